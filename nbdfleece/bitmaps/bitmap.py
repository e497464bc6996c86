"""A bitmap of a disk's granules, held as the bytes that qcow2 stores.

Bit ``i`` says whether granule ``i`` (the bytes from ``i * granularity`` on) is
dirty. The bits are packed least significant first, so loading and storing are
plain copies, a merge is one ``|=``, and runs come out of numpy. Bits past the
end of the disk are always zero.

Spec: qcow2.txt, "Bitmap data".
"""

from __future__ import annotations

import mmap
import operator
from collections.abc import Callable, Iterator
from typing import Any, Final

import numpy as np
import numpy.typing as npt

from ..extents import Extents
from .memory import zeroed_memory

Bytes = npt.NDArray[np.uint8]
Words = npt.NDArray[np.uint64]

GRANULARITY_MIN: Final = 1 << 9
GRANULARITY_MAX: Final = 1 << 31
"""QEMU's limits (block/qcow2-bitmap.c: BME_MIN_GRANULARITY_BITS, BME_MAX_GRANULARITY_BITS)."""

_SCAN_BYTES: Final = 1 << 16
"""Bitmap bytes examined at once when runs are sought: 512 Ki bits, 0.5 MiB when unpacked."""

_DENSE_BYTES_MIN: Final = 1 << 12
"""Of those that are not all equal no fewer are unpacked at once, however few runs are sought."""

_PAGE: Final = mmap.PAGESIZE

_ONES_BELOW: Final = tuple((1 << bit) - 1 for bit in range(9))
"""``_ONES_BELOW[n]`` has the ``n`` lowest bits of a byte set."""


class Bitmap:
    """The dirty granules of a disk.

    Args:
        size: Bytes of the disk.
        granularity: Bytes per bit, a power of two from 512 to 2 GiB.
        data: Packed bits to take over; shorter data is zero-extended. None means all clear.

    Raises:
        ValueError: The granularity is none, or ``data`` is too long.
    """

    __slots__ = ("_bits", "_shift", "granularity", "size")

    def __init__(
        self, size: int, granularity: int = 65536, data: bytes | memoryview | None = None
    ) -> None:
        if granularity & (granularity - 1) or not GRANULARITY_MIN <= granularity <= GRANULARITY_MAX:
            raise ValueError(
                f"granularity {granularity} is not a power of two"
                f" from {GRANULARITY_MIN} to {GRANULARITY_MAX}"
            )
        self.size = size
        self.granularity = granularity
        self._shift = granularity.bit_length() - 1
        self._bits = zeroed_memory(-(-self.bit_count // 8))
        if data is not None:
            if len(data) > len(self._bits):
                raise ValueError(f"{len(data)} bytes of bits where {len(self._bits)} are enough")
            _combine(self.array(), np.frombuffer(data, dtype=np.uint8), None)
            self._clear_tail()

    @property
    def bit_count(self) -> int:
        """How many granules the disk has; the last one may reach past its end."""
        return -(-self.size // self.granularity)

    @property
    def data(self) -> memoryview:
        """The packed bits, ``ceil(bit_count / 8)`` bytes, read-only."""
        return memoryview(self._bits).toreadonly()

    def array(self) -> Bytes:
        """The packed bits as a writable numpy view of shape (ceil(bit_count / 8),).

        Whoever writes through it keeps the bits past the end of the disk zero.
        """
        return np.frombuffer(self._bits, dtype=np.uint8)

    def bits_of(self, offset: int, length: int) -> memoryview:
        """The packed bits of the granules that a range touches, by whole bytes, read-only."""
        bits = self._shift + 3
        return self.data[offset >> bits : (offset + length - 1 >> bits) + 1]

    def put(self, position: int, data: memoryview) -> None:
        """Store packed bits at a byte's number; what is past the end of the disk is left out."""
        part = np.frombuffer(data, dtype=np.uint8)[: max(0, len(self._bits) - position)]
        mine = self.array()[position : position + len(part)]
        if not np.array_equal(mine, part):  # zeroes on zeroes would only take memory
            mine[:] = part
            self._clear_tail()

    def copy(self) -> Bitmap:
        """An independent bitmap with the same bits."""
        return Bitmap(self.size, self.granularity, self.data)

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Bitmap):
            return NotImplemented
        return (
            self.size == other.size
            and self.granularity == other.granularity
            and np.array_equal(self.array(), other.array())
        )

    __hash__ = None  # type: ignore[assignment]  # mutable, as list is

    def __repr__(self) -> str:
        return (
            f"<Bitmap size={self.size} granularity={self.granularity} dirty={self.dirty_bytes()}>"
        )

    def set_range(self, offset: int, length: int) -> None:
        """Mark every granule that the ``length`` bytes from ``offset`` on touch."""
        first, last = offset >> self._shift, offset + length - 1 >> self._shift
        if first == last:
            self._bits[first >> 3] |= 1 << (first & 7)
        else:
            self._assign(first, last + 1, True)

    def clear_range(self, offset: int, length: int) -> None:
        """Clear every granule that the ``length`` bytes from ``offset`` on touch."""
        self._assign(offset >> self._shift, (offset + length - 1 >> self._shift) + 1, False)

    def _assign(self, first: int, end: int, value: bool) -> None:
        """Set or clear the bits ``[first, end)``, ``end > first``."""
        bits = self._bits
        first_byte, last_byte = first >> 3, end - 1 >> 3
        head = 0xFF & ~_ONES_BELOW[first & 7]
        tail = _ONES_BELOW[(end - 1 & 7) + 1]
        if first_byte == last_byte:
            if value:
                bits[first_byte] |= head & tail
            else:
                bits[first_byte] &= ~(head & tail)
            return
        if value:
            bits[first_byte] |= head
            bits[last_byte] |= tail
        else:
            bits[first_byte] &= ~head
            bits[last_byte] &= ~tail
        middle = last_byte - first_byte - 1
        if middle:
            bits[first_byte + 1 : last_byte] = (b"\xff" if value else b"\0") * middle

    def set_all(self) -> None:
        """Mark every granule."""
        self.array()[:] = 0xFF
        self._clear_tail()

    def is_set(self, offset: int) -> bool:
        """Whether the granule that holds the byte at ``offset`` is dirty."""
        bit = offset >> self._shift
        return bool(self._bits[bit >> 3] >> (bit & 7) & 1)

    def is_empty(self) -> bool:
        """Whether no granule is dirty."""
        return not self.array().any()

    def bits_set(self) -> int:
        """How many granules are dirty."""
        pages, tail = _split(self.array())
        return _count_bits(pages[_used(pages)]) + _count_bits(tail)

    def dirty_bytes(self) -> int:
        """Bytes of the disk that lie in dirty granules; the last granule ends with the disk."""
        total = self.bits_set() * self.granularity
        if self.size % self.granularity and self.is_set(self.size - 1):
            total -= self.granularity - self.size % self.granularity
        return total

    def merge(self, other: Bitmap) -> None:
        """Mark everything that ``other`` marks; granularities may differ, sizes may not.

        From finer to coarser a granule is marked when any of its parts is; from
        coarser to finer all parts are. Nothing marked is ever lost (rule 2).

        Raises:
            ValueError: The bitmaps are of disks of different sizes.
        """
        if other.size != self.size:
            raise ValueError(f"bitmaps of {other.size} and {self.size} bytes cannot be merged")
        if other.granularity == self.granularity:
            _combine(self.array(), other.array(), operator.or_)
            return
        for offset, length in other.dirty_ranges():
            self.set_range(offset, length)

    def subtract(self, other: Bitmap) -> None:
        """Clear everything that ``other`` marks; both have the same size and granularity.

        Raises:
            ValueError: They have not.
        """
        if other.size != self.size or other.granularity != self.granularity:
            raise ValueError("only bitmaps of one size and granularity can be subtracted")
        _combine(self.array(), other.array(), lambda mine, others: mine & ~others)

    def resized(self, size: int) -> Bitmap:
        """A bitmap of a disk of another size; what is new in it is clear, as in QEMU."""
        new = Bitmap(size, self.granularity)
        new._bits[:] = self._bits[: len(new._bits)].ljust(len(new._bits), b"\0")
        new._clear_tail()
        return new

    def dirty_ranges(self) -> Iterator[tuple[int, int]]:
        """All dirty ranges as ``(offset, length)`` in bytes, ascending, none adjacent."""
        offset = 0
        pending: tuple[int, int] | None = None
        for length, status in self._runs(0, self.size, extents_max=None):
            if status and pending is not None:
                pending = (pending[0], pending[1] + length)
            elif status:
                pending = (offset, length)
            elif pending is not None:
                yield pending
                pending = None
            offset += length
        if pending is not None:
            yield pending

    def extents(self, offset: int, length: int, *, extents_max: int = 1 << 20) -> Extents:
        """The range as extents of status 1 (dirty) and 0 (clean).

        Returns:
            At most ``extents_max`` extents that begin at ``offset``, alternate, and
            together reach ``offset + length`` unless the maximum is hit.
        """
        parts = list(self._scan(offset, length, extents_max))
        found = parts[0] if len(parts) == 1 else Extents.concatenate(parts)
        return found.limited(extents_max)

    def _runs(
        self, offset: int, length: int, *, extents_max: int | None
    ) -> Iterator[tuple[int, int]]:
        """``(length, status)`` of the range; equal neighbours may occur between two scans."""
        for part in self._scan(offset, length, extents_max):
            yield from zip(part.lengths.tolist(), part.status.tolist(), strict=True)

    def _scan(self, offset: int, length: int, extents_max: int | None) -> Iterator[Extents]:
        """The range as parts of at most ``_SCAN_BYTES`` bitmap bytes, each merged in itself."""
        if length <= 0:
            return
        end = offset + length
        array = self.array()
        bits = self._shift + 3
        """Of a byte's number in an offset."""
        first_byte = offset >> bits
        byte_end = (end - 1 >> bits) + 1
        found = 0
        while first_byte < byte_end and (extents_max is None or found <= extents_max):
            stop = min(first_byte + _SCAN_BYTES, byte_end)
            part = _uniform(array, first_byte, stop)
            if part is None and extents_max is not None:  # no more than may be full of extents
                enough = (extents_max - found) // 8 + 2
                stop = min(stop, first_byte + max(enough, _DENSE_BYTES_MIN))
            begin, limit = max(offset, first_byte << bits), min(end, stop << bits)
            if part is None:
                extents = self._alternating(begin, limit)
            else:
                extents = Extents.single(limit - begin, part)
            yield extents
            found += len(extents.lengths) - 1  # the first may be joined to the one before
            first_byte = stop

    def _alternating(self, offset: int, end: int) -> Extents:
        """The range ``[offset, end)`` with all its changes from clean to dirty and back."""
        first, last = offset >> self._shift, (end - 1 >> self._shift) + 1
        skipped = first >> 3 << 3
        bits = np.unpackbits(self.array()[first >> 3 : (last + 7) >> 3], bitorder="little")
        bits = bits[first - skipped : last - skipped]
        edges = np.flatnonzero(bits[1:] != bits[:-1])
        if not len(edges):
            return Extents.single(end - offset, int(bits[0]))
        status = np.empty(len(edges) + 1, dtype=np.uint32)
        status[::2] = bits[0]
        status[1::2] = 1 - bits[0]
        lengths = np.empty(len(edges) + 1, dtype=np.int64)
        np.subtract(edges[1:], edges[:-1], out=lengths[1:-1])
        lengths[1:-1] <<= self._shift
        lengths[0] = (first + int(edges[0]) + 1 << self._shift) - offset
        lengths[-1] = end - (first + int(edges[-1]) + 1 << self._shift)
        return Extents(lengths, status)

    def _clear_tail(self) -> None:
        """Clear the bits of the last byte that lie past the end of the disk."""
        if self.bit_count % 8:
            self._bits[-1] &= _ONES_BELOW[self.bit_count % 8]


def _split(array: Bytes) -> tuple[Words, Bytes]:
    """An array as words, shape (pages, 512), and the bytes after the last whole page."""
    whole = len(array) // _PAGE * _PAGE
    return array[:whole].view(np.uint64).reshape(-1, _PAGE // 8), array[whole:]


def _used(pages: Words) -> npt.NDArray[np.intp]:
    """The pages that are not all zero: ``max`` tells ten times sooner than ``any`` does."""
    return np.flatnonzero(pages.max(axis=1))


def _combine(mine: Bytes, given: Bytes, how: Callable[[Any, Any], Any] | None) -> None:
    """Change the beginning of an array by what is not zero in another one.

    The rest is neither written, which would take memory, nor read.

    Args:
        mine: Is changed.
        given: No longer than it.
        how: Makes the new words of both; None to take those that are given.
    """
    pages, tail = _split(given)
    mine_pages, mine_tail = _split(mine[: len(given)])
    used = _used(pages)
    mine_pages[used] = pages[used] if how is None else how(mine_pages[used], pages[used])
    mine_tail[:] = tail if how is None else how(mine_tail, tail)


def _count_bits(array: Bytes | Words) -> int:
    if hasattr(np, "bitwise_count"):  # from numpy 2 on
        return int(np.bitwise_count(array).sum())
    return int.from_bytes(array.tobytes(), "little").bit_count()


def _uniform(array: Bytes, start: int, stop: int) -> int | None:
    """0 or 1 if the bits of all bytes ``[start, stop)`` are equal, else None."""
    first = array[start]
    if first in (0, 0xFF) and not (array[start:stop] != first).any():
        return int(first & 1)
    return None
