"""What a backup costs the guest in time, and the server in memory."""

from __future__ import annotations

import time

from ..clients import Fio, fio
from ..images import TIB
from ..measure import Metric
from ..servers import Nbdfleece, Running, Server, Setup
from .base import Row

DISKS = 8


class BeginPause(Row):
    """A backup begins on 8 disks of 1 TiB while a guest writes to one of them.

    The pause is the longest time that one 4 KiB write takes in a second around the beginning,
    at one write at a time; ``quiet`` is the same without a backup, the machine's own noise.
    With QEMU a transaction adds a bitmap to each disk; its filters are not transactionable.
    """

    name = "begin-pause"
    title = f"begin of a backup on {DISKS} disks of 1 TiB: guest pause"
    metrics = (Metric("pause", "ms", lower_is_better=True, limit=10.0, aim=1.0),)

    def setup(self) -> Setup:
        disks = {f"vd{letter}": self.images.sparse(TIB) for letter in "abcdefgh"[:DISKS]}
        return Setup(disks, writable=True, checkpoints=1)

    def measure(self, server: Server, running: Running) -> dict[str, float]:
        quiet = self._longest_write(running, begin=None)
        begin = _begin_ours if isinstance(server, Nbdfleece) else _begin_qemu
        pause = self._longest_write(running, begin)
        return {"pause": pause["longest"], "quiet": quiet["longest"], "begin": pause["begin"]}

    def _longest_write(self, running: Running, begin: object) -> dict[str, float]:
        fio(self.place, running.uri(), "write", iodepth=1, size=1 << 20)
        writer = Fio(
            self.place, running.uri(), "randwrite", iodepth=1, size=1 << 20, norandommap=1,
            runtime=1, time_based=1,
        )  # fmt: skip
        time.sleep(0.5)
        started = time.perf_counter()
        if callable(begin):
            begin(running)
        seconds = time.perf_counter() - started
        return {"longest": writer.finish()["clat_ns"]["max"] / 1e6, "begin": seconds * 1e3}


def _begin_ours(running: Running) -> None:
    running.qmp.execute("backup-begin", name="b", checkpoint="c1", since="c0")


def _begin_qemu(running: Running) -> None:
    actions = [
        {
            "type": "block-dirty-bitmap-add",
            "data": {"node": f"d-{name}", "name": "c1", "granularity": 65536, "persistent": True},
        }
        for name in running.setup.disks
    ]
    running.qmp.execute("transaction", actions=actions)


class Memory(Row):
    """What a server holds with one 1 TiB disk and 100 checkpoints, after some writes."""

    name = "memory"
    title = "memory: one 1 TiB disk and 100 checkpoints, resident"
    metrics = (Metric("resident", "MB", lower_is_better=True, at_least=1.0, limit=100.0),)

    def setup(self) -> Setup:
        return Setup({"vda": self.images.sparse(TIB)}, writable=True, checkpoints=100)

    def measure(self, server: Server, running: Running) -> dict[str, float]:
        fio(
            self.place, running.uri(), "randwrite", bs="4k", size=TIB, number_ios=2000,
            norandommap=1,
        )  # fmt: skip
        return {"resident": running.process.status_bytes("VmRSS") / 1e6}
