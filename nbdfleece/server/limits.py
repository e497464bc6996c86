"""Limits of the server: how much time, how many connections, how much memory, and why that much.

What one message or one handshake may contain is the wire's affair
(:class:`nbdfleece.nbd.limits.Limits`); it is carried along here.
"""

from __future__ import annotations

import logging
import resource
from dataclasses import dataclass, field
from typing import Final

from ..nbd.limits import KIB, MIB
from ..nbd.limits import Limits as WireLimits

logger = logging.getLogger("nbdfleece.server")

OTHER_DESCRIPTORS: Final = 1024
"""Descriptors beside those of NBD clients: images, scratch, listeners, the control socket."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Limits:
    """What clients may take of the server; each hit is one line in the log.

    Attributes:
        handshake_seconds: From accepting a connection to its transmission phase, TLS
            included; QEMU's 10 s. A client that dribbles holds a socket no longer
            (CVE-2024-7409). 0: no limit.
        idle_seconds: A connection in transmission without a request for so long is closed.
            0: no limit, since a kernel's block device may be idle for days.
        connections_max: Connections at a time, handshakes included. One costs about 10 KiB
            before its transmission phase, so 1000 cost 10 MiB. Above it: closed at once.
        excess_waits: Connections above the maximum are not closed but wait in the kernel's
            queue until one ends, as with qemu-nbd.
        poll_seconds: How long the loop looks at its sockets before it sleeps, after a request of
            a client that asks for a little at a time (:mod:`.polling`). 0: not at all.
        closing_seconds: At the end of a connection, for a client that reads nothing of the
            replies that are left. 0: no limit.
        queued_bytes_max: Replies that wait for one client to read them before its requests
            are no longer read. Large enough for a whole round of a fast client (64 requests
            of 64 KiB); a hundred clients that never read hold 400 MiB of it, and each the one
            reply that went beyond, up to ``wire.payload_accepted_max`` if it is a simple one.
        flush_bytes: Replies are sent when so many bytes wait, also within one wake-up:
            what was just read is still in the processor's cache.
        wake_up_bytes_max: Work for one connection before the others have their turn; about a fifth
            of a millisecond. A request counts for 4 KiB more than its data, so that it is one
            of 256 KiB or, with some room, 32 of 4 KiB.
        read_chunk_bytes_max: A structured read is answered in chunks of this size once it is
            larger, so that a read of 32 MiB needs no buffer of 32 MiB.
        idle_buffer_bytes_max: Buffers that are kept for the next use, for all connections.
        wire: The limits of the handshake and of single messages; also the requests and bytes
            in flight per connection.
    """

    handshake_seconds: float = 10.0
    idle_seconds: float = 0.0
    connections_max: int = 1000
    excess_waits: bool = False
    poll_seconds: float = 32e-6
    closing_seconds: float = 5.0
    queued_bytes_max: int = 4 * MIB
    flush_bytes: int = 256 * KIB
    wake_up_bytes_max: int = 260 * KIB
    read_chunk_bytes_max: int = 2 * MIB
    idle_buffer_bytes_max: int = 64 * MIB
    wire: WireLimits = field(default_factory=WireLimits)

    def describe_pause(self, queued_bytes: int, requests_in_flight: int) -> str:
        """Which limit a connection must wait for, that has so much to do."""
        if queued_bytes >= self.queued_bytes_max:
            return f"paused: more than {self.queued_bytes_max} bytes of replies are unread"
        if requests_in_flight >= self.wire.requests_in_flight_max:
            return f"paused: {self.wire.requests_in_flight_max} requests are in flight, the limit"
        return f"paused: {self.wire.bytes_in_flight_max} bytes in flight are the limit"


def allow_descriptors(limits: Limits) -> None:
    """Let this process have as many descriptors as its clients may take, and its own.

    The usual soft limit is 1024: clients that take all connections would leave none for the
    scratch of a snapshot (rule 5).
    """
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = limits.connections_max + OTHER_DESCRIPTORS
    if soft == resource.RLIM_INFINITY or soft >= wanted:
        return
    allowed = wanted if hard == resource.RLIM_INFINITY else min(wanted, hard)
    resource.setrlimit(resource.RLIMIT_NOFILE, (allowed, hard))
    if allowed < wanted:
        logger.warning(
            "%d file descriptors are allowed, but %d connections and the disks may need %d: "
            "raise the hard limit (ulimit -Hn), or lower connections-max",
            allowed,
            limits.connections_max,
            wanted,
        )
