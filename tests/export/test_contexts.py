"""Dirty bitmaps are described alike however a client asks for them."""

from __future__ import annotations

import random

import numpy as np

from nbdfleece.bitmaps.bitmap import Bitmap
from nbdfleece.export.contexts import DirtyBitmap
from nbdfleece.extents import Extents

SIZE = (5 << 30) + 12345
STEP = 1 << 30


def fragmented() -> Bitmap:
    bitmap = Bitmap(SIZE, 65536)
    bitmap.array()[:] = np.random.default_rng(1).integers(0, 256, len(bitmap.array()), np.uint8)
    bitmap.clear_range(SIZE - 1, 1)
    bitmap.clear_range(2 * STEP, STEP)
    return bitmap


async def piece(context: DirtyBitmap, offset: int, extents_max: int) -> Extents:
    length = min(STEP, SIZE - offset)
    return await context.extents(offset, length, extents_max=extents_max)


async def test_whole_map_in_pieces_is_the_bitmap() -> None:
    """In order, as clients ask: what was found ahead is what would have been found."""
    bitmap = fragmented()
    for extents_max in (5000, 1 << 20):
        context = DirtyBitmap("b", bitmap)
        found: list[Extents] = []
        offset = 0
        while offset < SIZE:
            found.append(await piece(context, offset, extents_max))
            offset += found[-1].total()
        assert Extents.concatenate(found).pairs() == bitmap.extents(0, SIZE).pairs()


async def test_pieces_in_any_order_are_the_bitmap() -> None:
    """Several clients: what was found ahead for one is not taken for another's."""
    bitmap = fragmented()
    context = DirtyBitmap("b", bitmap)
    chance = random.Random(1)
    for _ in range(60):
        offset = chance.choice([0, STEP, 2 * STEP, 3 * STEP, 65536 * chance.randrange(70_000)])
        extents_max = chance.choice([1, 5000, 1 << 20])
        found = await piece(context, offset, extents_max)
        length = min(STEP, SIZE - offset)
        assert found.pairs() == bitmap.extents(offset, length, extents_max=extents_max).pairs()
