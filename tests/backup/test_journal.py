from __future__ import annotations

from datetime import UTC, datetime
from pathlib import Path

import pytest

from nbdfleece.backup.errors import BackupError
from nbdfleece.backup.journal import DiskHead, DoneBlock, Head, Journal


@pytest.fixture
def head() -> Head:
    disk = DiskHead(
        name="vda",
        size=1 << 20,
        kind="incremental",
        parent="monday",
        bitmap="qemu:dirty-bitmap:monday",
        extents_blake2b="ab",
        identity=None,
    )
    return Head(
        point="tuesday",
        checkpoint=None,
        checkpoint_created=None,
        started=datetime(2026, 11, 23, tzinfo=UTC),
        disks=[disk],
    )


def blocks(count: int) -> list[DoneBlock]:
    return [DoneBlock(0, number, "cd" * 32, [(4096, 1)], 4096) for number in range(count)]


def test_journal_opened_again_has_what_was_appended(tmp_path: Path, head: Head) -> None:
    journal = Journal.create(tmp_path / "j", head)
    journal.append(blocks(2))
    journal.append(blocks(3)[2:])
    journal.close()
    again = Journal.open(tmp_path / "j")
    assert (again.head, again.done) == (head, blocks(3))
    again.close()


def test_journal_cut_anywhere_has_all_whole_blocks_and_can_be_gone_on_with(
    tmp_path: Path, head: Head
) -> None:
    path = tmp_path / "j"
    journal = Journal.create(path, head)
    head_bytes = path.stat().st_size
    journal.append(blocks(3))
    journal.close()
    whole = path.read_bytes()
    line_bytes = (len(whole) - head_bytes) // 3
    for length in range(head_bytes, len(whole) + 1):
        path.write_bytes(whole[:length])
        count = (length - head_bytes) // line_bytes
        cut = Journal.open(path)
        assert cut.done == blocks(count)
        cut.append(blocks(3)[count:])
        cut.close()
        assert path.read_bytes() == whole


def test_journal_damaged_anywhere_is_refused_or_has_fewer_blocks(
    tmp_path: Path, head: Head
) -> None:
    path = tmp_path / "j"
    journal = Journal.create(path, head)
    journal.append(blocks(2))
    journal.close()
    whole = path.read_bytes()
    for position in range(len(whole)):
        damaged = bytearray(whole)
        damaged[position] ^= 0x55
        path.write_bytes(damaged)
        try:
            cut = Journal.open(path)
        except BackupError:
            continue
        assert cut.head == head
        assert cut.done in ([], blocks(1))
        cut.close()


@pytest.mark.parametrize("content", [b"", b"\n", b"00000000 {}\n", b"x" * 100])
def test_what_is_no_journal_is_refused(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "j").write_bytes(content)
    with pytest.raises(BackupError, match="no journal"):
        Journal.open(tmp_path / "j")
