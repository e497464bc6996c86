"""Nodes with bitmaps that no guest writes through: nothing records, and nothing is stored."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Iterable
from pathlib import Path
from typing import Self

from ..bitmaps.bitmap import Bitmap
from ..block.file import FileNode
from ..errors import ImageLockedError, StateError
from ..qcow2.bitmap_store import BitmapStore
from ..qcow2.image import Qcow2Image
from .chain import Chain
from .disk import Disk
from .disk_state import DiskState
from .layers import LayersBelow, stored_changes
from .stored_state import stored_state


class StillNode:
    """What such nodes have in common.

    Attributes:
        name: The node's name.
        size: Bytes.
        default_granularity: Bytes per bit of a new bitmap.
        state: Its bitmaps; replaced whole.
        busy: How often each bitmap is used by something that it must not change under.
    """

    can_persist = False

    def __init__(self, name: str, size: int, default_granularity: int) -> None:
        self.name = name
        self.size = size
        self.default_granularity = default_granularity
        self.state = DiskState({}, Chain())
        self.busy: Counter[str] = Counter()

    async def bits(self, name: str) -> Bitmap:
        """The bits of a bitmap."""
        bits = self.state.bitmaps[name].bits
        assert bits is not None, "transient bitmaps are in memory"
        return bits

    async def drain(self) -> None:
        """Nobody writes to it."""

    def resume(self) -> None:
        """Likewise."""

    def stage(self, state: DiskState) -> None:
        """Nothing records."""

    def unstage(self) -> None:
        """Likewise."""

    async def store(self, state: DiskState) -> None:
        """Refuse.

        Raises:
            StateError: Always: what is persistent cannot be changed here.
        """
        raise StateError(f"node '{self.name}' is read-only")

    def install(self, state: DiskState) -> None:
        """Put a state in its place."""
        self.state = state


class ScratchImage(StillNode):
    """The bitmaps of a scratch image over a disk: transient, and marked by nobody.

    What the image shows changes only when its guest's does, and from a backup's instant on
    not at all.

    Args:
        name: The node's name.
        disk: What the image is over.
    """

    GRANULARITY = 65536
    """Bytes per bit of its bitmaps: what QEMU takes for clusters of the usual size."""

    def __init__(self, name: str, disk: Disk) -> None:
        super().__init__(name, disk.size, self.GRANULARITY)


class ReadOnlyImage(StillNode):
    """The bitmaps of an image that is only read. Made by :meth:`open`.

    Attributes:
        image: The image; closed with :meth:`close`.
    """

    def __init__(self, name: str, image: Qcow2Image, store: BitmapStore) -> None:
        super().__init__(name, image.size, min(max(image.cluster_size, 4096), 65536))
        self.image = image
        self._store = store
        self._below = LayersBelow(image)
        self.state = stored_state(store)

    @classmethod
    async def open(cls, name: str, path: Path, disks: Iterable[Disk]) -> Self:
        """Open an image and find its bitmaps.

        Args:
            name: What to call the node.
            path: The image.
            disks: What this server writes, for the message.

        Raises:
            OSError, ImageError: It cannot be opened.
            StateError: Its chain's record cannot be understood.
        """
        try:
            image = await Qcow2Image.open(path, read_only=True)
        except ImageLockedError as error:
            raise ImageLockedError(error.path, _advice(error.path, disks)) from error
        try:
            return cls(name, image, await BitmapStore.load(image))
        except BaseException:
            await image.close()
            raise

    def check_undamaged(self, name: str) -> None:
        """Refuse a bitmap that is not there because of damage.

        Raises:
            StateError: It is one.
        """
        if reason := self._store.damage_of(name):
            raise StateError(f"Bitmap '{name}' is damaged: {reason}")

    async def bits(self, name: str) -> Bitmap:
        """The bits of a bitmap, read from the image if they are not in memory."""
        return self.state.bitmaps[name].bits or await self._store.load_bits(name)

    async def changes_since(self, checkpoint: str) -> Bitmap:
        """What has changed since a checkpoint; errors as of :func:`stored_changes`."""
        self.check_undamaged(checkpoint)  # a damaged directory may have taken the chain with it
        return await stored_changes(
            self.image.path, self._below, self._store, self.state, checkpoint
        )


def _advice(path: str, disks: Iterable[Disk]) -> str:
    """Who writes a file, and what to do about it."""
    found = os.stat(path)
    for disk in disks:
        file = disk.image if isinstance(disk.image, FileNode) else disk.image.file
        if file.identity == (found.st_dev, found.st_ino):
            return (
                f"being written by this server itself, as disk '{disk.name}': serve it as one of"
                " the two only, or export a snapshot of the disk"
            )
    return "being written by another program: stop it before serving the image"
