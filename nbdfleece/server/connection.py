"""One connection: a channel, the handshake, the transmission phase, and the end.

No streams, no task (but for what a session must find out): the event loop calls
:meth:`Connection._on_readable` and :meth:`Connection._on_writable`, and everything happens in
them, or in the turns that they ask for.

**A turn.** One receive takes what the kernel has, the current phase handles every whole
message in it (and receives more of a large one), and the replies leave in one send. What is
left when the turn has used up its share of time is handled when the others who wait have had
theirs (:mod:`.turns`); so is all that a client sends who has lately used up its share, and
beside others who did, what a client sends who asks for several things at a time.

**States.** Each has one way in:

=============  ======================================================================
HANDSHAKE      from the start; the phase is a :class:`Handshake`
TRANSMISSION   :meth:`_begin_transmission`; the phase is a :class:`Transmission`
CLOSING        :meth:`_begin_closing`, after DISC, ABORT, the end of the stream, or a
               broken rule: nothing is received any more; requests in flight finish
               and all replies are sent, then the channel is closed
LINGERING      :meth:`_close_channel`, if the end is ours to begin: the client is told that
               no more comes, and what it still sends is thrown away until it closes too.
               A socket that is closed with bytes unread takes sent replies with it
CLOSED         :meth:`_release`; from any state when the channel breaks. Descriptors
               and buffers are given up at once; requests in flight still finish, and
               their replies are thrown away. From HANDSHAKE by :meth:`_hand_over`, too
=============  ======================================================================

**Pausing.** When the phase is not open (too many replies unread, too many requests
in flight) the reader is removed, so that the kernel's buffer fills and the client
waits. Once there is room, a turn goes on with what was received.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import Callable, Coroutine
from enum import Enum
from typing import Any, Final

from ..errors import ProtocolError
from ..export.export import Export
from ..nbd.export_info import Lookup
from ..nbd.negotiation import Negotiation
from ..nbd.outcomes import Closed, Negotiated, StartTls
from .catalogue import ServedExport
from .channel import Channel, SocketChannel
from .connection_log import ConnectionLog
from .handshake import Handshake
from .host import Host
from .inbox import BrokenChannelError, Inbox
from .outbox import Outbox
from .statistics import Statistics
from .transmission import Transmission
from .turns import Turn

logger = logging.getLogger("nbdfleece.server")

LINGER_SECONDS: Final = 1.0
"""How long a client may take to notice that the server has ended its connection."""


class State(Enum):
    """How far a connection is."""

    HANDSHAKE = "handshake"
    TRANSMISSION = "transmission"
    CLOSING = "closing"
    LINGERING = "lingering"
    CLOSED = "closed"


class Connection:
    """One client.

    Args:
        host: The server.
        channel: The bytes; owned by the connection.

    Attributes:
        state: How far it is.
        export: What it has open, in its transmission phase.
        statistics: What it has done.
        session: Its own view of what is served; None for what all see.
        is_draining: It is shutting down, and not all is answered that was asked before.
        transmission_class: What the phase of that name is.
    """

    transmission_class: type[Transmission] = Transmission

    def __init__(self, host: Host, channel: Channel) -> None:
        self.state = State.HANDSHAKE
        self.export: Export | None = None
        self.statistics = Statistics()
        self.is_draining = False
        self._is_shutting_down = False
        self.outbox = Outbox(host.pool)
        self.peer = channel.peer
        self._log = ConnectionLog(self.peer)
        self._host = host
        self._limits = host.limits
        self._channel = channel
        self.session = host.new_session(self)
        self._wait: asyncio.Task[None] | None = None
        self._loop = asyncio.get_running_loop()
        self._inbox = Inbox(host.pool, channel)
        self._phase: Handshake | Transmission = self._new_handshake(None)
        self._is_reading = self._is_writing = self._is_overlooked = False
        self._turn: Turn | None = None
        self._tick: asyncio.Handle | Turn | None = None
        self._timer: asyncio.TimerHandle | None = None
        self._drain_waiters: list[asyncio.Future[None]] = []
        self._progress = (0, 0)
        self._ends_first = False
        self._is_released = False

    def start(self) -> None:
        """Greet the client, once it may be here."""
        if self.session is None:
            self._greet()
        else:
            self._wait_for(self.session.admit(), self._greet)

    def _wait_for(self, step: Coroutine[Any, Any, None], then: Callable[[], None]) -> None:
        """Let the session do a step of the handshake, and go on if all is still as it was."""

        def end(task: asyncio.Task[None]) -> None:
            self._wait = None
            error = None if task.cancelled() else task.exception()
            if self.state is not State.HANDSHAKE:
                return
            if error is None:
                then()
            else:
                self._begin_closing(f"refused: {error}", level=logging.WARNING)
                self._settle()

        self._wait = self._loop.create_task(step)
        self._wait.add_done_callback(end)

    def _look_up(self, phase: Handshake, lookup: Lookup) -> None:
        """Find out what the client's option asks for, then answer it."""
        assert self.session is not None, "only a session does not know its answers yet"

        def go_on() -> None:
            phase.resume()
            self._take_turn()

        self._wait_for(self.session.look_up(lookup), go_on)

    def _greet(self) -> None:
        seconds = self._limits.handshake_seconds
        if seconds:
            self._timer = self._loop.call_later(seconds, self._end_slow_handshake)
        self._take_turn()

    def shut_down(self, reason: str) -> None:
        """Refuse what is asked from now on; see :meth:`finish` for what ends the connection."""
        logger.debug("%s: shutting down: %s", self.peer, reason)
        self._is_shutting_down = self.is_draining = True
        self._phase.shut_down()
        if self.state is State.TRANSMISSION:
            self._set_timer(self._limits.closing_seconds, self._end_slow_closing)
        self._check_drained()

    def _check_drained(self) -> None:
        if self.is_draining and self.is_idle:
            self.is_draining = False
            if self.state is State.TRANSMISSION:
                self._set_timer(0, self._end_slow_closing)
            self._host.drained(self)

    def finish(self, reason: str) -> None:
        """Finish what is in flight, send all replies, close."""
        if self.state in (State.HANDSHAKE, State.TRANSMISSION):
            self._begin_our_end(reason)
            self._settle()

    def abort(self, reason: str) -> None:
        """Close at once; what is in flight is cancelled."""
        if isinstance(self._phase, Transmission):
            self._phase.cancel()
        if self.state is not State.CLOSED:
            logger.info("%s: connection closed: %s", self.peer, reason)
            self._release()

    @property
    def channel(self) -> Channel:
        """Its bytes; another one once TLS is in use."""
        return self._channel

    @property
    def identity(self) -> str | None:
        """Who the client has proven to be by TLS: a distinguished name or the name of a key."""
        return self._channel.identity

    @property
    def requests_in_flight(self) -> int:
        """Requests that wait for something."""
        return self._phase.requests_in_flight if isinstance(self._phase, Transmission) else 0

    @property
    def _is_special(self) -> bool:
        """Whether a turn may have changed more than what was received and what is to be sent."""
        return self.state is not State.TRANSMISSION or self.is_draining

    @property
    def is_idle(self) -> bool:
        """Whether nothing is in flight, waiting to be handled, or on its way out."""
        return not (
            self.requests_in_flight or self.outbox.queued_bytes or self._is_writing or self._turn
        )

    # Receiving.

    def _on_readable(self) -> None:
        self._host.polling.found(self)
        self._is_overlooked = self._turn is not None  # libuv tells of a broken socket only once
        if self._is_overlooked or not self._can_receive():
            return  # the rest of the last turn comes first; what TLS still has may be too late
        try:
            count = self._inbox.receive(self._phase.needed)
        except BlockingIOError:
            self.flush()  # TLS may have something to say
            self._settle()
            return
        except OSError as error:
            self._lose(error)
            return
        if count == 0:
            self._receive_eof()
        elif self._phase.is_bulk:
            self._turn = self._host.turns.add(self._take_turn)
        elif self._phase.is_busy and not self._host.turns.is_idle:
            self._turn = self._host.turns.add_busy(self._take_turn)
        else:
            self._take_turn()

    def _take_turn(self) -> None:
        """Handle what was received, send the replies."""
        self._turn = None
        try:
            has_more = self._phase.handle(self._inbox)
        except ProtocolError as error:
            self._begin_closing(f"protocol error: {error}", level=logging.WARNING)
            has_more = False
        except BrokenChannelError as error:
            self._lose(error)
        except Exception:
            # A bug of ours. The socket is still readable: going on would repeat it for ever.
            logger.exception("%s: internal error", self.peer)
            self.abort("internal error")
        if self.state is State.CLOSED:
            return
        self.flush()
        if has_more or not self._is_reading or self._is_special:
            if has_more and self._can_receive():
                self._turn = self._host.turns.add(self._take_turn)
            self._settle()
            return
        # The usual end of a turn: all that was received is handled.
        self._inbox.give_back()
        is_amid = len(self._inbox) or self._phase.is_skipping
        may_be_broken = is_amid and not self._inbox.is_dry  # and that was the last of it
        if may_be_broken or self._is_overlooked or self._channel.has_pending():
            self._loop.call_soon(self._on_readable)
        elif (self._phase.is_answered or self._inbox.is_dry) and not self._is_writing:
            self._host.polling.begin(self)

    def _receive_eof(self) -> None:
        if isinstance(self._phase, Handshake):
            self._phase.receive_eof()
        else:
            self._begin_closing("the client left without a DISC")
        self._settle()

    # Sending.

    def flush(self) -> None:
        """Send what can be sent now; the rest follows when the channel is writable."""
        if self._is_writing or self.state is State.CLOSED:
            return
        try:
            self.outbox.send(self._channel)
            self._channel.send_own()
        except BlockingIOError:
            self._is_writing = True
            self._loop.add_writer(self._channel.writer_fd, self._on_writable)
        except OSError as error:
            self._lose(error)
        if self._drain_waiters:
            self._wake_drain_waiters()

    def _on_writable(self) -> None:
        try:
            self.outbox.send(self._channel)
            self._channel.send_own()
        except BlockingIOError:
            pass
        except OSError as error:
            self._lose(error)
            return
        else:
            self._stop_writing()
        self._wake_drain_waiters()
        if self._phase.is_bulk and self._may_go_on():
            self._turn = self._host.turns.add(self._take_turn)
        else:
            self._go_on()

    def _stop_writing(self) -> None:
        if self._is_writing:
            self._is_writing = False
            self._loop.remove_writer(self._channel.writer_fd)

    def send_soon(self) -> None:
        """Send in this turn of the loop, together with what else ends in it, or when it is due."""
        if self._tick is None and not self._is_released:
            later = self._host.turns.add if self._phase.is_bulk else self._loop.call_soon
            self._tick = later(self._on_tick)

    def _on_tick(self) -> None:
        self._tick = None
        self.flush()
        self._go_on()

    async def give_way(self) -> None:
        """Let other connections have their turn, and the client read what it has not."""
        self.send_soon()
        await self._host.turns.next()
        while self.outbox.queued_bytes >= self._limits.queued_bytes_max:
            waiter = self._loop.create_future()
            self._drain_waiters.append(waiter)
            await waiter
            await self._host.turns.next()

    async def next_turn(self) -> None:
        """Wait until all who wait have had their turn."""
        await self._host.turns.next()

    def _wake_drain_waiters(self) -> None:
        for waiter in self._drain_waiters:
            if not waiter.done():
                waiter.set_result(None)
        self._drain_waiters.clear()

    # What follows from it.

    def _may_go_on(self) -> bool:
        """Whether the connection had paused and need not any longer."""
        return self._can_receive() and not self._is_reading and self._turn is None

    def _go_on(self) -> None:
        """Handle what was left when the connection paused, if it may go on now."""
        if self._may_go_on():
            self._take_turn()
        else:
            self._settle()

    def _can_receive(self) -> bool:
        return self.state in (State.HANDSHAKE, State.TRANSMISSION) and self._phase.is_open

    def _settle(self) -> None:
        """After anything happened: next phase, reading or pausing, the end."""
        self._check_drained()
        if self.state is State.HANDSHAKE:
            self._leave_handshake()
        elif isinstance(self._phase, Transmission) and self._phase.disconnected:
            self._begin_closing("the client disconnected", level=logging.DEBUG)
        if self.state is State.CLOSING and self.is_idle:
            self._close_channel()
        elif self.state is State.CLOSED:
            self._report_if_over()
        elif self.state is not State.LINGERING:
            self._watch_reader()

    def _watch_reader(self) -> None:
        """Read the channel, or pause; a connection with nothing left over keeps no buffer."""
        can_receive = self._can_receive()
        if can_receive != self._is_reading:
            self._is_reading = can_receive
            if can_receive:
                self._loop.add_reader(self._channel.reader_fd, self._on_readable)
            else:
                self._loop.remove_reader(self._channel.reader_fd)
        self._inbox.give_back()
        if can_receive and self._channel.has_pending():
            self._loop.call_soon(self._on_readable)

    def _leave_handshake(self) -> None:
        assert isinstance(self._phase, Handshake)
        outcome = self._phase.outcome
        if isinstance(outcome, Negotiated):
            if not self._hand_over(outcome):
                self._begin_transmission(outcome)
        elif isinstance(outcome, Closed):
            level = logging.DEBUG if outcome.clean else logging.WARNING
            self._begin_closing(outcome.reason, level=level)
        elif isinstance(outcome, StartTls) and not self.outbox.queued_bytes:
            self._begin_tls(outcome)
        elif self._phase.lookup is not None and self._wait is None:
            self._look_up(self._phase, self._phase.lookup)

    def _new_handshake(self, after: StartTls | None) -> Handshake:
        negotiation = Negotiation(
            self.session or self._host.catalogue,
            self._limits.wire,
            tls=self._host.tls_mode,
            after=after,
            may_access=self._host.may_access(self),
        )
        if self._is_shutting_down:
            negotiation.shut_down()
        return Handshake(negotiation, self.outbox, self._limits, self._log)

    def _begin_tls(self, outcome: StartTls) -> None:
        """Everything received so far is forgotten; the handshake begins anew inside TLS."""
        self._channel = self._inbox.source = self._host.start_tls(self._channel)
        self._phase = self._new_handshake(outcome)

    def _hand_over(self, negotiated: Negotiated) -> bool:
        """Give the client to the deputy of its export; whether that has one."""
        if self._is_shutting_down:
            return False  # who ends this connection must not be left with another one
        if not isinstance(self._channel, SocketChannel) or self.session is not None:
            return False
        assert isinstance(negotiated.export, ServedExport)
        deputy = self._host.deputy(negotiated.export.export)
        if deputy is None:
            return False
        if not self.outbox.queued_bytes:  # else once the client has read what it was answered
            refusal = self._host.hand_over(self, self._channel.sock, negotiated, deputy)
            if refusal is None:
                self._release()
            else:
                self._begin_our_end(refusal, level=logging.WARNING)
        return True

    def go_on(self, negotiated: Negotiated) -> None:
        """Begin, in place of :meth:`start`, after a handshake that another process has done."""
        self._begin_transmission(negotiated)
        self._settle()

    def _begin_transmission(self, negotiated: Negotiated) -> None:
        self.state = State.TRANSMISSION
        if isinstance(self._channel, SocketChannel):
            self.outbox.sendfile = self._channel.sendfile
        self._phase = transmission = self.transmission_class(negotiated, self, self._limits)
        self.statistics = transmission.statistics
        refusal = self._host.open_export(self, transmission.export)
        if refusal is not None:
            self._begin_our_end(refusal, level=logging.WARNING)
            return
        self.export = transmission.export
        logger.info("%s: opened export '%s'", self.peer, self.export.name)
        self._set_timer(self._limits.idle_seconds, self._end_idle)
        if negotiated.leftover:
            self._inbox.append(negotiated.leftover)
            self._turn = self._host.turns.add(self._take_turn)

    # Time.

    def _set_timer(self, seconds: float, callback: Callable[[], None]) -> None:
        if self._timer is not None:
            self._timer.cancel()
        self._progress = self._current_progress()
        self._timer = self._loop.call_later(seconds, callback) if seconds else None

    def _current_progress(self) -> tuple[int, int]:
        return self.statistics.requests, self.outbox.sent_bytes

    def _has_moved(self) -> bool:
        """Whether anything was received or sent since the timer was set, or is being worked at."""
        is_at_work = self.requests_in_flight > len(self._drain_waiters)  # they wait for the client
        return is_at_work or self._progress != self._current_progress()

    def _end_slow_handshake(self) -> None:
        self._timer = None
        limit = f"handshake not done after {self._limits.handshake_seconds:g} s, the limit"
        logger.warning("%s: %s: connection closed", self.peer, limit)
        self._release()

    def _end_idle(self) -> None:
        if self._has_moved():
            self._set_timer(self._limits.idle_seconds, self._end_idle)
            return
        reason = f"idle for {self._limits.idle_seconds:g} s, the limit"
        self._begin_our_end(reason, level=logging.WARNING)
        self._settle()

    def _end_slow_closing(self) -> None:
        if self._has_moved():
            self._set_timer(self._limits.closing_seconds, self._end_slow_closing)
            return
        self.abort(f"the client does not read its replies for {self._limits.closing_seconds:g} s")

    # The end.

    def _begin_our_end(self, reason: str, *, level: int = logging.INFO) -> None:
        """Close a connection whose client has done nothing wrong and expects no end."""
        self._ends_first = True
        self._begin_closing(reason, level=level)

    def _begin_closing(self, reason: str, *, level: int = logging.INFO) -> None:
        if self.state not in (State.HANDSHAKE, State.TRANSMISSION):
            return
        logger.log(level, "%s: closing: %s", self.peer, reason)
        self.state = State.CLOSING
        if self._turn is not None:
            self._turn.cancel()
            self._turn = None
        if self._is_reading:
            self._is_reading = False
            self._loop.remove_reader(self._channel.reader_fd)
        self._inbox.close()
        self._set_timer(self._limits.closing_seconds, self._end_slow_closing)

    def _close_channel(self) -> None:
        """All replies are sent: say goodbye and close."""
        try:
            self._channel.finish()
        except BlockingIOError:
            logger.debug("%s: no room for the end of TLS", self.peer)
        except OSError as error:
            logger.debug("%s: %s", self.peer, error)
            self._ends_first = False
        if self._ends_first:
            self._linger()
        else:
            self._release()

    def _linger(self) -> None:
        """Wait for the client's end, and look at nothing that comes before it."""
        self.state = State.LINGERING
        self._is_reading = True
        self._loop.add_reader(self._channel.reader_fd, self._discard)
        self._set_timer(LINGER_SECONDS, self._release)

    def _discard(self) -> None:
        try:
            if self._channel.discard():
                self._release()
        except BlockingIOError:
            return
        except OSError as error:
            logger.debug("%s: %s", self.peer, error)
            self._release()

    def _lose(self, error: OSError | BrokenChannelError) -> None:
        """The channel is broken."""
        logger.info("%s: connection lost: %s", self.peer, error)
        with contextlib.suppress(OSError):  # a TLS alert may still get through
            self._channel.send_own()
        self._release()

    def _release(self) -> None:
        """Give everything up but the requests in flight."""
        if self.state is State.CLOSED:
            return
        self.state = State.CLOSED
        for handle in (self._turn, self._timer):
            if handle is not None:
                handle.cancel()
        self._turn = self._timer = None
        if self._is_reading:
            self._is_reading = False
            self._loop.remove_reader(self._channel.reader_fd)
        self._stop_writing()
        self._inbox.close()
        self.outbox.close()
        self._channel.close()
        self._wake_drain_waiters()
        self._report_if_over()

    def _report_if_over(self) -> None:
        if self.requests_in_flight or self._is_released:
            return
        self._is_released = True
        self.is_draining = False
        if self._tick is not None:
            self._tick.cancel()
        self._log.close()
        self._host.closed(self)

    def log_failure(self, text: str, error: BaseException) -> None:
        """Note a request that failed for a reason of ours, not more often than is readable."""
        self._log.failure(text, error)

    def log_pause(self, text: str) -> None:
        """Note what makes this client wait."""
        self._log.limit(text, level=logging.INFO)
