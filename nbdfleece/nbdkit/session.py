"""One connection to a script: its exports, and the handle that it has open.

In the order of nbdkit: ``preconnect`` before anything is said; ``list_exports`` for LIST;
``default_export`` when a client asks for ""; ``open`` and what a handle is asked when it is
opened for INFO and GO; ``close`` after INFO, and when the connection is over. Every name that
``open`` does not refuse is an export.

A script with contexts of its own is opened when a client asks for contexts already; what was
opened then is what GO for the same name gets.

**Steps** (:meth:`PluginSession.admit`, :meth:`~PluginSession.look_up`, the end) come one after
the other, under one lock: a handle that is being opened when its client leaves is closed.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING, TypeVar

from ..errors import UsageError
from ..export.contexts import BASE_ALLOCATION, BaseAllocation, MetadataContext
from ..export.export import Export
from ..nbd.constants import InfoType, Option, OptionReply
from ..nbd.errors import OptionError
from ..nbd.export_info import ExportInfo, Lookup, NotKnownYet
from ..server.catalogue import ServedExport
from ..server.tls import TlsChannel
from .calls import Client
from .errors import CallbackError
from .handle import Handle
from .module import CACHE_NONE, FUA_NONE, SERIALIZE_CONNECTIONS, log
from .node import PluginNode, ScriptContext
from .values import check_exports, check_text, fits_the_wire

if TYPE_CHECKING:
    from ..server.connection import Connection
    from .host import PluginServer

T = TypeVar("T")

_DESCRIBING = (Option.INFO, Option.GO)
_OPENING = (Option.GO, Option.EXPORT_NAME)


@dataclass(slots=True)
class Opened:
    """A handle and what a client is told of it.

    Attributes:
        asked: The name that the client has given.
        name: What it means.
        handle: Open.
        contexts: Names of the script's own metadata contexts.
    """

    asked: str
    name: str
    handle: Handle
    contexts: list[str]


class PluginSession:
    """The exports of one connection.

    Args:
        server: The script, and what all connections share.
        connection: The connection.
    """

    def __init__(self, server: PluginServer, connection: Connection) -> None:
        self._server = server
        self._script = server.script
        self._connection = connection
        self._client = Client(disconnect=self._disconnect)
        self._gate = server.new_gate()
        self._step = asyncio.Lock()
        self._is_alone = False
        self._is_over = False
        self._default: str | None = None
        self._opened: Opened | None = None
        self._answer: ExportInfo | OptionError | None = None
        self._list: list[ExportInfo] | OptionError | None = None

    # What the connection calls.

    async def admit(self) -> None:
        """Wait for our turn, if connections are to come one after the other; ``preconnect``.

        Raises:
            CallbackError: The script does not want the client.
        """
        async with self._step:
            if self._server.thread_model == SERIALIZE_CONNECTIONS:
                await self._server.alone.acquire()
                self._is_alone = True
            if self._is_over:
                return
            self._client.look_at(self._connection.channel.reader_fd)
            if self._script.has("preconnect"):
                read_only = self._server.read_only
                gate = self._server.preconnect_gate
                await gate.run(self._client, lambda: self._script.call("preconnect", read_only))

    async def look_up(self, lookup: Lookup) -> None:
        """Ask the script what an option needs to know."""
        async with self._step:
            if self._is_over:
                return
            self._look_at_tls()
            if lookup.option is Option.LIST:
                self._list = await self._list_exports()
                return
            try:
                self._answer = await self._find(lookup)
            except OptionError as error:
                self._answer = error

    def exports(self) -> Iterable[ExportInfo]:
        """What LIST shows, once it was looked up."""
        found, self._list = self._list, None
        if found is None:
            raise NotKnownYet
        if isinstance(found, OptionError):
            raise found
        return found

    def find(self, name: str) -> ExportInfo:
        """The export that was looked up last; each answer is good for one option."""
        found, self._answer = self._answer, None
        if found is None:
            raise NotKnownYet
        if isinstance(found, OptionError):
            raise found
        return found

    def end(self) -> None:
        """Close the handle, when all that is going on has ended."""
        self._is_over = True
        self._client.left.set()
        self._server.keep(self._end())

    async def _end(self) -> None:
        async with self._step:
            await self._close()
            if self._is_alone:
                self._server.alone.release()

    def _disconnect(self, is_forced: bool) -> None:
        """``nbdkit.disconnect``, in the script's thread."""
        connection, reason = self._connection, "the script has disconnected the client"
        end = connection.abort if is_forced else connection.shut_down
        self._server.loop.call_soon_threadsafe(end, reason)

    # Looking up.

    def _look_at_tls(self) -> None:
        """After TLS has begun, nothing counts that was said before."""
        channel = self._connection.channel
        if isinstance(channel, TlsChannel) and not self._client.is_tls:
            self._client.is_tls = True
            self._client.tls_dn = channel.subject or ""
            self._client.tls_issuer_dn = channel.issuer or ""
            self._default = None

    async def _run(self, job: Callable[[], T]) -> T:
        return await self._gate.run(self._client, job)

    async def _list_exports(self) -> list[ExportInfo] | OptionError:
        try:
            names = await self._run(self._call_list_exports)
            return [ExportInfo(name=name, size=0, description=text) for name, text in names]
        except (CallbackError, UsageError) as error:
            if isinstance(error, UsageError):
                self._script.failure("list_exports", str(error))
            return OptionError(OptionReply.ERR_PLATFORM, "the plugin cannot list its exports")

    def _call_list_exports(self) -> list[tuple[str, str]]:
        if self._script.has("list_exports"):
            arguments = self._server.read_only, self._client.is_tls
            return self._script.ask("list_exports", check_exports, *arguments)
        name = self._call_default_export()
        return [] if name is None else [(name, "")]

    def _call_default_export(self) -> str | None:
        """What "" means; None if it is not permitted. Asked until there is an answer."""
        if not self._script.has("default_export"):
            return ""
        if self._default is None:
            arguments = self._server.read_only, self._client.is_tls
            try:
                name = self._script.ask("default_export", check_text, *arguments)
            except CallbackError:
                return None  # it was logged
            self._default = name if fits_the_wire(name) else None
        return self._default

    async def _find(self, lookup: Lookup) -> ExportInfo:
        """Work the answer out.

        Raises:
            OptionError: There is no such export.
        """
        opens = lookup.option in (*_DESCRIBING, *_OPENING)
        if not opens and not self._script.has("contexts"):
            return ExportInfo(name=lookup.name, size=0, contexts=(BASE_ALLOCATION,))
        if self._opened is None or self._opened.asked != lookup.name:
            await self._close()
            self._opened = await self._open(lookup.name)
        try:
            info = await self._describe(self._opened, lookup)
        except (CallbackError, UsageError) as error:
            await self._close()
            raise _refusal(lookup.name) from error
        if lookup.option is Option.INFO:
            await self._close()
        return info

    async def _canonical_name(self, asked: str) -> str:
        name: str | None = asked
        if not asked:
            name = await self._run(self._call_default_export)
        if name is None:
            log.error('%s: default export ("") not permitted', self._script.path)
            raise _refusal(asked)
        reason = self._server.authorizer.refusal(name, self._connection.identity)
        if reason is not None:
            raise OptionError(OptionReply.ERR_POLICY, reason)
        return name

    async def _open(self, asked: str) -> Opened:
        name = await self._canonical_name(asked)

        def open_handle() -> Opened:
            handle = Handle(self._script, read_only=self._server.read_only)
            try:
                return Opened(asked, name, handle, handle.contexts())
            except CallbackError:
                handle.close()
                raise

        self._client.export_name = name
        try:
            return await self._run(open_handle)
        except CallbackError as error:
            self._client.export_name = None
            raise _refusal(asked) from error

    async def _close(self) -> None:
        opened, self._opened = self._opened, None
        if opened is not None:
            await self._run(opened.handle.close)
            self._client.export_name = None

    async def _describe(self, opened: Opened, lookup: Lookup) -> ServedExport:
        """Say to the wire what a handle can do; asks for what only some clients want to know."""
        handle, wire = opened.handle, self._server.limits.wire
        description, sizes = "", None
        if lookup.option in _DESCRIBING:
            if InfoType.BLOCK_SIZE in lookup.types:
                sizes = await self._run(handle.block_size)
            if InfoType.DESCRIPTION in lookup.types:
                description = await self._run(handle.description)
        facts = handle.facts
        export = self._make_export(opened)
        return ServedExport(
            export=export,
            name=opened.name,
            description=description,
            size=facts.size,
            read_only=not facts.can_write,
            rotational=facts.is_rotational,
            can_multi_conn=facts.can_multi_conn and self._server.allows_many,
            can_trim=facts.can_trim,
            can_write_zeroes=facts.can_write,
            can_fast_zero=facts.can_fast_zero,
            can_cache=facts.can_cache != CACHE_NONE,
            can_flush=facts.can_flush,
            can_fua=facts.can_fua != FUA_NONE,
            maximum_payload=max(wire.payload_advertised_max, wire.payload_accepted_max),
            tells_block_sizes=sizes is not None,
            told_block_sizes=sizes,
            contexts=[context.name for context in export.contexts],
        )

    def _make_export(self, opened: Opened) -> Export:
        node = PluginNode(opened.handle, self._gate, self._client)
        contexts: list[MetadataContext] = [BaseAllocation(node)]
        contexts += [ScriptContext(name, node, opened.handle) for name in opened.contexts]
        return Export(
            name=opened.name, node=node, read_only=node.read_only, contexts=tuple(contexts)
        )


def _refusal(name: str) -> OptionError:
    return OptionError(OptionReply.ERR_UNKNOWN, f"the plugin does not serve export '{name}'")
