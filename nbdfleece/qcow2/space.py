"""Where guest data lie on the host: in the image's own clusters or in a data file.

Spec: qcow2.txt, "Incompatible features", bit 2: with an external data file the host
offset of a guest cluster is its guest offset; nothing there is counted or shared.
"""

from __future__ import annotations

import asyncio
import errno
from abc import ABC, abstractmethod
from collections.abc import Callable

from ..block.file import FileNode
from .compressed import compressed_range
from .entries import COMPRESSED, COPIED, OFFSET_MASK
from .quarantine import Quarantine
from .refcounts import Allocation, Refcounts
from .tables import MetadataMap


class GuestSpace(ABC):
    """Takes, fills and gives back the host clusters of guest data."""

    @abstractmethod
    async def take(self, guest_offset: int, clusters: int) -> Allocation:
        """Get host clusters for up to ``clusters`` guest clusters from ``guest_offset`` on."""

    def write_new_at_once(self, clusters: int, data: memoryview) -> int | None:
        """Fill new host clusters in a row, if nothing needs waiting for.

        Args:
            clusters: How many.
            data: As much as they hold.

        Returns:
            Their host offset; None, with nothing changed, if :meth:`take` must be asked.

        Raises:
            OSError: The data could not be written; no clusters were taken.
        """
        return None

    @abstractmethod
    async def give_back(self, allocation: Allocation) -> None:
        """Return what was taken and never entered anywhere."""

    async def take_packed(self, length: int) -> int:
        """Get bytes for a compressed cluster, which may share its host clusters with others.

        Raises:
            OSError: ENOTSUP: there can be no compressed clusters here.
        """
        raise OSError(errno.ENOTSUP, "a data file holds no compressed clusters")

    async def give_back_packed(self, host: int, length: int) -> None:
        """Return bytes that :meth:`take_packed` gave and that were never entered anywhere."""
        raise NotImplementedError

    @abstractmethod
    async def write(self, host: int, data: memoryview) -> None:
        """Write guest data to a host offset."""

    @abstractmethod
    async def zero(self, guest_offset: int, length: int, *, unmap: bool) -> None:
        """The guest clusters are about to read as zeroes, whatever the host has."""

    @abstractmethod
    async def provision(self, allocation: Allocation) -> None:
        """Make what was taken take space on the host and read as zeroes."""

    @abstractmethod
    def free(self, entry: int, clusters: int, *, punch: bool) -> None:
        """A run of entries does not lead to its host clusters any more.

        Args:
            entry: The run's first entry.
            clusters: How many entries.
            punch: The guest gave the space up.
        """

    def resize(self, size: int) -> None:
        """The disk is to have another size."""


class ImageSpace(GuestSpace):
    """Counted clusters of the image file, freed through quarantine.

    Args:
        file: The image file.
        cluster_bits: Of the image.
        refcounts: Where clusters come from.
        quarantine: Where they go.
        metadata: What guest data must never touch.
        on_damage: Called with a message when they would.
    """

    def __init__(
        self,
        file: FileNode,
        cluster_bits: int,
        refcounts: Refcounts,
        quarantine: Quarantine,
        metadata: MetadataMap,
        on_damage: Callable[[str], None],
    ) -> None:
        self._file = file
        self._cluster_bits = cluster_bits
        self._refcounts = refcounts
        self._quarantine = quarantine
        self._metadata = metadata
        self._on_damage = on_damage
        self._packed_end = 0
        """Where the next compressed cluster may begin; 0 for in a host cluster of its own."""
        self._packing = asyncio.Lock()

    async def take(self, guest_offset: int, clusters: int) -> Allocation:
        """Allocate the first free clusters."""
        return await self._refcounts.allocate_up_to(clusters)

    def write_new_at_once(self, clusters: int, data: memoryview) -> int | None:
        """Write to the first free clusters, and take them once that has worked."""
        host = self._refcounts.first_free(clusters)
        if host is None or self._metadata.overlaps(host, len(data)):
            return None
        try:
            if not self._file.write_at_once(host, data):
                return None
        except BaseException:  # some of it may be there
            self._refcounts.spoil_first(clusters)
            raise
        self._refcounts.take_first(clusters)
        return host

    async def give_back(self, allocation: Allocation) -> None:
        """Free the clusters at once: nothing ever led to them."""
        length = allocation.clusters << self._cluster_bits
        await self._refcounts.release(allocation.offset, length)

    async def take_packed(self, length: int) -> int:
        """Go on behind the last compressed cluster, or begin a new host cluster.

        Each compressed cluster is one reference to each host cluster that it touches.
        """
        size = 1 << self._cluster_bits
        async with self._packing:
            start = self._packed_end
            if length > -start % size or not await self._share_packed_end():
                new = await self._refcounts.allocate(1)
                start = self._packed_end
                is_next = length > -start % size > 0 and start + -start % size == new
                if not (is_next and await self._share_packed_end()):
                    start = new
            self._packed_end = start + length
            return start

    async def _share_packed_end(self) -> bool:
        """Take one more reference to the host cluster in which the last compressed one ends."""
        end = self._packed_end
        if not await self._refcounts.share(end):
            return False
        if end != self._packed_end:  # freed meanwhile
            await self._refcounts.release(end, 1)
            return False
        return True

    async def give_back_packed(self, host: int, length: int) -> None:
        """Drop the references again."""
        self._packed_end = 0
        await self._refcounts.release(host, length)

    async def write(self, host: int, data: memoryview) -> None:
        """Write to the image file, but never over metadata (rule 4)."""
        self._check_no_metadata(host, len(data))
        await self._file.write(host, data)

    async def zero(self, guest_offset: int, length: int, *, unmap: bool) -> None:
        """The entries alone make clusters read as zeroes."""

    async def provision(self, allocation: Allocation) -> None:
        """Zero the clusters on the host, allocated."""
        length = allocation.clusters << self._cluster_bits
        await self._file.write_zeroes(allocation.offset, length, unmap=False)

    def free(self, entry: int, clusters: int, *, punch: bool) -> None:
        """Put the run's host clusters, if it has any, into quarantine."""
        if entry & COMPRESSED:
            offset, length = compressed_range(entry, self._cluster_bits)
            first = offset >> self._cluster_bits
            count = (offset + length - 1 >> self._cluster_bits) + 1 - first
            if first <= self._packed_end >> self._cluster_bits <= first + count:
                self._packed_end = 0  # once free, it may become somebody else's
            # Other compressed clusters may lie in the same host clusters: never punched.
            self._quarantine.add(first << self._cluster_bits, count << self._cluster_bits)
        elif entry & OFFSET_MASK:
            host, length = entry & OFFSET_MASK, clusters << self._cluster_bits
            self._check_no_metadata(host, length)
            # Without COPIED an internal snapshot may have the cluster, too.
            self._quarantine.add(host, length, punch=punch and bool(entry & COPIED))

    def _check_no_metadata(self, host: int, length: int) -> None:
        if self._metadata.overlaps(host, length):
            self._on_damage(f"a guest cluster lies over metadata at {host:#x}")
            raise OSError(errno.EIO, "guest data lie over metadata", self._file.path)


class DataFileSpace(GuestSpace):
    """An external data file, in which every guest cluster has its own place.

    What the guest zeroes or discards is zeroed in the data file, too: a raw data file
    must have the guest's content by itself.

    Args:
        file: The data file.
        cluster_bits: Of the image.
        size: Bytes of the disk; nothing is written past it.
    """

    def __init__(self, file: FileNode, cluster_bits: int, size: int) -> None:
        self._file = file
        self._cluster_bits = cluster_bits
        self._size = size

    async def take(self, guest_offset: int, clusters: int) -> Allocation:
        """The clusters' own place."""
        return Allocation(guest_offset, clusters, is_fresh=False)

    async def give_back(self, allocation: Allocation) -> None:
        """Nothing was taken from anybody."""

    async def write(self, host: int, data: memoryview) -> None:
        """Write to the data file what lies inside the disk."""
        if host < self._size:
            await self._file.write(host, data[: self._size - host])

    async def zero(self, guest_offset: int, length: int, *, unmap: bool) -> None:
        """Zero the data file as well."""
        length = min(length, self._size - guest_offset)
        if length > 0:
            await self._file.write_zeroes(guest_offset, length, unmap=unmap)

    async def provision(self, allocation: Allocation) -> None:
        """Zero the clusters in the data file, allocated."""
        await self.zero(allocation.offset, allocation.clusters << self._cluster_bits, unmap=False)

    def free(self, entry: int, clusters: int, *, punch: bool) -> None:
        """Nothing is counted here."""

    def resize(self, size: int) -> None:
        """Let writes reach to the new end."""
        self._size = size
