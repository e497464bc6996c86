"""An image's properties and its map, in the words of ``qemu-img info`` and ``qemu-img map``."""

from __future__ import annotations

import errno
import os
from collections.abc import AsyncIterator
from typing import Any, Final, NamedTuple

from ..block.file import FileNode
from ..block.node import BlockNode, BlockStatus
from ..errors import ImageError
from .backing import BackingPolicy
from .bitmap_directory import BitmapGeometry, find_directory, list_directory
from .entries import COPIED, OFFSET_MASK, SUBCLUSTERS_PER_CLUSTER, Kind, Run, find_runs
from .header import (
    HEADER_BYTES_MAX,
    MAGIC,
    Autoclear,
    Compatible,
    Header,
    Incompatible,
    unpack_header,
)
from .image import Qcow2Image
from .snapshots import InternalSnapshot, read_snapshots
from .status import looks_preallocated
from .subclusters import subcluster_runs

_COMPRESSION_NAMES: Final = {0: "zlib", 1: "zstd"}
_PIECE: Final = 1 << 30
"""Bytes of a raw file whose holes are sought at one time."""


async def describe_image(
    path: str | os.PathLike[str], *, force_share: bool = False
) -> dict[str, Any]:
    """What ``qemu-img info --output=json`` says of an image, under the same names.

    Only the file itself is opened, no backing or data file. A damaged bitmap directory does
    not keep the rest from being told: its damage is in ``damaged-bitmaps``, which QEMU has not.

    Args:
        path: A qcow2 image, or anything else, which then is raw.
        force_share: Read even while another program writes.

    Raises:
        OSError: The file cannot be opened or read.
        ImageError: It is in use, or a damaged qcow2 image.
    """
    file = FileNode.open(path, read_only=True, force_share=force_share)
    try:
        raw = await file.read(0, min(file.size, HEADER_BYTES_MAX))
        shown = {
            "virtual-size": file.size,
            "filename": file.path,
            "format": "raw",
            "actual-size": os.fstat(file.fileno()).st_blocks * 512,
            "dirty-flag": False,
        }
        if raw[:4] == MAGIC.to_bytes(4, "big"):
            shown |= await _describe_qcow2(file, unpack_header(raw, file.path, file.size))
    finally:
        await file.close()
    return shown


async def _describe_qcow2(file: FileNode, header: Header) -> dict[str, Any]:
    shown: dict[str, Any] = {
        "virtual-size": header.size,
        "cluster-size": header.cluster_size,
        "format": "qcow2",
        "dirty-flag": bool(header.incompatible_features & Incompatible.DIRTY),
    }
    if header.backing_file is not None:
        name = os.fsdecode(header.backing_file)
        shown["backing-filename"] = name
        shown["full-backing-filename"] = os.path.join(os.path.dirname(file.path), name)
    if header.backing_format is not None and header.backing_file is not None:
        shown["backing-filename-format"] = header.backing_format
    snapshots, _ = await read_snapshots(file, header, strict=False)
    if snapshots:
        shown["snapshots"] = [_describe_snapshot(each) for each in snapshots]
    data = _describe_format(header)
    await _add_bitmaps(file, header, data)
    return shown | {"format-specific": {"type": "qcow2", "data": data}}


def _describe_format(header: Header) -> dict[str, Any]:
    data: dict[str, Any] = {
        "compat": "0.10" if header.version < 3 else "1.1",
        "compression-type": _COMPRESSION_NAMES[header.compression_type],
        "refcount-bits": header.refcount_bits,
    }
    if header.version < 3:
        return data
    features = header.incompatible_features
    data["lazy-refcounts"] = bool(header.compatible_features & Compatible.LAZY_REFCOUNTS)
    data["corrupt"] = bool(features & Incompatible.CORRUPT)
    data["extended-l2"] = header.has_extended_l2
    if header.has_data_file:
        data["data-file"] = header.data_file
        data["data-file-raw"] = bool(header.autoclear_features & Autoclear.DATA_FILE_RAW)
    return data


def _describe_snapshot(snapshot: InternalSnapshot) -> dict[str, Any]:
    seconds, nanoseconds = divmod(snapshot.vm_clock_nanoseconds, 10**9)
    shown = {
        "id": snapshot.snapshot_id,
        "name": snapshot.name,
        "vm-state-size": snapshot.vm_state_size,
        "date-sec": snapshot.date_seconds,
        "date-nsec": snapshot.date_nanoseconds,
        "vm-clock-sec": seconds,
        "vm-clock-nsec": nanoseconds,
    }
    if snapshot.instruction_count is not None:
        shown["icount"] = snapshot.instruction_count
    return shown


async def _add_bitmaps(file: FileNode, header: Header, data: dict[str, Any]) -> None:
    geometry = BitmapGeometry(header.size, header.cluster_size, file.size)
    try:
        directory = find_directory(header, geometry, file.path)
    except ImageError as error:
        data["damaged-bitmaps"] = [{"reason": str(error)}]
        return
    if directory is None:
        return
    count, size, offset = directory
    listing = list_directory(await file.read(offset, size), count, geometry)
    data["bitmaps"] = [
        {
            "name": each.name,
            "granularity": each.granularity,
            "flags": ["in-use"] * each.in_use + ["auto"] * each.auto,
        }
        for each in listing.entries
    ]
    if listing.damaged:
        data["damaged-bitmaps"] = [
            {"name": each.name, "reason": each.reason} for each in listing.damaged
        ]


Sparse = frozenset[Qcow2Image]


class MapEntry(NamedTuple):
    """A range of the disk as ``qemu-img map`` tells it; bytes.

    Attributes:
        depth: Which file of the chain tells, 0 the image itself.
        present: The chain has the range allocated.
        zero: It reads as zeroes.
        data: It is read from a file.
        compressed: From a compressed cluster.
        offset: Where in that file; None where there is no such place.
    """

    start: int
    length: int
    depth: int
    present: bool
    zero: bool
    data: bool
    compressed: bool
    offset: int | None

    def precedes(self, other: MapEntry) -> bool:
        """Whether both are one range."""
        follows = None if self.offset is None else self.offset + self.length
        return self[2:7] == other[2:7] and follows == other.offset


async def map_image(
    path: str | os.PathLike[str],
    *,
    force_share: bool = False,
    backing_policy: BackingPolicy = BackingPolicy.SAME_FOLDER,
) -> AsyncIterator[MapEntry]:
    """What ``qemu-img map`` says of an image and its chain, adjacent like ranges as one.

    Behind allocated clusters holes are looked for where QEMU does: if far more clusters are
    allocated than the file has space for, so that it looks preallocated.

    Args:
        path: A qcow2 image, or a raw file.
        force_share: Read even while another program writes.
        backing_policy: Which backing files may be opened.

    Raises:
        OSError: A file cannot be opened or read, or an L2 entry cannot be meant.
        ImageError: The image is in use, damaged or not supported.
    """
    node: BlockNode = FileNode.open(path, read_only=True, force_share=force_share)
    assert isinstance(node, FileNode)
    if bytes(await node.read(0, 4)) == MAGIC.to_bytes(4, "big"):
        node = await Qcow2Image.from_file(
            node, force_share=force_share, backing_policy=backing_policy
        )
    try:
        last: MapEntry | None = None
        sparse = await _sparse_images(node)
        async for entry in _entries(node, 0, node.size, 0, sparse):
            if last is not None and last.precedes(entry):
                last = last._replace(length=last.length + entry.length)
                continue
            if last is not None:
                yield last
            last = entry
        if last is not None:
            yield last
    finally:
        await node.close()


def _entries(
    node: BlockNode, start: int, end: int, depth: int, sparse: Sparse
) -> AsyncIterator[MapEntry]:
    if isinstance(node, Qcow2Image):
        return _qcow2_entries(node, start, end, depth, sparse)
    return _raw_entries(node, start, end, depth)


async def _raw_entries(
    node: BlockNode, start: int, end: int, depth: int
) -> AsyncIterator[MapEntry]:
    while start < end:
        extents = await node.block_status(start, min(end - start, _PIECE))
        for length, status in extents.pairs():
            is_zero = bool(status & BlockStatus.ZERO)
            yield MapEntry(start, length, depth, True, is_zero, not is_zero, False, start)
            start += length


async def _qcow2_entries(
    image: Qcow2Image, start: int, end: int, depth: int, sparse: Sparse
) -> AsyncIterator[MapEntry]:
    size, per_table = image.cluster_size, image.layout.l2_entries
    has_holes = image in sparse
    while start < end:
        l1_index = start // (size * per_table)
        stop = min(end, (l1_index + 1) * size * per_table)
        table = await image.mapping.table(l1_index)
        if table is None:
            async for entry in _unallocated(image, start, stop, depth, None, sparse):
                yield entry
            start = stop
            continue
        first = start // size % per_table
        last = (stop - 1) // size % per_table + 1
        cluster = start // size * size
        for run in find_runs(table, first, last, size):
            run_end = cluster + run.clusters * size
            is_mixed = run.kind is Kind.SUBCLUSTERS
            bitmap = table.bitmap(cluster // size % per_table) if is_mixed else 0
            for part in _parts(run, cluster, size, bitmap, image.header.has_extended_l2):
                inside = _clip(part, start, stop, depth)
                if inside is None:
                    continue
                if inside.present:
                    for piece in await _with_holes(image, inside) if has_holes else [inside]:
                        yield piece
                    continue
                part_end = inside.start + inside.length
                async for entry in _unallocated(
                    image, inside.start, part_end, depth, inside.offset, sparse
                ):
                    yield entry
            cluster = run_end
        start = stop


async def _sparse_images(node: BlockNode | None) -> Sparse:
    """The images of a chain behind whose clusters holes are looked for."""
    found: set[Qcow2Image] = set()
    while isinstance(node, Qcow2Image):
        if await looks_preallocated(node):
            found.add(node)
        node = node.backing
    return frozenset(found)


async def _with_holes(image: Qcow2Image, entry: MapEntry) -> list[MapEntry]:
    """Data clusters by whether the file has data for them."""
    if entry.offset is None or entry.zero:
        return [entry]
    pieces: list[MapEntry] = []
    done = 0
    while done < entry.length:
        place = entry.offset + done
        extents = await image.data_file.block_status(place, entry.length - done)
        for length, status in extents.pairs():
            is_zero = bool(status & BlockStatus.ZERO)
            start, place = entry.start + done, entry.offset + done
            pieces.append(entry._replace(start=start, length=length, zero=is_zero, offset=place))
            done += length
    return pieces


def _parts(run: Run, start: int, size: int, bitmap: int, is_extended: bool) -> list[MapEntry]:
    """A run as entries; those that are not present are the backing file's to tell."""
    host = run.entry & OFFSET_MASK
    length = run.clusters * size
    if run.kind is Kind.SUBCLUSTERS:
        sub = size // SUBCLUSTERS_PER_CLUSTER
        has_host = bool(run.entry & (OFFSET_MASK | COPIED))  # in a data file it may be at 0
        return [
            _part(
                part.kind,
                start + part.first * sub,
                (part.end - part.first) * sub,
                host + part.first * sub if has_host else None,
            )
            for part in subcluster_runs(bitmap, 0, SUBCLUSTERS_PER_CLUSTER)
        ]
    if run.kind is Kind.ZERO_ALLOC and not host and not is_extended:
        # To QEMU zeroes at 0 of a data file are zeroes without a place.
        rest = _part(run.kind, start + size, length - size, size)
        return [_part(run.kind, start, size, None), rest][: run.clusters]
    has_host = run.kind in (Kind.NORMAL, Kind.ZERO_ALLOC)
    return [_part(run.kind, start, length, host if has_host else None)]


def _part(kind: Kind, start: int, length: int, offset: int | None) -> MapEntry:
    if kind is Kind.INVALID:
        raise OSError(errno.EIO, "damaged L2 entry")
    is_zero = kind in (Kind.ZERO_PLAIN, Kind.ZERO_ALLOC)
    is_data = kind in (Kind.NORMAL, Kind.COMPRESSED)
    return MapEntry(
        start, length, 0, is_zero or is_data, is_zero, is_data, kind is Kind.COMPRESSED, offset
    )


def _clip(entry: MapEntry, start: int, end: int, depth: int) -> MapEntry | None:
    """The part of an entry within a range."""
    first, last = max(entry.start, start), min(entry.start + entry.length, end)
    if first >= last:
        return None
    offset = None if entry.offset is None else entry.offset + first - entry.start
    return entry._replace(start=first, length=last - first, depth=depth, offset=offset)


async def _unallocated(
    image: Qcow2Image, start: int, end: int, depth: int, offset: int | None, sparse: Sparse
) -> AsyncIterator[MapEntry]:
    """What an image does not have itself: the backing file's, zeroes past its end."""
    backing = image.backing
    inside = min(end, max(start, backing.size)) if backing is not None else start
    if backing is not None and inside > start:
        async for entry in _entries(backing, start, inside, depth + 1, sparse):
            yield entry
    if end > inside:
        place = None if offset is None else offset + inside - start
        yield MapEntry(inside, end - inside, depth, False, True, False, False, place)
