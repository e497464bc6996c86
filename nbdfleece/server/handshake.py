"""The handshake phase of one connection: between its bytes and the state machine."""

from __future__ import annotations

import logging

from ..nbd.export_info import Lookup
from ..nbd.negotiation import Negotiation
from ..nbd.outcomes import Outcome
from .connection_log import ConnectionLog
from .inbox import Inbox
from .limits import Limits
from .outbox import Outbox


class Handshake:
    """The handshake phase: bytes go to the state machine, its replies to the outbox."""

    needed = 1
    is_bulk = is_busy = is_answered = is_skipping = False

    def __init__(
        self, negotiation: Negotiation, outbox: Outbox, limits: Limits, log: ConnectionLog
    ) -> None:
        self._negotiation = negotiation
        self._outbox = outbox
        self._log = log
        self._reply_bytes_max = limits.wire.reply_bytes_max
        self._has_more = True

    @property
    def is_open(self) -> bool:
        """Whether there is something to do: receiving more, or answering what was received."""
        if self._is_full or self._negotiation.lookup is not None:
            return False
        return self._has_more or self._negotiation.outcome is None

    @property
    def _is_full(self) -> bool:
        return self._outbox.queued_bytes > self._reply_bytes_max

    @property
    def outcome(self) -> Outcome | None:
        """How the handshake has ended, once all its replies are in the outbox."""
        return None if self._has_more else self._negotiation.outcome

    @property
    def lookup(self) -> Lookup | None:
        """What must be found out before the handshake goes on."""
        return self._negotiation.lookup

    def resume(self) -> None:
        """It was found out."""
        self._negotiation.resume()

    def handle(self, inbox: Inbox) -> bool:
        """Give what was received to the machine, and take the replies to one option.

        One option makes the server search an export's contexts a thousand times, or list a
        thousand exports: the others have their turn before the next one (rule 5).

        Returns:
            Whether there may be more.
        """
        if len(inbox) and self._negotiation.outcome is None:
            data = inbox.peek(len(inbox))
            inbox.start = inbox.end
            self._negotiation.receive_data(data)
        reply = self._negotiation.data_to_send()
        if reply:
            self._outbox.put(reply)
        self._has_more = bool(reply)
        for note in self._negotiation.take_notes():
            self._log.limit(note, level=logging.WARNING)
        return self._has_more

    def receive_eof(self) -> None:
        """The client has closed its side."""
        self._negotiation.receive_eof()
        self._has_more = False

    def shut_down(self) -> None:
        """Answer further options with ERR_SHUTDOWN."""
        self._negotiation.shut_down()
