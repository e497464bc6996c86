"""The control socket: who may speak, how many at a time, and how it ends."""

from __future__ import annotations

import asyncio
import errno
import logging
import os
import socket
import struct
from collections.abc import Mapping
from typing import Any, Final

from .dispatcher import Dispatcher
from .protocol import pack_event
from .session import Session

SESSIONS_MAX: Final = 64
"""Each holds a few MiB at the worst; people and programs that watch one server are few."""

_ROOT: Final = 0
_OUT_OF_RESOURCES: Final = (errno.EMFILE, errno.ENFILE, errno.ENOBUFS, errno.ENOMEM)
_ACCEPT_PAUSE_SECONDS: Final = 1.0

_log = logging.getLogger("nbdfleece.control")


class ControlServer:
    """Serves sessions on a listening Unix socket; made inside a running event loop.

    Args:
        sock: Listening, non-blocking; its file's mode keeps other users out, and each peer is
            asked for its user all the same. It stays the caller's to close.
        dispatcher: Carries out the commands.
        sessions_max: Above it, clients are hung up on at once.
    """

    def __init__(
        self, sock: socket.socket, dispatcher: Dispatcher, *, sessions_max: int = SESSIONS_MAX
    ) -> None:
        self._sock = sock
        self._dispatcher = dispatcher
        self._sessions_max = sessions_max
        self._sessions: dict[Session, asyncio.Task[None]] = {}
        self._loop = asyncio.get_running_loop()
        self._is_closing = False
        self._start_accepting()

    @property
    def session_count(self) -> int:
        """Clients that are connected."""
        return len(self._sessions)

    def send_event(self, name: str, data: Mapping[str, Any]) -> None:
        """Tell all clients that are in command mode."""
        event = pack_event(name, data)
        for session in self._sessions:
            session.send_event(event)

    async def finish_commands(self) -> None:
        """Accept no more clients and refuse new commands; wait for those being carried out.

        Clients that are connected still receive events.
        """
        self._stop_accepting()
        await self._dispatcher.finish()

    async def close(self) -> None:
        """End all sessions, once their clients have read what is left for them."""
        self._stop_accepting()
        await asyncio.gather(*(session.finish() for session in self._sessions))
        tasks = list(self._sessions.values())
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    # -- accepting ----------------------------------------------------------------

    def _start_accepting(self) -> None:
        if not self._is_closing:
            self._loop.add_reader(self._sock.fileno(), self._accept)

    def _stop_accepting(self) -> None:
        if not self._is_closing:
            self._is_closing = True
            self._loop.remove_reader(self._sock.fileno())

    def _accept(self) -> None:
        try:
            sock, _ = self._sock.accept()
        except (BlockingIOError, ConnectionAbortedError):
            return
        except OSError as error:
            if error.errno not in _OUT_OF_RESOURCES:
                raise
            _log.error("cannot accept control connections: %s; trying again", error.strerror)
            self._loop.remove_reader(self._sock.fileno())
            self._loop.call_later(_ACCEPT_PAUSE_SECONDS, self._start_accepting)
            return
        sock.setblocking(False)
        self._admit(sock)

    def _admit(self, sock: socket.socket) -> None:
        pid, uid, _ = struct.unpack(
            "3i", sock.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, 12)
        )
        peer = f"control:pid={pid},uid={uid}"
        if not may_control(uid):
            _log.warning("%s: refused: not the server's user", peer)
            sock.close()
        elif len(self._sessions) >= self._sessions_max:
            _log.warning("%s: refused: %d sessions are open, the limit", peer, self._sessions_max)
            sock.close()
        else:
            session = Session(sock, peer, self._dispatcher)
            task = self._loop.create_task(session.run())
            self._sessions[session] = task
            task.add_done_callback(lambda task: self._ended(session, task))

    def _ended(self, session: Session, task: asyncio.Task[None]) -> None:
        del self._sessions[session]
        session.close()
        if not task.cancelled() and (error := task.exception()) is not None:
            _log.error("a control session failed", exc_info=error)


def may_control(uid: int) -> bool:
    """Whether a user may control this process: its own user and root may."""
    return uid in (_ROOT, os.geteuid())
