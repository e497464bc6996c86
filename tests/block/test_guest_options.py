"""Discards, zeroes and durability are as the operator says."""

from __future__ import annotations

import pytest

from nbdfleece.block.guest_options import DetectZeroes, GuestOptions, is_zero
from nbdfleece.testing.memory_node import MemoryNode


class Recorder(MemoryNode):
    """Notes what reaches it."""

    def __init__(self) -> None:
        super().__init__(1 << 20)
        self.calls: list[tuple[object, ...]] = []

    async def write(self, offset: int, data: memoryview) -> None:
        self.calls.append(("write", offset, len(data)))

    async def write_zeroes(
        self, offset: int, length: int, *, unmap: bool = True, fast: bool = False
    ) -> None:
        self.calls.append(("zeroes", offset, length, unmap, fast))

    async def trim(self, offset: int, length: int) -> None:
        self.calls.append(("trim", offset, length))

    async def flush(self) -> None:
        self.calls.append(("flush",))


async def test_discards_that_are_ignored_do_nothing_and_zeroes_keep_the_space() -> None:
    below = Recorder()
    node = GuestOptions(below, discard=False, zeroes_unmap=False)
    await node.trim(0, 4096)
    await node.write_zeroes(4096, 4096, unmap=True, fast=True)
    assert below.calls == [("zeroes", 4096, 4096, False, True)]


async def test_discards_that_are_let_through_arrive() -> None:
    below = Recorder()
    node = GuestOptions(below, discard=True, zeroes_unmap=True)
    await node.trim(0, 4096)
    await node.write_zeroes(4096, 4096, unmap=True)
    await node.write_zeroes(8192, 4096, unmap=False)
    assert below.calls == [
        ("trim", 0, 4096),
        ("zeroes", 4096, 4096, True, False),
        ("zeroes", 8192, 4096, False, False),
    ]


@pytest.mark.parametrize(
    ("detect", "discard", "expected"),
    [
        (DetectZeroes.OFF, True, ("write", 512, 4096)),
        (DetectZeroes.ON, True, ("zeroes", 512, 4096, False, False)),
        (DetectZeroes.UNMAP, True, ("zeroes", 512, 4096, True, False)),
        (DetectZeroes.UNMAP, False, ("zeroes", 512, 4096, False, False)),
    ],
)
async def test_zeroes_written_as_data_are_detected(
    detect: DetectZeroes, discard: bool, expected: tuple[object, ...]
) -> None:
    below = Recorder()
    node = GuestOptions(below, discard=discard, zeroes_unmap=True, detect_zeroes=detect)
    await node.write(512, memoryview(bytes(4096)))
    await node.write(0, memoryview(bytes(4095) + b"x"))
    assert below.calls == [expected, ("write", 0, 4096)]


async def test_writethrough_flushes_after_each_change() -> None:
    below = Recorder()
    node = GuestOptions(below, discard=True, zeroes_unmap=True, writethrough=True)
    await node.write(0, memoryview(b"x"))
    await node.write_zeroes(0, 1)
    await node.trim(0, 1)
    assert [call[0] for call in below.calls] == [
        "write",
        "flush",
        "zeroes",
        "flush",
        "trim",
        "flush",
    ]


@pytest.mark.parametrize("size", [1, 15, 16, 17, 4096, 65537])
def test_one_byte_that_is_not_zero_is_found_wherever_it_is(size: int) -> None:
    data = bytearray(size)
    assert is_zero(memoryview(data))
    for place in {0, size // 2, size - 1}:
        data[place] = 1
        assert not is_zero(memoryview(data))
        data[place] = 0
