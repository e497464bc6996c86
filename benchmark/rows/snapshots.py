"""Guests that write while snapshots stand, and pulls of snapshots."""

from __future__ import annotations

import time
from collections.abc import Mapping

from .. import clients
from ..clients import LoggedFio, fio
from ..images import Images
from ..measure import Metric
from ..servers import Running, Server, Setup
from .base import Row, throughput

QEMU_GRANULE = 65536
"""Bytes that QEMU's copy-before-write copies at least."""

FEWER = 4
"""Under ten snapshots QEMU takes milliseconds for a write: a fourth of them will do."""


class FirstTouch(Row):
    """fio writes 4 KiB at random places while snapshots stand.

    One write for each 64 KiB of the disk, wherever they fall: so most of them are the first
    to their place for QEMU, too, which copies 64 KiB at once. Fewer under several snapshots.
    """

    def __init__(self, images: Images, snapshots: int) -> None:
        super().__init__(images)
        self.snapshots = snapshots
        self.name = f"first-touch-{snapshots}"
        if snapshots == 1:
            self.title = "4 KiB random guest writes under a snapshot (first touch)"
            self.metrics = (Metric("iops", "IOPS", at_least=1.2, aim=2.0),)
        else:
            self.title = f"the same with {snapshots} snapshots standing"
            self.metrics = (Metric("iops", "IOPS", at_least=3.0, aim=8.0),)

    def setup(self) -> Setup:
        return Setup({"vda": self.images.full}, writable=True, snapshots=self.snapshots)

    def measure(self, server: Server, running: Running) -> dict[str, float]:
        figures = self._write(running)
        return {"iops": figures["iops"], "operations": figures["total_ios"]}

    def _write(self, running: Running) -> dict[str, float]:
        count = self.images.size // QEMU_GRANULE // (1 if self.snapshots == 1 else FEWER)
        return fio(self.place, running.uri(), "randwrite", size=self.images.size, number_ios=count)

    def check(self, server: Server) -> None:
        with server.serve(self.setup()) as running:
            self._write(running)
            for number in {0, self.snapshots - 1}:
                uri = running.uri(f"snap{number}")
                clients.check_content(self.place, uri, self.images.content_hash(self.images.raw))


class PullWhileWriting(Row):
    """nbdcopy pulls a snapshot while fio writes to the disk as fast as it can."""

    name = "pull-fleece"
    title = "full pull of a fleece while a writer runs"
    metrics: tuple[Metric, ...] = (
        Metric("pull", "MB/s", at_least=1.2, aim=2.0, of_raw=0.8),
        Metric("writer", "IOPS", at_least=1.2, aim=2.0),
    )
    pace: Mapping[str, int] = {}
    """More options of fio's."""

    def setup(self) -> Setup:
        images = self.images
        disks = {"vda": images.full}
        return Setup(disks, writable=True, snapshots=1, is_pulled=True, bare=images.raw)

    def measure(self, server: Server, running: Running) -> dict[str, float]:
        writer = self._start_writer(running)
        begin = time.time()
        seconds = clients.pull(running.uri("snap0"))
        writer.stop()
        writer.finish()
        return {
            "pull": throughput(self.images.size, seconds),
            "writer": writer.rate(begin, begin + seconds),
        }

    def _start_writer(self, running: Running) -> LoggedFio:
        writer = LoggedFio(
            self.place, running.uri(), "randwrite", iodepth=8, size=self.images.size,
            norandommap=1, runtime=120, time_based=1, **self.pace,
        )  # fmt: skip
        writer.wait_until_running()
        return writer

    def check(self, server: Server) -> None:
        if server.is_limit:
            return  # it keeps nothing still
        with server.serve(self.setup()) as running:
            writer = self._start_writer(running)
            expected = self.images.content_hash(self.images.raw)
            clients.check_content(self.place, running.uri("snap0"), expected)
            writer.stop()
            writer.finish()


class PullBesideSteadyWriter(PullWhileWriting):
    """The same with a guest that asks of all servers for what each of them can do.

    Beside a guest that writes as fast as it can, a server that lets it write more has less left
    for the pull.
    """

    name = "pull-fleece-steady"
    title = "the same beside a guest that asks for 2,000 writes a second"
    metrics = (Metric("pull", "MB/s", at_least=1.2, aim=2.0, of_raw=0.8),)
    pace: Mapping[str, int] = {"rate_iops": 2000}
