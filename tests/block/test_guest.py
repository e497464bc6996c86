"""The guest's node: what is marked before what, and the instant between writes."""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest

from nbdfleece.bitmaps.bitmap import Bitmap
from nbdfleece.block.copy_before_write import CopyBeforeWrite
from nbdfleece.block.guest import GuestNode
from nbdfleece.block.snapshot_access import SnapshotAccess
from nbdfleece.testing.memory_node import MemoryNode

SIZE = 1 << 20


def set_up(tmp_path: Path) -> tuple[MemoryNode, GuestNode, Bitmap]:
    disk = MemoryNode(SIZE)
    guest = GuestNode(disk, CopyBeforeWrite(disk, tmp_path))
    bitmap = Bitmap(SIZE, 65536)
    guest.recording = (bitmap,)
    return disk, guest, bitmap


@pytest.mark.parametrize("operation", ["write", "write_zeroes", "trim"])
async def test_bit_is_set_before_the_disk_is_touched(tmp_path: Path, operation: str) -> None:
    """Rule 2: a bit is set before the write is issued, and stays if the write fails."""
    disk, guest, bitmap = set_up(tmp_path)

    def fail(name: str, offset: int) -> None:
        assert bitmap.is_set(70_000)
        raise OSError(5, "no")

    disk.fail = fail
    argument = memoryview(bytes(100)) if operation == "write" else 100
    with pytest.raises(OSError, match="no"):
        await getattr(guest, operation)(70_000, argument)
    assert bitmap.bits_set() == 1


async def test_drain_waits_for_writes_in_flight_and_holds_new_ones_back(tmp_path: Path) -> None:
    """Rule 3: a write lies wholly before or wholly after the instant."""
    disk, guest, bitmap = set_up(tmp_path)
    held = asyncio.get_running_loop().create_future()
    disk.pause = lambda operation: held
    before = asyncio.ensure_future(guest.write(0, memoryview(b"a")))
    await asyncio.sleep(0)
    draining = asyncio.ensure_future(guest.drain())
    await asyncio.sleep(0)
    after = [
        asyncio.ensure_future(guest.write(100_000, memoryview(b"b"))),
        asyncio.ensure_future(guest.trim(200_000, 65536)),
        asyncio.ensure_future(guest.write_zeroes(300_000, 1)),
    ]
    await asyncio.sleep(0)
    assert not draining.done()
    held.set_result(None)
    await draining
    assert before.done()
    assert disk.content[100_000] == 0
    assert bitmap.bits_set() == 1, "writes that are held back have marked nothing yet"
    guest.recording = (Bitmap(SIZE, 65536),)
    guest.resume()
    await asyncio.gather(*after)
    assert bitmap.bits_set() == 1
    assert guest.recording[0].bits_set() == 3


async def test_cancelled_write_that_was_held_back_does_not_disturb_the_others(
    tmp_path: Path,
) -> None:
    disk, guest, _ = set_up(tmp_path)
    await guest.drain()
    waiting = [asyncio.ensure_future(guest.write(i, memoryview(b"x"))) for i in range(3)]
    await asyncio.sleep(0)
    waiting[1].cancel()
    await asyncio.sleep(0)
    guest.resume()
    await asyncio.wait(waiting)
    assert disk.content[:3] == b"x\0x"


async def test_write_to_page_cached_disk_never_suspends(tmp_path: Path) -> None:
    """The hot path needs no task: the coroutine runs to its end at once."""
    _, guest, _ = set_up(tmp_path)
    with pytest.raises(StopIteration):
        guest.write(0, memoryview(b"x")).send(None)


class AtOnce(MemoryNode):
    """A disk that never has to wait."""

    def read_at_once(self, offset: int, view: memoryview) -> bool:
        view[:] = self.content[offset : offset + len(view)]
        return True

    def write_at_once(self, offset: int, data: memoryview) -> bool:
        self.fail("write", offset)
        self.content[offset : offset + len(data)] = data
        return True


class Log:
    """An activity log that covers the beginning of the disk."""

    def covers(self, offset: int, length: int) -> bool:
        return offset + length <= 65536

    async def mark(self, offset: int, length: int) -> None:
        raise AssertionError("not asked for")


async def test_bit_is_set_before_the_disk_is_written_at_once(tmp_path: Path) -> None:
    """Rule 2."""
    disk = AtOnce(SIZE)
    guest = GuestNode(disk, CopyBeforeWrite(disk, tmp_path))
    bitmap = Bitmap(SIZE, 65536)
    guest.recording, guest.logs = (bitmap,), (Log(),)

    def fail(name: str, offset: int) -> None:
        assert bitmap.is_set(offset)
        raise OSError(5, "no")

    assert guest.write_at_once(0, memoryview(b"x" * 65536))
    assert (bitmap.bits_set(), disk.content[65535]) == (1, ord("x"))
    disk.fail = fail
    bitmap.clear_range(0, bitmap.size)
    with pytest.raises(OSError, match="no"):
        guest.write_at_once(60_000, memoryview(b"y"))
    assert bitmap.bits_set() == 1
    buffer = bytearray(4)
    assert guest.read_at_once(60_000, memoryview(buffer))
    assert buffer == b"xxxx"


async def test_write_at_once_keeps_a_snapshot_still(tmp_path: Path) -> None:
    """Rules 1 and 2: the old content is safe and the bit set before the disk changes."""
    disk = MemoryNode(b"old!" * 16384)
    disk.is_at_hand = lambda: True
    copies = CopyBeforeWrite(disk, tmp_path)
    guest = GuestNode(disk, copies)
    bitmap = Bitmap(disk.size, 65536)
    guest.recording = (bitmap,)
    snapshot = SnapshotAccess(copies, copies.add_layer(), disk.size, 4096)
    seen = memoryview(bytearray(8192))

    def look(operation: str, offset: int) -> None:
        if operation == "write":
            disk.fail = lambda operation, offset: None
            assert bitmap.is_set(offset)
            disk.content[4096:8192] = b"new!" * 1024
            assert snapshot.read_at_once(4096, seen)

    disk.fail = look
    assert guest.write_at_once(5000, memoryview(b"new!"))
    assert bytes(seen) == b"old!" * 2048
    assert not guest.write_at_once(4000, memoryview(b"n" * 4096)), "two granules may have to wait"
    await snapshot.close()


@pytest.mark.parametrize("hindrance", ["snapshot", "log", "drain"])
async def test_write_that_needs_more_than_marked_bits_is_not_done_at_once(
    tmp_path: Path, hindrance: str
) -> None:
    """Rules 1, 2 and 3: nothing has happened when it is left to :meth:`GuestNode.write`."""
    disk = AtOnce(SIZE)
    copies = CopyBeforeWrite(disk, tmp_path)
    guest = GuestNode(disk, copies)
    bitmap = Bitmap(SIZE, 65536)
    guest.recording, guest.logs = (bitmap,), (Log(),)
    if hindrance == "drain":
        await guest.drain()
    layer = copies.add_layer() if hindrance == "snapshot" else None
    offset = 65530 if hindrance == "log" else 0
    assert not guest.write_at_once(offset, memoryview(b"x" * 10))
    assert disk.content == bytes(SIZE)
    assert bitmap.is_empty()
    if layer is not None:
        await copies.remove_layer(layer)
