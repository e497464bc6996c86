"""One client of the control socket.

Two tasks: one receives and carries out commands, one after another; one sends. A command that
was begun is finished, also if its client has gone. What waits to be sent is one answer, and
events up to a limit: a client that does not read them is told so by the end of its session,
since an event that is left out in silence would be worse.
"""

from __future__ import annotations

import asyncio
import logging
import socket
from collections import deque
from typing import Final

from .dispatcher import Dispatcher
from .errors import QmpError, SessionError
from .protocol import Answer, QmpProtocol, Request, pack_error, pack_return

RECEIVE_BYTES: Final = 1 << 16
EVENT_BYTES_MAX: Final = 1 << 20
"""Events that wait for one client; thousands of them."""

DRAIN_SECONDS: Final = 5.0
"""At the end of a session, for a client to read what is left."""

_log = logging.getLogger("nbdfleece.control")


class Session:
    """A connected client.

    Args:
        sock: Connected, non-blocking; :meth:`close` closes it.
        peer: Who that is, for the log.
        dispatcher: Carries out the commands.
    """

    def __init__(self, sock: socket.socket, peer: str, dispatcher: Dispatcher) -> None:
        self._sock = sock
        self._peer = peer
        self._dispatcher = dispatcher
        self._protocol = QmpProtocol()
        self._loop = asyncio.get_running_loop()
        self._outgoing: deque[bytes] = deque()
        self._waiting_bytes = 0
        self._is_over = False
        self._has_output = asyncio.Event()
        self._drained = asyncio.Event()
        self._drained.set()

    def send_event(self, event: bytes) -> None:
        """Send an event, if the client is in command mode."""
        if not self._protocol.in_command_mode:
            return
        if self._waiting_bytes > EVENT_BYTES_MAX:
            _log.warning("%s: closed: it does not read its events", self._peer)
            self._hang_up()
            return
        self._put(event)

    async def run(self) -> None:
        """Serve the client until it goes, cannot be understood, or we are cancelled."""
        sender = asyncio.create_task(self._send_all())
        try:
            self._put(self._protocol.greeting())
            await self._receive_all()
            await self._drain()
        except OSError as error:
            _log.debug("%s: %s", self._peer, error)
        finally:
            self._end()
            sender.cancel()
            await asyncio.gather(sender, return_exceptions=True)

    def close(self) -> None:
        """Close the connection; after :meth:`run`, also if that was cancelled before it began."""
        self._sock.close()

    async def finish(self) -> None:
        """Let the client read what is left for it."""
        await self._drain()

    # -- receiving ----------------------------------------------------------------

    async def _receive_all(self) -> None:
        while data := await self._loop.sock_recv(self._sock, RECEIVE_BYTES):
            self._protocol.receive_data(data)
            try:
                await self._handle_messages()
            except SessionError as error:
                _log.warning("%s: closed: %s", self._peer, error)
                self._put(pack_error(str(error)))
                return

    async def _handle_messages(self) -> None:
        while (message := self._protocol.next_message()) is not None:
            self._put(message.data if isinstance(message, Answer) else await self._answer(message))
            await self._drained.wait()

    async def _answer(self, request: Request) -> bytes:
        try:
            result = await self._dispatcher.execute(request.name, request.arguments)
        except QmpError as error:
            return pack_error(str(error), error.error_class, request.id)
        return pack_return(result, request.id)

    # -- sending ------------------------------------------------------------------

    def _put(self, data: bytes) -> None:
        if self._is_over:
            return
        self._outgoing.append(data)
        self._waiting_bytes += len(data)
        self._drained.clear()
        self._has_output.set()

    async def _send_all(self) -> None:
        while True:
            await self._has_output.wait()
            self._has_output.clear()
            while self._outgoing:
                try:
                    await self._loop.sock_sendall(self._sock, self._outgoing[0])
                except OSError:
                    self._hang_up()
                    return
                self._waiting_bytes -= len(self._outgoing.popleft())
            self._drained.set()

    async def _drain(self) -> None:
        try:
            async with asyncio.timeout(DRAIN_SECONDS):
                await self._drained.wait()
        except TimeoutError:
            _log.warning("%s: closed: it does not read its answers", self._peer)

    def _end(self) -> None:
        """Take nothing more to send, and let nobody wait for it."""
        self._is_over = True
        self._drained.set()

    def _hang_up(self) -> None:
        """Have the receiving side find the end of the stream."""
        self._end()
        try:
            self._sock.shutdown(socket.SHUT_RDWR)
        except OSError as error:
            _log.debug("%s: %s", self._peer, error)
