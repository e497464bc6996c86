"""What changed: block status and incremental pulls."""

from __future__ import annotations

import time
from contextlib import ExitStack

from .. import clients
from ..clients import fio
from ..copies import data_ranges
from ..images import GRANULE, Images
from ..measure import Metric
from ..servers import Nbdfleece, QemuStorageDaemon, Running, Server, Setup
from .base import Row

DISK_BYTES = 100 << 30
"""Of the incremental pull."""


class IncrementalPull(Row):
    """A guest changes 1 % of a sparse disk, a backup begins, and what changed is pulled.

    Timed is everything from beginning the backup (freezing the disk and its bitmap, exporting
    both) to the last byte. The client is libnbd's, the same for all. The raw limit has nothing
    to begin and no map: its client reads where the raw file has data.
    """

    name = "incremental"
    title = "incremental pull of 1 % dirty, scattered, of a sparse 100 GiB disk, end to end"
    metrics = (Metric("seconds", "s", lower_is_better=True, at_least=1.5, aim=3.0),)

    def __init__(self, images: Images, disk_bytes: int = DISK_BYTES) -> None:
        super().__init__(images)
        self._disk_bytes = disk_bytes
        self._granules = disk_bytes // 100 // GRANULE

    def setup(self) -> Setup:
        images, size = self.images, self._disk_bytes
        disks = {"vda": images.sparse(size)}
        return Setup(disks, writable=True, checkpoints=1, bare=images.sparse_raw(size))

    def prepare(self, running: Running) -> None:
        fio(
            self.place, running.uri(), "randwrite", bs="64k", size=self._disk_bytes,
            number_ios=self._granules, iodepth=8,
        )  # fmt: skip

    def measure(self, server: Server, running: Running) -> dict[str, float]:
        with ExitStack() as stack:
            if server.is_limit:
                assert running.setup.bare is not None
                with running.setup.bare.open("rb") as file:
                    ranges = list(data_ranges(file))
                begin_seconds = 0.0
                pulled = clients.pull_ranges(running.uri(), ranges)
            else:
                begin_seconds, name, context = begin_backup(server, running, stack)
                pulled = clients.pull_dirty(running.uri(name), context)
        if pulled["bytes"] < self._granules * GRANULE:
            raise clients.WrongContent(f"only {pulled['bytes']} bytes are dirty")
        seconds = begin_seconds + pulled["seconds"]
        return {"seconds": seconds, "map": pulled["map"], "client-cpu": pulled["cpu"]}

    def check(self, server: Server) -> None:
        """What changed is all that the disk has, and as it has it: nobody writes meanwhile."""
        if server.is_limit:
            return  # it has no bitmap
        with server.serve(self.setup()) as running:
            self.prepare(running)
            with ExitStack() as stack:
                _, name, context = begin_backup(server, running, stack)
                changed = clients.pull_dirty(running.uri(name), context)
                live = running.uri()
                present = clients.pull_ranges(live, clients.data_extents(live))
        found = [(each["bytes"], each["checksum"]) for each in (changed, present)]
        if found[0] != found[1]:
            raise clients.WrongContent(f"{name}: bytes and checksum {found[0]}, not {found[1]}")


def begin_backup(server: Server, running: Running, stack: ExitStack) -> tuple[float, str, str]:
    """Freeze the disk and what changed since checkpoint ``c0``; seconds, export, context."""
    begin = time.perf_counter()
    qmp = running.qmp
    if isinstance(server, Nbdfleece):
        qmp.execute("backup-begin", name="b", checkpoint="c1", since="c0")
        return time.perf_counter() - begin, "b/vda", "qemu:dirty-bitmap:c0"
    assert isinstance(server, QemuStorageDaemon)
    qmp.execute("block-dirty-bitmap-disable", node="d-vda", name="c0")
    qmp.execute(
        "block-dirty-bitmap-add", node="d-vda", name="c1", granularity=GRANULE, persistent=True
    )
    # A filter cannot be put under an export: the guest is cut off, and comes back over it.
    server.unexport(running, "vda")
    top = server.add_filter(running, "d-vda", 0, stack)
    server.unexport(running, "snap0")
    server.export(running, "vda", top, "vda", writable=True)
    bitmaps = [{"node": "d-vda", "name": "c0"}]
    server.export(running, "snap", "access0", "vda", bitmaps=bitmaps)
    return time.perf_counter() - begin, "snap", "qemu:dirty-bitmap:c0"


class AlternatingStatus(Row):
    """nbdinfo asks for the whole map of a bitmap that no run-length encoding can shorten."""

    name = "block-status"
    title = "BLOCK_STATUS of a whole 1 TiB disk, every other 64 KiB granule dirty"
    metrics = (Metric("seconds", "s", lower_is_better=True, at_least=2.0, aim=5.0),)

    def setup(self) -> Setup:
        return Setup({"vda": self.images.alternating}, bitmaps=("b0",))

    def measure(self, server: Server, running: Running) -> dict[str, float]:
        return {"seconds": clients.map_totals(running.uri(), "qemu:dirty-bitmap:b0")}
