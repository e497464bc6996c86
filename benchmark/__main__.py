"""The command line: ``python -m benchmark run``, ``curves``, ``report``, ``list``."""

from __future__ import annotations

import argparse
import json
import shutil
import signal
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path

from .curves import run_curves, usual_servers
from .images import Images
from .measure import Contestant, Result, Sample, run_rounds
from .picture import ratios_picture
from .place import Place
from .report import details, read_json, table, write_json
from .rows import Row, all_rows
from .servers import Server, all_servers

QUICK = ("nbdfleece", "io_uring", "nbdkit")
"""Parts of the labels of the contestants of a quick run."""


def main() -> None:
    """Run what the command line says."""
    arguments = _parser().parse_args()
    # However it is ended, servers and folders do not stay behind.
    signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(128 + number))
    signal.signal(signal.SIGINT, signal.default_int_handler)
    if arguments.command == "report":
        _write_report(arguments.output)
        return
    with _place(arguments) as place:
        images = Images(place)
        if arguments.command == "list":
            for row in all_rows(images):
                print(f"{row.name:16} {row.title}")
        elif arguments.command == "curves":
            _run_curves(images, arguments)
        else:
            _run(images, arguments)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m benchmark", description=__doc__)
    parser.add_argument("command", choices=["run", "curves", "report", "list"])
    parser.add_argument("rows", nargs="*", help="names of rows or curves (default: all)")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--seconds", type=float, default=5.0, help="of one run of fio")
    parser.add_argument("--image-mib", type=int, default=1024, help="size of the usual disk")
    parser.add_argument("--tree", type=Path, help="a Debian 13 tree, from scripts/trixie-tree")
    parser.add_argument("--memory", type=Path, default=Path("/dev/shm"), help="a tmpfs")
    parser.add_argument("--disk", type=Path, default=Path("/var/tmp"), help="a disk")
    parser.add_argument("--output", type=Path, default=Path("benchmark-results"))
    parser.add_argument(
        "--resume", action="store_true", help="measure only what --output does not have yet"
    )
    parser.add_argument(
        "--servers", nargs="*", help="only contestants whose label contains one of these"
    )
    parser.add_argument("--quick", action="store_true", help=f"only {', '.join(QUICK)}")
    parser.add_argument("--no-check", action="store_true", help="do not check the content")
    return parser


@contextmanager
def _place(arguments: argparse.Namespace) -> Iterator[Place]:
    """Working folders that go at the end."""
    memory = Path(tempfile.mkdtemp(prefix="nbdfleece-bench-", dir=arguments.memory))
    disk = Path(tempfile.mkdtemp(prefix="nbdfleece-bench-", dir=arguments.disk))
    try:
        image_bytes = arguments.image_mib << 20
        yield Place(memory, disk, arguments.tree, image_bytes, arguments.seconds)
    finally:
        for folder in (memory, disk):
            shutil.rmtree(folder, ignore_errors=True)


def _run_curves(images: Images, arguments: argparse.Namespace) -> None:
    servers = _servers(images.place, arguments)
    if not arguments.servers:
        servers = usual_servers(servers)
    folder = arguments.output / "curves"
    run_curves(images, folder, arguments.rows, servers, resume=arguments.resume)


def _servers(place: Place, arguments: argparse.Namespace) -> list[Server]:
    """The contestants that the command line asks for, ours always."""
    wanted = QUICK if arguments.quick else arguments.servers
    return [
        server
        for server in all_servers(place)
        if server.is_ours or not wanted or any(word in server.label for word in wanted)
    ]


def _run(images: Images, arguments: argparse.Namespace) -> None:
    servers = _servers(images.place, arguments)
    rows = [row for row in all_rows(images) if not arguments.rows or row.name in arguments.rows]
    unknown = set(arguments.rows) - {row.name for row in rows}
    if unknown:
        sys.exit(f"no such row: {', '.join(sorted(unknown))}; see the list")
    arguments.output.mkdir(parents=True, exist_ok=True)
    options = {
        "rounds": arguments.rounds,
        "seconds": arguments.seconds,
        "image-mib": arguments.image_mib,
    }
    for row in rows:
        result = run_row(row, servers, arguments.rounds, check=not arguments.no_check)
        write_json(arguments.output / "results.json", [result], options)
        print(table([result]), flush=True)
    _write_report(arguments.output)


def run_row(row: Row, servers: list[Server], rounds: int, *, check: bool) -> Result:
    """Measure one row with every server that can take part."""
    print(f"== {row.name}: {row.title}", flush=True)
    setup = row.setup()
    contestants: list[tuple[Contestant, Sample]] = []
    for server in servers:
        if not server.can(setup):
            continue
        contestant = Contestant(server.label, server.is_ours, server.counts)
        if check:
            try:
                row.check(server)
            except Exception as error:
                contestant.failure = f"check: {type(error).__name__}: {error}"[:600]
                print(f"  {server.label}: {contestant.failure}", file=sys.stderr)
        contestants.append((contestant, partial(row.sample, server)))
    run_rounds(contestants, rounds, partial(print, flush=True))
    return Result(row.name, row.title, row.metrics, [it for it, _ in contestants], row.notes)


def _write_report(folder: Path) -> None:
    """Write the table, the details and the picture of all results in a folder."""
    results = read_json(folder / "results.json")
    rows = json.loads((folder / "results.json").read_text())["rows"]
    about = rows[-1]["machine"]
    text = f"Measured on {about['cpus']} x {about['cpu']}, Linux {about['kernel']}.\n\n"
    (folder / "table.md").write_text(text + table(results) + "\n" + details(results))
    (folder / "ratios.svg").write_text(ratios_picture(results))
    print(table(results))


if __name__ == "__main__":
    main()
