"""How cost grows: one workload, one thing about it varied, a line per server.

What is measured is always a cost, so that less is better and a line that rises says how fast. Each
curve says how it may grow: where the design says O(1) it must be flat, and nowhere may it be worse
than linear; :mod:`.growth` fits and judges. Points are medians of a few rounds, the servers in turn
within each round as in the rows. After each value everything that is known is written.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

from . import clients
from .clients import fio, percentile_microseconds
from .curve_files import CurveFile, write_index
from .growth import Expected
from .images import Images
from .measure import shuffled
from .place import warm
from .servers import Nbdfleece, QemuStorageDaemon, Running, Server, Setup

ROUNDS: Final = 3
FLOOD_SECONDS: Final = 1.0
"""How long one run of fio lasts, whatever the command line says: a curve has dozens of them."""

SNAPSHOT_WRITES: Final = 2048
"""Few enough that QEMU ends with 20 snapshots, and that most are the first to their cluster."""

Point = Callable[[Images, Server, int], float]


@dataclass(frozen=True)
class Curve:
    """One picture.

    Attributes:
        name: Of its files.
        title: What is measured.
        x_unit: What is varied.
        y_unit: What it costs.
        values: The values of what is varied.
        point: Measures one of them.
        expected: How ours may grow.
        has_limit: The raw limit can do the same.
    """

    name: str
    title: str
    x_unit: str
    y_unit: str
    values: tuple[int, ...]
    point: Point
    expected: Expected = Expected.LINEAR
    has_limit: bool = field(default=False, kw_only=True)


@contextmanager
def _reading(images: Images, server: Server, image: Path) -> Iterator[Running]:
    warm(image)
    bare = images.raw if server.is_limit else None
    with server.serve(Setup({"vda": image}, bare=bare)) as running:
        yield running


def _flood(
    images: Images, running: Running, workload: str, **options: str | int | float
) -> dict[str, Any]:
    """Run fio for a fixed time."""
    defaults: dict[str, str | int | float] = {
        "runtime": min(images.place.seconds, FLOOD_SECONDS),
        "time_based": 1,
        "norandommap": 1,
        "size": images.size,
    }
    return fio(images.place, running.uri(), workload, **(defaults | options))


def _microseconds(figures: dict[str, Any]) -> float:
    """Of time per request, all together."""
    return 1e6 / float(figures["iops"])


def _read_size(images: Images, server: Server, kib: int) -> float:
    with _reading(images, server, images.full) as running:
        return _microseconds(_flood(images, running, "randread", bs=f"{kib}k", iodepth=16))


def _read_depth(images: Images, server: Server, depth: int) -> float:
    with _reading(images, server, images.full) as running:
        return float(_flood(images, running, "randread", iodepth=depth)["clat_ns"]["mean"]) / 1e3


def _connections(images: Images, server: Server, count: int) -> float:
    with _reading(images, server, images.full) as running:
        return clients.pull(running.uri(), f"--connections={count}")


def _fragmentation(images: Images, server: Server, pieces: int) -> float:
    with _reading(images, server, images.fragmented(pieces)) as running:
        return clients.pull(running.uri())


def _image_size(images: Images, server: Server, gib: int) -> float:
    """Writes into a part of fixed size that is allocated before, beside one recording bitmap."""
    part = 64 << 20
    setup = Setup({"vda": images.sparse(gib << 30)}, writable=True, checkpoints=1)
    with server.serve(setup) as running:
        fio(images.place, running.uri(), "write", bs="1m", size=part)
        figures = _flood(images, running, "randwrite", size=part, iodepth=1)
        return percentile_microseconds(figures, 50)


def _checkpoints(images: Images, server: Server, count: int) -> float:
    setup = Setup({"vda": images.full}, writable=True, checkpoints=count)
    with server.serve(setup) as running:
        return _microseconds(_flood(images, running, "randwrite"))


def _bitmaps(images: Images, server: Server, count: int) -> float:
    setup = Setup({"vda": images.full}, writable=True)
    with server.serve(setup) as running:
        for number in range(count):
            node = "vda" if isinstance(server, Nbdfleece) else "d-vda"
            running.qmp.execute("block-dirty-bitmap-add", node=node, name=f"m{number}")
        return _microseconds(_flood(images, running, "randwrite"))


def _snapshots(images: Images, server: Server, count: int) -> float:
    setup = Setup({"vda": images.full}, writable=True, snapshots=count)
    with server.serve(setup) as running:
        figures = fio(
            images.place, running.uri(), "randwrite", size=images.size, number_ios=SNAPSHOT_WRITES
        )
        return _microseconds(figures)


CURVES: Final = (
    Curve(
        "request-size", "Random reads, depth 16, one connection", "KiB per request",
        "µs per request", (4, 16, 64, 256, 1024, 4096), _read_size, has_limit=True,
    ),
    Curve(
        "depth", "4 KiB random reads, one connection", "requests in flight",
        "mean latency, µs", (1, 2, 4, 8, 16, 32, 64, 128), _read_depth, has_limit=True,
    ),
    Curve(
        "connections", "Full pull of 1 GiB by nbdcopy", "connections", "s",
        (1, 2, 4, 8, 16, 32, 64), _connections, Expected.FLAT, has_limit=True,
    ),
    Curve(
        "image-size", "4 KiB writes into 64 MiB of a sparse disk, depth 1, one bitmap",
        "GiB of disk", "p50, µs", (1, 16, 256, 4096, 16384), _image_size, Expected.FLAT,
    ),
    Curve(
        "fragmentation", "Full pull of 1 GiB by nbdcopy, its clusters in disorder",
        "pieces in the image file", "s", (1, 16, 256, 1024, 4096, 16384), _fragmentation,
    ),
    Curve(
        "bitmaps", "4 KiB random writes, depth 32, all bitmaps recording", "recording bitmaps",
        "µs per write", (1, 3, 10, 30, 100), _bitmaps,
    ),
    Curve(
        "checkpoints", "4 KiB random writes, depth 32; QEMU: recording bitmaps", "checkpoints",
        "µs per write", (1, 3, 10, 30, 100), _checkpoints, Expected.FLAT,
    ),
    Curve(
        "snapshots", "4 KiB random first-touch writes, depth 32", "snapshots standing",
        "µs per write", (1, 2, 5, 10, 20), _snapshots, Expected.FLAT,
    ),
)  # fmt: skip


def run_curves(
    images: Images, folder: Path, names: list[str], servers: list[Server], *, resume: bool
) -> None:
    """Measure curves, all or the named ones; writes a JSON and an SVG file for each.

    Raises:
        OtherRun: ``resume`` is wanted, and what is there was made otherwise.
    """
    unknown = set(names) - {curve.name for curve in CURVES}
    if unknown:
        sys.exit(f"no such curve: {', '.join(sorted(unknown))}")
    for curve in CURVES:
        if not names or curve.name in names:
            measure(curve, images, servers, folder, resume=resume)
            write_index(folder, [curve.name for curve in CURVES])


def usual_servers(servers: list[Server]) -> list[Server]:
    """Ours, the newest storage daemon with io_uring, which can do all that is varied, the limit."""
    daemons = [
        server
        for server in servers
        if isinstance(server, QemuStorageDaemon) and "io_uring" in server.label
    ]
    own = [server for server in servers if server.is_ours]
    return [*own, *daemons[-1:], *[server for server in servers if server.is_limit][:1]]


def measure(
    curve: Curve, images: Images, servers: list[Server], folder: Path, *, resume: bool
) -> CurveFile:
    """Measure what is missing of a curve, and write it after each value."""
    print(f"== {curve.name}: {curve.title}; expected: {curve.expected.value}", flush=True)
    options = {"rounds": ROUNDS, "image-mib": images.size >> 20}
    servers = [server for server in servers if curve.has_limit or not server.is_limit]
    labels = [server.label for server in servers]
    file = CurveFile.open(folder, curve, labels, options, resume=resume)
    for value in curve.values:
        missing = [server for server in servers if file.wants(server.label, value)]
        if missing:
            _measure_value(curve, images, missing, value, file)
            file.write()
    print(file.summary(), flush=True)
    return file


def _measure_value(
    curve: Curve, images: Images, servers: list[Server], value: int, file: CurveFile
) -> None:
    samples: dict[str, list[float]] = {server.label: [] for server in servers}
    for number in range(ROUNDS):
        for server in shuffled(servers, number):
            if not file.has_failed(server.label):
                try:
                    samples[server.label].append(curve.point(images, server, value))
                except Exception as error:
                    file.fail(server.label, f"at {value}: {type(error).__name__}: {error}"[:600])
    for label, found in samples.items():
        if not file.has_failed(label):
            file.add(label, value, found)
