"""Compressed clusters: where they lie, how to inflate them, and how to make them.

Spec: qcow2.txt, "Compressed Clusters Descriptor", and "compression_type". The length
is in whole sectors, so what follows the compressed data in the last one is not
theirs: inflating stops after one cluster.
"""

from __future__ import annotations

import errno
import zlib
from typing import Final

from .entries import COMPRESSED
from .zstd import zstd

ZLIB: Final = 0
ZSTD: Final = 1

_ZLIB_WINDOW_BITS: Final = -12
"""Raw deflate with a window of 4 KiB, as QEMU writes it."""

_ZSTD_WINDOW_LOG_MAX: Final = 21
"""A frame holds one cluster at most: a larger window is only a claim on our memory."""

_SECTOR: Final = 512
_SECTORS_SHIFT: Final = 8
"""An entry counts sectors with ``cluster_bits - 8`` bits."""


def compressed_entry(host: int, length: int, cluster_bits: int) -> int:
    """The L2 entry of a compressed cluster.

    Args:
        host: Where it begins, in bytes.
        length: Its bytes, fewer than a cluster's.
        cluster_bits: Of the image.
    """
    more_sectors = (host + length - 1) // _SECTOR - host // _SECTOR
    return COMPRESSED | more_sectors << 62 - (cluster_bits - _SECTORS_SHIFT) | host


def deflate(cluster: bytes | bytearray | memoryview, compression_type: int) -> bytes | None:
    """Compress one cluster; None if it would not become smaller.

    Both compressors let other threads run meanwhile.
    """
    if compression_type == ZSTD:
        packed = zstd.compress(cluster)
    else:
        deflater = zlib.compressobj(wbits=_ZLIB_WINDOW_BITS)
        packed = deflater.compress(cluster) + deflater.flush()
    return packed if len(packed) < len(cluster) else None


def compressed_range(entry: int, cluster_bits: int) -> tuple[int, int]:
    """Where a compressed cluster lies: ``(host offset, bytes up to the last sector's end)``."""
    offset_bits = 62 - (cluster_bits - _SECTORS_SHIFT)
    offset = entry & (1 << offset_bits) - 1
    sectors = (entry >> offset_bits & (1 << cluster_bits - _SECTORS_SHIFT) - 1) + 1
    return offset, sectors * _SECTOR - offset % _SECTOR


def inflate(data: bytes | bytearray, cluster_size: int, compression_type: int) -> bytes:
    """Inflate one cluster.

    Raises:
        OSError: EIO: the data are damaged or do not fill the cluster.
    """
    try:
        cluster = (
            _inflate_zstd(data, cluster_size)
            if compression_type
            else _inflate_zlib(data, cluster_size)
        )
    except (zlib.error, zstd.ZstdError) as error:
        raise OSError(errno.EIO, f"damaged compressed cluster: {error}") from error
    if len(cluster) != cluster_size:
        raise OSError(errno.EIO, "compressed cluster is too short")
    return cluster


def _inflate_zlib(data: bytes | bytearray, cluster_size: int) -> bytes:
    return zlib.decompressobj(_ZLIB_WINDOW_BITS).decompress(data, cluster_size)


def _inflate_zstd(data: bytes | bytearray, cluster_size: int) -> bytes:
    """One cluster may be several frames in a row."""
    parts: list[bytes] = []
    length = 0
    rest = bytes(data)
    while length < cluster_size and rest:
        options = {int(zstd.DecompressionParameter.window_log_max): _ZSTD_WINDOW_LOG_MAX}
        frame = zstd.ZstdDecompressor(options=options)
        part = frame.decompress(rest, cluster_size - length)
        if not part and not frame.eof:
            break
        parts.append(part)
        length += len(part)
        rest = frame.unused_data if frame.eof else b""
    return b"".join(parts)
