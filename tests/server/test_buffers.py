"""Buffers are used again, and not hoarded."""

from __future__ import annotations

from nbdfleece.server.buffers import BufferPool


def test_pool_keeps_no_more_than_it_may() -> None:
    pool = BufferPool(1 << 20)
    buffers = [pool.take(1 << 20) for _ in range(3)]
    for buffer in buffers:
        buffer.release()
    assert (pool.taken_bytes, pool.idle_bytes) == (0, 1 << 20)
