"""Messages between two processes, with descriptors, over a pair of Unix sockets.

A message is its length, 32 bits, and so many bytes. A descriptor that comes along (SCM_RIGHTS,
unix(7)) arrives with the first byte of its message at the latest, and no receive returns those
of two messages, so that they keep their order.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import socket
import struct
from collections import deque
from collections.abc import Callable, Iterable
from typing import Final

_LENGTH: Final = struct.Struct("=I")
_DESCRIPTOR: Final = struct.Struct("=i")
_RECEIVE_BYTES: Final = 256 << 10

logger = logging.getLogger("nbdfleece.server")


class Link:
    """One end, inside a running event loop. Nothing here waits.

    Args:
        sock: The link's from now on.
        receive: Called with each message.
        end: Called once, when the other end is gone and all that it said has been received.
    """

    def __init__(
        self, sock: socket.socket, receive: Callable[[memoryview], None], end: Callable[[], None]
    ) -> None:
        sock.setblocking(False)
        self._sock = sock
        self._receive = receive
        self._end = end
        self._loop = asyncio.get_running_loop()
        self._buffer = memoryview(bytearray(_RECEIVE_BYTES))
        self._received = bytearray()
        self._descriptors: deque[int | None] = deque()
        self._waiting: deque[tuple[memoryview, int | None]] = deque()
        self.is_open = True
        """Whether the other end may still hear something."""
        self._loop.add_reader(sock, self._on_readable)

    def send(self, message: bytes, descriptor: int | None = None) -> None:
        """Send a message, as soon as there is room.

        Args:
            message: Below 4 GiB.
            descriptor: Comes along, as a duplicate: the caller's own stays with the caller.

        Raises:
            OSError: It cannot be duplicated.
        """
        if not self.is_open:
            return
        duplicate = None if descriptor is None else os.dup(descriptor)
        is_first = not self._waiting
        self._waiting.append((memoryview(_LENGTH.pack(len(message)) + message), duplicate))
        if is_first:
            self._flush()

    def take_descriptor(self) -> int | None:
        """The descriptor that came with the message received last, if it came with one.

        None if this process could not have one more. It is the caller's.
        """
        return self._descriptors.popleft()

    def close(self) -> None:
        """Give the socket up; nothing more is called."""
        if not self.is_open:
            return
        self.is_open = False
        self._loop.remove_reader(self._sock)
        self._loop.remove_writer(self._sock)
        self._sock.close()
        self._forget_waiting()
        _close_all(self._descriptors)

    def _forget_waiting(self) -> None:
        _close_all(descriptor for _, descriptor in self._waiting)
        self._waiting.clear()

    def _break(self) -> None:
        """End it, for a message cannot be sent: all that the other end has said is still received.

        The other end must not take what would come next for the rest of that message.
        """
        self._forget_waiting()
        with contextlib.suppress(OSError):  # it is gone already
            self._sock.shutdown(socket.SHUT_WR)

    def _flush(self) -> None:
        while self._waiting:
            view, descriptor = self._waiting[0]
            try:
                count = self._send(view, descriptor)
            except BlockingIOError:
                self._loop.add_writer(self._sock, self._flush)
                return
            except OSError:
                self._break()
                break
            if descriptor is not None:
                os.close(descriptor)
            if count == len(view):
                self._waiting.popleft()
            else:
                self._waiting[0] = view[count:], None
        self._loop.remove_writer(self._sock)

    def _send(self, view: memoryview, descriptor: int | None) -> int:
        if descriptor is None:
            return self._sock.send(view, socket.MSG_NOSIGNAL)
        rights = (socket.SOL_SOCKET, socket.SCM_RIGHTS, _DESCRIPTOR.pack(descriptor))
        return self._sock.sendmsg([view], [rights], socket.MSG_NOSIGNAL)

    def _on_readable(self) -> None:
        try:
            count, ancillary, flags, _ = self._sock.recvmsg_into(
                [self._buffer], socket.CMSG_LEN(_DESCRIPTOR.size), socket.MSG_CMSG_CLOEXEC
            )
        except BlockingIOError:
            return
        except OSError:
            count, ancillary, flags = 0, [], 0
        for _, _, rights in ancillary:
            self._descriptors += [each for (each,) in _DESCRIPTOR.iter_unpack(rights)]
        if flags & socket.MSG_CTRUNC:
            self._descriptors.append(None)
        if not count:
            self.close()
            self._end()
            return
        self._received += self._buffer[:count]
        self._take_messages()

    def _take_messages(self) -> None:
        position = 0
        with memoryview(self._received) as view:
            while self.is_open and len(view) >= position + _LENGTH.size:
                begin = position + _LENGTH.size
                end = begin + _LENGTH.unpack_from(view, position)[0]
                if len(view) < end:
                    break
                position = end
                with view[begin:end] as message:
                    try:
                        self._receive(message)
                    except Exception:
                        # A bug of ours. The next message may be all right.
                        logger.exception("internal error")
        del self._received[:position]


def _close_all(descriptors: Iterable[int | None]) -> None:
    for descriptor in descriptors:
        if descriptor is not None:
            os.close(descriptor)
