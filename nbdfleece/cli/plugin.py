"""``nbdfleece plugin``: serve an nbdkit Python plugin script, without nbdkit."""

from __future__ import annotations

import asyncio
import os
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractAsyncContextManager, ExitStack, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, Protocol

import click
from click.core import ParameterSource

from ..errors import UsageError
from ..nbd.constants import DEFAULT_PORT
from ..nbdkit import lifecycle
from ..nbdkit.module import Server
from ..server.listener import Listener, listen_systemd, listen_tcp, listen_unix, listen_vsock
from .addresses import CONTROL_VARIABLE
from .limit_options import parse_limits
from .nbd_serving import go_to_background, handle_signals, pid_file
from .options import loop_option
from .serve import choose_control
from .tls_options import build_authorization, build_tls, tls_options

if TYPE_CHECKING:
    from ..nbdkit.host import HostOptions
    from ..nbdkit.lifecycle import Plugin
    from ..server.channel import Channel


class Ending(Protocol):
    """A server that may end by itself."""

    def request_stop(self) -> None:
        """Have it end in good order."""

    async def wait_end(self) -> None:
        """Wait until it is time to end."""


TEMPORARY: Final = "-"
"""The value of ``--unix`` for a socket that is made for the occasion."""


@click.command(context_settings={"ignore_unknown_options": False})
@click.option("-r", "--readonly", is_flag=True, help="Serve read-only; open() is told so.")
@click.option("-U", "--unix", metavar="SOCKET", help="Unix socket; - for a temporary one.")
@click.option(
    "-p", "--port", type=click.IntRange(0, 65535), help=f"TCP port. Default: {DEFAULT_PORT}."
)
@click.option("-i", "--ipaddr", metavar="ADDRESS", help="TCP address. Default: all.")
@click.option("--vsock", is_flag=True, help="Listen on vsock, on --port.")
@click.option("-s", "--single", is_flag=True, help="Serve one client, on stdin and stdout.")
@click.option("-e", "--exportname", default="", metavar="NAME", help="Export in --run's URI.")
@click.option("--print-uri", is_flag=True, help="Once ready, print the URIs.")
@click.option("--run", metavar="COMMAND", help="Run it with $uri, and end with its exit status.")
@click.option("-f", "--foreground", is_flag=True, help="Stay there; the default.")
@click.option("--fork", is_flag=True, help="Go on in the background once clients can come.")
@click.option("-P", "--pidfile", metavar="FILE", help="Write the process id there once ready.")
@click.option(
    "-t",
    "--threads",
    type=click.IntRange(1, 1024),
    default=16,
    show_default=True,
    help="Callbacks of a client at a time, with THREAD_MODEL_PARALLEL.",
)
@tls_options
@click.option(
    "--limit",
    multiple=True,
    metavar="NAME=VALUE",
    help="What clients may take, as for 'nbdfleece serve'.",
)
@loop_option
@click.option(
    "--fleece",
    type=click.Path(path_type=Path),
    metavar="FILE",
    help="Snapshots, checkpoints and backups for the script's disk. FILE is a qcow2 image that"
    " keeps their bitmaps; it is made if it is not there.",
)
@click.option(
    "--disk", default="disk", show_default=True, metavar="NAME", help="With --fleece: its name."
)
@click.option(
    "--control",
    metavar="PATH",
    envvar=CONTROL_VARIABLE,
    show_envvar=True,
    help="With --fleece: the control socket, as for 'nbdfleece serve'.",
)
@click.option(
    "--scratch-dir",
    type=click.Path(path_type=Path),
    default=Path("/var/tmp"),
    show_default=True,
    metavar="DIR",
    help="With --fleece: where snapshots keep what is overwritten.",
)
@click.option("--dump-plugin", is_flag=True, help="Print what the script is, and exit.")
@click.argument("words", nargs=-1, required=True, metavar="SCRIPT [KEY=VALUE]...")
def plugin(**values: Any) -> int:
    """Serve a Python plugin script of nbdkit's, without nbdkit.

    SCRIPT is given each KEY=VALUE by config(); options come first.
    """
    path, parameters = lifecycle.parse_words(values["words"])
    server = Server(uses_stdin=values["single"])
    sys.argv = [""]  # as scripts find it under nbdkit
    script = lifecycle.load(path, parameters, server)
    if values["dump_plugin"]:
        lifecycle.print_plugin(script)
        return 0
    _check(values)
    return _serve(lifecycle.prepare(script, server), values)


def _check(values: dict[str, Any]) -> None:
    if values["fleece"] is not None:
        for name in ("readonly", "single"):
            if values[name]:
                raise UsageError(f"--fleece and --{name} exclude each other")
        values["fleece"] = values["fleece"].absolute()
        values["scratch_dir"] = values["scratch_dir"].absolute()
        control = choose_control(values["control"])
        values["control"] = None if control is None else control.absolute()
    else:
        _check_no_fleece()
    if values["pidfile"] is not None:
        values["pidfile"] = os.path.abspath(values["pidfile"])
    if values["fork"]:
        for name in ("foreground", "single", "run"):
            if values[name]:
                raise UsageError(f"--fork and --{name} exclude each other")
        if values["unix"] == TEMPORARY:
            raise UsageError("--fork needs a socket whose name is known: not --unix -")
    ways = [name for name in ("unix", "vsock", "single") if values[name]]
    if values["ipaddr"] is not None:
        ways.append("ipaddr")
    if len(ways) > 1:
        raise UsageError(f"--{ways[0]} and --{ways[1]} exclude each other")
    if values["run"] and values["single"]:
        raise UsageError("--run and --single exclude each other")


def _check_no_fleece() -> None:
    """Refuse options that would mean nothing; NBDFLEECE_CONTROL is for other commands, too."""
    context = click.get_current_context()
    for name in ("disk", "control", "scratch_dir"):
        if context.get_parameter_source(name) is ParameterSource.COMMANDLINE:
            raise UsageError(f"--{name.replace('_', '-')} goes with --fleece")


def _serve(ready: Plugin, values: dict[str, Any]) -> int:
    """Serve until it is time to end.

    Returns:
        The exit status: that of ``--run``, if it was given.
    """
    settings = {
        "read_only": values["readonly"],
        "threads": values["threads"],
        "limits": parse_limits(values["limit"]),
        "tls": build_tls(values),
        "authorizer": build_authorization(values["authorize"]),
    }
    with ExitStack() as cleaning:
        listeners = _listen(values, cleaning)
        tell_ready = None
        if values["fork"]:
            tell_ready = go_to_background(is_verbose=False)
            os.chdir("/")
        lifecycle.after_fork(ready)
        # Only now: numpy's libraries start threads, which do not survive a fork.
        from ..nbdkit.host import HostOptions
        from ..server.loop import run

        main = _main(ready, HostOptions(**settings), listeners, values, tell_ready)
        return run(main, values["loop"])


async def _main(
    ready: Plugin,
    options: HostOptions,
    listeners: Sequence[Listener],
    values: dict[str, Any],
    tell_ready: Callable[[], None] | None,
) -> int:
    from ..server.limits import allow_descriptors

    allow_descriptors(options.limits)
    export = values["exportname"] if values["fleece"] is None else values["disk"]
    uris = [str(each.uri(export, tls=options.tls is not None)) for each in listeners]
    async with _server(ready, options, listeners, values) as server:
        handle_signals(server.request_stop)
        with pid_file(values["pidfile"], keep=False):
            if values["print_uri"]:
                print("\n".join(uris), flush=True)
            if tell_ready is not None:
                tell_ready()
            if values["run"]:
                return await _run_command(values, uris, server)
            await server.wait_end()
    return 0


def _server(
    ready: Plugin, options: HostOptions, listeners: Sequence[Listener], values: dict[str, Any]
) -> AbstractAsyncContextManager[Ending]:
    if values["fleece"] is not None:
        from .plugin_fleece import FleeceServer

        return FleeceServer(ready, options, listeners, values)
    from ..nbdkit.host import PluginServer

    return PluginServer(ready, options, listeners, _channel(values))


def _channel(values: dict[str, Any]) -> Channel | None:
    if not values["single"]:
        return None
    from ..server.channel import open_standard_channel

    return open_standard_channel()


def _listen(values: dict[str, Any], cleaning: ExitStack) -> list[Listener]:
    if values["single"]:
        return []
    listeners = listen_systemd()
    if listeners:
        return listeners
    port = DEFAULT_PORT if values["port"] is None else values["port"]
    if values["vsock"]:
        return [listen_vsock(port=port)]
    has_address = values["ipaddr"] is not None or values["port"] is not None
    path = values["unix"] or (TEMPORARY if values["run"] and not has_address else None)
    if path is None:
        return listen_tcp(values["ipaddr"] or "", port)
    if path == TEMPORARY:
        path = cleaning.enter_context(_temporary_path())
    return [listen_unix(os.path.abspath(path))]


@contextmanager
def _temporary_path() -> Iterator[str]:
    with tempfile.TemporaryDirectory(prefix="nbdfleece") as folder:
        yield os.path.join(folder, "socket")


async def _run_command(values: dict[str, Any], uris: Sequence[str], server: Ending) -> int:
    """Run a shell's command until it ends, or the server is to."""
    known = {"uri": uris[0], "exportname": values["exportname"]}
    if values["fleece"] is not None:
        known[CONTROL_VARIABLE] = str(values["control"] or "")
    process = await asyncio.create_subprocess_shell(
        values["run"], env={**os.environ, **known, **_address(uris[0])}
    )
    running = asyncio.create_task(process.wait())
    ending = asyncio.create_task(server.wait_end())
    await asyncio.wait((running, ending), return_when=asyncio.FIRST_COMPLETED)
    if not running.done():
        process.terminate()
    ending.cancel()
    status = await running
    return status if status >= 0 else 128 - status


def _address(uri: str) -> dict[str, str]:
    """What nbdkit tells commands beside the URI."""
    from ..nbd.uri import parse_uri

    where = parse_uri(uri)
    if where.transport == "unix":
        return {"unixsocket": where.socket, "port": "", "nbd": f"nbd:unix:{where.socket}"}
    return {"unixsocket": "", "port": str(where.port), "nbd": f"nbd:{where.host}:{where.port}"}
