"""A qcow2 image as a block node: opening, reading, describing.

An image is put together from parts that know one thing each:

* :class:`~nbdfleece.qcow2.tables.Mapping`: where a guest cluster lies;
* :class:`~nbdfleece.qcow2.refcounts.Refcounts`: which host clusters are free;
* :class:`~nbdfleece.qcow2.epochs.Epochs`: in which order the file learns of changes;
* :class:`~nbdfleece.qcow2.write.Writer`: guest writes, zeroes and discards.

A read that may be suspended counts itself in the quarantine's current batch of reads,
so that the host cluster that it reads is not given to anyone else meanwhile.
"""

from __future__ import annotations

import errno
import logging
import os
from contextlib import AsyncExitStack
from functools import partial

import numpy as np

from ..block.file import FileNode
from ..block.host_file import BELOW, ZEROES, HostFile, Places
from ..block.node import BlockNode, BlockStatus, readable_part
from ..block.range_lock import RangeLock
from ..block.stable import STABLE_PIECE_BYTES_MIN, StablePlace
from ..extents import Extents
from .backing import (
    BackingPolicy,
    Chain,
    OpenBacking,
    backing_format,
    check_chain,
    open_data_file,
    resolve_name,
)
from .checks import check_refcount_table, check_supported, repair_refcounts
from .compressed import CompressedReader, Piece
from .entries import (
    COPIED,
    IN_PLACE,
    OFFSET_MASK,
    SPECIAL,
    SUBCLUSTERS_PER_CLUSTER,
    Entries,
    Kind,
    L2Table,
    Layout,
    Run,
    find_runs,
    host_places,
)
from .epochs import Epochs
from .header import (
    AUTOCLEAR_FIELD,
    HEADER_BYTES_MAX,
    Autoclear,
    Header,
    Incompatible,
    unpack_header,
)
from .quarantine import Quarantine
from .refcounts import Refcounts, unpack_refcount_table
from .snapshots import InternalSnapshot, choose_disk, read_snapshots
from .space import DataFileSpace, GuestSpace, ImageSpace
from .status import STATUS_DATA, describe, uniform
from .subclusters import subcluster_runs
from .tables import CACHE_BYTES, Mapping, MetadataMap
from .write import Writer

_log = logging.getLogger(__name__)


class Qcow2Image(BlockNode):
    """A qcow2 image. Made by :meth:`open` or :meth:`from_file`."""

    refcounts: Refcounts
    epochs: Epochs
    space: GuestSpace
    writer: Writer

    def __init__(
        self,
        file: FileNode,
        data_file: FileNode,
        header: Header,
        l1: Entries,
        backing: BlockNode | None,
    ) -> None:
        self.file = file
        self.data_file = data_file
        """Where guest data lie: ``file``, or an external data file."""
        self.path = file.path
        self.header = header
        self.size = header.size
        self.cluster_size = header.cluster_size
        self.read_only = file.read_only
        self.is_corrupt = bool(header.incompatible_features & Incompatible.CORRUPT)
        self.backing = backing
        self.has_named_backing = True
        """Whether ``backing`` is what the header names, if anything."""
        self.layout = Layout(
            header.cluster_bits, header.version, header.has_extended_l2, header.has_data_file
        )
        self.mapping = Mapping(
            file, self.layout, l1, cache_bytes=CACHE_BYTES, on_damage=self.note_damage
        )
        self.metadata = MetadataMap(header.cluster_bits)
        """Host clusters that hold metadata; whoever allocates some registers them here."""
        self.ranges = RangeLock()
        """Guest ranges that suspended writes hold."""
        self.quarantine = Quarantine()
        self.snapshots: list[InternalSnapshot] = []
        """The internal snapshots that the image has."""
        self.has_holes_below: bool | None = None
        """Whether data clusters may lie in holes of the file; None until it was looked."""
        self._tables = self.mapping.tables
        self._cluster_bits = header.cluster_bits
        self._cluster_mask = header.cluster_size - 1
        self._l2_bits = self.layout.l2_entries.bit_length() - 1
        self._l2_mask = self.layout.l2_entries - 1
        self._guarded: set[int] = set()
        """Clusters of ``data_file`` that guest data must not touch."""
        self._compressed = CompressedReader(file, header.cluster_bits, header.compression_type)

    @classmethod
    async def open(
        cls,
        path: str | os.PathLike[str],
        *,
        read_only: bool,
        force_share: bool = False,
        backing_policy: BackingPolicy = BackingPolicy.SAME_FOLDER,
        snapshot: str | None = None,
    ) -> Qcow2Image:
        """Open an image and its backing chain, with QEMU's locks.

        Args:
            path: The image file.
            read_only: Not to be written; marks of damage or of a crash do not matter then.
            force_share: Read even while another program writes (read-only images).
            backing_policy: Which backing and data files may be opened.
            snapshot: Id or name of an internal snapshot to read instead of the disk.

        Raises:
            OSError: A file cannot be opened or read.
            StateError: There is no such snapshot.
            UsageError: A snapshot is to be written.
            ImageLockedError: Another program uses the image or a file of its chain.
            UnsupportedImageError: The image needs what we do not have.
            ImageError: The image is damaged, or refers to what must not be opened.
        """
        file = FileNode.open(path, read_only=read_only, force_share=force_share)
        return await cls.from_file(
            file, force_share=force_share, backing_policy=backing_policy, snapshot=snapshot
        )

    @classmethod
    async def from_file(
        cls,
        file: FileNode,
        *,
        force_share: bool = False,
        backing_policy: BackingPolicy = BackingPolicy.SAME_FOLDER,
        snapshot: str | None = None,
        chain: Chain = frozenset(),
        open_backing: OpenBacking | None = None,
    ) -> Qcow2Image:
        """The image in an open file, which is closed with it, also when this fails.

        Args:
            file: The image file; its ``read_only`` decides whether the image can be written.
            force_share: For the backing chain.
            backing_policy: For the backing chain and the data file.
            snapshot: Id or name of an internal snapshot to read instead of the disk.
            chain: The files above this one, for which it is the backing file.
            open_backing: Opens what is to be behind the image, whatever its header names.

        Raises:
            OSError: A file cannot be opened or read.
            ImageError: As for :meth:`open`.
        """
        async with AsyncExitStack() as opened:
            opened.push_async_callback(file.close)
            raw = await file.read(0, min(file.size, HEADER_BYTES_MAX))
            header = unpack_header(raw, file.path, file.size)
            check_supported(header, file)
            header = await repair_refcounts(header, file)
            snapshots, snapshots_bytes = await read_snapshots(file, header)
            disk = choose_disk(file, header, snapshots, snapshot)
            data_file = open_data_file(file, header, backing_policy, force_share)
            opened.push_async_callback(data_file.close)
            chain |= {file.identity, data_file.identity}
            has_named_backing = open_backing is None
            if open_backing is None:
                open_backing = partial(
                    _open_backing, policy=backing_policy, force_share=force_share
                )
            backing = await open_backing(file, header, chain)
            if backing is not None:
                opened.push_async_callback(backing.close)
            l1 = await file.read(disk.l1_table_offset, disk.l1_size * 8)
            image = cls(file, data_file, header, _unpack_l1(l1), backing)
            image.size, image.snapshots = disk.size, snapshots
            image.has_named_backing = has_named_backing
            if not file.read_only:
                image.metadata.add(header.snapshots_offset, snapshots_bytes)
                await image._prepare_writing()
            opened.pop_all()
        return image

    async def _prepare_writing(self) -> None:
        """Load what writing needs, and clear the marks that only a reader may leave."""
        header, file = self.header, self.file
        blocks = unpack_refcount_table(
            await file.read(
                header.refcount_table_offset, header.refcount_table_clusters << self._cluster_bits
            )
        )
        check_refcount_table(blocks, header, file)
        self._register_metadata(blocks)
        self.refcounts = Refcounts(
            file, header, blocks, self.metadata, self.quarantine, self.note_damage
        )
        self.epochs = Epochs(
            file, header, self.mapping, self.refcounts, self.quarantine, self.data_file
        )
        if header.has_data_file:
            self.space = DataFileSpace(self.data_file, self._cluster_bits, self.size)
        else:
            self._guarded = self.metadata.clusters
            self.space = ImageSpace(
                file,
                self._cluster_bits,
                self.refcounts,
                self.quarantine,
                self.metadata,
                self.note_damage,
            )
        self.writer = Writer(self)
        await self._clear_autoclear_bits()

    async def _clear_autoclear_bits(self) -> None:
        """Clear the bits of features that we do not keep up while we write; 8 bytes, no more."""
        known = int(Autoclear.BITMAPS | Autoclear.PRIVATE)
        if self.header.has_data_file:  # we keep a raw data file equal to the disk
            known |= Autoclear.DATA_FILE_RAW
        if self.header.autoclear_features & ~int(known):  # ~ of a flag knows its own bits only
            self.header.autoclear_features &= known
            bits = self.header.autoclear_features.to_bytes(8, "big")
            await self.file.write(AUTOCLEAR_FIELD, memoryview(bits))
            await self.file.flush()

    def _register_metadata(self, blocks: list[int]) -> None:
        header, add = self.header, self.metadata.add
        add(0, header.cluster_size)
        add(header.l1_table_offset, header.l1_size * 8)
        add(header.refcount_table_offset, header.refcount_table_clusters << self._cluster_bits)
        for snapshot in self.snapshots:
            add(snapshot.l1_table_offset, snapshot.l1_size * 8)
        l2_tables: list[int] = (self.mapping.l1 & np.uint64(OFFSET_MASK)).tolist()
        for offset in l2_tables + blocks:
            if offset:
                add(offset, 1)

    def note_damage(self, message: str) -> None:
        """Something in the file cannot be: report it, and write no guest data any more.

        An image open for writing gets its corrupt bit with the next flush.
        """
        _log.error("%s: damaged: %s", self.path, message)
        if self.read_only:
            return
        self.is_corrupt = True
        self.read_only = True
        if self.header.version >= 3:
            self.header.incompatible_features |= Incompatible.CORRUPT
            self.epochs.header_is_dirty = True

    def check_writable(self) -> None:
        """Raise the ``OSError`` of a write that may not be."""
        if not self.read_only:
            return
        if self.is_corrupt and not self.file.read_only:
            raise OSError(errno.EIO, "the image is damaged and not written any more", self.path)
        raise PermissionError(errno.EPERM, "the image is read-only", self.path)

    async def read_into(self, offset: int, view: memoryview) -> None:
        """Fill ``view`` with the guest's bytes from ``offset`` on."""
        host = self._host_offset(offset, len(view))
        if host is None:
            await self._read_tables(offset, view)
            return
        reads = self.quarantine.reads
        reads.count += 1
        try:
            await self.data_file.read_into(host, view)
        finally:
            reads.count -= 1

    def read_at_once(self, offset: int, view: memoryview) -> bool:
        """Read from data clusters that lie one behind the other and whose L2 table is in memory."""
        host = self._host_offset(offset, len(view))
        return host is not None and self.data_file.read_at_once(host, view)

    def _host_offset(self, offset: int, length: int) -> int | None:
        """Where a range lies in one piece; None if it does not, or if that is not known.

        The L2 table must be in memory.
        """
        cluster = offset >> self._cluster_bits
        table = self._tables.get(cluster >> self._l2_bits)
        if table is None:
            return None
        index = cluster & self._l2_mask
        entry = table.entries[index]
        if entry & SPECIAL or not entry & OFFSET_MASK:
            return None
        within = offset & self._cluster_mask
        more = within + length - 1 >> self._cluster_bits
        if more:
            if index + more > self._l2_mask:
                return None
            expected = entry
            for following in table.entries[index + 1 : index + 1 + more]:
                expected += self.cluster_size
                if following != expected:
                    return None
        table.is_recent = True
        return (entry & OFFSET_MASK) + within

    def stable_places(self, offset: int, length: int) -> list[StablePlace] | None:
        """Where a range of data clusters lies, if that is a file that holds still."""
        if not self.data_file.read_only:
            return None
        host = self._host_offset(offset, length)
        if host is not None:
            return self.data_file.stable_places(host, length)
        cluster = offset >> self._cluster_bits
        table = self._tables.get(cluster >> self._l2_bits)
        first = cluster & self._l2_mask
        within = offset & self._cluster_mask
        end = first + (within + length - 1 >> self._cluster_bits) + 1
        if table is None or end > self._l2_mask + 1:
            return None
        runs = find_runs(table, first, end, self.cluster_size)
        if length < len(runs) * STABLE_PIECE_BYTES_MIN:
            return None
        places: list[StablePlace] = []
        for run in runs:
            if run.kind is not Kind.NORMAL:
                return None
            size = min((run.clusters << self._cluster_bits) - within, length)
            place = self.data_file.stable_places((run.entry & OFFSET_MASK) + within, size)
            if place is None:
                return None
            places += place
            length -= size
            within = 0
        table.is_recent = True
        return places

    def host_file(self) -> HostFile | None:
        """The file of the data clusters; what one L2 table maps is located together."""
        if self.backing is not None and not self.has_named_backing:
            return None  # others could not open what is below
        map_bits = self._cluster_bits + self._l2_bits
        return HostFile(self.data_file.fileno(), self._cluster_bits, map_bits, self.backing)

    async def locate(self, part: int) -> Places:
        """Where the clusters lie that one L2 table maps, as far as they are the disk's alone."""
        unallocated = ZEROES if self.backing is None else BELOW
        table = await self.mapping.table(part)
        if table is None:
            return np.full(self._l2_mask + 1, unallocated, dtype=np.uint64)
        return host_places(table.array, unallocated)

    async def _read_tables(self, offset: int, view: memoryview) -> None:
        """Read through any number of L2 tables."""
        reads = self.quarantine.reads
        reads.count += 1
        try:
            while len(view):
                l1_index = offset >> self._cluster_bits + self._l2_bits
                table_end = l1_index + 1 << self._cluster_bits + self._l2_bits
                length = min(len(view), table_end - offset)
                table = await self.mapping.table(l1_index)
                if table is None:
                    await self._read_backing(offset, view[:length])
                else:
                    await self._read_table(table, offset, view[:length])
                offset += length
                view = view[length:]
        finally:
            reads.count -= 1

    async def _read_table(self, table: L2Table, offset: int, view: memoryview) -> None:
        """Read a range that one L2 table maps."""
        index = offset >> self._cluster_bits & self._l2_mask
        within = offset & self._cluster_mask
        end = index + (within + len(view) - 1 >> self._cluster_bits) + 1
        compressed: list[Piece] = []
        for run in find_runs(table, index, end, self.cluster_size):
            length = min(len(view), (run.clusters << self._cluster_bits) - within)
            part = view[:length]
            if run.kind is Kind.COMPRESSED:
                compressed.append(Piece(run.entry, within, part))
            elif run.kind is Kind.SUBCLUSTERS:
                bitmap = table.bitmap(offset >> self._cluster_bits & self._l2_mask)
                await self._read_subclusters(run.entry & OFFSET_MASK, bitmap, offset, part)
            else:
                await self._read_run(run, within, offset, part)
            offset += length
            view = view[length:]
            within = 0
        if compressed:
            await self._compressed.read(compressed)

    async def _read_subclusters(
        self, host: int, bitmap: int, offset: int, view: memoryview
    ) -> None:
        """Read a range inside one cluster whose subclusters differ."""
        size = self.cluster_size // SUBCLUSTERS_PER_CLUSTER
        within = offset & self._cluster_mask
        first, end = within // size, (within + len(view) - 1) // size + 1
        for run in subcluster_runs(bitmap, first, end):
            length = min(len(view), run.end * size - within)
            if run.kind is Kind.NORMAL:
                await self.data_file.read_into(host + within, view[:length])
            elif run.kind is Kind.UNALLOCATED:
                await self._read_backing(offset, view[:length])
            else:
                view[:length] = bytes(length)
            within += length
            offset += length
            view = view[length:]

    async def _read_run(self, run: Run, within: int, offset: int, view: memoryview) -> None:
        """Read guest offset ``offset``, which lies ``within`` bytes after a run's beginning."""
        if run.kind is Kind.NORMAL:
            await self.data_file.read_into((run.entry & OFFSET_MASK) + within, view)
        elif run.kind is Kind.UNALLOCATED:
            await self._read_backing(offset, view)
        elif run.kind is Kind.INVALID:
            raise OSError(errno.EIO, "damaged L2 entry", self.path)
        else:
            view[:] = bytes(len(view))

    async def _read_backing(self, offset: int, view: memoryview) -> None:
        """Read what is not in this image: the backing file's bytes, zeroes past its end."""
        part = readable_part(self.backing, offset, view)
        if self.backing is not None and part:
            await self.backing.read_into(offset, part)

    async def block_status(
        self, offset: int, length: int, *, extents_max: int = 1 << 20
    ) -> Extents:
        """Describe a guest range through the whole backing chain."""
        return await describe(self, offset, length, extents_max)

    def read_with_status(self, offset: int, view: memoryview) -> int | None:
        """Status and content of a range inside one cluster, if its L2 table is in memory."""
        cluster = offset >> self._cluster_bits
        table = self._tables.get(cluster >> self._l2_bits)
        within = offset & self._cluster_mask
        if table is not None and self.has_holes_below is False:
            entry = table.entries[cluster & self._l2_mask]
            fits = within + len(view) <= self.cluster_size
            if fits and not entry & SPECIAL and entry & OFFSET_MASK:
                table.is_recent = True
                count = self.data_file.read_cached((entry & OFFSET_MASK) + within, view)
                return STATUS_DATA if count == len(view) else None
        status = uniform(self, offset, len(view))
        return status if status is not None and status & BlockStatus.ZERO else None

    async def write(self, offset: int, data: memoryview) -> None:
        """Write guest bytes."""
        if not self.write_at_once(offset, data):
            self.check_writable()
            await self.writer.write(offset, data)

    def write_at_once(self, offset: int, data: memoryview) -> bool:
        """Overwrite a part of one cluster that is ours alone, where it is, or fill new clusters."""
        cluster = offset >> self._cluster_bits
        table = self._tables.get(cluster >> self._l2_bits)
        within = offset & self._cluster_mask
        if table is not None and within + len(data) <= self.cluster_size:
            entry = table.entries[cluster & self._l2_mask]
            host = entry & OFFSET_MASK
            if (
                entry & IN_PLACE == COPIED
                and host
                and host >> self._cluster_bits not in self._guarded
                and self.ranges.is_idle
                and not self.read_only
            ):
                table.is_recent = True
                return self.data_file.write_at_once(host + within, data)
        if not self.ranges.is_idle or self.read_only:
            return False
        return self.writer.write_new_at_once(offset, data)

    async def write_packed(self, offset: int, packed: memoryview) -> None:
        """Write one whole guest cluster that was compressed as this image's clusters are.

        Args:
            offset: Where the cluster begins.
            packed: What :func:`~nbdfleece.qcow2.compressed.deflate` made of it.

        Raises:
            OSError: ENOTSUP: the image has an external data file.
        """
        self.check_writable()
        await self.writer.write_packed(offset, packed)

    async def write_zeroes(
        self, offset: int, length: int, *, unmap: bool = True, fast: bool = False
    ) -> None:
        """Make a guest range read as zeroes, whole clusters by their entries alone."""
        self.check_writable()
        await self.writer.write_zeroes(offset, length, unmap=unmap, fast=fast)

    async def trim(self, offset: int, length: int) -> None:
        """Discard the whole clusters in a guest range."""
        self.check_writable()
        await self.writer.trim(offset, length)

    async def flush(self) -> None:
        """Make everything durable that was written before this call (rule 4)."""
        if not self.file.read_only:
            await self.epochs.flush()

    async def allocate_clusters(self, count: int) -> int:
        """Take consecutive host clusters for metadata of one's own.

        The next flush makes their refcounts durable; nothing durable may lead to them before.

        Returns:
            Their host offset. What they contain is anything.
        """
        offset = await self.refcounts.allocate(count)
        self.metadata.add(offset, count << self._cluster_bits)
        return offset

    def free_clusters(self, offset: int, count: int) -> None:
        """Give metadata clusters up, to which nothing durable leads any more."""
        self.metadata.remove(offset, count << self._cluster_bits)
        self.quarantine.add(offset, count << self._cluster_bits)

    async def close(self) -> None:
        """Flush, and give up the files and locks, the backing chain's too."""
        async with AsyncExitStack() as opened:
            if self.backing is not None:
                opened.push_async_callback(self.backing.close)
            opened.push_async_callback(self.data_file.close)
            opened.push_async_callback(self.file.close)
            if not self.file.read_only and not self.file.is_closed:
                await self.epochs.settle()


def _unpack_l1(raw: bytearray) -> Entries:
    return np.frombuffer(raw, dtype=">u8").astype(np.uint64)


async def _open_backing(
    file: FileNode, header: Header, chain: Chain, *, policy: BackingPolicy, force_share: bool
) -> BlockNode | None:
    """Open the backing file that a header names, and what is behind it."""
    if header.backing_file is None:
        return None
    name = os.fsdecode(header.backing_file)
    path = resolve_name(file.path, name, policy)
    check_chain(file.path, path, chain)
    below = FileNode.open(path, read_only=True, force_share=force_share)
    try:
        image_format = await backing_format(file.path, header, below)
    except BaseException:
        await below.close()
        raise
    if image_format == "raw":
        return below
    return await Qcow2Image.from_file(
        below, force_share=force_share, backing_policy=policy, chain=chain
    )
