"""Writing: in place under bitmaps, and where clusters have to be allocated."""

from __future__ import annotations

from .. import clients
from ..clients import fio
from ..images import Images
from ..measure import Metric
from ..servers import Running, Server, Setup
from .base import Row


class RandomWrites(Row):
    """fio writes 4 KiB at random places of a full image.

    Ours has one recording bitmap however many checkpoints there are; QEMU records into one
    bitmap for each, which is how libvirt does it.
    """

    def __init__(self, images: Images, checkpoints: int) -> None:
        super().__init__(images)
        self.checkpoints = checkpoints
        self.name = f"randwrite-{checkpoints}"
        if checkpoints == 1:
            self.title = "4 KiB random writes, depth 32, one recording bitmap"
            self.metrics = (Metric("iops", "IOPS", at_least=1.2, aim=2.0),)
        else:
            self.title = f"the same with {checkpoints} checkpoints"
            self.metrics = (Metric("iops", "IOPS", at_least=2.0, aim=3.0),)

    def setup(self) -> Setup:
        return Setup({"vda": self.images.full}, writable=True, checkpoints=self.checkpoints)

    def measure(self, server: Server, running: Running) -> dict[str, float]:
        seconds = self.place.seconds
        figures = fio(
            self.place, running.uri(), "randwrite", runtime=seconds, time_based=1,
            size=self.images.size, norandommap=1,
        )  # fmt: skip
        return {"iops": figures["iops"], "operations": figures["total_ios"]}


class AllocatingWrites(Row):
    """fio writes a whole disk from its beginning to its end, into an empty image."""

    name = "allocating"
    title = "256 KiB sequential writes into an empty qcow2"
    metrics = (Metric("throughput", "MB/s", at_least=1.0, aim=1.5),)

    def setup(self) -> Setup:
        return Setup({"vda": self.images.empty}, writable=True)

    def measure(self, server: Server, running: Running) -> dict[str, float]:
        figures = fio(
            self.place, running.uri(), "write", bs="256k", iodepth=16, size=self.images.size,
        )  # fmt: skip
        return {"throughput": figures["bw_bytes"] / 1e6}

    def check(self, server: Server) -> None:
        with server.serve(self.setup()) as running:
            clients.timed(["nbdcopy", str(self.images.raw), running.uri()])
            clients.check_content(
                self.place, running.uri(), self.images.content_hash(self.images.raw)
            )
