"""``nbdfleece serve``: run a server until it is told to end."""

from __future__ import annotations

import contextlib
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click
import msgspec

from ..errors import UsageError
from . import logs
from .addresses import (
    CONTROL_VARIABLE,
    NO_CONTROL,
    default_control,
    default_listen,
    parse_listen,
    runtime_directory,
)
from .backup_exports import backup_exports
from .config import config_option
from .disk_options import disk_options, parse_disks, parse_policies
from .export_options import parse_export_rule
from .limit_options import parse_limits
from .listen_options import keep_stderr_from_client, listen_options, parse_socket_file
from .nbd_serving import handle_signals
from .options import loop_option
from .read_only_options import parse_bitmaps, parse_images, parse_since, read_only_options
from .sizes import parse_size
from .tls_options import build_authorization, build_tls, tls_options

if TYPE_CHECKING:
    from ..daemon import Daemon, DaemonOptions


@click.command()
@config_option
@disk_options
@read_only_options
@click.option(
    "--backup",
    "backups",
    multiple=True,
    metavar="DIR[@POINT]",
    help="Serve the disks of a restore point, or of all, read-only as exports POINT/DISK, with "
    "qemu:dirty-bitmap:EARLIER for the difference to each earlier point; may be repeated.",
)
@click.option(
    "--listen",
    multiple=True,
    metavar="ADDRESS",
    help="unix:PATH, tcp:HOST:PORT, vsock:CID:PORT or an NBD URI; may be repeated. "
    "Default: unix:$XDG_RUNTIME_DIR/nbdfleece/nbd.sock.",
)
@listen_options
@tls_options
@click.option(
    "--export",
    "export_rules",
    multiple=True,
    metavar="PATTERN:KEY=VALUE,...",
    help="Settings of the exports whose names fit, those of snapshots too: allocation-depth, "
    "connections-max, maximum-payload, minimum-block-size, multi-conn, preferred-block-size, "
    "require-block-size, rotational, tls-only. May be repeated; the last word counts.",
)
@click.option(
    "--limit",
    "limits",
    multiple=True,
    metavar="NAME=VALUE",
    help="What clients may take, such as handshake-seconds=10 or connections-max=1000; may be "
    "repeated. All limits with their reasons are in docs/nbd.md.",
)
@click.option(
    "--control",
    metavar="PATH",
    envvar=CONTROL_VARIABLE,
    show_envvar=True,
    help="The control socket; 'none' for none. Default: $XDG_RUNTIME_DIR/nbdfleece/control.sock.",
)
@click.option(
    "--scratch-dir",
    type=click.Path(path_type=Path),
    default=Path("/var/tmp"),
    show_default=True,
    metavar="DIR",
    help="Where snapshots keep what the guest overwrites.",
)
@click.option(
    "--scratch-quota",
    type=parse_size,
    metavar="SIZE",
    help="The most that is kept per disk, such as 10G. Default: no limit.",
)
@click.option(
    "--scratch-granularity",
    type=parse_size,
    default="4k",
    show_default=True,
    metavar="SIZE",
    help="What a first guest write copies at least.",
)
@click.option(
    "--on-cbw-error",
    type=click.Choice(["break-snapshot", "break-guest-write"]),
    default="break-snapshot",
    show_default=True,
    help="What ends if the scratch cannot take a copy.",
)
@click.option(
    "--cbw-timeout",
    type=click.FloatRange(min=0, min_open=True),
    metavar="SECONDS",
    help="A copy that takes longer counts as failed. Default: no limit.",
)
@click.option(
    "--pid-file", type=click.Path(path_type=Path), metavar="FILE", help="Write the process id."
)
@click.option("--print-uri", is_flag=True, help="Once ready, print the URIs only, one per line.")
@click.option("--json", "as_json", is_flag=True, help="Once ready, print one line of JSON.")
@click.option(
    "--ready-fd", type=click.IntRange(min=0), metavar="FD", help="Write a line there once ready."
)
@loop_option
@click.option("-v", "--verbose", count=True, help="Log what happens; twice for more.")
@click.option(
    "--log-format", type=click.Choice(["text", "json"]), default="text", show_default=True
)
@click.pass_context
def serve(ctx: click.Context, /, **values: Any) -> None:
    """Serve disks over NBD until SIGTERM, SIGINT, SIGHUP or quit.

    A second signal ends the server at once; images survive that as they survive a crash.
    """
    assert ctx.parent is not None
    verbosity = values["verbose"] + ctx.parent.params.get("verbose", 0)
    if values["stdio"]:
        keep_stderr_from_client()
    logs.configure(verbosity, values["log_format"])
    from ..server.loop import run  # heavy, and not needed by anything that fails before

    options = build_options(values)
    run(_serve(options, values), values["loop"])


def build_options(values: dict[str, Any]) -> DaemonOptions:
    """What was asked for on the command line.

    Raises:
        UsageError: It cannot be meant.
    """
    from ..block.copy_failure import CopyFailure, OnCbwError
    from ..daemon import DaemonOptions
    from ..engine.disk import ScratchOptions

    if not (values["disks"] or values["images"] or values["backups"]):
        raise UsageError("there is nothing to serve: say --disk, --read-only or --backup")
    if values["stdio"] and (values["as_json"] or values["print_uri"]):
        raise UsageError("--stdio: stdout is the client's; leave --json and --print-uri out")
    if values["processes"] and not (values["images"] or values["disks"]):
        raise UsageError(
            "--processes are for --read-only images and the snapshots of --disk: there are none"
        )
    if values["processes"] and values["stdio"]:
        raise UsageError("--stdio serves one client only: leave --processes out")
    is_activated = os.environ.get("LISTEN_PID") == str(os.getpid())
    listen = [parse_listen(text) for text in values["listen"]]
    if not (listen or is_activated or values["stdio"]):
        listen = [default_listen()]
        make_runtime_directory()
    disks = parse_disks(values["disks"])
    images = parse_images(values["images"], disks)
    bitmaps = parse_bitmaps(values["bitmaps"], images)
    return DaemonOptions(
        disks=disks,
        policies=parse_policies(disks, values["discard"], values["detect_zeroes"]),
        images=images,
        bitmaps=bitmaps,
        since=parse_since(values["since"], bitmaps),
        processes=values["processes"],
        processes_nice=values["processes_nice"],
        loop=values["loop"],
        listen=listen,
        control=choose_control(values["control"]),
        limits=parse_limits(values["limits"]),
        socket_file=parse_socket_file(values["socket_mode"], values["socket_owner"]),
        adopts_sockets=is_activated,
        stdio=values["stdio"],
        tls=build_tls(values),
        authorization=build_authorization(values["authorize"]),
        export_rules=[parse_export_rule(text) for text in values["export_rules"]],
        more_exports=[backup_exports(text) for text in values["backups"]],
        scratch=ScratchOptions(
            directory=values["scratch_dir"],
            granularity=values["scratch_granularity"],
            quota=values["scratch_quota"],
            failure=CopyFailure(OnCbwError(values["on_cbw_error"]), values["cbw_timeout"]),
        ),
    )


def choose_control(word: str | None) -> Path | None:
    """The control socket that was asked for, or the usual one."""
    if word == NO_CONTROL:
        return None
    if word is not None:
        return Path(word)
    make_runtime_directory()
    return default_control()


def make_runtime_directory() -> None:
    """Make the place for our sockets, for ourselves only."""
    runtime_directory().mkdir(mode=0o700, parents=True, exist_ok=True)


async def _serve(options: DaemonOptions, values: dict[str, Any]) -> None:
    from ..daemon import Daemon
    from ..server.limits import allow_descriptors
    from ..server.loop import settle

    allow_descriptors(options.limits)
    daemon = Daemon(options)
    handle_signals(lambda: daemon.request_stop("host-signal"))
    with contextlib.ExitStack() as after_the_end:
        async with daemon:
            settle()
            after_the_end.enter_context(_pid_file(values["pid_file"]))
            _announce(daemon, values)
            await daemon.wait_stop_requested()


@contextlib.contextmanager
def _pid_file(path: Path | None) -> Iterator[None]:
    if path is None:
        yield
        return
    path.write_text(f"{os.getpid()}\n")
    try:
        yield
    finally:
        path.unlink(missing_ok=True)


def _announce(daemon: Daemon, values: dict[str, Any]) -> None:
    """Say that clients can come; on stdout, unless that is a client's."""
    if values["ready_fd"] is not None:
        with open(values["ready_fd"], "w") as stream:
            stream.write("ready\n")
    exports = [
        {"name": export.name, "uris": daemon.export_uris(export.name)} for export in daemon.exports
    ]
    uris = [uri for export in exports for uri in export["uris"]]
    if values["stdio"]:
        return
    if values["as_json"]:
        control = daemon.options.control
        ready = {"pid": os.getpid(), "control": control and str(control), "exports": exports}
        click.echo(msgspec.json.encode(ready))
    elif values["print_uri"]:
        click.echo("\n".join(uris))
    else:
        click.echo(f"nbdfleece: ready: {' '.join(uris)}")
    sys.stdout.flush()
