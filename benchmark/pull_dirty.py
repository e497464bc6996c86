"""An incremental pull with libnbd: the map of a dirty bitmap, then what is dirty.

A program of its own, so that each pull begins with nothing in memory: it prints one line of
JSON with the seconds from connecting to the last byte, the bytes, and a checksum of them.
"""

from __future__ import annotations

import json
import sys
import time
import zlib
from typing import Any

import nbd

REQUEST_BYTES = 256 << 10
REQUESTS_MAX = 64
STATUS_BYTES = 1 << 30


def dirty_ranges(handle: Any, context: str) -> list[tuple[int, int]]:
    """``(offset, length)`` of what is dirty, adjacent ranges joined."""
    ranges: list[tuple[int, int]] = []
    offset = 0
    size = handle.get_size()

    def collect(name: str, start: int, entries: list[int], error: int) -> int:
        nonlocal offset
        if name != context:
            return 0
        for length, flags in zip(entries[::2], entries[1::2], strict=True):
            if flags:
                ranges.append((start, length))
            start += length
        offset = start
        return 0

    while offset < size:
        handle.block_status(min(size - offset, STATUS_BYTES), offset, collect)
    return ranges


def read_all(handle: Any, ranges: list[tuple[int, int]]) -> tuple[int, int]:
    """Read the ranges, many requests in flight; the bytes and a checksum that knows the order."""
    total = checksum = 0
    flying: list[tuple[int, Any]] = []

    def finish(cookie: int, buffer: Any) -> None:
        nonlocal total, checksum
        while not handle.aio_command_completed(cookie):
            handle.poll(-1)
        total += buffer.size()
        checksum = zlib.crc32(buffer.to_bytearray()[:8], checksum)

    for offset, length in ranges:
        for at in range(offset, offset + length, REQUEST_BYTES):
            if len(flying) == REQUESTS_MAX:
                finish(*flying.pop(0))
            buffer = nbd.Buffer(min(REQUEST_BYTES, offset + length - at))
            flying.append((handle.aio_pread(buffer, at), buffer))
    for cookie, buffer in flying:
        finish(cookie, buffer)
    return total, checksum


def main() -> None:
    """Pull what is dirty on the command line's URI, by the command line's context."""
    uri, context = sys.argv[1:]
    begin = time.perf_counter()
    handle = nbd.NBD()
    handle.add_meta_context(context)
    handle.connect_uri(uri)
    ranges = dirty_ranges(handle, context)
    mapped = time.perf_counter() - begin
    total, checksum = read_all(handle, ranges)
    seconds = time.perf_counter() - begin
    handle.shutdown()
    print(json.dumps({"seconds": seconds, "map": mapped, "bytes": total, "checksum": checksum}))


if __name__ == "__main__":
    main()
