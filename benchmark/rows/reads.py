"""Reading: full pulls, random reads, compressed and cold images."""

from __future__ import annotations

import time
from pathlib import Path

from .. import clients
from ..clients import LoggedFio, fio, percentile_microseconds
from ..images import Images
from ..measure import Metric
from ..place import make_cold, resident_bytes, warm
from ..servers import Running, Server, Setup, Transport
from .base import Row, throughput


class _Pull(Row):
    """nbdcopy reads a whole disk, with its own defaults: requests of 256 KiB, 64 in flight.

    It opens four connections, but no more than it has threads, of which it has one for each
    processor.
    """

    transport = Transport.UNIX
    options: tuple[str, ...] = ()

    def setup(self) -> Setup:
        images = self.images
        certificates = images.certificates if self.transport is Transport.TLS else None
        return Setup(
            {"vda": images.full},
            {"vda": images.raw},
            transport=self.transport,
            certificates=certificates,
            # Over TLS there is no sendfile: the kernel would have to encrypt.
            bare=None if certificates else images.raw,
        )

    def measure(self, server: Server, running: Running) -> dict[str, float]:
        seconds = clients.pull(running.uri(), *self.options)
        return {"throughput": throughput(self.images.size, seconds)}

    def contents(self) -> dict[str, Path]:
        return {"vda": self.images.raw}


class PullUnix(_Pull):
    """Over a Unix socket."""

    name = "pull-unix"
    title = "full pull, 256 KiB requests, nbdcopy's defaults"
    metrics = (Metric("throughput", "MB/s", at_least=2.0, aim=3.0, of_raw=0.8),)


class PullUnixByFour(PullUnix):
    """With four connections, whatever the number of processors."""

    name = "pull-unix-4"
    title = "the same with 4 threads and 4 connections"
    options = ("--threads=4", "--connections=4")


class PullTcp(_Pull):
    """Over TCP."""

    name = "pull-tcp"
    title = "full pull over TCP loopback"
    metrics = (Metric("throughput", "MB/s", at_least=1.0, aim=1.5, of_raw=0.8),)
    transport = Transport.TCP


class PullTls(_Pull):
    """Over TLS, over TCP."""

    name = "pull-tls"
    title = "the same over TLS (TCP loopback)"
    metrics = (Metric("throughput", "MB/s", at_least=0.8, aim=1.0),)
    transport = Transport.TLS


class RandomReads(Row):
    """fio on one connection."""

    name = "randread-32"
    title = "4 KiB random reads, depth 32, one connection"
    metrics: tuple[Metric, ...] = (Metric("iops", "IOPS", at_least=1.2, aim=2.0),)
    depth = 32

    def setup(self) -> Setup:
        return Setup({"vda": self.images.full}, {"vda": self.images.raw})

    def contents(self) -> dict[str, Path]:
        return {"vda": self.images.raw}

    def measure(self, server: Server, running: Running) -> dict[str, float]:
        figures = self._run(running)
        return {"iops": figures["iops"], "operations": figures["total_ios"]}

    def _run(self, running: Running) -> dict[str, float]:
        seconds = self.place.seconds
        return fio(
            self.place, running.uri(), "randread", iodepth=self.depth, runtime=seconds,
            time_based=1, size=self.images.size, norandommap=1,
        )  # fmt: skip


class ReadLatency(RandomReads):
    """fio, one request at a time."""

    name = "randread-1"
    title = "4 KiB random reads, depth 1"
    metrics = (
        Metric("p50", "µs", lower_is_better=True, at_least=0.8, aim=1.2),
        Metric("p99", "µs", lower_is_better=True, at_least=0.8, aim=1.2),
    )
    depth = 1

    def measure(self, server: Server, running: Running) -> dict[str, float]:
        figures = self._run(running)
        return {
            "p50": percentile_microseconds(figures, 50),
            "p99": percentile_microseconds(figures, 99),
            "operations": figures["total_ios"],
        }


class CompressedRead(Row):
    """nbdcopy reads a compressed image, of half the usual size."""

    def __init__(self, images: Images, kind: str) -> None:
        super().__init__(images)
        self.kind = kind
        self.name = f"compressed-{kind}"
        self.title = f"compressed ({kind}) qcow2, full read"
        self.metrics = (Metric("throughput", "MB/s", at_least=0.9, aim=1.5),)

    def setup(self) -> Setup:
        return Setup({"vda": self.images.compressed(self.kind)})

    def measure(self, server: Server, running: Running) -> dict[str, float]:
        return {"throughput": throughput(self.images.text_size, clients.pull(running.uri()))}

    def contents(self) -> dict[str, Path]:
        return {"vda": self.images.text}


class ColdRead(Row):
    """nbdcopy reads an image on a disk that nothing of is in the page cache."""

    name = "cold-read"
    title = "cold cache full read"
    metrics = (Metric("throughput", "MB/s", at_least=1.0, aim=1.2, of_raw=0.8),)

    def setup(self) -> Setup:
        return Setup({"vda": self.images.cold("a")}, bare=self.images.cold_raw)

    def contents(self) -> dict[str, Path]:
        return {"vda": self.images.raw}

    def ready(self, setup: Setup) -> None:
        """What a server reads when it starts may make some of it warm: see measure."""

    def measure(self, server: Server, running: Running) -> dict[str, float]:
        setup = running.setup
        path = setup.bare if server.is_limit and setup.bare else setup.disks["vda"]
        make_cold(path)
        seconds = clients.pull(running.uri())
        assert resident_bytes(path) > self.images.size // 2, "it was not read through the cache"
        return {"throughput": throughput(self.images.size, seconds)}


class NeighbourLatency(Row):
    """fio reads one cached export while nbdcopy streams another from a cold disk."""

    name = "neighbour-p99"
    title = "p99 of 4 KiB cached reads on one export while another streams cold data"
    metrics = (Metric("p99", "µs", lower_is_better=True, at_least=1.0, aim=2.0),)

    def setup(self) -> Setup:
        return Setup({"vda": self.images.full, "vdb": self.images.cold("a")})

    def contents(self) -> dict[str, Path]:
        return {"vda": self.images.raw, "vdb": self.images.raw}

    def ready(self, setup: Setup) -> None:
        warm(setup.disks["vda"])
        make_cold(setup.disks["vdb"])

    def measure(self, server: Server, running: Running) -> dict[str, float]:
        reader = LoggedFio(
            self.place, running.uri("vda"), "randread", iodepth=1, runtime=60, time_based=1,
            size=self.images.size, norandommap=1,
        )  # fmt: skip
        reader.wait_until_running()
        begin = time.time()
        seconds = clients.pull(running.uri("vdb"))
        reader.stop()
        reader.finish()
        return {
            "p99": reader.percentile(begin, begin + seconds, 99),
            "stream": throughput(self.images.size, seconds),
        }
