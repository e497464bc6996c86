"""A disk in memory that is lost at the end: the smallest plugin that does everything.

    nbdkit python examples/ramdisk.py size=100M

Parameters:
    size    how large; 1M if it is not given
"""

from __future__ import annotations

import nbdkit

API_VERSION = 2

BLOCK = 4096
"""Bytes; what extents tell holes by."""

disk = bytearray(1 << 20)


def config(key: str, value: str) -> None:
    """Take a parameter."""
    if key != "size":
        raise ValueError(f"unknown parameter {key!r}: there is only size")
    disk[:] = bytes(nbdkit.parse_size(value))


def open(readonly: bool) -> bytearray:
    """All clients have the one disk."""
    return disk


def get_size(h: bytearray) -> int:
    """Bytes of the disk."""
    return len(h)


def can_multi_conn(h: bytearray) -> bool:
    """What one client has written, the next reads."""
    return True


def can_fua(h: bytearray) -> int:
    """Memory is as durable as it will ever be."""
    return nbdkit.FUA_NATIVE


def pread(h: bytearray, buf: memoryview, offset: int, flags: int) -> None:
    """Copy out."""
    buf[:] = h[offset : offset + len(buf)]


def pwrite(h: bytearray, buf: memoryview, offset: int, flags: int) -> None:
    """Copy in."""
    h[offset : offset + len(buf)] = buf


def zero(h: bytearray, count: int, offset: int, flags: int) -> None:
    """Make zeroes."""
    h[offset : offset + count] = bytes(count)


def trim(h: bytearray, count: int, offset: int, flags: int) -> None:
    """Forget: the same here."""
    zero(h, count, offset, flags)


def flush(h: bytearray, flags: int) -> None:
    """Nothing to do."""


def extents(h: bytearray, count: int, offset: int, flags: int) -> list[tuple[int, int, int]]:
    """Blocks of zeroes are holes; neighbours of one kind are one extent."""
    found: list[tuple[int, int, int]] = []
    end = offset + count
    while offset < end:
        stop = min(end, (offset // BLOCK + 1) * BLOCK)
        is_data = any(memoryview(h)[offset:stop])
        kind = 0 if is_data else nbdkit.EXTENT_HOLE | nbdkit.EXTENT_ZERO
        if found and found[-1][2] == kind:
            first, length, _ = found.pop()
            found.append((first, length + stop - offset, kind))
        elif found and flags & nbdkit.FLAG_REQ_ONE:
            break
        else:
            found.append((offset, stop - offset, kind))
        offset = stop
    return found
