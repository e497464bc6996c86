"""A window of another node shifts every operation, and guards the first sector of guessed disks."""

from __future__ import annotations

import pytest

from nbdfleece.block.raw import RawNode
from nbdfleece.errors import UsageError
from nbdfleece.testing.memory_node import MemoryNode

CONTENT = bytes(range(256)) * 256


async def read(node: RawNode, offset: int, length: int) -> bytes:
    buffer = bytearray(length)
    await node.read_into(offset, memoryview(buffer))
    return bytes(buffer)


async def test_window_reads_and_writes_at_its_offset() -> None:
    below = MemoryNode(CONTENT)
    node = RawNode(below, 1000, 5000)
    assert node.size == 5000
    assert await read(node, 7, 900) == CONTENT[1007:1907]
    await node.write(4998, memoryview(b"xy"))
    await node.write_zeroes(0, 3)
    assert below.content[5998:6000] == b"xy"
    assert below.content[999:1004] == CONTENT[999:1000] + bytes(3) + CONTENT[1003:1004]


async def test_what_is_done_at_once_is_done_in_the_window_too() -> None:
    class AtOnce(MemoryNode):
        def read_at_once(self, offset: int, view: memoryview) -> bool:
            view[:] = self.content[offset : offset + len(view)]
            return True

        def write_at_once(self, offset: int, data: memoryview) -> bool:
            self.content[offset : offset + len(data)] = data
            return True

    node = RawNode(AtOnce(CONTENT), 1000, is_guessed=True)
    buffer = bytearray(900)
    assert node.read_at_once(7, memoryview(buffer))
    assert buffer == CONTENT[1007:1907]
    assert node.write_at_once(512, memoryview(b"xy"))
    assert await read(node, 511, 4) == CONTENT[1511:1512] + b"xy" + CONTENT[1514:1515]
    assert not node.write_at_once(0, memoryview(b"QFI\xfb")), "the first sector is looked at"
    assert await read(node, 0, 4) == CONTENT[1000:1004]


async def test_window_without_size_reaches_to_the_end() -> None:
    node = RawNode(MemoryNode(CONTENT), 65000)
    assert node.size == 536
    assert await read(node, 530, 6) == CONTENT[65530:]


async def test_window_status_is_that_of_the_range_below() -> None:
    below = MemoryNode(CONTENT)
    await below.trim(8192, 8192)
    status = await RawNode(below, 4096).block_status(0, 16384)
    assert status.lengths.tolist() == (await below.block_status(4096, 16384)).lengths.tolist()
    assert status.lengths.tolist() == [4096, 8192, 4096]


@pytest.mark.parametrize(("offset", "size"), [(65537, None), (0, 65537), (65000, 537), (1, 65536)])
def test_window_past_the_end_is_refused(offset: int, size: int | None) -> None:
    with pytest.raises(UsageError, match="past the end"):
        RawNode(MemoryNode(CONTENT), offset, size)


@pytest.mark.parametrize(
    ("offset", "data"),
    [
        (0, b"QFI\xfb"),
        (0, b"QFI\xfb" + bytes(5000)),
        (3, b"\xfb"),
        (60, bytes(4) + b"\x7f\x10\xda\xbe"),
    ],
)
async def test_header_written_to_a_guessed_raw_disk_is_refused(offset: int, data: bytes) -> None:
    below = MemoryNode(b"QFI" + bytes(8189))
    before = bytes(below.content)
    with pytest.raises(PermissionError, match="name the format"):
        await RawNode(below, is_guessed=True).write(offset, memoryview(data))
    assert below.content == before


async def test_other_writes_to_a_guessed_raw_disk_are_done() -> None:
    below = MemoryNode(100)
    node = RawNode(below, is_guessed=True)
    await node.write(0, memoryview(b"\xeb\x63\x90"))
    await node.write(90, memoryview(b"0123456789"))
    assert below.content == b"\xeb\x63\x90" + bytes(87) + b"0123456789"


async def test_header_written_to_a_disk_named_raw_is_done() -> None:
    below = MemoryNode(CONTENT)
    await RawNode(below).write(0, memoryview(b"QFI\xfb"))
    assert below.content[:4] == b"QFI\xfb"
