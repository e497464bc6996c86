"""What may be sent without a copy: bytes that nobody can overwrite, and that are in memory."""

from __future__ import annotations

import asyncio
import errno
import os
import tempfile
import threading
from pathlib import Path

import pytest

from nbdfleece.block import stable as stable_module
from nbdfleece.block.file import FileNode
from nbdfleece.block.raw import RawNode
from nbdfleece.block.stable import Fetcher, StableFile, StablePlace, bring_to_hand
from nbdfleece.errors import ImageLockedError
from nbdfleece.qcow2.create import create_image
from nbdfleece.qcow2.image import Qcow2Image

MIB = 1 << 20
CLUSTER = 65536


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "disk"
    path.write_bytes(os.urandom(MIB))
    return path


async def test_file_open_for_writing_is_not_stable(file: Path) -> None:
    """Rule 1: what the guest may overwrite is never sent from where it lies."""
    node = FileNode.open(file, read_only=False)
    assert node.stable_places(0, MIB) is None
    await node.close()


@pytest.mark.parametrize("options", [{"force_share": True}, {"locking": False}])
async def test_file_that_others_may_write_is_not_stable(
    file: Path, options: dict[str, bool]
) -> None:
    """Rule 1: nor what another program may overwrite."""
    node = FileNode.open(file, read_only=True, **options)
    assert node.stable_places(0, MIB) is None
    await node.close()


async def test_stable_place_has_the_bytes(file: Path) -> None:
    node = FileNode.open(file, read_only=True)
    await node.read(0, MIB)
    (place,) = node.stable_places(5000, 70000) or []
    assert os.pread(place.file.fd, 70000, place.offset) == file.read_bytes()[5000:75000]
    await node.close()


async def test_stable_place_past_the_end_of_the_file_is_none(file: Path) -> None:
    node = FileNode.open(file, read_only=True)
    assert node.stable_places(MIB - 10, 11) is None
    await node.close()


async def test_writers_are_kept_out_while_a_reply_refers_to_the_closed_file(file: Path) -> None:
    """Rule 1: QEMU's locks go with the last reply that is queued, not with the node."""
    node = FileNode.open(file, read_only=True)
    places = node.stable_places(0, MIB)
    await node.close()
    with pytest.raises(ImageLockedError):
        FileNode.open(file, read_only=False)
    assert places
    del places
    await FileNode.open(file, read_only=False).close()


async def test_cold_bytes_are_not_at_hand() -> None:
    """Rule 5: sending them would make everybody wait for the disk."""
    with tempfile.TemporaryDirectory(dir="/var/tmp") as folder:  # /tmp may be memory
        path = Path(folder) / "cold"
        path.write_bytes(os.urandom(MIB))
        node = FileNode.open(path, read_only=True)
        os.fsync(node.fileno())
        places = node.stable_places(0, MIB)
        assert places
        for _ in range(1000):  # a page that the kernel is busy with stays the first time
            os.posix_fadvise(node.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
            if not places[0].is_at_hand:
                break
        assert not places[0].is_at_hand
        assert await bring_to_hand(places)
        assert places[0].is_at_hand
        await node.close()


async def test_window_is_stable_where_the_file_is(file: Path) -> None:
    node = RawNode(FileNode.open(file, read_only=True), 4096, CLUSTER)
    (place,) = node.stable_places(100, 1000) or []
    assert (place.offset, place.length) == (4196, 1000)
    await node.close()


async def make_image(path: Path, *, clusters: list[int]) -> bytes:
    """An image of 1 MiB with data in some clusters, allocated in this order; its content."""
    await create_image(path, MIB)
    image = await Qcow2Image.open(path, read_only=False)
    content = bytearray(MIB)
    for index in clusters:
        data = os.urandom(CLUSTER)
        content[index * CLUSTER : (index + 1) * CLUSTER] = data
        await image.write(index * CLUSTER, memoryview(data))
    assert image.stable_places(clusters[0] * CLUSTER, CLUSTER) is None, "rule 1"
    await image.close()
    return bytes(content)


def stable_bytes(places: list[StablePlace]) -> bytes:
    return b"".join(os.pread(place.file.fd, place.length, place.offset) for place in places)


async def test_adjacent_clusters_of_an_image_are_one_place(tmp_path: Path) -> None:
    content = await make_image(tmp_path / "i", clusters=[2, 3, 4, 9, 8])
    image = await Qcow2Image.open(tmp_path / "i", read_only=True)
    await image.read_into(0, memoryview(bytearray(MIB)))
    begin, length = 2 * CLUSTER + 17, 2 * CLUSTER
    places = image.stable_places(begin, length) or []
    assert len(places) == 1
    assert stable_bytes(places) == content[begin : begin + length]
    begin = 8 * CLUSTER + 17  # in the other order in the file
    places = image.stable_places(begin, CLUSTER) or []
    assert [place.length for place in places] == [CLUSTER - 17, 17]
    assert stable_bytes(places) == content[begin : begin + CLUSTER]
    assert image.stable_places(4 * CLUSTER, 2 * CLUSTER) is None, "half of it has no cluster"
    assert image.stable_places(0, CLUSTER) is None
    await image.close()


async def test_many_small_pieces_are_not_worth_a_system_call_each(tmp_path: Path) -> None:
    path = tmp_path / "i"
    await create_image(path, MIB, cluster_size=4096)
    image = await Qcow2Image.open(path, read_only=False)
    data = memoryview(os.urandom(MIB))
    for index in reversed(range(32)):
        await image.write(index * 4096, data[index * 4096 : (index + 1) * 4096])
    await image.write(MIB // 2, data[: MIB // 2])
    await image.close()
    image = await Qcow2Image.open(path, read_only=True)
    await image.read_into(0, memoryview(bytearray(MIB)))
    assert image.stable_places(0, 32 * 4096) is None
    assert len(image.stable_places(MIB // 2, MIB // 2) or []) == 1
    await image.close()


async def test_bytes_that_cannot_be_read_are_not_brought_to_hand(
    file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fd = os.open(file, os.O_RDONLY)
    stable = StableFile(fd, is_in_memory=False)
    os.close(fd)
    monkeypatch.setattr(StableFile, "is_at_hand", lambda *range_: False)
    assert not await bring_to_hand([StablePlace(stable, 0, MIB)]), "gone again at once"
    monkeypatch.setattr(stable_module, "fetch", fail)
    assert not await bring_to_hand([StablePlace(stable, 0, MIB)])


async def test_file_that_no_page_cache_keeps_is_soon_read_only_once(
    file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """ZFS and direct I/O have every byte cold for ever: to fetch it would be to read it twice."""
    monkeypatch.setattr(StableFile, "is_at_hand", lambda *range_: False)
    fetches: list[int] = []
    monkeypatch.setattr(stable_module, "fetch", lambda *range_: fetches.append(1))
    node = FileNode.open(file, read_only=True)
    places = node.stable_places(0, MIB)
    assert places
    for _ in range(100):
        assert not await bring_to_hand(places)
    assert 1 < len(fetches) < 10
    monkeypatch.setattr(StableFile, "is_at_hand", lambda *range_: True)
    assert await bring_to_hand(places), "what is in memory all the same is sent from there"
    await node.close()


async def test_file_that_memory_is_short_for_now_and_then_is_still_fetched(
    file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    is_cold, is_gone_again, is_kept = False, False, True
    answers = iter(([is_cold, is_gone_again] * 3 + [is_cold, is_kept]) * 10)
    monkeypatch.setattr(StableFile, "is_at_hand", lambda *range_: next(answers))
    node = FileNode.open(file, read_only=True)
    for number in range(40):
        places = node.stable_places(0, MIB)
        assert places
        assert await bring_to_hand(places) is (number % 4 == 3)
    await node.close()


async def test_file_that_a_thread_fetches_stays_open_when_the_node_is_closed(
    file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    begun, may_go_on = threading.Event(), threading.Event()
    seen: list[bool] = []

    def slow(fd: int, offset: int, length: int) -> None:
        begun.set()
        assert may_go_on.wait(60)
        seen.append(os.path.samestat(os.fstat(fd), file.stat()))

    monkeypatch.setattr(stable_module, "fetch", slow)
    monkeypatch.setattr(StableFile, "is_at_hand", lambda *range_: False)
    node = FileNode.open(file, read_only=True)
    fetching = asyncio.create_task(bring_to_hand(node.stable_places(0, MIB) or []))
    assert await asyncio.to_thread(begun.wait, 60)
    await node.close()
    fetching.cancel()  # its client has left
    await asyncio.sleep(0)
    assert not fetching.done()
    may_go_on.set()
    await asyncio.wait([fetching], timeout=60)
    assert fetching.cancelled()
    assert seen == [True]
    del fetching
    await FileNode.open(file, read_only=False).close()  # nobody has the locks any more


async def test_each_fetcher_has_an_open_file_of_its_own(
    file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The kernel follows one stream for each; those through one descriptor would disturb it."""
    positions: list[int] = []

    def fetch(fd: int, offset: int, length: int) -> None:
        positions.append(os.lseek(fd, 0, os.SEEK_CUR))
        os.lseek(fd, offset + length, os.SEEK_SET)

    monkeypatch.setattr(stable_module, "fetch", fetch)
    monkeypatch.setattr(StableFile, "is_at_hand", lambda *range_: False)
    monkeypatch.setattr(StableFile, "is_cached", True)
    node = FileNode.open(file, read_only=True)
    (place,) = node.stable_places(0, MIB) or []
    os.lseek(place.file.fd, 17, os.SEEK_SET)
    before = len(os.listdir("/proc/self/fd"))
    with Fetcher() as one, Fetcher() as other:
        for fetcher in (one, other, one, other):
            await fetcher.bring_to_hand([place])
        assert len(os.listdir("/proc/self/fd")) == before + 2
    assert positions == [0, 0, MIB, MIB]
    assert os.lseek(place.file.fd, 0, os.SEEK_CUR) == 17
    assert len(os.listdir("/proc/self/fd")) == before
    await node.close()


async def test_file_that_may_not_be_opened_again_is_fetched_all_the_same(
    file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its descriptor may come from a server with more rights, and /proc may be missing."""
    node = FileNode.open(file, read_only=True)
    (place,) = node.stable_places(0, MIB) or []
    may_open = os.open

    def refuse(path: str, *rest: int) -> int:
        if path.startswith("/proc"):
            raise PermissionError(errno.EACCES, "no")
        return may_open(path, *rest)

    answers = iter([False, True])
    monkeypatch.setattr(StableFile, "is_at_hand", lambda *range_: next(answers))
    monkeypatch.setattr(os, "open", refuse)
    assert await bring_to_hand([place])
    await node.close()


async def test_where_nothing_can_be_thrown_away_bytes_are_read(
    file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In a sandbox without /dev/null."""
    monkeypatch.setattr(os, "devnull", "/nonexistent")
    monkeypatch.setattr(StableFile, "is_at_hand", lambda *range_: False)
    node = FileNode.open(file, read_only=True)
    assert not await bring_to_hand(node.stable_places(0, MIB) or [])
    await node.close()


def fail(fd: int, offset: int, length: int) -> None:
    raise OSError(errno.EIO, "bad block")
