"""A disk in memory that fails where and as often as one likes: for tests of what reads it.

    nbdkit python examples/error_injector.py size=1M fail=pread:4096-8191:EIO fail=pwrite::ENOSPC:2

Parameters:
    size    how large; 1M if it is not given
    fail    OPERATION:FIRST-LAST:ERRNO:COUNT, where OPERATION is pread, pwrite, zero, trim or
            flush; an empty range is the whole disk, and without COUNT it fails for ever. May be
            given several times.
"""

from __future__ import annotations

import errno
from dataclasses import dataclass

import nbdkit

API_VERSION = 2

OPERATIONS = ("pread", "pwrite", "zero", "trim", "flush")


@dataclass
class Fault:
    """What is to fail: ``left`` times, or for ever if that is negative."""

    operation: str
    begin: int
    end: int
    error: int
    left: int


disk = bytearray(1 << 20)
faults: list[Fault] = []


def parse_fault(text: str) -> Fault:
    """Read OPERATION:FIRST-LAST:ERRNO:COUNT."""
    operation, where, name, *rest = text.split(":")
    if operation not in OPERATIONS:
        raise ValueError(f"fail={text}: the operation is one of {', '.join(OPERATIONS)}")
    number = getattr(errno, name, None)
    if not isinstance(number, int) or len(rest) > 1:
        raise ValueError(f"fail={text}: OPERATION:FIRST-LAST:ERRNO:COUNT is meant")
    begin, end = 0, 1 << 63
    if where:
        first, last = where.split("-")
        begin, end = nbdkit.parse_size(first), nbdkit.parse_size(last) + 1
    return Fault(operation, begin, end, number, int(rest[0]) if rest else -1)


def config(key: str, value: str) -> None:
    """Take a parameter."""
    if key == "size":
        disk[:] = bytes(nbdkit.parse_size(value))
    elif key == "fail":
        faults.append(parse_fault(value))
    else:
        raise ValueError(f"unknown parameter {key!r}: there are size and fail")


def check(operation: str, offset: int, count: int) -> None:
    """Fail, if this is to fail."""
    for fault in faults:
        touches = offset < fault.end and offset + count > fault.begin
        if fault.operation == operation and touches and fault.left:
            fault.left -= 1
            nbdkit.set_error(fault.error)
            raise OSError(fault.error, f"{operation} at {offset} is to fail")


def open(readonly: bool) -> bytearray:
    """All clients have the one disk."""
    return disk


def get_size(h: bytearray) -> int:
    """Bytes of the disk."""
    return len(h)


def pread(h: bytearray, buf: memoryview, offset: int, flags: int) -> None:
    """Copy out."""
    check("pread", offset, len(buf))
    buf[:] = h[offset : offset + len(buf)]


def pwrite(h: bytearray, buf: memoryview, offset: int, flags: int) -> None:
    """Copy in."""
    check("pwrite", offset, len(buf))
    h[offset : offset + len(buf)] = buf


def zero(h: bytearray, count: int, offset: int, flags: int) -> None:
    """Make zeroes."""
    check("zero", offset, count)
    h[offset : offset + count] = bytes(count)


def trim(h: bytearray, count: int, offset: int, flags: int) -> None:
    """Forget."""
    check("trim", offset, count)
    h[offset : offset + count] = bytes(count)


def flush(h: bytearray, flags: int) -> None:
    """Nothing to do but to fail."""
    check("flush", 0, len(h))
