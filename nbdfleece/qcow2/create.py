"""Making new qcow2 images, as ``qemu-img create`` does."""

from __future__ import annotations

import os
from contextlib import ExitStack, suppress
from typing import Final

import numpy as np

from ..block.file import FileNode
from ..errors import UsageError
from .compressed import ZLIB
from .header import (
    CLUSTER_BITS_MAX,
    CLUSTER_BITS_MIN,
    CLUSTER_BITS_MIN_EXTENDED_L2,
    EXTENSION_BACKING_FORMAT,
    EXTENSION_DATA_FILE,
    HEADER_BYTES_V2,
    HEADER_BYTES_V3,
    L1_BYTES_MAX,
    REFCOUNT_ORDER_MAX,
    Autoclear,
    Compatible,
    Header,
    HeaderExtension,
    Incompatible,
    feature_names_extension,
    pack_header,
)
from .preallocate import (
    Places,
    Preallocation,
    check_data_file,
    has_data_file,
    plan,
    reserve,
    write_tables,
)
from .refcount_codec import counts_per_block, empty_counts, pack_counts

_FEATURE_NAMES_CLUSTER_MIN: Final = 8192
"""Smaller clusters need their room for other header extensions (QEMU: up to 4 KiB)."""


async def create_image(
    path: str | os.PathLike[str],
    size: int,
    *,
    cluster_size: int = 65536,
    version: int = 3,
    refcount_bits: int = 16,
    extended_l2: bool = False,
    backing_file: str | None = None,
    backing_format: str | None = None,
    lazy_refcounts: bool = False,
    compression_type: int = ZLIB,
    data_file: str | None = None,
    data_file_raw: bool = False,
    preallocation: Preallocation = Preallocation.OFF,
) -> None:
    """Make a new image in a new file; it is durable on return.

    The host clusters are, in this order: header, refcount table, refcount blocks, L1 table.

    Args:
        path: Must not exist.
        size: Bytes of the disk.
        cluster_size: Bytes, a power of two from 512 to 2 MiB.
        version: 3, or 2 for programs of before 2012.
        refcount_bits: A power of two from 1 to 64; 16 in version 2.
        extended_l2: Whether clusters have 32 subclusters: less to copy from a backing file.
        backing_file: What unallocated clusters show, named as the image is to name it.
        backing_format: Its format.
        lazy_refcounts: Let programs that can put off refcounts do so.
        compression_type: Of clusters that are compressed later.
        data_file: Where guest data are to lie, named as the image is to name it. It must not
            exist, but for a raw one of the disk's size, which is taken as it is.
        data_file_raw: Keep the data file equal to the disk; its metadata are preallocated.
        preallocation: Which guest clusters have a place from the beginning.

    Raises:
        UsageError: The options do not go together.
        OSError: The file exists or cannot be written; nothing is left behind.
    """
    entry_bytes = 16 if extended_l2 else 8
    _check_options(size, cluster_size, version, refcount_bits, entry_bytes)
    header = _make_header(size, cluster_size, version, refcount_bits, entry_bytes)
    _add_features(header, lazy_refcounts, compression_type)
    check_data_file(data_file, data_file_raw, version, backing_file)
    _add_names(header, backing_file, backing_format, data_file, data_file_raw)
    if data_file_raw and preallocation is Preallocation.OFF:
        preallocation = Preallocation.METADATA
    places = plan(header, preallocation)
    blocks = _place_tables(header, sum(places))
    clusters = _refcount_clusters(header, blocks, sum(places))
    first_cluster = pack_header(header, os.fspath(path))
    with ExitStack() as created:
        _create_file(path, created)
        if data_file is not None:
            data_path = os.path.join(os.path.dirname(os.fspath(path)), data_file)
            await _create_data_file(data_path, header, preallocation, created)
        await _write_image(path, header, clusters, first_cluster, places, preallocation)
        created.pop_all()


def _add_features(header: Header, lazy_refcounts: bool, compression_type: int) -> None:
    if header.version < 3 and (lazy_refcounts or compression_type != ZLIB):
        raise UsageError("lazy refcounts and other compression types than zlib need version 3")
    if lazy_refcounts:
        header.compatible_features |= Compatible.LAZY_REFCOUNTS
    if compression_type != ZLIB:
        header.compression_type = compression_type
        header.incompatible_features |= Incompatible.COMPRESSION


def _add_names(
    header: Header,
    backing_file: str | None,
    backing_format: str | None,
    data_file: str | None,
    is_raw: bool,
) -> None:
    """Let the header name other files."""
    if data_file is not None:
        header.incompatible_features |= Incompatible.DATA_FILE
        header.extensions.insert(0, HeaderExtension(EXTENSION_DATA_FILE, os.fsencode(data_file)))
    if is_raw:
        header.autoclear_features |= Autoclear.DATA_FILE_RAW
    if backing_file is not None:
        header.backing_file = os.fsencode(backing_file)
        if backing_format is not None:
            data = backing_format.encode()
            header.extensions.insert(0, HeaderExtension(EXTENSION_BACKING_FORMAT, data))


def _create_file(path: str | os.PathLike[str], created: ExitStack) -> None:
    """Create a file that goes again when ``created`` is left."""
    os.close(os.open(path, os.O_CREAT | os.O_EXCL | os.O_WRONLY | os.O_CLOEXEC, 0o644))
    created.callback(_remove, path)


def _remove(path: str | os.PathLike[str]) -> None:
    with suppress(OSError):  # the error that brought us here says more
        os.unlink(path)


async def _create_data_file(
    path: str, header: Header, preallocation: Preallocation, created: ExitStack
) -> None:
    is_raw = bool(header.autoclear_features & Autoclear.DATA_FILE_RAW)
    is_new = not (is_raw and has_data_file(path, header.size))
    if is_new:
        _create_file(path, created)
    file = FileNode.open(path, read_only=False)
    try:
        if is_new:
            await reserve(file, 0, header.size, preallocation)
    finally:
        await file.close()


def _check_options(
    size: int, cluster_size: int, version: int, refcount_bits: int, entry_bytes: int
) -> None:
    sizes = [1 << bits for bits in range(CLUSTER_BITS_MIN, CLUSTER_BITS_MAX + 1)]
    if cluster_size not in sizes:
        raise UsageError(
            f"cluster size {cluster_size} is not a power of two from {sizes[0]} to {sizes[-1]}"
        )
    if version not in (2, 3):
        raise UsageError(f"qcow2 version {version}: must be 2 or 3")
    if refcount_bits not in [1 << order for order in range(REFCOUNT_ORDER_MAX + 1)]:
        raise UsageError(f"refcounts of {refcount_bits} bits: must be a power of two from 1 to 64")
    if version == 2 and refcount_bits != 16:
        raise UsageError("version 2 has refcounts of 16 bits only")
    if entry_bytes == 16 and (version == 2 or cluster_size < 1 << CLUSTER_BITS_MIN_EXTENDED_L2):
        raise UsageError("extended L2 entries need version 3 and clusters of 16 KiB at least")
    table_bytes = cluster_size // entry_bytes * cluster_size
    if size < 0 or -(-size // table_bytes) * 8 > L1_BYTES_MAX:
        largest = L1_BYTES_MAX // 8 * table_bytes
        raise UsageError(
            f"a disk of {size} bytes: clusters of {cluster_size} bytes allow {largest} at most"
        )


def _make_header(
    size: int, cluster_size: int, version: int, refcount_bits: int, entry_bytes: int
) -> Header:
    table_bytes = cluster_size // entry_bytes * cluster_size
    has_names = version >= 3 and cluster_size >= _FEATURE_NAMES_CLUSTER_MIN
    return Header(
        version=version,
        cluster_bits=cluster_size.bit_length() - 1,
        size=size,
        l1_size=-(-size // table_bytes),
        l1_table_offset=0,
        refcount_table_offset=cluster_size,
        refcount_table_clusters=1,
        incompatible_features=Incompatible.EXTENDED_L2 if entry_bytes == 16 else 0,
        refcount_order=refcount_bits.bit_length() - 1,
        header_length=HEADER_BYTES_V3 if version >= 3 else HEADER_BYTES_V2,
        unknown_fields=bytes(7) if version >= 3 else b"",
        extensions=[feature_names_extension()] if has_names else [],
    )


def _place_tables(header: Header, preallocated: int) -> int:
    """Place the tables behind one another; return how many refcount blocks all clusters need."""
    size = header.cluster_size
    l1_clusters = max(1, -(-header.l1_size * 8 // size))
    per_block = counts_per_block(header.cluster_bits, header.refcount_order)
    table_clusters = blocks = 1
    while True:
        total = 1 + table_clusters + blocks + l1_clusters + preallocated
        needed = -(-total // per_block), -(-blocks * 8 // size)
        if needed == (blocks, table_clusters):
            break
        blocks, table_clusters = max(blocks, needed[0]), max(table_clusters, needed[1])
    header.refcount_table_clusters = table_clusters
    header.l1_table_offset = (1 + table_clusters + blocks) * size
    return blocks


def _refcount_clusters(header: Header, blocks: int, preallocated: int) -> bytes:
    """The refcount table and the blocks that describe all clusters of the new image."""
    size = header.cluster_size
    l1_clusters = max(1, -(-header.l1_size * 8 // size))
    total = 1 + header.refcount_table_clusters + blocks + l1_clusters + preallocated
    first_block = header.refcount_table_offset + header.refcount_table_clusters * size
    table = np.zeros(header.refcount_table_clusters * size // 8, dtype=">u8")
    table[:blocks] = first_block + size * np.arange(blocks)
    per_block = counts_per_block(header.cluster_bits, header.refcount_order)
    counts = empty_counts(blocks * per_block, header.refcount_bits)
    counts[:total] = 1
    return table.tobytes() + pack_counts(counts, header.refcount_bits)


async def _write_image(
    path: str | os.PathLike[str],
    header: Header,
    clusters: bytes,
    first_cluster: bytes,
    places: Places,
    preallocation: Preallocation,
) -> None:
    """Write the tables and then, when they are durable, the header."""
    file = FileNode.open(path, read_only=False)
    try:
        await file.write(header.refcount_table_offset, memoryview(clusters))
        l1_clusters = max(1, -(-header.l1_size * 8 // header.cluster_size))
        l1_end = header.l1_table_offset + l1_clusters * header.cluster_size
        await file.grow(l1_end)
        if places.l2_tables:
            await write_tables(file, header, places)
            l2_end = l1_end + places.l2_tables * header.cluster_size
            length = places.guest_clusters * header.cluster_size
            await reserve(file, l2_end, length, preallocation)
        await file.flush()
        await file.write(0, memoryview(first_cluster))
    finally:
        await file.close()
