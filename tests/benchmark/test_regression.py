"""No gross regression: ours against qemu-storage-daemon or qemu-nbd in the same run.

Only ratios within a round count, never absolute times, and of those the best of many rounds:
a machine that does something else at the same time slows both, or one of them in some rounds.
The first round that is good enough is the last. The floors are far below what
``docs/performance.md`` shows; what falls below them in all rounds has become several times slower.
"""

from __future__ import annotations

import pytest

from benchmark.images import Images
from benchmark.place import SYSTEM
from benchmark.rows.base import Row
from benchmark.rows.reads import PullUnix, RandomReads
from benchmark.rows.snapshots import FirstTouch
from benchmark.rows.writes import AllocatingWrites, RandomWrites
from benchmark.servers import Nbdfleece, QemuStorageDaemon

ROUNDS = 15

CASES = {
    "pull": (PullUnix, 0.5),
    "random reads": (RandomReads, 0.4),
    "random writes": (lambda images: RandomWrites(images, 1), 0.25),
    "random writes with 20 checkpoints": (lambda images: RandomWrites(images, 20), 0.3),
    "allocating writes": (AllocatingWrites, 0.25),
    "first touch under 5 snapshots": (lambda images: FirstTouch(images, 5), 0.7),
}


@pytest.mark.timeout(1200)
@pytest.mark.parametrize("case", CASES)
def test_ours_is_not_several_times_slower_than_qemu(images: Images, case: str) -> None:
    make, floor = CASES[case]
    row: Row = make(images)
    ours, peer = Nbdfleece(images.place), QemuStorageDaemon(images.place, SYSTEM, "threads")
    metric = row.metrics[0]
    ratios: list[float] = []
    while len(ratios) < ROUNDS and max(ratios, default=0.0) < floor:
        mine, theirs = row.sample(ours), row.sample(peer)
        ratios.append(metric.ratio(mine[metric.key], theirs[metric.key]))
    assert min(mine["server-cpu"], mine["client-cpu"]) > 0
    assert max(ratios) >= floor, f"{row.title}: ours to QEMU's {ratios}"
