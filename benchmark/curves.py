"""How cost grows: one workload, one thing about it varied, a line per server.

Each curve says how it may grow: a server whose design says O(1) must be flat. Points are medians
of a few rounds, the servers in turn within each round as in the rows.
"""

from __future__ import annotations

import json
import statistics
import sys
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Final

from . import clients
from .clients import fio, percentile_microseconds
from .images import Images
from .picture import curves_picture
from .place import warm
from .servers import Nbdfleece, QemuStorageDaemon, Running, Server, Setup, all_servers

ROUNDS: Final = 3

Point = Callable[[Images, Server, int], float]


@dataclass(frozen=True)
class Curve:
    """One picture.

    Attributes:
        name: Of its files.
        title: What is measured.
        x_unit: What is varied.
        y_unit: What is measured.
        values: The values of what is varied.
        point: Measures one of them.
        expected: How ours may grow, in words.
    """

    name: str
    title: str
    x_unit: str
    y_unit: str
    values: tuple[int, ...]
    point: Point
    expected: str


def _fio(
    images: Images, running: Running, workload: str, **options: str | int | float
) -> dict[str, Any]:
    defaults: dict[str, str | int | float] = {
        "runtime": images.place.seconds,
        "time_based": 1,
        "norandommap": 1,
        "size": images.size,
    }
    return fio(images.place, running.uri(), workload, **(defaults | options))


def _read_size(images: Images, server: Server, kib: int) -> float:
    with server.serve(Setup({"vda": images.full})) as running:
        figures = _fio(images, running, "randread", bs=f"{kib}k", iodepth=16)
        return float(figures["bw_bytes"]) / 1e6


def _read_depth(images: Images, server: Server, depth: int) -> float:
    with server.serve(Setup({"vda": images.full})) as running:
        return float(_fio(images, running, "randread", iodepth=depth)["iops"])


def _connections(images: Images, server: Server, count: int) -> float:
    with server.serve(Setup({"vda": images.full})) as running:
        seconds = clients.pull(running.uri(), f"--connections={count}")
        return images.size / seconds / 1e6


def _image_size(images: Images, server: Server, gib: int) -> float:
    """Latency of writes and reads at the beginning of an ever larger disk: flat."""
    setup = Setup({"vda": images.sparse(gib << 30)}, writable=True)
    with server.serve(setup) as running:
        figures = _fio(images, running, "randwrite", size=64 << 20, iodepth=1)
        return percentile_microseconds(figures, 50)


def _fragmentation(images: Images, server: Server, is_fragmented: int) -> float:
    image = images.fragmented if is_fragmented > 1 else images.full
    warm(image)
    with server.serve(Setup({"vda": image})) as running:
        return images.size / clients.pull(running.uri()) / 1e6


def _writes(images: Images, server: Server, *, checkpoints: int = 0, snapshots: int = 0) -> float:
    setup = Setup({"vda": images.full}, writable=True, checkpoints=checkpoints, snapshots=snapshots)
    with server.serve(setup) as running:
        if not snapshots:
            return float(_fio(images, running, "randwrite")["iops"])
        count = images.size // 65536
        figures = fio(images.place, running.uri(), "randwrite", size=images.size, number_ios=count)
    return float(figures["iops"])


def _checkpoints(images: Images, server: Server, count: int) -> float:
    return _writes(images, server, checkpoints=count)


def _snapshots(images: Images, server: Server, count: int) -> float:
    return _writes(images, server, snapshots=count)


CURVES: Final = (
    Curve(
        "request-size", "Random reads, depth 16, one connection", "KiB per request", "MB/s",
        (4, 16, 64, 256, 1024, 4096), _read_size, "rises until copying is all the cost",
    ),
    Curve(
        "depth", "4 KiB random reads, one connection", "requests in flight", "IOPS",
        (1, 2, 4, 8, 16, 32, 64, 128), _read_depth, "rises, then level",
    ),
    Curve(
        "connections", "Full pull by nbdcopy", "connections", "MB/s",
        (1, 2, 4, 8, 16, 32, 64), _connections, "level",
    ),
    Curve(
        "image-size", "4 KiB random writes into 64 MiB of a sparse disk, depth 1", "GiB of disk",
        "p50, µs", (1, 16, 256, 4096, 16384), _image_size, "flat: O(1)",
    ),
    Curve(
        "fragmentation", "Full pull: clusters in order (1) and in random order (2)", "layout",
        "MB/s", (1, 2), _fragmentation, "less, as each cluster is a read of its own",
    ),
    Curve(
        "checkpoints", "4 KiB random writes, depth 32; QEMU: recording bitmaps", "checkpoints",
        "IOPS", (1, 3, 10, 30, 100), _checkpoints, "flat: O(1)",
    ),
    Curve(
        "snapshots", "4 KiB random first-touch writes, depth 32", "snapshots standing",
        "IOPS", (1, 2, 5, 10, 20), _snapshots, "flat: one copy serves all",
    ),
)  # fmt: skip


def run_curves(images: Images, output: Path, names: list[str]) -> None:
    """Measure curves, all or the named ones; writes a JSON and an SVG file for each."""
    unknown = set(names) - {curve.name for curve in CURVES}
    if unknown:
        sys.exit(f"no such curve: {', '.join(sorted(unknown))}")
    output.mkdir(parents=True, exist_ok=True)
    servers = _curve_servers(images)
    for curve in CURVES:
        if names and curve.name not in names:
            continue
        lines = _measure(curve, images, servers)
        data = {"title": curve.title, "expected": curve.expected, "lines": lines}
        (output / f"curve-{curve.name}.json").write_text(json.dumps(data, indent=1) + "\n")
        drawn = {label: line for label, line in lines.items() if line}
        picture = curves_picture(curve.title, curve.x_unit, curve.y_unit, drawn)
        (output / f"curve-{curve.name}.svg").write_text(picture)


def _curve_servers(images: Images) -> list[Server]:
    """Ours, and the storage daemons with io_uring: they can do all that is varied."""
    return [
        server
        for server in all_servers(images.place)
        if isinstance(server, Nbdfleece)
        or (isinstance(server, QemuStorageDaemon) and "io_uring" in server.label)
    ]


def _measure(
    curve: Curve, images: Images, servers: list[Server]
) -> dict[str, list[tuple[float, float]]]:
    """``(x, median y)`` for each server; a server that fails has no more points."""
    print(f"== {curve.name}: {curve.title}; expected: {curve.expected}", flush=True)
    lines: dict[str, list[tuple[float, float]]] = {server.label: [] for server in servers}
    failed: set[str] = set()
    for value in curve.values:
        samples: dict[str, list[float]] = {server.label: [] for server in servers}
        for _ in range(ROUNDS):
            for server in servers:
                if server.label not in failed:
                    _try(partial(curve.point, images, server, value), server, samples, failed)
        for label, found in samples.items():
            if label not in failed:
                lines[label].append((value, statistics.median(found)))
                print(f"  {value} {label}: {lines[label][-1][1]:.4g} {curve.y_unit}", flush=True)
    return lines


def _try(
    point: Callable[[], float], server: Server, samples: dict[str, list[float]], failed: set[str]
) -> None:
    try:
        samples[server.label].append(point())
    except Exception as error:
        failed.add(server.label)
        print(f"  {server.label}: {type(error).__name__}: {error}", file=sys.stderr)
