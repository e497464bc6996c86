"""Changes since a checkpoint as images hold them, with those recorded in the images behind.

A disk whose image is an overlay has what changed before the overlay was made in bitmaps of the
backing files. libvirt's rule says when they can be had: from the top image down a bitmap of
that name, in one granularity, recording and consistent, in each image that is to be counted;
below the first that has none, none may have one. The changes are all of them together.

In each image the name is a checkpoint's, if the image has a chain with it, and then stands for
all links from there on; otherwise it is a bitmap's, which has recorded from the checkpoint on.
"""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from typing import NamedTuple

from ..bitmaps.bitmap import Bitmap
from ..block.node import BlockNode
from ..errors import StateError
from ..qcow2.bitmap_store import BitmapStore
from ..qcow2.image import Qcow2Image
from .chain import Chain
from .disk_state import DiskState
from .stored_state import stored_state


class Layer(NamedTuple):
    """An image behind another one."""

    path: str
    store: BitmapStore
    state: DiskState

    def has(self, name: str) -> bool:
        """Whether it has a checkpoint or a bitmap of a name."""
        return self.state.chain.find(name) is not None or name in self.state.bitmaps


class LayersBelow:
    """The images behind an open one.

    Args:
        top: That image, or another node, which has none.
    """

    def __init__(self, top: BlockNode) -> None:
        self._top = top
        self._found: list[Layer] | None = None
        self._loading = asyncio.Lock()

    async def load(self) -> Sequence[Layer]:
        """Those that can hold bitmaps, from above; they are read once, when first asked for.

        Read again, their bitmaps would be taken for damaged: for lying in clusters that are in use.

        Raises:
            OSError: One could not be read.
            StateError: The record of a chain cannot be understood.
        """
        async with self._loading:
            if self._found is None:
                self._found = await self._load()
        return self._found

    async def _load(self) -> list[Layer]:
        found = []
        node = self._top.backing if isinstance(self._top, Qcow2Image) else None
        while isinstance(node, Qcow2Image):
            store = await BitmapStore.load(node)
            found.append(Layer(node.path, store, stored_state(store)))
            node = node.backing
        return found


def check_own(path: str, chain: Chain, layers: Sequence[Layer], name: str) -> None:
    """Refuse a checkpoint that only images behind the top one have.

    Args:
        path: The top image.
        chain: Its chain.
        layers: The images behind it.
        name: The checkpoint.

    Raises:
        StateError: It is one.
    """
    if chain.find(name) is None and any(layer.has(name) for layer in layers):
        raise StateError(
            f"the changes since checkpoint '{name}' are not known: '{path}' has no such"
            " checkpoint, though an image behind it has"
        )


async def stored_changes(
    path: str, below: LayersBelow, store: BitmapStore, state: DiskState, name: str
) -> Bitmap:
    """The changes from a checkpoint to now of an image that nobody writes, as one new bitmap.

    Args:
        path: The image.
        below: The images behind it.
        store: Its bitmaps.
        state: What it tells of them and of its chain.
        name: The checkpoint.

    Raises:
        StateError: There is no such checkpoint, or the changes since it are not known.
        OSError, ImageError: A bitmap could not be read.
    """
    if state.chain.change is not None:
        raise StateError(state.chain.change.describe(path))
    layers = await below.load()
    check_own(path, state.chain, layers, name)
    state.check_since(name)
    *older, newest = state.chain.checkpoints[state.chain.index(name) :]
    merged = await store.load_bits(newest.bitmap_name)
    for link in older:
        merged.merge(await store.load_bits(link.bitmap_name))
    await merge_below(merged, layers, name)
    return merged


async def merge_below(
    merged: Bitmap, layers: Sequence[Layer], name: str, last: str | None = None
) -> None:
    """Add to changes what the images behind the top one have recorded of them.

    Args:
        merged: What the top image itself knows of the changes since the checkpoint.
        layers: The images behind it, from above.
        name: The checkpoint.
        last: The checkpoint up to which; None for all. An image that does not know it gives all.

    Raises:
        StateError: The changes are not known; the text says in which image.
    """
    gap: str | None = None
    for layer in layers:
        if reason := layer.store.damage_of(name):
            raise StateError(
                f"the changes since checkpoint '{name}' are not known: {layer.path}: bitmap"
                f" '{name}' is damaged: {reason}"
            )
        if not layer.has(name):
            gap = gap or layer.path
        elif gap is not None:
            raise StateError(
                f"the changes since checkpoint '{name}' are not known: '{gap}' has no bitmap of"
                f" that name, though '{layer.path}' behind it has"
            )
        else:
            for bits in await _changes(layer, name, last, merged.granularity):
                merged.merge(bits if bits.size == merged.size else bits.resized(merged.size))


async def _changes(layer: Layer, name: str, last: str | None, granularity: int) -> list[Bitmap]:
    """The bits of one image, of which there may be several bitmaps.

    Raises:
        StateError: They cannot be believed.
    """
    state = layer.state
    links = [name]
    if state.chain.find(name) is not None:
        end = None if last is None or not state.chain.find(last) else state.chain.index(last)
        checkpoints = state.chain.checkpoints[state.chain.index(name) : end]
        problem = next(filter(None, map(state.problem, checkpoints)), None)
        links = [each.bitmap_name for each in checkpoints]
    elif state.bitmaps[name].inconsistent:
        problem = f"bitmap '{name}' is inconsistent: the image was not closed properly"
    elif not state.bitmaps[name].recording:
        problem = f"bitmap '{name}' was disabled and has missed changes"
    else:
        problem = None
    if problem is None and any(state.bitmaps[each].granularity != granularity for each in links):
        problem = f"bitmap '{name}' is not of granularity {granularity}"
    if problem is not None:
        raise StateError(
            f"the changes since checkpoint '{name}' are not known: {layer.path}: {problem}"
        )
    return [await layer.store.load_bits(each) for each in links]
