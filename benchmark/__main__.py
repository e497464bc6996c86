"""The command line: ``python -m benchmark run``, ``curves``, ``profile``, ``report``, ``list``."""

from __future__ import annotations

import argparse
import shutil
import signal
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from .curves import run_curves, usual_servers
from .images import Images
from .place import Place
from .profiles import BEHIND, profile_rows
from .report import read_json, table
from .rows import Row, all_rows
from .run import run_rows, write_report
from .servers import Server, all_servers
from .version import OtherRun

QUICK = ("nbdfleece", "io_uring", "nbdkit", "raw limit")
"""Parts of the labels of the contestants of a quick run."""

COMMANDS = {
    "run": "measure rows, all or the named ones",
    "curves": "measure how cost grows, into OUTPUT/curves",
    "profile": "say where our server's time goes, into OUTPUT/profiles (default: slow rows)",
    "report": "write the table of what was measured once more",
    "list": "name the rows",
}


def main() -> None:
    """Run what the command line says."""
    arguments = _parser().parse_intermixed_args()
    # However it is ended, servers and folders do not stay behind.
    signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(128 + number))
    signal.signal(signal.SIGINT, signal.default_int_handler)
    if arguments.command == "report":
        write_report(arguments.output)
        print(table(read_json(arguments.output / "results.json")))
        return
    with _place(arguments) as place:
        try:
            _carry_out(Images(place), arguments)
        except OtherRun as error:
            sys.exit(f"bench: {error}")


def _carry_out(images: Images, arguments: argparse.Namespace) -> None:
    output = arguments.resume or arguments.output
    resume = arguments.resume is not None
    if arguments.command == "list":
        for row in all_rows(images):
            print(f"{row.name:16} {row.title}")
    elif arguments.command == "profile":
        arguments.rows = arguments.rows or list(BEHIND)
        profile_rows(_rows(images, arguments), output / "profiles")
    elif arguments.command == "curves":
        servers = _servers(images.place, arguments)
        if not arguments.servers:
            servers = usual_servers(servers)
        run_curves(images, output / "curves", arguments.rows, servers, resume=resume)
    elif not _run(images, arguments, output, resume=resume):
        sys.exit(75)  # as in sysexits.h: try again later


def _run(images: Images, arguments: argparse.Namespace, output: Path, *, resume: bool) -> bool:
    options = {
        "rounds": arguments.rounds,
        "seconds": arguments.seconds,
        "image-mib": arguments.image_mib,
    }
    return run_rows(
        _rows(images, arguments),
        _servers(images.place, arguments),
        output,
        options,
        check=not arguments.no_check,
        resume=resume,
        minutes=arguments.minutes,
    )


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m benchmark",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        description="\n".join(f"{name:8} {text}" for name, text in COMMANDS.items()),
    )
    parser.add_argument("command", choices=list(COMMANDS))
    parser.add_argument("rows", nargs="*", help="names of rows or curves (default: all)")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--seconds", type=float, default=1.0, help="of one run of fio")
    parser.add_argument("--image-mib", type=int, default=1024, help="size of the usual disk")
    parser.add_argument("--tree", type=Path, help="a Debian 13 tree, from scripts/trixie-tree")
    parser.add_argument("--memory", type=Path, default=Path("/dev/shm"), help="a tmpfs")
    parser.add_argument("--disk", type=Path, default=Path("/var/tmp"), help="a disk")
    parser.add_argument("--output", type=Path, default=Path("benchmark-results"))
    parser.add_argument(
        "--resume", type=Path, metavar="DIR", help="measure what the results in DIR lack"
    )
    parser.add_argument("--minutes", type=float, help="after so many, begin no further row")
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


def _servers(place: Place, arguments: argparse.Namespace) -> list[Server]:
    """The contestants that the command line asks for, ours always."""
    wanted = QUICK if arguments.quick else arguments.servers
    return [
        server
        for server in all_servers(place)
        if server.is_ours or not wanted or any(word in server.label for word in wanted)
    ]


def _rows(images: Images, arguments: argparse.Namespace) -> list[Row]:
    rows = [row for row in all_rows(images) if not arguments.rows or row.name in arguments.rows]
    unknown = set(arguments.rows) - {row.name for row in rows}
    if unknown:
        sys.exit(f"no such row: {', '.join(sorted(unknown))}; see the list")
    return rows


if __name__ == "__main__":
    main()
