"""A deputy's process, which calls :func:`main`.

The server that started it tells it which images to open, and gives it clients that it has
negotiated with. The process ends with the server, and not at signals: a terminal or a service
manager sends those that end a server to all of its processes, and clients may finish first.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import signal
import socket
from collections.abc import Awaitable, Coroutine
from typing import Final, get_args

from ..bitmaps.bitmap import Bitmap
from ..block.file import FileNode
from ..block.node import BlockNode
from ..block.shared_fleece import Share, SharedFleece
from ..errors import ImageError, StateError
from ..export.contexts import AllocationDepth, BaseAllocation, DirtyBitmap, MetadataContext
from ..export.export import Export, ExportTable
from ..nbd.constants import TransmissionFlag
from ..nbd.outcomes import Negotiated, SelectedContext
from ..qcow2.image import Qcow2Image
from ..server.catalogue import describe_export
from ..server.channel import SocketChannel
from ..server.limits import Limits
from ..server.loop import LoopChoice, run, settle
from ..server.server import Client, NbdServer
from . import messages
from .link import Link
from .questions import AskedKeeper, Questions, Tell

IGNORED_SIGNALS: Final = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
"""A terminal or a service manager sends them to all processes of a server: it ends the others."""

logger = logging.getLogger("nbdfleece.server")


class LogHandler(logging.Handler):
    """Has who started this process write into its log, from any thread.

    Args:
        tell: Sends a message there.
    """

    def __init__(self, tell: Tell) -> None:
        super().__init__()
        self._loop = asyncio.get_running_loop()
        self._tell = tell
        self._formatter = logging.Formatter()

    def emit(self, record: logging.LogRecord) -> None:
        """Send a line, and the traceback that belongs to it."""
        text = _printable(self._formatter.format(record))
        message = messages.Logged(logger=record.name, level=record.levelno, text=text)
        with contextlib.suppress(RuntimeError):  # nobody listens any more
            self._loop.call_soon_threadsafe(self._tell, message)


class DeputyServer(NbdServer):
    """A server whose clients are given to it, and have numbers.

    Args:
        limits: What clients may take.
        tell: Sends a message to who gives them.
    """

    def __init__(self, limits: Limits, tell: Tell) -> None:
        super().__init__(ExportTable(), limits=limits)
        self._tell = tell
        self._numbers: dict[Client, int] = {}
        self._clients: dict[int, Client] = {}

    def serve(self, number: int, channel: SocketChannel, negotiated: Negotiated) -> None:
        """Serve a client from now on."""
        client = self.add(channel)
        self._numbers[client], self._clients[number] = number, client
        client.go_on(negotiated)

    def end(self, message: messages.End) -> None:
        """End a client, unless it has ended meanwhile."""
        client = self._clients.get(message.client)
        if client is not None:
            getattr(client, message.how)(message.reason)

    def drained(self, connection: Client) -> None:
        """Tell it."""
        super().drained(connection)
        self._tell(messages.Drained(client=self._numbers[connection]))

    def closed(self, connection: Client) -> None:
        """Tell it."""
        super().closed(connection)
        number = self._numbers.pop(connection)
        del self._clients[number]
        self._tell(messages.Closed(client=number))


class DeputyProcess:
    """What one end of a link asks for, done.

    Args:
        sock: The link's.
    """

    def __init__(self, sock: socket.socket) -> None:
        self._link = Link(sock, self._receive, self._end)
        self._server: DeputyServer | None = None
        self._exports: dict[int, Export] = {}
        self._lent: dict[messages.Lent, int] = {}
        self._questions = Questions(self._tell)
        self._tasks: set[asyncio.Task[None]] = set()
        self._ended = asyncio.Event()

    async def wait_end(self) -> None:
        """Serve until the other end is gone, then end all clients at once."""
        await self._ended.wait()
        if self._server is not None:
            await self._server.shut_down(grace_seconds=0)
        await asyncio.gather(*self._tasks)
        for export in self._exports.values():
            await export.node.close()

    def _end(self) -> None:
        self._ended.set()

    def _tell(self, message: messages.Message) -> None:
        self._link.send(messages.encode(message))

    def _receive(self, data: memoryview) -> None:
        message = messages.decode_for_deputy(data)
        match message:
            case messages.Begin():
                root = logging.getLogger()
                root.handlers[:] = [LogHandler(self._tell)]
                root.setLevel(message.log_level)
                self._server = DeputyServer(message.limits, self._tell)
            case messages.Open():
                self._start(self._add(message.export, self._open(message)))
            case messages.Lend():
                self._take_lent(message.what)
            case messages.Share():
                lent, self._lent = self._lent, {}
                self._start(self._add(message.export, self._share(message, lent)))
            case messages.Answer() | messages.Refusal():
                self._questions.settle(message)
            case messages.Bits():
                bitmap = Bitmap(message.size, message.granularity, message.data)
                self._exports[message.export].contexts += (DirtyBitmap(message.leaf, bitmap),)
            case messages.Serve():
                self._serve(message, self._link.take_descriptor())
            case messages.End():
                self._begun.end(message)
            case messages.Close():
                self._start(self._close(message.export))

    @property
    def _begun(self) -> DeputyServer:
        assert self._server is not None, "Begin comes first"
        return self._server

    def _start(self, work: Coroutine[object, object, None]) -> None:
        task = asyncio.create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._finish)

    def _finish(self, task: asyncio.Task[None]) -> None:
        self._tasks.discard(task)
        error = None if task.cancelled() else task.exception()
        if error is not None:  # a bug of ours: who asked must not wait for ever
            logger.error("internal error", exc_info=error)
            self._end()

    async def _add(self, number: int, making: Awaitable[Export]) -> None:
        """Serve one more export, and tell whether that could be."""
        try:
            export = await making
        except (OSError, ImageError, StateError) as error:
            self._tell(messages.Failed(export=number, reason=_printable(str(error))))
            return
        self._exports[number] = export
        self._begun.exports.add(export)
        self._tell(messages.Done(export=number))

    async def _open(self, message: messages.Open) -> Export:
        image = await _open_image(message.image)
        contexts = (BaseAllocation(image), AllocationDepth(image))
        return Export(node=image, contexts=contexts, **message.settings)

    def _take_lent(self, what: messages.Lent) -> None:
        """Keep what is lent until the share comes, a moment later."""
        descriptor = self._link.take_descriptor()
        if descriptor is not None:
            self._lent[what] = descriptor

    async def _share(self, message: messages.Share, lent: dict[messages.Lent, int]) -> Export:
        async with contextlib.AsyncExitStack() as given_back:
            for descriptor in lent.values():
                given_back.callback(os.close, descriptor)
            if len(lent) < len(get_args(messages.Lent)):
                raise OSError("no more descriptors are allowed")
            below = None
            if message.below is not None:
                below = await _open_image(message.below)
                given_back.push_async_callback(below.close)
            share = Share(message.geometry, **lent, below=below)
            node = SharedFleece(share, AskedKeeper(self._questions, message.export))
            given_back.pop_all()
        contexts: tuple[MetadataContext, ...] = (BaseAllocation(node),)
        if message.has_depth:
            contexts += (AllocationDepth(node),)
        return Export(node=node, contexts=contexts, **message.settings)

    async def _close(self, number: int) -> None:
        export = self._exports.pop(number)
        await self._begun.close_export(export.name, hard=True)
        await export.node.close()
        self._tell(messages.Done(export=number))

    def _serve(self, message: messages.Serve, descriptor: int | None) -> None:
        server, export = self._begun, self._exports[message.export]
        try:
            if descriptor is None:
                raise OSError("no more descriptors are allowed")
            channel = SocketChannel(socket.socket(fileno=descriptor), message.peer)
        except OSError as error:
            logger.error("%s: connection lost: %s", message.peer, error)
            self._tell(messages.Closed(client=message.client))
            return
        negotiated = Negotiated(
            export=describe_export(export, server.limits.wire),
            transmission_flags=TransmissionFlag(message.transmission_flags),
            structured_replies=message.structured_replies,
            extended_headers=message.extended_headers,
            contexts=tuple(SelectedContext(*each) for each in message.contexts),
            leftover=message.leftover,
        )
        server.serve(message.client, channel, negotiated)


async def _open_image(image: messages.Image) -> BlockNode:
    """Open an image for reading.

    Raises:
        OSError, ImageError: It cannot be opened.
        StateError: It is another file than the server has seen.
    """
    file = FileNode.open(os.fsdecode(image.path), read_only=True)
    if file.identity != image.identity:
        await file.close()
        raise StateError(f"{file.path}: another file has taken its place")
    return file if image.is_raw else await Qcow2Image.from_file(file)


def _printable(text: str) -> str:
    """A text for a message: names of files need not be UTF-8."""
    return text.encode(errors="backslashreplace").decode()


def main(descriptor: int, loop: LoopChoice) -> None:
    """Serve at one end of a link until the other is gone."""
    for number in IGNORED_SIGNALS:
        signal.signal(number, signal.SIG_IGN)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, IGNORED_SIGNALS)

    async def serve() -> None:
        settle()
        await DeputyProcess(socket.socket(fileno=descriptor)).wait_end()

    run(serve(), loop)
