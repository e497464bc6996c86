"""The view of one snapshot of one disk: a fleece."""

from __future__ import annotations

from ..bitmaps.bitmap import Bitmap
from ..extents import Extents
from .copy_before_write import CopyBeforeWrite
from .host_file import Places
from .layer import Layer
from .node import BlockNode
from .shared_fleece import Geometry, Share


class SnapshotAccess(BlockNode):
    """Reads what the disk was at the instant of the snapshot.

    Writing is refused, but :meth:`trim` means "I am done with this range": it frees the
    copies and ends their protection; reading the range is refused from then on, as in
    QEMU's snapshot-access.

    Args:
        copies: The disk's copy-before-write.
        layer: The snapshot.
        size: Bytes of the disk when the snapshot was taken.
        preferred_block_size: The disk's.
        release_after_read: Release each range once it has been read.
    """

    read_only = True

    def __init__(
        self,
        copies: CopyBeforeWrite,
        layer: Layer,
        size: int,
        preferred_block_size: int,
        *,
        release_after_read: bool = False,
    ) -> None:
        self._copies = copies
        self._layer = layer
        self._release_after_read = release_after_read
        self.size = size
        self.preferred_block_size = preferred_block_size

    @property
    def error(self) -> str | None:
        """Why the snapshot is broken; None while it is good."""
        return self._layer.error

    async def read_into(self, offset: int, view: memoryview) -> None:
        """Fill ``view`` with the bytes as they were."""
        await self._copies.read_into(self._layer, offset, view)
        if self._release_after_read:
            await self._copies.release(self._layer, offset, len(view))

    def read_at_once(self, offset: int, view: memoryview) -> bool:
        """Fill ``view`` with the bytes as they were, if these are at hand.

        Not if they are to be released then, which only :meth:`read_into` does.
        """
        return not self._release_after_read and self._copies.read_at_once(self._layer, offset, view)

    async def block_status(
        self, offset: int, length: int, *, extents_max: int = 1 << 20
    ) -> Extents:
        """Describe the range as it was."""
        return await self._copies.block_status(self._layer, offset, length, extents_max)

    async def share(self) -> Share | None:
        """What another process needs to read the snapshot, as it is in this one.

        Its descriptors are for immediate use: who goes on waiting may find them closed. None if
        the snapshot is of a part of the disk only, or others cannot read what it is of.

        Raises:
            SnapshotError: The snapshot is broken or gone.
            OSError: There is no memory for it.
        """
        file = self._copies.source.host_file()
        if file is None or self._release_after_read or self._layer.access is not None:
            return None
        scratch, codes = await self._copies.share(self._layer)
        granule_bits = self._copies.granularity.bit_length() - 1
        geometry = Geometry(
            self.size, self.preferred_block_size, granule_bits, file.cluster_bits, file.map_bits
        )
        return Share(geometry, file.descriptor, scratch.fileno(), codes.fileno(), file.below)

    async def locate(self, part: int) -> Places:
        """The places of the clusters of a part of the disk, for who has a :meth:`share`."""
        return await self._copies.source.locate(part)

    async def limit(self, access: Bitmap) -> None:
        """Keep only what a bitmap marks; reading the rest is refused from now on."""
        self._layer.check()
        await self._copies.limit(self._layer, access)

    async def trim(self, offset: int, length: int) -> None:
        """Release the whole access granules inside the range."""
        self._layer.check()
        await self._copies.release(self._layer, offset, length)

    async def close(self) -> None:
        """Drop the snapshot."""
        if not self._layer.is_removed:
            await self._copies.remove_layer(self._layer)
