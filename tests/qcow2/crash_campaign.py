"""Power cuts by the thousand: random images, random guests, cuts in the middle of anything.

Each round has an image, a guest and a disk of its own, all made from the seed and the round's
number, so that a failure can be had again by ``--seed S --first ROUND``. In some rounds the
disk fails once. Where guests and flushes overlap is :mod:`tests.qcow2.test_crash`'s part.
"""

from __future__ import annotations

import argparse
import asyncio
import collections
import contextlib
import random
import tempfile
import time
from pathlib import Path

from nbdfleece.qcow2.image import Qcow2Image
from tests.qcow2.fake_disk import Fault
from tests.qcow2.test_crash import CASES, CrashingDisk, CrashingGuest, examine, fresh_image

STATES_PER_ROUND = 100
"""Cuts until the next round begins with a new image."""

FAULT_ERRORS = (5, 28)
"""EIO and ENOSPC."""


class Enough(BaseException):
    """The round has had its cuts."""


async def crash_round(folder: Path, seed: str, states: int) -> str:
    """Cut the power ``states`` times in the life of one image; return what kind it was."""
    rng = random.Random(seed)
    kind, cluster_size = rng.choice(CASES)
    start, content = await fresh_image(folder, kind, cluster_size)
    disk = CrashingDisk(start)
    image = await Qcow2Image.from_file(disk)
    guest = CrashingGuest(image, cluster_size, rng)
    guest.content[:] = content
    guest.track()
    if rng.random() < 0.3:
        disk.faults[disk.operations + rng.randrange(500)] = Fault(rng.choice(FAULT_ERRORS))
    probability = rng.choice([0.1, 0.3, 1.0])
    seen = 0

    async def question() -> None:
        nonlocal seen
        if rng.random() < probability:
            await examine(folder, disk, guest, rng if rng.random() < 0.8 else None)
            seen += 1
            if seen >= states:
                raise Enough

    disk.question = question  # type: ignore[method-assign]  # the round's own hook
    with contextlib.suppress(Enough):
        while True:
            await live_on(guest, disk, rng)
    return f"{kind} {cluster_size}"


async def live_on(guest: CrashingGuest, disk: CrashingDisk, rng: random.Random) -> None:
    """A few steps and a flush; after a fault the guest looks what it has got."""
    met = len(disk.met)
    try:
        await guest.steps(rng.randint(1, 4), rng.choice([3000, 20_000, 60_000]))
        await guest.flush()
    except OSError:
        if len(disk.met) == met:
            raise
        buffer = bytearray(guest.node.size)
        await guest.node.read_into(0, memoryview(buffer))
        assert guest.allowed(bytes(buffer))
        guest._change(0, bytes(buffer))


def run_campaign(states: int, seed: int, first: int = 0) -> collections.Counter[str]:
    """Cut the power ``states`` times; return how often for which kind of image.

    Raises:
        AssertionError: A cut left what it must not; the round is in a note.
    """
    seen: collections.Counter[str] = collections.Counter()
    number = first
    while states > 0:
        count = min(states, STATES_PER_ROUND)
        with tempfile.TemporaryDirectory(prefix="crash-", dir="/dev/shm") as name:
            try:
                kind = asyncio.run(crash_round(Path(name), f"{seed}:{number}", count))
            except BaseException as error:
                error.add_note(f"again: --seed {seed} --first {number}")
                raise
        seen[kind] += count
        states -= count
        number += 1
    return seen


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(prog="crash-campaign", description=__doc__)
    parser.add_argument("--states", type=int, default=20_000, help="power cuts in all")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--first", type=int, default=0, help="number of the first round")
    options = parser.parse_args()
    begun = time.monotonic()
    seen = run_campaign(options.states, options.seed, options.first)
    for kind, count in sorted(seen.items()):
        print(f"{kind:20} {count:7} states")
    seconds = time.monotonic() - begun
    print(f"{'all sound':20} {seen.total():7} states in {seconds:.0f} s, seed {options.seed}")


if __name__ == "__main__":
    main()
