"""Compressing what is pulled: which clusters of an image can be, and what is left as it is.

An image's clusters are compressed whole, so a cluster is compressed if everything in it is
known, and if it becomes smaller. Of an increment a cluster of which only a part has changed is
not known here: it is written as it is, and the rest of it comes from the layers below.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Iterable, Iterator, Sequence
from functools import partial
from typing import Final, NamedTuple

from ..qcow2.compressed import ZLIB, ZSTD, deflate
from ..qcow2.image import Qcow2Image
from .blocks import ABSENT, CLUSTER_BYTES, ZEROES
from .manifest import Compression

COMPRESSION_TYPES: Final[dict[Compression, int]] = {"zlib": ZLIB, "zstd": ZSTD}
"""As they are numbered in an image's header."""


class Part(NamedTuple):
    """Bytes of the disk on their way into an image.

    Attributes:
        offset: Where on the disk, in bytes.
        length: How much, in bytes.
        status: A layer's status.
        data: The bytes, if they are data.
    """

    offset: int
    length: int
    status: int
    data: memoryview | None


class Cluster(NamedTuple):
    """A whole cluster, compressed."""

    offset: int
    packed: bytes


class ImageWriter:
    """Writes parts of a disk into an image.

    Args:
        image: The image.
        compression: How clusters are compressed, as the image was made for; None for not at all.
        is_full: What is not written is zero: there is nothing below the image.
        disk_size: Bytes of the disk.
    """

    def __init__(
        self, image: Qcow2Image, compression: Compression | None, *, is_full: bool, disk_size: int
    ) -> None:
        self._image = image
        self._compression = compression
        self._is_full = is_full
        self._disk_size = disk_size

    def prepare(self, parts: Sequence[Part]) -> Callable[[], Awaitable[None]]:
        """Compress what can be, which takes its time: for a thread.

        Args:
            parts: Consecutive parts of the disk, with all that there is of their clusters.

        Returns:
            What writes them, in the loop's thread; it raises OSError if that fails.
        """
        clusters: list[Cluster] = []
        rest: list[Part] = []
        if self._compression is None:
            rest.extend(parts)
        else:
            self._pack(parts, COMPRESSION_TYPES[self._compression], clusters, rest)
        return partial(self._write, clusters, rest)

    def _pack(
        self, parts: Sequence[Part], kind: int, clusters: list[Cluster], rest: list[Part]
    ) -> None:
        for offset, within in _by_cluster(parts):
            cluster = self._assemble(offset, within)
            packed = None if cluster is None else deflate(cluster, kind)
            if packed is None:
                _append(rest, within)
            else:
                clusters.append(Cluster(offset, packed))

    def _assemble(self, offset: int, within: list[Part]) -> memoryview | bytearray | None:
        """A cluster's bytes; None if it has no data, or not all of it is known."""
        first = within[0]
        if first.length == CLUSTER_BYTES:
            return first.data
        known = sum(part.length for part in within if part.status != ABSENT)
        is_known = self._is_full or known == min(CLUSTER_BYTES, self._disk_size - offset)
        if not is_known or all(part.data is None for part in within):
            return None
        cluster = bytearray(CLUSTER_BYTES)
        for part in within:
            if part.data is not None:
                start = part.offset - offset
                cluster[start : start + part.length] = part.data
        return cluster

    async def _write(self, clusters: list[Cluster], rest: list[Part]) -> None:
        """Write it all; zeroes are never left out (the layer below may differ)."""
        for offset, packed in clusters:
            await self._image.write_packed(offset, memoryview(packed))
        for part in rest:
            if part.data is not None:
                await self._image.write(part.offset, part.data)
            elif part.status == ZEROES:
                await self._image.write_zeroes(part.offset, part.length)


def _by_cluster(parts: Iterable[Part]) -> Iterator[tuple[int, list[Part]]]:
    """The parts cut at clusters: where each cluster begins, and what is said of it."""
    start, within = -1, list[Part]()
    for part in parts:
        offset, end = part.offset, part.offset + part.length
        while offset < end:
            cluster = offset - offset % CLUSTER_BYTES
            if cluster != start and within:
                yield start, within
                within = []
            start = cluster
            stop = min(end, cluster + CLUSTER_BYTES)
            within.append(_cut(part, offset, stop))
            offset = stop
    if within:
        yield start, within


def _cut(part: Part, offset: int, stop: int) -> Part:
    data = None if part.data is None else part.data[offset - part.offset : stop - part.offset]
    return Part(offset, stop - offset, part.status, data)


def _append(rest: list[Part], within: list[Part]) -> None:
    """Add what is left of a cluster, as one with what is before it where that is all zeroes."""
    for part in within:
        last = rest[-1] if rest else None
        is_next = last is not None and last.offset + last.length == part.offset
        if last is not None and is_next and last.data is None and last.status == part.status:
            rest[-1] = last._replace(length=last.length + part.length)
        else:
            rest.append(part)
