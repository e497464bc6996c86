"""A snapshot that another process than its keeper reads.

The keeper has the disk, its guest and its copies; what a reader needs to do without it most of
the time is a :class:`Share` of them. Everything else it asks the keeper (:class:`Keeper`):
where clusters lie, how ranges are allocated, and what it cannot read by itself.
"""

from __future__ import annotations

from typing import NamedTuple, Protocol

from ..extents import Extents
from .file import FileNode
from .granule_reads import read_granules, read_granules_at_once
from .host_file import Places
from .mapped_file import MappedFile
from .node import BlockNode
from .shared_codes import SharedCodesReader


class Geometry(NamedTuple):
    """Numbers of a snapshot of a disk.

    Attributes:
        size: Bytes of the disk.
        preferred_block_size: Bytes.
        granule_bits: Bits of an offset within a granule.
        cluster_bits: Bits of an offset within a cluster of the disk's file.
        map_bits: Bits of an offset within a part of the disk whose clusters are located together.
    """

    size: int
    preferred_block_size: int
    granule_bits: int
    cluster_bits: int
    map_bits: int


class Share(NamedTuple):
    """What a reader needs.

    Attributes:
        geometry: The numbers.
        file: Descriptor of the disk's file.
        scratch: Of the copies.
        codes: Of the :class:`~.shared_codes.SharedCodes`.
        below: What is below the disk's file (:class:`~.host_file.HostFile`), in the same process.
    """

    geometry: Geometry
    file: int
    scratch: int
    codes: int
    below: BlockNode | None


class Keeper(Protocol):
    """Who keeps a snapshot still; errors are those of the snapshot's own node."""

    async def locate(self, part: int) -> Places:
        """The places of the clusters of a part of the disk."""

    async def read_into(self, offset: int, view: memoryview) -> None:
        """Fill ``view`` with the snapshot's bytes from ``offset`` on."""

    async def block_status(self, offset: int, length: int, extents_max: int) -> Extents:
        """Describe a range of the snapshot."""


class SharedFleece(BlockNode):
    """The snapshot, to its reader.

    Args:
        share: Of the reader's process; what is in it is the node's, once there is one.
        keeper: Is asked for the rest.

    Raises:
        OSError: It cannot be used.
    """

    read_only = True

    def __init__(self, share: Share, keeper: Keeper) -> None:
        geometry, file, scratch, codes, self._below = share
        self.size = geometry.size
        self.preferred_block_size = geometry.preferred_block_size
        self._granule_bits = geometry.granule_bits
        self._codes = SharedCodesReader(codes)
        self._file = FileNode(file, "the disk's file", read_only=True, grows_elsewhere=True)
        self._scratch = FileNode(scratch, "the scratch", read_only=True, grows_elsewhere=True)
        self._disk = MappedFile(
            self._file,
            geometry.size,
            geometry.cluster_bits,
            geometry.map_bits,
            keeper.locate,
            self._below,
        )
        self._keeper = keeper

    def read_at_once(self, offset: int, view: memoryview) -> bool:
        """Fill ``view`` with the bytes as they were, if these are at hand and remained so."""
        bits, shared = self._granule_bits, self._codes
        first, end = offset >> bits, (offset + len(view) - 1 >> bits) + 1
        if not shared.is_open:
            return False
        codes = shared.read(first, end)
        if codes == bytes(len(codes)):
            is_read = self._disk.read_at_once(offset, view)
        else:
            found = memoryview(codes).cast("I").tolist()
            is_read = read_granules_at_once(self._disk, self._scratch, found, bits, offset, view)
        return is_read and shared.read(first, end) == codes and shared.is_open

    async def read_into(self, offset: int, view: memoryview) -> None:
        """Fill ``view`` with the bytes as they were."""
        bits, shared = self._granule_bits, self._codes
        first, end = offset >> bits, (offset + len(view) - 1 >> bits) + 1
        while shared.is_open:
            codes = shared.read(first, end)
            found = memoryview(codes).cast("I").tolist()
            try:
                await read_granules(self._disk, self._scratch, found, bits, offset, view)
            except OSError:  # the keeper knows more, or how to tell it
                break
            if shared.read(first, end) == codes and shared.is_open:
                return
        await self._keeper.read_into(offset, view)

    async def block_status(
        self, offset: int, length: int, *, extents_max: int = 1 << 20
    ) -> Extents:
        """Describe the range as it was."""
        return await self._keeper.block_status(offset, length, extents_max)

    async def close(self) -> None:
        """Give the share up."""
        self._codes.close()
        await self._disk.close()
        await self._file.close()
        await self._scratch.close()
        if self._below is not None:
            await self._below.close()
