from __future__ import annotations

import asyncio
import errno
import os
import tempfile
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from nbdfleece.block import file as file_module
from nbdfleece.block.file import INLINE_BYTES_MAX, FileNode
from nbdfleece.block.node import BlockStatus, allocation_flags
from nbdfleece.block.threads import THREADS_MAX, in_thread
from nbdfleece.errors import ImageError
from tests.loop_turns import until


@pytest.fixture(params=["disk", "memory"])
def folder(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Path]:
    """A folder on a disk's file system and one on tmpfs."""
    if request.param == "disk":
        yield tmp_path
        return
    with tempfile.TemporaryDirectory(dir="/dev/shm") as name:
        yield Path(name)


def make_file(folder: Path, content: bytes) -> FileNode:
    path = folder / "disk.raw"
    path.write_bytes(content)
    return FileNode.open(path, read_only=False)


async def test_read_of_cached_bytes_does_not_suspend(folder: Path) -> None:
    node = make_file(folder, bytes(range(256)) * 64)
    buffer = bytearray(4096)
    with pytest.raises(StopIteration):
        node.read_into(100, memoryview(buffer)).send(None)
    assert buffer == (bytes(range(256)) * 64)[100:4196]
    await node.close()


def pieces_of(buffer: bytearray, *offsets: int) -> list[tuple[int, memoryview]]:
    """Pieces of ten bytes."""
    view = memoryview(buffer)
    return [(at, view[10 * n : 10 * n + 10]) for n, at in enumerate(offsets)]


async def test_pieces_that_are_at_hand_are_read_at_once(folder: Path) -> None:
    content = os.urandom(20_000)
    node = make_file(folder, content)
    buffer = bytearray(30)
    assert node.read_pieces_at_once(pieces_of(buffer, 19_990, 5, 7000))
    assert buffer == content[19_990:] + content[5:15] + content[7000:7010]
    assert node.read_pieces_at_once([])
    await node.close()


async def test_pieces_past_the_end_of_the_file_are_not_read_at_once(folder: Path) -> None:
    node = make_file(folder, bytes(100))
    assert not node.read_pieces_at_once(pieces_of(bytearray(30), 0, 95, 10))
    await node.close()


@pytest.mark.parametrize(
    "error", [errno.EAGAIN, errno.EOPNOTSUPP, errno.EIO], ids=errno.errorcode.__getitem__
)
async def test_piece_that_would_block_is_left_to_a_thread_and_a_bad_one_is_an_error(
    folder: Path, monkeypatch: pytest.MonkeyPatch, error: int
) -> None:
    node = make_file(folder, bytes(100))
    read, seen = os.preadv, []

    def preadv(fd: int, views: list[memoryview], offset: int, flags: int = 0) -> int:
        seen.append(offset)
        if offset == 20:
            raise OSError(error, os.strerror(error))
        return read(fd, views, offset, flags)

    monkeypatch.setattr(os, "preadv", preadv)
    pieces = pieces_of(bytearray(30), 0, 20, 40)
    if error == errno.EIO:
        with pytest.raises(OSError, match=os.strerror(error)):
            node.read_pieces_at_once(pieces)
    else:
        assert not node.read_pieces_at_once(pieces)
    assert seen == [0, 20], "nobody asks for the rest"
    monkeypatch.undo()
    await node.close()


async def test_write_up_to_the_inline_limit_does_not_suspend(folder: Path) -> None:
    node = make_file(folder, bytes(4096))
    with pytest.raises(StopIteration):
        node.write(0, memoryview(bytes(INLINE_BYTES_MAX))).send(None)
    assert node.size == INLINE_BYTES_MAX
    await node.close()


async def test_write_past_the_inline_limit_goes_through_a_thread(folder: Path) -> None:
    node = make_file(folder, b"")
    data = os.urandom(INLINE_BYTES_MAX + 1)
    await node.write(0, memoryview(data))
    assert Path(node.path).read_bytes() == data
    await node.close()


async def test_read_of_cold_bytes_comes_from_a_thread(tmp_path: Path) -> None:
    content = os.urandom(1 << 20)
    node = make_file(tmp_path, content)
    os.fsync(node.fileno())
    os.posix_fadvise(node.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
    assert await node.read(12345, 500_000) == content[12345:512345]
    await node.close()


@pytest.mark.parametrize(("offset", "length"), [(90, 20), (100, 10), (200, 10)])
async def test_read_past_the_end_of_the_file_is_zeroes(
    folder: Path, offset: int, length: int
) -> None:
    node = make_file(folder, b"x" * 100)
    buffer = bytearray(b"?" * length)
    await node.read_into(offset, memoryview(buffer))
    assert buffer == (b"x" * max(0, 100 - offset)).ljust(length, b"\0")
    await node.close()


@pytest.mark.parametrize("unmap", [True, False])
async def test_write_zeroes_reads_as_zeroes_and_grows(folder: Path, unmap: bool) -> None:
    node = make_file(folder, b"x" * 100_000)
    await node.write_zeroes(5000, 100_000, unmap=unmap)
    assert node.size == 105_000
    assert Path(node.path).read_bytes() == b"x" * 5000 + bytes(100_000)
    await node.close()


def refuse_fallocate(fd: int, mode: int, offset: int, length: int) -> None:
    raise OSError(errno.EOPNOTSUPP, "no such mode")


async def test_write_zeroes_without_fallocate_writes_or_says_so(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    node = make_file(folder, b"x" * 3_000_000)
    monkeypatch.setattr(file_module, "fallocate", refuse_fallocate)
    with pytest.raises(OSError, match=os.strerror(errno.ENOTSUP)):
        await node.write_zeroes(0, 10, fast=True)
    await node.trim(0, 4096)
    await node.write_zeroes(10, 2_500_000)
    content = Path(node.path).read_bytes()
    assert content == b"x" * 10 + bytes(2_500_000) + b"x" * 499_990
    await node.close()


async def test_trim_punches_a_hole(folder: Path) -> None:
    node = make_file(folder, b"x" * (1 << 20))
    await node.trim(65536, 65536)
    status = await node.block_status(0, 1 << 20)
    assert status.lengths.tolist() == [65536, 65536, (1 << 20) - 131072]
    hole = BlockStatus.HOLE | BlockStatus.ZERO
    assert allocation_flags(status.status).tolist() == [0, int(hole), 0]
    await node.close()


async def test_block_status_stops_at_the_extents_asked_for(folder: Path) -> None:
    node = make_file(folder, b"")
    await node.grow(1 << 20)
    for offset in range(0, 1 << 20, 1 << 17):
        await node.write(offset, memoryview(b"x" * 4096))
    status = await node.block_status(100, (1 << 20) - 100, extents_max=3)
    assert status.lengths.tolist() == [3996, (1 << 17) - 4096, 4096]
    await node.close()


async def test_bytes_are_read_and_written_at_once_only_without_waiting(folder: Path) -> None:
    node = make_file(folder, b"old" * 4096)
    await node.flush()
    assert node.write_at_once(3, memoryview(b"new"))
    buffer = bytearray(4096)
    assert node.read_at_once(0, memoryview(buffer))
    assert buffer[:9] == b"oldnewold"
    assert not node.read_at_once(node.size - 1, memoryview(buffer)), "zeroes past the end"
    assert not node.write_at_once(0, memoryview(bytes(INLINE_BYTES_MAX + 1)))
    assert node.size == 3 * 4096
    flush = node.flush()
    assert asyncio.isfuture(flush.send(None)), "rule 4: what was written is yet to be durable"
    flush.close()
    await node.flush()
    await node.close()


async def test_flush_with_nothing_written_does_not_suspend(folder: Path) -> None:
    node = make_file(folder, b"x")
    await node.flush()
    with pytest.raises(StopIteration):
        node.flush().send(None)
    await node.close()


class GatedSync:
    """fdatasync that counts, waits for its gate, and fails on demand."""

    def __init__(self) -> None:
        self.calls = 0
        self.gate = threading.Event()
        self.error: OSError | None = None

    def __call__(self, fd: int) -> None:
        self.calls += 1
        self.gate.wait(60)
        if self.error is not None:
            raise self.error


@pytest.fixture
def sync(monkeypatch: pytest.MonkeyPatch) -> GatedSync:
    gated = GatedSync()
    monkeypatch.setattr(os, "fdatasync", gated)
    return gated


async def test_flushes_that_arrive_while_one_runs_share_the_next(
    tmp_path: Path, sync: GatedSync
) -> None:
    node = make_file(tmp_path, b"x")
    first = asyncio.ensure_future(node.flush())
    await until(lambda: sync.calls == 1)
    await node.write(0, memoryview(b"y"))
    others = [asyncio.ensure_future(node.flush()) for _ in range(10)]
    await asyncio.sleep(0)
    assert sync.calls == 1
    sync.gate.set()
    await asyncio.gather(first, *others)
    assert sync.calls == 2
    await node.close()


async def test_flush_that_failed_fails_for_all_its_callers_and_ever_after(
    tmp_path: Path, sync: GatedSync
) -> None:
    """Rule 4: the kernel drops pages that it could not write; a later success proves nothing."""
    node = make_file(tmp_path, b"x")
    sync.error = OSError(errno.EIO, "disk on fire")
    sync.gate.set()
    results = await asyncio.gather(node.flush(), node.flush(), return_exceptions=True)
    assert [type(result) for result in results] == [OSError, OSError]
    sync.error = None
    with pytest.raises(OSError, match="disk on fire"):
        await node.flush()
    with pytest.raises(OSError, match="disk on fire"):
        await node.close()


async def test_flush_does_not_wait_for_the_cold_reads_of_others(tmp_path: Path) -> None:
    """Rule 5: those who stream may have hundreds of reads that wait for a disk."""
    path = tmp_path / "disk.raw"
    path.write_bytes(bytes(512))
    node = FileNode.open(path, read_only=False)
    gate = threading.Event()
    reads = [asyncio.ensure_future(in_thread(gate.wait, 120)) for _ in range(2 * THREADS_MAX)]
    await asyncio.sleep(0)
    await node.write(0, memoryview(b"x" * 512))
    try:
        await asyncio.wait_for(node.flush(), 60)
    finally:
        gate.set()
        await asyncio.gather(*reads)
    await node.close()


async def test_cancelled_caller_waits_for_the_thread_that_uses_its_buffer() -> None:
    gate = threading.Event()
    done = threading.Event()

    def work() -> None:
        gate.wait(60)
        done.set()

    task = asyncio.ensure_future(in_thread(work))
    await asyncio.sleep(0)
    task.cancel()
    await asyncio.sleep(0)
    assert not task.done()
    gate.set()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert done.is_set()


async def test_short_writes_are_completed(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    node = make_file(folder, b"")
    whole = os.pwrite
    monkeypatch.setattr(os, "pwrite", lambda fd, data, offset: whole(fd, data[:1000], offset))
    data = os.urandom(4096)
    await node.write(0, memoryview(data))
    assert Path(node.path).read_bytes() == data
    await node.close()


@pytest.mark.parametrize("kind", ["folder", "fifo"])
def test_open_of_what_is_no_file_is_refused_at_once(tmp_path: Path, kind: str) -> None:
    path = tmp_path / "thing"
    path.mkdir() if kind == "folder" else os.mkfifo(path)
    with pytest.raises(ImageError, match="neither a regular file nor a block device"):
        FileNode.open(path, read_only=True)
