"""Channels: where a connection's bytes come from and go to, without waiting.

A channel is a socket, a pair of pipes (one connection on stdin and stdout), or
TLS over one of them (:mod:`nbdfleece.server.tls`). Receiving and sending raise
``BlockingIOError`` where they would wait; the connection then asks the event
loop to say when the descriptor is ready.
"""

from __future__ import annotations

import os
import socket
import stat
from typing import Final, Protocol

SOCKET_BUFFER_BYTES: Final = 4 << 20
"""Asked of the kernel for sending; it grants what net.core.wmem_max allows. With more room a
client finds the next replies waiting when it comes back."""

_discarded = memoryview(bytearray(64 << 10))
"""Where bytes are received that nobody will look at."""


class Channel(Protocol):
    """Both directions of one connection."""

    reader_fd: int
    """Becomes readable when there is something to receive."""
    writer_fd: int
    """Becomes writable when more can be sent."""
    peer: str
    """Who is at the other end, for the log."""
    identity: str | None
    """Who the client has proven to be."""

    def recv_into(self, view: memoryview, /) -> int:
        """Receive what is there; see :meth:`inbox.Receiver.recv_into`."""

    def sendmsg(self, views: list[memoryview], /) -> int:
        """Send what can be sent without waiting; see :meth:`outbox.Sender.sendmsg`."""

    def has_pending(self) -> bool:
        """Whether bytes were received that :meth:`recv_into` would return without the kernel."""

    def send_own(self) -> None:
        """Send the channel's own waiting bytes.

        Raises:
            BlockingIOError: Some of them are left.
            OSError: The connection is broken.
        """

    def finish(self) -> None:
        """Say that nothing more will be sent.

        Raises:
            BlockingIOError: There is no room for it now.
            OSError: The connection is broken.
        """

    def discard(self) -> bool:
        """Receive what is there and throw it away; whether it was the end.

        Raises:
            BlockingIOError: Nothing is there now.
            OSError: The connection is broken.
        """

    def close(self) -> None:
        """Give the descriptors up."""


class PlainChannel:
    """What the channels without TLS have in common: nothing of their own to send."""

    identity: str | None = None

    def has_pending(self) -> bool:
        """Never: all that was not returned is in the kernel."""
        return False

    def send_own(self) -> None:
        """Nothing to do."""


class SocketChannel(PlainChannel):
    """A stream socket.

    Args:
        sock: Connected; owned by the channel from now on.
        peer: Who is at the other end, for the log.
    """

    def __init__(self, sock: socket.socket, peer: str) -> None:
        sock.setblocking(False)
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, SOCKET_BUFFER_BYTES)
        if sock.family in (socket.AF_INET, socket.AF_INET6):
            # Spec: "TCP_NODELAY ... SHOULD be set": a reply must not wait for the next one.
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self.sock = sock
        self.peer = peer
        self.reader_fd = self.writer_fd = sock.fileno()
        self.recv_into = sock.recv_into

    def sendmsg(self, views: list[memoryview], /) -> int:
        """Send what the socket takes."""
        # MSG_NOSIGNAL: a peer that is gone is an error here, whatever SIGPIPE is set to.
        if len(views) == 1:
            return self.sock.send(views[0], socket.MSG_NOSIGNAL)
        return self.sock.sendmsg(views, [], socket.MSG_NOSIGNAL)

    def sendfile(self, fd: int, offset: int, length: int, /) -> int:
        """Send a part of a file without copying it; see :data:`outbox.SendFile`."""
        return os.sendfile(self.writer_fd, fd, offset, length)

    def finish(self) -> None:
        """Shut the sending side down; what was sent still reaches the peer."""
        try:
            self.sock.shutdown(socket.SHUT_WR)
        except OSError:
            # The peer closed first: there is nobody left to tell.
            return

    def discard(self) -> bool:
        """Throw away what is there."""
        return not self.recv_into(_discarded)

    def close(self) -> None:
        """Close the socket."""
        self.sock.close()


class PipeChannel(PlainChannel):
    """A pair of pipes, for one connection on stdin and stdout.

    Args:
        reader_fd: Where requests come from; owned by the channel from now on.
        writer_fd: Where replies go; likewise.
    """

    peer = "stdin"

    def __init__(self, reader_fd: int, writer_fd: int) -> None:
        os.set_blocking(reader_fd, False)
        os.set_blocking(writer_fd, False)
        self.reader_fd = reader_fd
        self.writer_fd = writer_fd

    def recv_into(self, view: memoryview, /) -> int:
        """Receive what is there."""
        return os.readv(self.reader_fd, [view])

    def sendmsg(self, views: list[memoryview], /) -> int:
        """Send what the pipe takes."""
        return os.writev(self.writer_fd, views)

    def finish(self) -> None:
        """Nothing to do: the peer sees the end when the pipe is closed."""

    def discard(self) -> bool:
        """Throw away what is there."""
        return not self.recv_into(_discarded)

    def close(self) -> None:
        """Close both pipes."""
        os.close(self.reader_fd)
        os.close(self.writer_fd)


def open_standard_channel() -> SocketChannel | PipeChannel:
    """The channel on stdin and stdout: one socket as inetd passes it, or two pipes.

    Raises:
        OSError: They are neither.
    """
    if stat.S_ISSOCK(os.fstat(0).st_mode):
        return SocketChannel(socket.socket(fileno=os.dup(0)), "stdin")
    return PipeChannel(os.dup(0), os.dup(1))
