"""A snapshot that stood for long, shared with other processes while the guest goes on writing."""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest

from nbdfleece.block.copy_before_write import PAGES_AT_ONCE, CopyBeforeWrite
from nbdfleece.block.granule_map import PAGE_GRANULES
from nbdfleece.block.guest import GuestNode
from nbdfleece.block.shared_codes import SharedCodes
from nbdfleece.errors import SnapshotError
from nbdfleece.testing.memory_node import MemoryNode

GRANULE = 512
PAGE_BYTES = PAGE_GRANULES * GRANULE
OLD_PAGES = 4 * PAGES_AT_ONCE
PAGES = 3 * OLD_PAGES


class Setup:
    """A disk whose guest touches one page of codes after the other."""

    def __init__(self, directory: Path) -> None:
        disk = MemoryNode(PAGES * PAGE_BYTES)
        self.copies = CopyBeforeWrite(disk, directory, granularity=GRANULE)
        self.guest = GuestNode(disk, self.copies)
        self.touched = 0

    async def touch(self, pages: int = 1) -> None:
        for _ in range(pages):
            await self.guest.write(self.touched * PAGE_BYTES, memoryview(b"new"))
            self.touched += 1


def codes(shared: SharedCodes) -> list[int]:
    return shared._codes.tolist()


async def test_others_have_their_turn_and_need_not_be_idle(tmp_path: Path) -> None:
    """Rule 5: new pages, one in each turn of the loop, do not draw it out."""
    setup = Setup(tmp_path)
    layer = setup.copies.add_layer()
    await setup.touch(OLD_PAGES)
    sharing = asyncio.create_task(setup.copies.share(layer))
    turns = 0
    while not sharing.done():
        await setup.touch()
        turns += 1
        await asyncio.sleep(0)
    _, shared = await sharing
    assert OLD_PAGES / PAGES_AT_ONCE <= turns < OLD_PAGES / 8
    assert codes(shared) == layer.map.codes(0, PAGES * PAGE_GRANULES).tolist()
    await setup.copies.remove_layer(layer)


async def test_codes_that_move_meanwhile_are_told(tmp_path: Path) -> None:
    """Those of a newer snapshot that is deleted go to an older one."""
    setup = Setup(tmp_path)
    layers = []
    for _ in range(4):
        layers.append(setup.copies.add_layer())
        await setup.touch(OLD_PAGES // 4)
    sharing = asyncio.create_task(setup.copies.share(layers[1]))
    expected = setup.copies._layers.resolve(layers[1], 0, PAGES * PAGE_GRANULES).tolist()
    await asyncio.sleep(0)
    removing = [layers[0], layers[3], layers[2]]
    removed = asyncio.gather(*map(setup.copies.remove_layer, removing))
    await asyncio.sleep(0)
    assert not sharing.done()
    assert all(layer.is_removed for layer in removing)
    _, shared = await sharing
    await removed
    assert codes(shared) == expected
    await setup.copies.remove_layer(layers[1])


async def test_snapshot_that_is_deleted_meanwhile_is_not_shared(tmp_path: Path) -> None:
    setup = Setup(tmp_path)
    layer = setup.copies.add_layer()
    await setup.touch(OLD_PAGES)
    sharing = asyncio.create_task(setup.copies.share(layer))
    await asyncio.sleep(0)
    await setup.copies.remove_layer(layer)
    with pytest.raises(SnapshotError, match="dropped"):
        await sharing
