"""The load generator of incremental pulls reads what is dirty, and all of it."""

from __future__ import annotations

import random
import zlib

from benchmark.clients import pull_dirty
from benchmark.pull_dirty import REQUEST_BYTES, REQUESTS_MAX, requests
from nbdfleece.testing import LiveServer

MIB = 1 << 20


def test_what_is_dirty_is_read_in_order() -> None:
    """More requests than places to read into, of several lengths."""
    content = random.Random(1).randbytes(6 * MIB)
    ranges = [(offset, 4096) for offset in range(0, 4 * MIB, 16384)]
    ranges.append((5 * MIB, 2 * REQUEST_BYTES + 8192))
    pieces = list(requests(ranges))
    assert len(pieces) > 4 * REQUESTS_MAX
    checksum = 0
    for offset, _ in pieces:
        checksum = zlib.crc32(content[offset : offset + 8], checksum)
    with LiveServer(content, export="x", dirty={"b": ranges}) as server:
        pulled = pull_dirty(server.uri, "qemu:dirty-bitmap:b")
    assert pulled["bytes"] == sum(length for _, length in ranges)
    assert pulled["checksum"] == checksum
    assert 0 < pulled["map"] < pulled["seconds"]
    assert pulled["cpu"] > 0
