"""Power cuts at any point (rule 4): what was flushed stays, and leaks are the worst damage.

The fake disk's log is cut after any number of its writes; of those that no flush covers
any subset of sectors may have reached the disk.
"""

from __future__ import annotations

import asyncio
import os
import random
from pathlib import Path

import pytest

from nbdfleece.qcow2.create import create_image
from nbdfleece.qcow2.image import Qcow2Image
from tests.qcow2.fake_disk import FakeDisk
from tests.qcow2.guest import Guest, check, qemu_img, qemu_io

MIB = 1 << 20

ROUNDS = int(os.environ.get("NBDFLEECE_CRASH_ROUNDS", "30"))
"""Rounds of work per case; 30 are some 500 power cuts in all, 1000 the full run."""

CASES = [
    ("empty", 512),
    ("empty", 4096),
    ("shared", 512),
    ("shared", 4096),
    ("compressed", 512),
    ("compressed", 4096),
    ("extended", 16384),
]
"""What the image is like at first, and its cluster size."""


async def examine(folder: Path, disk: FakeDisk, guest: Guest, rng: random.Random | None) -> None:
    """Materialise a power cut now and see what it left."""
    state = disk.log.crash(len(disk.log.records), rng)
    path = folder / "crashed.qcow2"
    path.write_bytes(state.content)
    check(path, leaks_allowed=True)
    image = await Qcow2Image.open(path, read_only=True)
    content = bytearray(image.size)
    await image.read_into(0, memoryview(content))
    await image.close()
    assert guest.allowed(bytes(content))


class CrashingGuest(Guest):
    """A guest whose every step, and every disk write inside a step, may be the last."""

    async def work_and_crash(
        self, folder: Path, disk: FakeDisk, steps: int, crashes_per_step: int
    ) -> None:
        for _ in range(steps):
            await self.step(40_000)
            for _ in range(crashes_per_step):
                await examine(folder, disk, self, self.rng)


async def fresh_image(folder: Path, kind: str, cluster_size: int) -> tuple[bytes, bytes]:
    """An image's file and what the guest sees in it."""
    path = folder / "start.qcow2"
    size = MIB // 2
    options = f"cluster_size={cluster_size}"
    if kind == "shared":
        qemu_img("create", "-q", "-f", "qcow2", "-o", options, path, str(size))
        qemu_io(path, [f"write -P 7 0 {size}"])
        qemu_img("snapshot", "-c", "before", path)
        return path.read_bytes(), b"\7" * size
    if kind == "compressed":
        raw = folder / "start.raw"
        content = (b"some text that compresses well " * 20_000)[:size]
        raw.write_bytes(content)
        qemu_img("convert", "-c", "-O", "qcow2", "-o", options, raw, path)
        return path.read_bytes(), content
    # Wide refcounts: new blocks are needed often.
    is_extended = kind == "extended"
    await create_image(
        path, size, cluster_size=cluster_size, refcount_bits=64, extended_l2=is_extended
    )
    return path.read_bytes(), bytes(size)


@pytest.mark.parametrize(("kind", "cluster_size"), [*CASES, ("shared", 65536)])
async def test_power_cut_after_any_step_leaves_what_was_flushed(
    folder: Path, kind: str, cluster_size: int
) -> None:
    start, content = await fresh_image(folder, kind, cluster_size)
    rng = random.Random(cluster_size)
    disk = FakeDisk(start)
    image = await Qcow2Image.from_file(disk)
    guest = CrashingGuest(image, cluster_size, rng)
    guest.content[:] = content
    guest.track()
    await guest.work_and_crash(folder, disk, steps=25, crashes_per_step=1)
    await image.close()


class CrashingDisk(FakeDisk):
    """Asks a question after some of its writes, in the middle of whatever goes on."""

    async def write(self, offset: int, data: memoryview) -> None:
        await super().write(offset, data)
        await self.question()

    async def flush(self) -> None:
        await super().flush()
        await self.question()

    async def question(self) -> None: ...


@pytest.mark.parametrize(("kind", "cluster_size"), CASES)
async def test_power_cut_inside_an_operation_or_flush_leaves_what_was_flushed(
    folder: Path, kind: str, cluster_size: int
) -> None:
    start, content = await fresh_image(folder, kind, cluster_size)
    rng = random.Random(cluster_size)
    disk = CrashingDisk(start)
    image = await Qcow2Image.from_file(disk)
    guest = Guest(image, cluster_size, rng)
    guest.content[:] = content
    guest.track()

    async def question() -> None:
        if rng.random() < 0.4:
            await examine(folder, disk, guest, rng)

    disk.question = question  # type: ignore[method-assign]  # the test's own hook
    for _ in range(ROUNDS):
        await guest.steps(3, 20_000)
        await guest.flush()
    await image.close()


async def test_power_cut_while_flush_and_writes_overlap_leaves_what_was_flushed(
    folder: Path,
) -> None:
    """Writes go on while a flush runs; only what came before the flush is promised by it."""
    start, content = await fresh_image(folder, "empty", 4096)
    rng = random.Random(9)
    disk = FakeDisk(start, rng=rng)
    image = await Qcow2Image.from_file(disk)
    guest = Guest(image, 4096, rng)
    guest.content[:] = content
    guest.track()
    for _ in range(15):
        await guest.steps(3, 20_000)
        flushed = [len(states) for states in guest.history]
        flush = asyncio.ensure_future(image.flush())
        await asyncio.sleep(0)
        while not flush.done():
            await guest.write(*guest.pick_range(20_000))
            await asyncio.sleep(0)
        flush.result()
        pairs = zip(guest.history, flushed, strict=True)
        guest.history = [states[count - 1 :] for states, count in pairs]
        await examine(folder, disk, guest, rng)
    await guest.check_all()
    await image.close()


async def fill(image: Qcow2Image, guest: Guest, offset: int) -> bool:
    """Write a whole cluster; whether that was done at once."""
    data = guest.rng.randbytes(guest.cluster_size)
    guest._change(offset, data)
    if image.write_at_once(offset, memoryview(data)):
        return True
    await image.write(offset, memoryview(data))
    return False


@pytest.mark.parametrize("cluster_size", [512, 4096])
async def test_power_cut_amid_flushes_while_new_clusters_are_filled_at_once(
    folder: Path, cluster_size: int
) -> None:
    """What takes one step of the loop falls between any two steps of a flush."""
    start, content = await fresh_image(folder, "empty", cluster_size)
    rng = random.Random(cluster_size)
    disk = FakeDisk(start, rng=rng)
    image = await Qcow2Image.from_file(disk)
    guest = Guest(image, cluster_size, rng)
    guest.content[:] = content
    guest.track()
    at_once = cuts = 0
    places = rng.sample(range(0, len(content), cluster_size), 128)
    while places:
        await guest.write(places.pop(), cluster_size)
        flushed = [len(states) for states in guest.history]
        flush = asyncio.ensure_future(image.flush())
        await asyncio.sleep(0)
        while places and not flush.done():
            at_once += await fill(image, guest, places.pop())
            await asyncio.sleep(0)
            if rng.random() < 0.2:
                await examine(folder, disk, guest, rng)
                cuts += 1
        await flush
        pairs = zip(guest.history, flushed, strict=True)
        guest.history = [states[count - 1 :] for states, count in pairs]
        await examine(folder, disk, guest, rng)
    assert at_once > 40
    assert cuts > 5
    await guest.check_all()
    await image.close()


async def test_power_cut_while_long_runs_of_clusters_are_allocated_leaks_at_most(
    folder: Path,
) -> None:
    """A run longer than what one refcount block describes needs several blocks at once."""
    start, content = await fresh_image(folder, "empty", 512)
    rng = random.Random(3)
    disk = CrashingDisk(start)
    image = await Qcow2Image.from_file(disk)
    guest = Guest(image, 512, rng)
    guest.content[:] = content
    guest.track()

    async def question() -> None:
        await examine(folder, disk, guest, rng)

    disk.question = question  # type: ignore[method-assign]  # the test's own hook
    for count in (100, 150, 300):
        offset = await image.allocate_clusters(count)
        await guest.write(*guest.pick_range(3000))
        await guest.flush()
        image.free_clusters(offset, count)
    await image.close()


@pytest.mark.parametrize("fail_after", [0, 1, 2, 3, 5, 8, 13, 21, 34, 55])
async def test_failing_disk_leaves_a_sound_image_and_an_image_that_goes_on(
    folder: Path, fail_after: int
) -> None:
    start, content = await fresh_image(folder, "empty", 4096)
    rng = random.Random(fail_after)
    disk = FakeDisk(start)
    image = await Qcow2Image.from_file(disk)
    guest = Guest(image, 4096, rng)
    guest.content[:] = content
    await guest.steps(10, 20_000)
    await guest.flush()
    guest.track()
    disk.fail_after = fail_after
    failures = 0
    for _ in range(40):
        try:
            await guest.write_sectors(*guest.pick_range(20_000))
            await guest.flush()
        except OSError:
            failures += 1
        if failures == 3:
            disk.fail_after = None
    assert failures >= 3
    await examine(folder, disk, guest, rng)
    await image.flush()
    content = bytearray(image.size)
    await image.read_into(0, memoryview(content))
    assert guest.allowed(bytes(content))
    await image.close()
    path = folder / "closed.qcow2"
    path.write_bytes(disk.content)
    check(path, leaks_allowed=True)
