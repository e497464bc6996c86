"""What is mostly zero takes memory only where it is not."""

from __future__ import annotations

from pathlib import Path

import pytest

from nbdfleece.bitmaps.memory import LAZY_BYTES_MIN, zeroed_memory


@pytest.mark.parametrize("length", [0, 1, LAZY_BYTES_MIN - 1, LAZY_BYTES_MIN, 3 * LAZY_BYTES_MIN])
def test_memory_is_zero_and_can_be_written(length: int) -> None:
    memory = zeroed_memory(length)
    assert bytes(memory) == bytes(length)
    for at in range(0, length, 1000):
        memory[at] |= 3
    assert sum(bytes(memory)) == 3 * len(range(0, length, 1000))


def test_large_memory_that_nobody_touches_takes_none() -> None:
    def resident_kib() -> int:
        lines = Path("/proc/self/status").read_text().splitlines()
        return next(int(line.split()[1]) for line in lines if line.startswith("VmRSS"))

    before = resident_kib()
    memory = zeroed_memory(256 << 20)
    memory[100 << 20] = 1
    assert resident_kib() - before < 32 << 10
