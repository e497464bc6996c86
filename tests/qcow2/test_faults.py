"""A disk that fails once, at any operation (rule 4).

The error reaches whoever asked, as itself; the image stays sound, also if the power is
cut soon after; and the driver goes on as if nothing had been.
"""

from __future__ import annotations

import errno
import os
import random
from pathlib import Path

import pytest

from nbdfleece.block.node import BlockNode
from nbdfleece.qcow2.image import Qcow2Image
from tests.qcow2.fake_disk import Fault
from tests.qcow2.guest import Guest, check, qemu_content
from tests.qcow2.test_crash import CrashingDisk, examine, fresh_image

POINTS = int(os.environ.get("NBDFLEECE_FAULT_POINTS", "10"))
"""Operations that fail, per case; 0 is every one, for the full run."""

STEPS = 14

FAULTS = [
    Fault(errno.ENOSPC),
    Fault(errno.EIO),
    Fault(errno.ENOSPC, is_short=True),
]

CASES = [
    ("empty", 512),
    ("empty", 4096),
    ("shared", 4096),
    ("compressed", 4096),
    ("extended", 16384),
]


class UnluckyGuest(Guest):
    """A guest whose disk may fail; then it looks at what it has got."""

    def __init__(
        self, node: BlockNode, cluster_size: int, rng: random.Random, disk: CrashingDisk
    ) -> None:
        super().__init__(node, cluster_size, rng)
        self.disk = disk
        self.told: list[OSError] = []
        """Errors that operations ended with."""

    async def attempt(self) -> None:
        met = len(self.disk.met)
        try:
            await self.step(20_000)
        except OSError as error:
            self.told.append(error)
        if len(self.disk.met) > met:
            await self.look()

    async def look(self) -> None:
        """Every sector has what it had or what it was to have; from now on that is it."""
        buffer = bytearray(self.node.size)
        await self.node.read_into(0, memoryview(buffer))
        assert self.allowed(bytes(buffer))
        self._change(0, bytes(buffer))


async def live(
    folder: Path,
    start: bytes,
    content: bytes,
    size: int,
    fault: dict[int, Fault],
    caplog: pytest.LogCaptureFixture,
) -> int:
    """A guest's life on a disk with a fault; return how many operations the disk did."""
    rng, cuts = random.Random(size), random.Random(str(fault))
    disk = CrashingDisk(start)
    disk.faults = dict(fault)
    guest: UnluckyGuest | None = None
    examinations = 4

    async def question() -> None:
        nonlocal examinations
        if guest is not None and disk.met and examinations and cuts.random() < 0.5:
            examinations -= 1
            await examine(folder, disk, guest, cuts)

    disk.question = question  # type: ignore[method-assign]  # the test's own hook
    caplog.clear()
    try:
        image = await Qcow2Image.from_file(disk)
    except OSError as error:
        assert [error] == disk.met  # noqa: PT017  # most faults come later
        assert disk.is_closed
        return disk.operations
    guest = UnluckyGuest(image, size, rng, disk)
    guest.content[:] = content
    guest.track()
    for _ in range(STEPS):
        await guest.attempt()
    try:
        await image.close()
    except OSError as error:
        guest.told.append(error)
    assert disk.is_closed
    if "at 0x" in caplog.text:  # clusters that could not be given back
        assert guest.told == []
    else:
        assert guest.told == disk.met
    path = folder / "closed.qcow2"
    path.write_bytes(disk.content)
    check(path, leaks_allowed=True)
    assert guest.allowed(qemu_content(path))
    return disk.operations


@pytest.mark.parametrize("fault", FAULTS, ids=["ENOSPC", "EIO", "short"])
@pytest.mark.parametrize(("kind", "cluster_size"), CASES)
async def test_fault_at_any_operation_reaches_the_caller_and_leaves_a_sound_image(
    folder: Path, kind: str, cluster_size: int, fault: Fault, caplog: pytest.LogCaptureFixture
) -> None:
    start, content = await fresh_image(folder, kind, cluster_size)
    count = await live(folder, start, content, cluster_size, {}, caplog)
    points = range(count)
    if POINTS and count > POINTS:
        points = random.Random(f"{kind}{cluster_size}{fault}").sample(points, POINTS)
    for number in points:
        await live(folder, start, content, cluster_size, {number: fault}, caplog)
