"""A range is read from wherever its granules lie."""

from __future__ import annotations

import contextlib
import errno
import random
from collections.abc import Sequence
from pathlib import Path

import pytest

from nbdfleece.block import scratch as scratch_module
from nbdfleece.block.file import FileNode
from nbdfleece.block.granule_codes import (
    COPIED,
    FORGOTTEN,
    UNALLOCATED,
    UNTOUCHED,
    ZERO_DATA,
    ZERO_HOLE,
)
from nbdfleece.block.granule_reads import read_granules, read_granules_at_once
from nbdfleece.block.scratch import Scratch
from nbdfleece.testing.memory_node import MemoryNode

GRANULE = 512
SHIFT = 9
COUNT = 40
ZEROES = ZERO_DATA, ZERO_HOLE, UNALLOCATED


class ColdFile(FileNode):
    """A scratch's file whose bytes are sometimes not at hand, or some of them only."""

    chance = random.Random(0)

    def read_pieces_at_once(self, pieces: Sequence[tuple[int, memoryview]]) -> bool:
        if self.chance.random() < 0.5:
            return super().read_pieces_at_once(pieces)
        assert super().read_pieces_at_once(pieces[: self.chance.randint(0, len(pieces))])
        for _, view in pieces[-1:]:
            view[:] = b"?" * len(view)
        return False


class BadBase(MemoryNode):
    """A disk that is bad where it is displaced, and has something else there."""

    def __init__(self, content: bytes, codes: list[int], shift: int) -> None:
        super().__init__(content)
        self._codes = codes
        self._shift = shift
        self.is_bad = False
        for number, code in enumerate(codes):
            if code != UNTOUCHED:
                begin, end = number << shift, min(number + 1 << shift, self.size)
                self.content[begin:end] = b"!" * (end - begin)

    def _check(self, offset: int, length: int) -> None:
        end = (offset + length - 1 >> self._shift) + 1
        if self.is_bad and any(self._codes[offset >> self._shift : end]):
            raise OSError(errno.EIO, "bad sector")

    async def read_into(self, offset: int, view: memoryview) -> None:
        self._check(offset, len(view))
        await super().read_into(offset, view)

    def read_at_once(self, offset: int, view: memoryview) -> bool:
        self._check(offset, len(view))
        return super().read_at_once(offset, view)


async def some_codes(
    scratch: Scratch, chance: random.Random, size: int, shift: int
) -> tuple[list[int], bytearray]:
    """Codes of all granules of a disk, and what it reads as.

    Copies that follow one another on the disk do so in the scratch, or lie anywhere in it, and
    there are some that follow one another only there.
    """
    shown = bytearray(chance.randbytes(size))
    codes: list[int] = []
    copied: list[range] = []
    untouched_share = chance.random()
    count = (size - 1 >> shift) + 1
    while len(codes) < count:
        part = range(len(codes), min(count, len(codes) + chance.randint(1, 5)))
        code = UNTOUCHED if chance.random() < untouched_share else chance.choice([*ZEROES, COPIED])
        codes += [code] * len(part)
        if code == COPIED:
            copied.append(part)
        elif code != UNTOUCHED:
            begin, end = part.start << shift, min(part.stop << shift, size)
            shown[begin:end] = bytes(end - begin)
    if chance.random() < 0.7:
        chance.shuffle(copied)
    for part in copied:
        scratch.allocate(chance.choice([0, 0, 1]))
        place = scratch.allocate(len(part))
        data = shown[part.start << shift : part.stop << shift].ljust(len(part) << shift, b"~")
        await scratch.write(place, memoryview(data))
        codes[part.start : part.stop] = range(COPIED + place, COPIED + place + len(part))
    return codes, shown


@pytest.mark.parametrize("seed", range(60))
async def test_any_range_of_any_granules_is_what_was_put_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, seed: int
) -> None:
    """Also where the base cannot be read at places that are displaced, and the scratch is cold."""
    chance = random.Random(seed)
    shift = chance.choice([9, 12, 16])
    size = (COUNT << shift) - chance.choice([0, 1, 511, 512])
    monkeypatch.setattr(ColdFile, "chance", chance)
    monkeypatch.setattr(scratch_module, "FileNode", chance.choice([ColdFile, FileNode]))
    scratch = Scratch(tmp_path, 1 << shift)
    codes, shown = await some_codes(scratch, chance, size, shift)
    base = BadBase(bytes(shown), codes, shift)
    base.is_at_hand = lambda: chance.random() < 0.8
    for _ in range(50):
        offset = chance.randrange(size)
        length = chance.randint(1, min(size - offset, chance.choice([600, 5 << shift, size])))
        first, end = offset >> shift, (offset + length - 1 >> shift) + 1
        base.is_bad = chance.random() < 0.3

        view = memoryview(bytearray(b"?" * length))
        await read_granules(base, scratch, codes[first:end], shift, offset, view)
        assert view == shown[offset : offset + length]

        again = memoryview(bytearray(b"?" * length))
        with contextlib.suppress(OSError):
            if read_granules_at_once(base, scratch, codes[first:end], shift, offset, again):
                assert again == view
    await scratch.close()


async def test_range_that_lies_mostly_in_the_base_is_read_at_once(tmp_path: Path) -> None:
    scratch = Scratch(tmp_path, GRANULE)
    copy = COPIED + scratch.append(memoryview(b"c" * GRANULE))
    base = MemoryNode(b"b" * (8 * GRANULE))
    base.is_at_hand = lambda: True
    view = memoryview(bytearray(2 * GRANULE))
    for codes, expected in (
        ([UNTOUCHED, UNTOUCHED], b"b" * (2 * GRANULE)),
        ([UNTOUCHED, copy], b"b" * GRANULE + b"c" * GRANULE),
        ([ZERO_DATA, UNTOUCHED], bytes(GRANULE) + b"b" * GRANULE),
    ):
        assert read_granules_at_once(base, scratch, codes, SHIFT, GRANULE, view)
        assert view == expected
    assert not read_granules_at_once(base, scratch, [copy, ZERO_DATA], SHIFT, GRANULE, view)
    base.is_at_hand = lambda: False
    assert not read_granules_at_once(base, scratch, [UNTOUCHED, copy], SHIFT, GRANULE, view)
    await scratch.close()


async def test_forgotten_granule_returns_eacces(tmp_path: Path) -> None:
    """What nobody kept is never shown as if it were the snapshot's (rule 1)."""
    scratch = Scratch(tmp_path, GRANULE)
    base = MemoryNode(4 * GRANULE)
    with pytest.raises(OSError, match="released") as caught:
        await read_granules(
            base, scratch, [UNTOUCHED, FORGOTTEN], SHIFT, 0, memoryview(bytearray(2 * GRANULE))
        )
    assert caught.value.errno == errno.EACCES
    base.is_at_hand = lambda: True
    assert not read_granules_at_once(
        base, scratch, [UNTOUCHED, FORGOTTEN], SHIFT, 0, memoryview(bytearray(2 * GRANULE))
    )
    await scratch.close()


async def test_bad_sector_of_the_base_is_an_error(tmp_path: Path) -> None:
    """A granule that lies in the base is not skipped because reading in one piece failed."""
    scratch = Scratch(tmp_path, GRANULE)
    base = MemoryNode(4 * GRANULE)

    def fail(operation: str, offset: int) -> None:
        raise OSError(errno.EIO, "bad sector")

    base.fail = fail
    with pytest.raises(OSError, match="bad sector"):
        await read_granules(
            base, scratch, [ZERO_DATA, UNTOUCHED], SHIFT, 0, memoryview(bytearray(2 * GRANULE))
        )
    await scratch.close()
