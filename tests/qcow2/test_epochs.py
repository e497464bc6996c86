"""The order of writes inside flushes, where the random work of the crash tests seldom comes."""

from __future__ import annotations

import asyncio
import errno
import random
from pathlib import Path

import pytest

from nbdfleece.block.file import FileNode
from nbdfleece.qcow2.create import create_image
from nbdfleece.qcow2.image import Qcow2Image
from tests.qcow2.fake_disk import Fault
from tests.qcow2.guest import Guest, check
from tests.qcow2.test_crash import CrashingDisk, examine

KIB = 1 << 10
SIZE = 256 * KIB


async def open_on_crashing_disk(
    folder: Path, cluster_size: int, rng: random.Random
) -> tuple[Qcow2Image, CrashingDisk, Guest]:
    path = folder / "start.qcow2"
    path.unlink(missing_ok=True)
    await create_image(path, SIZE, cluster_size=cluster_size, refcount_bits=64)
    disk = CrashingDisk(path.read_bytes())
    image = await Qcow2Image.from_file(disk)
    guest = Guest(image, cluster_size, rng)
    guest.track()
    return image, disk, guest


async def fail_and_go_on(folder: Path, fails_at: int | None, long_run: int) -> int:
    """Fail a flush at one of its operations, change more, and cut the power in the next flush.

    Returns:
        How many operations the first flush takes.
    """
    rng = random.Random(fails_at)
    image, disk, guest = await open_on_crashing_disk(folder, 512, rng)
    await guest.write(0, 30 * KIB)
    offset = await image.allocate_clusters(long_run) if long_run else 0
    before = disk.operations
    if fails_at is None:
        await guest.flush()
        count = disk.operations - before
        await image.close()
        return count
    disk.faults[before + fails_at] = Fault(errno.EIO)
    with pytest.raises(OSError, match="fails once"):
        await guest.flush()
    await examine(folder, disk, guest, rng)
    await guest.write(31 * KIB, 64 * KIB)

    async def question() -> None:
        for _ in range(2):
            await examine(folder, disk, guest, rng)

    disk.question = question  # type: ignore[method-assign]  # the test's own hook
    await guest.flush()
    if long_run:
        image.free_clusters(offset, long_run)
    await image.close()
    await guest_finds_all(folder, disk, guest)
    return 0


async def guest_finds_all(folder: Path, disk: CrashingDisk, guest: Guest) -> None:
    """After the end of it all the image is without a fault."""
    await examine(folder, disk, guest, None)
    check(folder / "crashed.qcow2")


@pytest.mark.parametrize("long_run", [0, 150])
async def test_power_cut_in_the_flush_after_one_that_failed_leaks_at_most(
    folder: Path, long_run: int
) -> None:
    """What a failed flush wrote may be in force: the next one must not treat it as new."""
    count = await fail_and_go_on(folder, None, long_run)
    assert count > 5
    for fails_at in range(0, count, 3 if long_run else 1):
        await fail_and_go_on(folder, fails_at, long_run)


async def test_refcount_blocks_that_describe_one_another_come_into_force_at_once(
    folder: Path,
) -> None:
    """Their entries lie in two sectors of the refcount table, of which a power cut may take one."""
    rng = random.Random(7)
    image, disk, guest = await open_on_crashing_disk(folder, 1024, rng)
    per_block = 128
    first = await image.allocate_clusters(61 * per_block)
    await guest.flush()
    assert [bool(block) for block in image.refcounts.table[62:65]] == [True, False, False]

    async def question() -> None:
        for _ in range(6):
            await examine(folder, disk, guest, rng)

    disk.question = question  # type: ignore[method-assign]  # the test's own hook
    second = await image.allocate_clusters(2 * per_block)
    assert image.refcounts.table[63]
    assert image.refcounts.table[64]
    await guest.flush()
    disk.question = CrashingDisk.question.__get__(disk)  # type: ignore[method-assign]
    image.free_clusters(first, 61 * per_block)
    image.free_clusters(second, 2 * per_block)
    await image.close()
    await guest_finds_all(folder, disk, guest)


async def test_what_changes_while_a_flush_writes_is_for_the_next_flush(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Rule 4: a flush writes tables as they were when it began, however late it comes to them."""
    rng = random.Random(11)
    image, disk, guest = await open_on_crashing_disk(folder, 512, rng)
    tables = range(0, SIZE, 32 * KIB)
    for table in tables:
        await guest.write(table, 512)
    await guest.flush()
    for table in tables:
        await guest.write(table + 512, 512)
    late = [table + 1024 for table in tables]

    async def question() -> None:
        while late:
            await guest.write(late.pop(), 512)
        for _ in range(3):
            await examine(folder, disk, guest, rng)

    monkeypatch.setattr(disk, "question", question)
    await image.flush()
    assert image.mapping.dirty
    await guest.flush()
    await image.close()
    await guest_finds_all(folder, disk, guest)


async def test_everybody_has_turns_while_a_flush_writes_many_tables(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Rule 5: packing and writing them takes some ten milliseconds, and a write one."""
    path = tmp_path / "disk.qcow2"
    tables = 30
    turn = 0
    turns_of_writes = set()
    write = FileNode.write

    async def note(file: FileNode, offset: int, data: memoryview) -> None:
        turns_of_writes.add(turn)
        await write(file, offset, data)

    await create_image(path, tables << 29, cluster_size=65536)
    image = await Qcow2Image.open(path, read_only=False)
    for offset in range(0, tables << 29, 1 << 29):
        await image.write(offset, memoryview(b"1"))
        await image.write(offset + (1 << 29) - 1, memoryview(b"1"))
    monkeypatch.setattr(FileNode, "write", note)
    flush = asyncio.create_task(image.flush())
    while not flush.done():
        await asyncio.sleep(0)
        turn += 1
    await flush
    assert len(turns_of_writes) > tables
    await image.close()
