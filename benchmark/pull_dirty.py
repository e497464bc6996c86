"""An incremental pull with libnbd: the map of a dirty bitmap, then what is dirty.

    pull_dirty.py URI CONTEXT    # a bitmap's
    pull_dirty.py URI            # no map: standard input has a list of (offset, length) as JSON

A program of its own, so that each pull begins with nothing in memory: it prints one line of
JSON with the seconds from connecting to the last byte, its own processor time in them, the bytes,
and a checksum of them.
"""

from __future__ import annotations

import json
import sys
import time
import zlib
from collections import deque
from collections.abc import Iterator
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
            if flags and ranges and sum(ranges[-1]) == start:
                ranges[-1] = ranges[-1][0], ranges[-1][1] + length
            elif flags:
                ranges.append((start, length))
            start += length
        offset = start
        return 0

    while offset < size:
        handle.block_status(min(size - offset, STATUS_BYTES), offset, collect)
    return ranges


def read_all(handle: Any, ranges: list[tuple[int, int]]) -> tuple[int, int]:
    """Read the ranges, many requests in flight; the bytes and a checksum that knows the order.

    Requests read into the same places again and again, as a backup tool's do: libnbd 1.14 never
    frees an ``nbd.Buffer`` of its own, and to clear new memory takes longer than to receive it.
    """
    places = [memoryview(bytearray(REQUEST_BYTES)) for _ in range(REQUESTS_MAX)]
    flying: deque[tuple[int, memoryview]] = deque()
    total = checksum = 0

    def finish() -> None:
        nonlocal total, checksum
        cookie, place = flying.popleft()
        while not handle.aio_command_completed(cookie):
            handle.poll(-1)
        total += len(place)
        checksum = zlib.crc32(place[:8], checksum)

    for number, (offset, length) in enumerate(requests(ranges)):
        if len(flying) == REQUESTS_MAX:
            finish()
        place = places[number % REQUESTS_MAX][:length]
        flying.append((handle.aio_pread(nbd.Buffer.from_buffer(place), offset), place))
    while flying:
        finish()
    return total, checksum


def requests(ranges: list[tuple[int, int]]) -> Iterator[tuple[int, int]]:
    """The ranges in pieces of a request."""
    for offset, length in ranges:
        for at in range(offset, offset + length, REQUEST_BYTES):
            yield at, min(REQUEST_BYTES, offset + length - at)


def main() -> None:
    """Pull what the command line asks for."""
    uri, *contexts = sys.argv[1:]
    ranges = None if contexts else json.load(sys.stdin)
    begin, used_before = time.perf_counter(), time.process_time()
    handle = nbd.NBD()
    for context in contexts:
        handle.add_meta_context(context)
    handle.connect_uri(uri)
    if ranges is None:
        ranges = dirty_ranges(handle, *contexts)
    mapped = time.perf_counter() - begin
    total, checksum = read_all(handle, ranges)
    seconds, used = time.perf_counter() - begin, time.process_time() - used_before
    handle.shutdown()
    found = {"seconds": seconds, "map": mapped, "cpu": used, "bytes": total, "checksum": checksum}
    print(json.dumps(found))


if __name__ == "__main__":
    main()
