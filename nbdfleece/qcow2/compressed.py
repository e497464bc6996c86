"""Compressed clusters: where they lie, how to inflate them, and how to make them.

Spec: qcow2.txt, "Compressed Clusters Descriptor", and "compression_type". The length
is in whole sectors, so what follows the compressed data in the last one is not
theirs: inflating stops after one cluster.
"""

from __future__ import annotations

import contextlib
import errno
import os
import zlib
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any, Final, NamedTuple, cast

from ..block.file import FileNode
from ..block.threads import in_pool
from .entries import COMPRESSED
from .libzstd import ZstdError, load
from .zstd import zstd

Decompressor = Callable[[int], Any]
"""Makes a decompressor object, as zlib's ``decompressobj``, for a number of window bits."""

_decompressor: Decompressor = zlib.decompressobj
_DAMAGE: tuple[type[Exception], ...] = (zlib.error, zstd.ZstdError)
with contextlib.suppress(ImportError):  # the extra "fast"; without it the same at half the speed
    from isal import isal_zlib

    _decompressor = isal_zlib.decompressobj
    _DAMAGE += (cast("type[Exception]", isal_zlib.error),)

Data = bytes | bytearray | memoryview

_zstd_library = load()

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


_INLINE_BYTES_MAX: Final = 256 << 10
"""Bytes of clusters that are inflated in the loop's thread: 0.1 ms with zstd, 0.5 with isal, 1
with zlib. With two processors threads for less made no reader faster, and cost more."""

_KEPT_MAX: Final = 8
"""Inflated clusters kept for reads smaller than a cluster."""

_pool = ThreadPoolExecutor(os.cpu_count() or 1, thread_name_prefix="nbdfleece-inflate")
"""As many threads as can work: inflating never waits for anything."""


class Piece(NamedTuple):
    """What of a compressed cluster is wanted."""

    entry: int
    """The cluster's L2 entry."""
    skip: int
    """Bytes of the cluster before it."""
    view: memoryview
    """Where it is to go."""

    def fill(self, cluster: bytes) -> None:
        """Take it out of the inflated cluster."""
        self.view[:] = cluster[self.skip : self.skip + len(self.view)]


class CompressedReader:
    """Reads compressed clusters of one image.

    Inflating is the one thing here that takes a processor long. So what a large request
    wants is inflated by a thread.

    Args:
        file: The image file.
        cluster_bits: Of the image.
        compression_type: ZLIB or ZSTD.
    """

    def __init__(self, file: FileNode, cluster_bits: int, compression_type: int) -> None:
        self._file = file
        self._cluster_bits = cluster_bits
        self._type = compression_type
        self._kept: dict[int, bytes] = {}
        """The last clusters that were not wanted whole, where the file cannot change."""

    async def read(self, pieces: list[Piece]) -> None:
        """Fill the views of pieces of adjacent guest clusters.

        Raises:
            OSError: EIO: a cluster is damaged; or as reading the file raised it.
        """
        missing = []
        for piece in pieces:
            cluster = self._kept.get(piece.entry)
            if cluster is None:
                missing.append(piece)
            else:
                piece.fill(cluster)
        if not missing:
            return
        jobs = list(zip(missing, await self._read_deflated(missing), strict=True))
        if len(jobs) << self._cluster_bits <= _INLINE_BYTES_MAX:
            parts = self._inflate_all(jobs)
        else:
            parts = await in_pool(_pool, self._inflate_all, jobs)
        if self._file.read_only:
            self._keep(parts)

    async def _read_deflated(self, pieces: list[Piece]) -> list[memoryview]:
        """The compressed clusters, those that touch one another in the file in one read."""
        places = [compressed_range(piece.entry, self._cluster_bits) for piece in pieces]
        found: list[memoryview] = []
        while len(found) < len(places):
            start, length = places[len(found)]
            if start >= self._file.size:
                path = self._file.path
                raise OSError(errno.EIO, "compressed cluster past the end of the file", path)
            count, end = 1, start + length
            for following, more in places[len(found) + 1 :]:
                if not start <= following <= end:
                    break
                count, end = count + 1, max(end, following + more)
            data = memoryview(await self._file.read(start, end - start))
            here = places[len(found) : len(found) + count]
            found += [data[place - start : place - start + size] for place, size in here]
        return found

    def _inflate_all(self, jobs: list[tuple[Piece, memoryview]]) -> dict[int, bytes]:
        """Inflate clusters; those that were not wanted whole are returned by their entries."""
        parts = {}
        for piece, data in jobs:
            if len(piece.view) >> self._cluster_bits:
                inflate_into(data, piece.view, self._type)
            else:
                cluster = parts[piece.entry] = inflate(data, 1 << self._cluster_bits, self._type)
                piece.fill(cluster)
        return parts

    def _keep(self, clusters: dict[int, bytes]) -> None:
        self._kept |= clusters
        while len(self._kept) > _KEPT_MAX:
            del self._kept[next(iter(self._kept))]


def compressed_range(entry: int, cluster_bits: int) -> tuple[int, int]:
    """Where a compressed cluster lies: ``(host offset, bytes up to the last sector's end)``."""
    offset_bits = 62 - (cluster_bits - _SECTORS_SHIFT)
    offset = entry & (1 << offset_bits) - 1
    sectors = (entry >> offset_bits & (1 << cluster_bits - _SECTORS_SHIFT) - 1) + 1
    return offset, sectors * _SECTOR - offset % _SECTOR


def inflate_into(data: memoryview, view: memoryview, compression_type: int) -> None:
    """Inflate one cluster to where it is wanted; as :func:`inflate`."""
    if compression_type == ZSTD and _zstd_library is not None:
        try:
            _zstd_library.inflate_into(data, view)
        except ZstdError as error:
            raise OSError(errno.EIO, f"damaged compressed cluster: {error}") from error
    else:
        view[:] = inflate(data, len(view), compression_type)


def inflate(data: Data, cluster_size: int, compression_type: int) -> bytes:
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
    except _DAMAGE as error:
        raise OSError(errno.EIO, f"damaged compressed cluster: {error}") from error
    if len(cluster) != cluster_size:
        raise OSError(errno.EIO, "compressed cluster is too short")
    return cluster


def _inflate_zlib(data: Data, cluster_size: int) -> bytes:
    cluster: bytes = _decompressor(_ZLIB_WINDOW_BITS).decompress(data, cluster_size)
    return cluster


def _inflate_zstd(data: Data, cluster_size: int) -> bytes:
    """One cluster may be several frames in a row."""
    parts: list[bytes] = []
    length = 0
    rest = data
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
