"""A range is read from wherever its granules lie."""

from __future__ import annotations

import contextlib
import errno
import random
from pathlib import Path

import pytest

from nbdfleece.block.granule_codes import COPIED, FORGOTTEN, UNTOUCHED, ZERO_DATA
from nbdfleece.block.granule_reads import read_granules, read_granules_at_once
from nbdfleece.block.scratch import Scratch
from nbdfleece.testing.memory_node import MemoryNode

GRANULE = 512
SHIFT = 9
COUNT = 40


async def some_codes(scratch: Scratch, chance: random.Random) -> tuple[list[int], bytearray]:
    """Codes of all granules, and what the displaced ones read as."""
    shown = bytearray(chance.randbytes(COUNT * GRANULE))
    codes: list[int] = []
    untouched_share = chance.random()
    while len(codes) < COUNT:
        count = chance.randint(1, min(5, COUNT - len(codes)))
        begin, end = len(codes) * GRANULE, (len(codes) + count) * GRANULE
        if chance.random() < untouched_share:
            codes += [UNTOUCHED] * count
        elif chance.random() < 0.3:
            codes += [ZERO_DATA] * count
            shown[begin:end] = bytes(end - begin)
        else:
            place = scratch.allocate(count)
            await scratch.write(place, memoryview(shown)[begin:end])
            codes += [COPIED + place + index for index in range(count)]
    return codes, shown


@pytest.mark.parametrize("seed", range(20))
async def test_any_range_of_any_granules_is_what_was_put_there(tmp_path: Path, seed: int) -> None:
    """Also where the base cannot be read at places that are displaced."""
    chance = random.Random(seed)
    scratch = Scratch(tmp_path, GRANULE)
    codes, shown = await some_codes(scratch, chance)
    base = MemoryNode(COUNT * GRANULE)
    for granule, code in enumerate(codes):
        begin = granule * GRANULE
        base.content[begin : begin + GRANULE] = (
            shown[begin : begin + GRANULE] if code == UNTOUCHED else b"!" * GRANULE
        )

    def fail(operation: str, offset: int) -> None:
        if codes[offset // GRANULE] != UNTOUCHED:
            raise OSError(errno.EIO, "bad sector")

    if chance.random() < 0.5:
        base.fail = fail
    is_at_hand = chance.random() < 0.8
    base.is_at_hand = lambda: is_at_hand
    for _ in range(50):
        offset = chance.randrange(COUNT * GRANULE)
        length = chance.randint(1, COUNT * GRANULE - offset)
        first, end = offset // GRANULE, (offset + length - 1) // GRANULE + 1

        view = memoryview(bytearray(b"?" * length))
        await read_granules(base, scratch, codes[first:end], SHIFT, offset, view)
        assert view == shown[offset : offset + length]

        again = memoryview(bytearray(b"?" * length))
        with contextlib.suppress(OSError):
            if read_granules_at_once(base, scratch, codes[first:end], SHIFT, offset, again):
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
