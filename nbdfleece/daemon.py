"""A whole server: exports, engine, NBD listeners and control socket, put together.

Start
    Sockets are bound first, because that costs nothing to take back; clients that come early
    wait. Then the disks are opened, what a crash left open is settled, and clients are let in.

End
    No more commands, then no more NBD clients, then backups that are pending are aborted,
    bitmaps stored and images closed; last the control clients, who are told of all this by
    events. A start that fails ends the same way, as far as it got.
"""

from __future__ import annotations

import asyncio
import logging
import os
import tempfile
from collections.abc import Mapping, Sequence
from contextlib import AbstractAsyncContextManager, AsyncExitStack
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Self

from .block.guest_options import DEFAULT_POLICY, GuestPolicy
from .block.node import BlockNode
from .control.commands import all_commands
from .control.dispatcher import Dispatcher
from .control.server import ControlServer
from .deputies.deputies import Deputies
from .engine.disk import ScratchOptions
from .engine.engine import Engine
from .engine.graph import Graph
from .engine.jobs import Jobs
from .engine.node_exports import NodeExports
from .engine.overlays import Overlays
from .errors import StateError, UsageError
from .export.export import Export, ExportTable
from .export.policy import ExportRule, apply_rules
from .nbd.outcomes import TlsMode
from .nbd.uri import NbdUri
from .server.catalogue import describe_export
from .server.channel import open_standard_channel
from .server.limits import Limits
from .server.listener import Listener, SocketFile, listen_systemd, listen_unix, listen_uri
from .server.loop import LoopChoice
from .server.server import NbdServer
from .server.tls import AllOf, Authorizer, TlsSettings
from .standalone.objects import Objects

CONTROL_MODE = 0o600

_log = logging.getLogger("nbdfleece.daemon")


@dataclass(frozen=True, slots=True, kw_only=True)
class DaemonOptions:
    """What to serve, and where.

    Attributes:
        disks: Images by the disk's name.
        policies: What becomes of discards and zeroes, by the disk's name; those that are not
            named have discards done and zeroes written.
        nodes: What has the bytes of those disks whose images have bitmaps only.
        images: Images that are only shown, by their exports' names.
        bitmaps: Dirty bitmaps that are shown with them, by the same names.
        since: Checkpoints of them since which the changes are shown, by the same names.
        listen: Where NBD clients are accepted; export names in it are of no matter.
        control: Path of the control socket; None for none.
        scratch: How snapshots are kept.
        limits: What NBD clients may take.
        socket_file: Who may connect to Unix sockets for NBD.
        adopts_sockets: Whether to listen on the sockets that systemd passes, too.
        stdio: Whether to serve a client on stdin and stdout, and to end with it.
        tls: How to do TLS; None for not at all.
        authorization: Who may have which export; None for everybody all.
        export_rules: What holds for exports by their names.
        more_exports: What else is served, for as long as each of these contexts is entered.
        processes: So many processes of their own serve ``images`` and snapshots; 0 for this one.
        processes_nice: How much lower their priority is than this one's, from -19 to 19.
        loop: Their event loop.
        grace_seconds: At the end, how long NBD requests in flight may take.
    """

    disks: Mapping[str, Path]
    policies: Mapping[str, GuestPolicy] = field(default_factory=dict)
    nodes: Mapping[str, BlockNode] = field(default_factory=dict)
    images: Mapping[str, Path] = field(default_factory=dict)
    bitmaps: Mapping[str, Sequence[str]] = field(default_factory=dict)
    since: Mapping[str, Sequence[str]] = field(default_factory=dict)
    listen: Sequence[NbdUri] = ()
    control: Path | None = None
    scratch: ScratchOptions = field(default_factory=ScratchOptions)
    limits: Limits = field(default_factory=Limits)
    socket_file: SocketFile = field(default_factory=SocketFile)
    adopts_sockets: bool = False
    stdio: bool = False
    tls: TlsSettings | None = None
    authorization: Authorizer | None = None
    export_rules: Sequence[ExportRule] = ()
    more_exports: Sequence[AbstractAsyncContextManager[Sequence[Export]]] = ()
    processes: int = 0
    processes_nice: int = 0
    loop: LoopChoice = "auto"
    grace_seconds: float = 10.0


class Daemon:
    """A running server, from entering this context to leaving it; inside an event loop.

    Attributes:
        exports: What is served.
        deputies: The processes that serve some of it.
        engine: Its disks, snapshots and checkpoints.
        overlays: What is written beside them.
        graph: The nodes of QEMU's commands over them.
        node_exports: The exports of such nodes.
        jobs: The backup jobs of QEMU's commands.
        server: The NBD side.
        commands: What the control socket can be told.
        control: Its sessions; None without a socket, and before the start.
    """

    def __init__(self, options: DaemonOptions) -> None:
        self.options = options
        self.exports = ExportTable(prepare=self._prepare_export)
        self.deputies = Deputies(
            options.processes, options.limits, options.loop, options.processes_nice
        )
        self.server = NbdServer(
            self.exports,
            limits=options.limits,
            tls=options.tls,
            authorization=options.authorization,
            deputy=self.deputies.of,
        )
        self.engine = Engine(
            self.exports,
            options.scratch,
            delegate=self.deputies.add_snapshot,
            disconnect=self._close_export,
            event=self._tell,
        )
        self.overlays = Overlays(self.engine, options.scratch, self._close_export)
        self.graph = Graph(self.engine)
        self.node_exports = NodeExports(self.engine, self.graph, self._close_export, self._tell)
        self.jobs = Jobs(self.graph, self.node_exports, self._tell)
        self.commands = all_commands()
        self._listeners: list[Listener] = []
        self.objects = Objects()
        self._added: list[NbdServer] = []
        """Those of start_listening; one of them listens at most, the others have clients."""
        self._control_listener: Listener | None = None
        self.control: ControlServer | None = None
        self._stdio_ended: asyncio.Future[None] | None = None
        self._stop_requested = asyncio.Event()
        self._stop_reason = "host-signal"
        self._more = AsyncExitStack()

    async def __aenter__(self) -> Self:
        """Start.

        Raises:
            StateError: It cannot listen where it should, or a name is taken.
            OSError, ImageError: An image cannot be opened.
        """
        try:
            await self._start()
        except BaseException:
            await self._stop()
            raise
        return self

    async def __aexit__(self, *_: object) -> None:
        await self._stop()

    def export_uris(self, export: str) -> list[str]:
        """How clients name an export, from any directory: one NBD URI per listener."""
        found = self.exports.find(export)
        tls = self.server.tls_mode is TlsMode.FORCEDTLS or (found is not None and found.tls_only)
        uris = [listener.uri(export, tls=tls) for listener in self.server.listeners]
        for server in self._added:
            forced = server.tls_mode is TlsMode.FORCEDTLS
            uris += [listener.uri(export, tls=tls or forced) for listener in server.listeners]
        return [str(_with_absolute_path(uri)) for uri in uris]

    async def _close_export(self, name: str, hard: bool = False) -> None:
        """End an export on all servers."""
        for server in (self.server, *self._added):
            await server.close_export(name, hard=hard)
        await self.deputies.remove(name, unless=self.exports.find(name))

    def _prepare_export(self, export: Export) -> None:
        """Let the operator's rules hold for a new export.

        Raises:
            UsageError: It could not be served so.
        """
        apply_rules(self.options.export_rules, export)
        describe_export(export, self.options.limits.wire)
        if export.tls_only and self.options.tls is None:
            raise UsageError(f"export '{export.name}' needs TLS, and the server has no certificate")

    def add_object(self, values: dict[str, Any]) -> None:
        """See :class:`~.control.controlled.Controlled`."""
        self.objects.add_values(values)

    def remove_object(self, identity: str) -> None:
        """See :class:`~.control.controlled.Controlled`."""
        self.objects.remove(identity)

    def start_listening(
        self,
        uri: NbdUri,
        *,
        credentials: str | None = None,
        authorization: str | None = None,
        connections_max: int | None = None,
    ) -> None:
        """Accept NBD clients at one more place, by a server of its own over the same exports.

        Args:
            uri: Where.
            credentials: The object for TLS; None for what the server was started with.
            authorization: The object that says which clients may connect; what the server was
                started with holds, too.
            connections_max: Clients at a time, the others wait; None for the server's limit.

        Raises:
            StateError: There is one more place already, or it cannot be listened on.
            UsageError: There is no such object, or it cannot be used.
        """
        if any(server.listeners for server in self._added):
            raise StateError("NBD server already running")
        options, tls, limits = self.options, self.options.tls, self.options.limits
        if credentials is not None:
            tls = self.objects.tls(credentials, "server").server_settings()
        rules: list[Authorizer] = [options.authorization] if options.authorization else []
        if authorization is not None:
            rules.append(self.objects.authorizer(authorization))
        if connections_max is not None:
            least = min(connections_max, limits.connections_max)
            limits = replace(limits, connections_max=least, excess_waits=True)
        try:
            listeners = listen_uri(uri, options.socket_file)
        except UsageError as error:
            raise StateError(str(error)) from error
        server = NbdServer(
            self.exports,
            limits=limits,
            tls=tls,
            authorization=AllOf(tuple(rules)),
            deputy=self.deputies.of,
        )
        for listener in listeners:
            server.add_listener(listener)
        self._added = [each for each in self._added if each.connections]
        self._added.append(server)

    def stop_listening(self) -> None:
        """See :class:`~.control.controlled.Controlled`."""
        listening = [server for server in self._added if server.listeners]
        if not listening:
            raise StateError("NBD server not running")
        for listener in listening[0].listeners:
            listening[0].remove_listener(listener)

    def request_stop(self, reason: str) -> None:
        """Have :meth:`wait_stop_requested` return; the first reason counts.

        Args:
            reason: One of QEMU's shutdown causes; the event SHUTDOWN tells it.
        """
        if not self._stop_requested.is_set():
            self._stop_reason = reason
            self._stop_requested.set()

    async def wait_stop_requested(self) -> None:
        """Wait until someone wants the server to end."""
        await self._stop_requested.wait()

    # -- start and end ------------------------------------------------------------

    async def _start(self) -> None:
        self._listen()
        _check_scratch(self.options.scratch.directory)
        for name, path in self.options.disks.items():
            policy = self.options.policies.get(name, DEFAULT_POLICY)
            await self.engine.open_disk(name, path, policy, data=self.options.nodes.get(name))
        await self.engine.recover()
        await self._more.enter_async_context(self.deputies)
        for name, path in self.options.images.items():
            bitmaps, since = (of.get(name, ()) for of in (self.options.bitmaps, self.options.since))
            shown = await self.node_exports.add_image(name, path, bitmaps, since)
            await self.deputies.add_image(*shown)
        for more in self.options.more_exports:
            for export in await self._more.enter_async_context(more):
                self.exports.add(export)
        while self._listeners:
            self.server.add_listener(self._listeners.pop(0))
        if self.options.stdio:
            self._stdio_ended = asyncio.ensure_future(self._serve_stdio())
        if self._control_listener is not None:
            self.control = ControlServer(self._control_listener.sock, Dispatcher(self))

    async def _serve_stdio(self) -> None:
        """Serve the client that started us, and end with it."""
        connection = self.server.add_channel(open_standard_channel())
        await self.server.wait_closed(connection)
        self.request_stop("host-signal")

    def _listen(self) -> None:
        try:
            if self.options.adopts_sockets:
                self._listeners += listen_systemd()
            for uri in self.options.listen:
                if uri.tls and self.options.tls is None:
                    raise UsageError(f"cannot listen on '{uri}': the server has no certificate")
                self._listeners += listen_uri(uri, self.options.socket_file)
            if self.options.control is not None:
                path = str(self.options.control)
                self._control_listener = listen_unix(path, mode=CONTROL_MODE)
        except UsageError as error:
            raise StateError(str(error)) from error

    async def _stop(self) -> None:
        if self.control is not None:
            await self.control.finish_commands()
        self._tell("SHUTDOWN", {"guest": False, "reason": self._stop_reason})
        servers = (self.server, *self._added)
        await asyncio.gather(*(each.shut_down(self.options.grace_seconds) for each in servers))
        if self._stdio_ended is not None:
            await self._stdio_ended
        try:
            await self._close_disks()
        finally:
            await self._close_sockets()

    async def _close_disks(self) -> None:
        try:
            await self.overlays.close()
            await self.jobs.close()
            await self.node_exports.close()
            await self.graph.close()
        finally:
            await self._more.aclose()
            await self.engine.close()

    async def _close_sockets(self) -> None:
        if self.control is not None:
            await self.control.close()
        if self._control_listener is not None:
            self._control_listener.close()
        for listener in self._listeners:
            listener.close()

    def _tell(self, event: str, data: Mapping[str, Any]) -> None:
        _log.info("%s %s", event, dict(data))
        if self.control is not None:
            self.control.send_event(event, data)


def _with_absolute_path(uri: NbdUri) -> NbdUri:
    """The URI as it is good for clients that run elsewhere; abstract sockets have no path."""
    if uri.transport != "unix" or uri.socket.startswith("\0"):
        return uri
    return replace(uri, socket=os.path.abspath(uri.socket))


def _check_scratch(directory: Path) -> None:
    """Find out now whether snapshots can be kept there, and not at the first guest write.

    Raises:
        OSError: They cannot.
    """
    tempfile.TemporaryFile(dir=directory).close()
