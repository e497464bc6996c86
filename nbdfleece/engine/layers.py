"""Changes that are recorded in the images behind a disk's image.

A disk whose image is an overlay has what changed before the overlay was made in bitmaps of the
backing files. libvirt's rule says when they can be had: from the top image down a bitmap of
that name, in one granularity, recording and consistent, in each image that is to be counted;
below the first that has none, none may have one. The changes are all of them together.

In each image the name is a checkpoint's, if the image has a chain with it, and then stands for
all links from there on; otherwise it is a bitmap's, which has recorded from the checkpoint on.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from ..bitmaps.bitmap import Bitmap
from ..block.node import BlockNode
from ..errors import StateError
from ..qcow2.bitmap_store import BitmapStore
from ..qcow2.image import Qcow2Image
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


async def load_layers(top: BlockNode) -> Sequence[Layer]:
    """The images behind the top one that can hold bitmaps, from above; once for an open image.

    Raises:
        OSError: One could not be read.
        StateError: The record of a chain cannot be understood.
    """
    found = []
    node = top.backing if isinstance(top, Qcow2Image) else None
    while isinstance(node, Qcow2Image):
        store = await BitmapStore.load(node)
        found.append(Layer(node.path, store, stored_state(store)))
        node = node.backing
    return found


async def changes_below(
    layers: Sequence[Layer], name: str, last: str | None, granularity: int
) -> list[Bitmap]:
    """What the images behind the top one tell of the changes since a checkpoint.

    Args:
        layers: Those images, from above; the top one itself knows the changes.
        name: The checkpoint.
        last: The checkpoint up to which; None for all. An image that does not know it gives all.
        granularity: Of the top image's bitmap, in bytes.

    Returns:
        Bitmaps of the size of their images.

    Raises:
        StateError: The changes are not known; the text says in which image.
    """
    found: list[Bitmap] = []
    gap: str | None = None
    for layer in layers:
        if not layer.has(name):
            gap = gap or layer.path
        elif gap is not None:
            raise StateError(
                f"the changes since checkpoint '{name}' are not known: '{gap}' has no bitmap of"
                f" that name, though '{layer.path}' behind it has"
            )
        else:
            found += await _changes(layer, name, last, granularity)
    return found


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
