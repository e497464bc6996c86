"""The transmission phase of one connection: requests in, replies out.

:meth:`Transmission.handle` takes whole requests out of the inbox, one after the
other. Each is one coroutine, started at once (:mod:`.eager`): if it does not wait,
its reply is in the outbox when :func:`~.eager.start` returns, and nothing is left
of it. If it waits, it becomes a task and is **in flight**: later requests overtake
it, and its reply is sent in the turn of the loop in which it ends, or in the client's next.

**Who holds what.** A request in flight holds its place in the outbox (a READ), or
a pin on the receive buffer that its payload lies in (a WRITE). Both are dropped
when its task ends, whether or not the client is still there. Node operations are
never cancelled because a client has left: a write that has begun is finished.

**When no more requests are started** (:attr:`Transmission.is_open`): too many
replies wait for the client to read them, or too many requests or bytes are in
flight. The driver then stops reading the socket until that has changed (rule 5).

Spec: proto.md, "Transmission phase", "Request types", "Structured reply types".
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine
from functools import partial
from typing import Any, Final, Protocol

from ..block.node import BlockNode
from ..errors import SnapshotError
from ..nbd.constants import Command, CommandFlag, Error
from ..nbd.errors import RequestError, error_from_errno
from ..nbd.outcomes import Negotiated
from ..nbd.replies import Replies, replies_for
from ..nbd.requests import Request, RequestRules
from .buffers import Buffer
from .catalogue import ServedExport
from .eager import start
from .inbox import IN_PLACE_BYTES_MAX, Inbox, needed_after
from .limits import Limits
from .outbox import Outbox
from .reads import Reads
from .statistics import Statistics
from .statuses import BlockStatuses
from .turns import BUSY_REQUESTS, COPIES_PER_SENDFILE, REQUEST_COST, STATUS_TURN_COST

_STATUS_COST: Final = 4 << 20
"""What a block status in flight counts for, in bytes, whatever it will find."""

_NO_PAYLOAD: Final = memoryview(b"")
_READ: Final = int(Command.READ)
_WRITE: Final = int(Command.WRITE)
_DISC: Final = int(Command.DISC)
_BLOCK_STATUS: Final = int(Command.BLOCK_STATUS)
_FUA: Final = int(CommandFlag.FUA)
_NO_HOLE: Final = int(CommandFlag.NO_HOLE)
_FAST_ZERO: Final = int(CommandFlag.FAST_ZERO)

_Work = Coroutine[Any, Any, None]
_Handler = Callable[[Request, memoryview], _Work]


class Host(Protocol):
    """What the transmission phase needs of its driver."""

    outbox: Outbox

    def flush(self) -> None:
        """Send what can be sent now."""

    def send_soon(self) -> None:
        """Send in this turn of the loop, once."""

    async def next_turn(self) -> None:
        """Wait until all who wait have had their turn."""

    async def give_way(self) -> None:
        """Let other connections have their turn and the client read."""

    def log_failure(self, text: str, error: BaseException) -> None:
        """Note a request that failed for a reason of ours."""

    def log_pause(self, text: str) -> None:
        """Note which limit makes the client wait."""


class Transmission:
    """The requests of one connection.

    Args:
        negotiated: What the handshake ended with; its export is a :class:`ServedExport`.
        host: The driver.
        limits: What the client may take.

    Attributes:
        needed: Bytes that the next message takes, as far as is known.
        disconnected: The client has sent DISC.
        is_bulk: The client has lately had enough requests, or large enough ones, for a whole turn.
        is_busy: It has lately had several requests for a turn.
        requests_in_flight: Requests that wait for something.
        bytes_in_flight: Their payload, either way.
    """

    def __init__(self, negotiated: Negotiated, host: Host, limits: Limits) -> None:
        assert isinstance(negotiated.export, ServedExport)
        self.export = negotiated.export.export
        self.statistics = Statistics()
        self.disconnected = False
        self.is_bulk = self.is_busy = False
        self._turn_left = 0
        self.requests_in_flight = 0
        self.bytes_in_flight = 0
        self._host = host
        self._limits = limits
        self._outbox = host.outbox
        self._node: BlockNode = self.export.node
        self._rules = RequestRules(negotiated, limits.wire)
        self._replies = self._new_replies(negotiated)
        self._extended = negotiated.extended_headers
        chunk_max = self._rules.chunk_max
        if not self._node.reads_as_asked:
            chunk_max = min(chunk_max, limits.read_chunk_bytes_max)
        turn_bytes = limits.wake_up_bytes_max
        self._reads = Reads(self._node, self._replies, self._outbox, chunk_max, turn_bytes, self)
        self._begin_read: Callable[[Request], _Work | None] = self._reads.begin
        # Room for one more of the largest requests is always left.
        self._pause_bytes = limits.wire.bytes_in_flight_max - self._rules.payload_max
        contexts = {
            selected.context_id: context
            for selected in negotiated.contexts
            if (context := self.export.context(selected.name)) is not None
        }
        extents_max = limits.wire.extents_max
        self._statuses = BlockStatuses(
            contexts, extents_max, self.export, self.statistics, self._replies, host.give_way
        )
        self._tasks: set[asyncio.Task[None]] = set()
        self._partial: Request | None = None
        self._partial_length = 0
        self._skip_left = 0
        self._skipped: tuple[Request, RequestError] | None = None
        self._header_size = self.needed = self._rules.header_size
        self._unpack = self._rules.unpack
        self._check = self._rules.check
        self._operations: dict[int, _Handler] = {
            Command.FLUSH: self._flush,
            Command.TRIM: self._trim,
            Command.CACHE: self._cache,
            Command.WRITE_ZEROES: self._write_zeroes,
        }
        self._handlers: dict[int, _Handler] = {
            **dict.fromkeys(self._operations, self._perform),
            Command.WRITE: self._write,
            Command.BLOCK_STATUS: self._block_status,
        }

    def _new_replies(self, negotiated: Negotiated) -> Replies:
        """The form of the replies."""
        return replies_for(negotiated)

    # Framing.

    @property
    def is_skipping(self) -> bool:
        """Whether the rest of a refused payload is still to come."""
        return self._skip_left > 0

    @property
    def is_answered(self) -> bool:
        """Whether a client that asks for a little at a time was answered in the last turn."""
        has_handled = self._turn_left < self._limits.wake_up_bytes_max
        return has_handled and not (self.is_bulk or self.is_busy or self.requests_in_flight)

    @property
    def is_open(self) -> bool:
        """Whether one more request may be started."""
        return (
            self._outbox.queued_bytes < self._limits.queued_bytes_max
            and self.requests_in_flight < self._limits.wire.requests_in_flight_max
            and self.bytes_in_flight <= self._pause_bytes
            and not self.disconnected
        )

    def handle(self, inbox: Inbox) -> bool:
        """Handle whole requests, for one turn at most.

        Returns:
            Whether it stopped for any other reason than missing bytes: the turn is over, the
            connection must pause (:attr:`is_open`), or the client has disconnected.

        Raises:
            ProtocolError: The stream is out of step: drop the connection.
            BrokenChannelError: The connection is broken.
        """
        outbox = self._outbox
        before = self.statistics.requests
        self._turn_left = receive_left = turn_bytes = self._limits.wake_up_bytes_max
        flush_bytes = self._limits.flush_bytes
        is_open = self.is_open
        while is_open and self._turn_left > 0:
            length = self._handle_next(inbox)
            if length is None:
                if receive_left > 0 and (count := inbox.receive_large(self.needed)):
                    receive_left -= count + REQUEST_COST
                    continue
                if self._partial is None:
                    self.needed = self._header_size  # nothing is known to follow
                if self._turn_left < turn_bytes:
                    self.is_bulk = False
                    self.is_busy = self.statistics.requests - before >= BUSY_REQUESTS
                return self.disconnected
            self._turn_left -= length + REQUEST_COST
            if outbox.queued_bytes >= flush_bytes:
                self._host.flush()
                is_open = self.is_open
            elif self.requests_in_flight:
                is_open = self.is_open
        if not is_open:
            pause = self._limits.describe_pause(outbox.queued_bytes, self.requests_in_flight)
            self._host.log_pause(pause)
        else:  # first make room for what the client is about to send, then wake it with replies
            inbox.receive_large(self.needed)
        self.is_bulk = True
        return True

    def _handle_next(self, inbox: Inbox) -> int | None:
        """Handle the next request; returns its length, or None if not all of it is here."""
        if self._partial is not None:
            return self._handle_payload(self._partial, inbox)
        if self._skip_left and not self._skip(inbox):
            return None
        position = inbox.start
        header_end = position + self._header_size
        if inbox.end < header_end:
            return None
        request = self._unpack(inbox.view, position)
        inbox.start = header_end
        self.statistics.requests += 1
        if request[2] == _READ and not self._extended:
            self._begin(request)
            return request[5]
        if request[2] == _WRITE and not request[1] and self._write_at_once(request, inbox):
            return request[5]
        return self._handle_uncommon(request, inbox)

    def _handle_uncommon(self, request: Request, inbox: Inbox) -> int | None:
        """Handle a request that may have a payload, or ends the connection."""
        if request[2] == _DISC:
            self.disconnected = True
            self.needed = 0
            return None
        length = self._rules.payload_length(request)
        if not length:
            self._begin(request)
            if request[2] == _BLOCK_STATUS:
                return STATUS_TURN_COST
            return request[5] if request[2] == _READ else 0
        refusal = self._refusal(request)
        if refusal is not None:
            self._skip_left = length
            self._skipped = request, refusal
            self._skip(inbox)
            return length
        self._partial, self._partial_length, self.needed = request, length, length
        if length > IN_PLACE_BYTES_MAX:
            inbox.begin_large(length)
        return self._handle_payload(request, inbox)

    def _handle_payload(self, request: Request, inbox: Inbox) -> int | None:
        """Handle a request that was admitted, with its payload, if all of it is here."""
        length = self._partial_length
        if length > IN_PLACE_BYTES_MAX:
            large = inbox.finish_large()
            if large is None:
                return None
            self._partial = None
            self.needed = needed_after(self._header_size, length)
            self._begin_with_payload(request, large.view[:length], large)
            large.release()
            return length
        if inbox.end - inbox.start < length:
            return None
        self._partial = None
        self.needed = needed_after(self._header_size, length)
        if request[2] == _WRITE and not request[1] and self._write_at_once(request, inbox):
            return length
        payload = inbox.peek(length)
        inbox.start += length
        assert inbox.buffer is not None
        self._begin_with_payload(request, payload, inbox.buffer)
        return length if request[2] == _WRITE else STATUS_TURN_COST

    def _skip(self, inbox: Inbox) -> bool:
        """Throw the payload of a refused request away; whether all of it is gone.

        Only then the request is answered: libnbd does not expect a reply to what it still sends.
        """
        count = min(self._skip_left, len(inbox))
        inbox.start += count
        self._skip_left -= count
        if self._skip_left:
            return False
        assert self._skipped is not None
        self._refuse(*self._skipped)
        self._skipped = None
        return True

    def _refusal(self, request: Request) -> RequestError | None:
        """Why the request may not be carried out, or None if it may."""
        try:
            self._check(request)
        except RequestError as error:
            return error
        return None

    def _begin(self, request: Request) -> None:
        """Check and start a request without payload."""
        try:
            self._check(request)
        except RequestError as error:
            self._refuse(request, error)
            return
        if request[2] == _READ:
            work = self._begin_read(request)
        else:
            work = self._handlers[request[2]](request, _NO_PAYLOAD)
        if work is not None:
            self.start_task(work, self._reply_cost(request))

    def _reply_cost(self, request: Request) -> int:
        """Bytes that the reply may hold while the request is in flight, about."""
        if request.command == _READ:
            return min(request.length, self._rules.payload_max)
        return _STATUS_COST if request.command == _BLOCK_STATUS else 0

    def _begin_with_payload(self, request: Request, payload: memoryview, buffer: Buffer) -> None:
        """Start a request that was admitted; ``buffer`` is what its payload lies in."""
        task = start(self._handlers[request[2]](request, payload))
        if task is not None:
            buffer.users += 1
            self._track(task, len(payload), buffer)

    def start_task(self, work: _Work, cost: int = 0) -> None:
        """Run a coroutine; as long as it waits it counts as in flight, and holds ``cost`` bytes."""
        task = start(work)
        if task is not None:
            self._track(task, cost, None)

    def start_read(self, request: Request) -> None:
        """Answer a READ by a task of its own."""
        self.start_task(self._reads.answer(request), self._reply_cost(request))

    def hold(self, cost: int) -> None:
        """Count a request as in flight, and the bytes that it holds."""
        self.requests_in_flight += 1
        self.bytes_in_flight += cost

    def let_go(self, cost: int) -> None:
        """Count it no longer."""
        self.requests_in_flight -= 1
        self.bytes_in_flight -= cost

    def _track(self, task: asyncio.Task[None], cost: int, buffer: Buffer | None) -> None:
        """Count a request that waits as in flight until it has ended."""
        self.hold(cost)
        self._tasks.add(task)
        task.add_done_callback(partial(self._end, cost, buffer))

    def _end(self, cost: int, buffer: Buffer | None, task: asyncio.Task[None]) -> None:
        """A request that waited has ended."""
        self._tasks.discard(task)
        self.let_go(cost)
        if buffer is not None:
            buffer.release()
        if not task.cancelled() and (error := task.exception()) is not None:
            self._host.log_failure("a request ended without a reply", error)
        self._host.send_soon()

    def shut_down(self) -> None:
        """Answer requests with ESHUTDOWN from now on."""
        self._check = _refuse_all

    def cancel(self) -> None:
        """Cancel what is in flight; the end of a grace time."""
        for task in self._tasks:
            task.cancel()

    # Answers.

    def succeed(self, request: Request) -> None:
        """Answer that a request is done."""
        self._outbox.put(self._replies.success(request))

    def _refuse(self, request: Request, error: RequestError) -> None:
        self.statistics.errors += 1
        self._outbox.put(self._replies.error(request, error.error, error.text))

    def fail(self, request: Request, error: Exception) -> None:
        """Answer a request that could not be carried out."""
        if isinstance(error, RequestError):
            self._refuse(request, error)
        else:
            self._refuse(request, self.explain(request, error))

    def explain(self, request: Request, error: Exception) -> RequestError:
        """What the client is told of an error; the original goes to the log."""
        what = f"{Command(request.command).name} at {request.offset}, length {request.length}"
        code = error_from_errno(getattr(error, "errno", None), request.flags)
        if code != Error.ENOTSUP:  # the answer to FAST_ZERO where zeroes are slow: no failure
            self._host.log_failure(f"export '{self.export.name}': {what}", error)
        if isinstance(error, OSError):
            return RequestError(code, f"{what}: {error.strerror or 'input/output error'}")
        if isinstance(error, SnapshotError):
            return RequestError(Error.EIO, f"{what}: {error}")
        return RequestError(Error.EIO, f"{what}: internal error of the server")

    # The commands.

    def note_sendfile(self, length: int) -> None:
        """Bytes that are sent without a copy take less of the turn."""
        self._turn_left += length - length // COPIES_PER_SENDFILE

    async def next_turn(self) -> None:
        """Wait until all who wait have had their turn."""
        await self._host.next_turn()

    def flush(self) -> None:
        """Send what is queued; go on in a later turn if the connection had paused."""
        self._host.flush()
        self._host.send_soon()

    async def give_way(self) -> None:
        """Let other connections have their turn and the client read."""
        await self._host.give_way()

    async def _perform(self, request: Request, payload: memoryview) -> None:
        """Carry out a command that is answered with success or an error."""
        try:
            await self._operations[request[2]](request, payload)
        except Exception as error:
            self.fail(request, error)
        else:
            self.succeed(request)

    async def _write(self, request: Request, payload: memoryview) -> None:
        """As :meth:`_perform`, in one coroutine: most requests of a busy disk are writes.

        FUA: "the server MUST NOT send a reply until the data has reached permanent storage".
        """
        try:
            if request[1] & _FUA:
                await self._node.write_fua(request[4], payload)
            else:
                await self._node.write(request[4], payload)
        except Exception as error:
            self.fail(request, error)
        else:
            self.statistics.written_bytes += len(payload)
            self.succeed(request)

    def _write_at_once(self, request: Request, inbox: Inbox) -> bool:
        """Carry out a WRITE that is here whole and need not wait; whether it was one."""
        begin = inbox.start
        end = begin + request[5]
        if end > inbox.end:
            return False
        try:
            self._check(request)
            if not self._node.write_at_once(request[4], inbox.view[begin:end]):
                return False
        except RequestError:  # told when the payload is thrown away
            return False
        except Exception as error:
            self.fail(request, error)
        else:
            self.statistics.written_bytes += end - begin
            self.succeed(request)
        inbox.start = end
        return True

    async def _flush(self, request: Request, payload: memoryview) -> None:
        await self._node.flush()

    async def _trim(self, request: Request, payload: memoryview) -> None:
        trim = self._node.trim_fua if request.flags & _FUA else self._node.trim
        await trim(request.offset, request.length)

    async def _cache(self, request: Request, payload: memoryview) -> None:
        await self._node.cache(request.offset, request.length)

    async def _write_zeroes(self, request: Request, payload: memoryview) -> None:
        unmap = not request.flags & _NO_HOLE
        fast = bool(request.flags & _FAST_ZERO)
        node = self._node
        write_zeroes = node.write_zeroes_fua if request.flags & _FUA else node.write_zeroes
        await write_zeroes(request.offset, request.length, unmap=unmap, fast=fast)

    async def _block_status(self, request: Request, payload: memoryview) -> None:
        """One chunk per context, DONE on the last; or one error, and nothing after it."""
        statuses = self._statuses
        try:
            query = self._rules.status_query(request, payload)
            found = await statuses.find(request, query)
        except Exception as error:
            self.fail(request, error)
            return
        statuses.put(self._outbox, request, found)
        if not statuses.foresee(request, query, found):
            return
        self._host.flush()  # the client has something to digest: to prepare the rest can wait
        if not self._outbox.is_closed:
            self.start_task(statuses.look_ahead())


def _refuse_all(request: Request) -> None:
    raise RequestError(Error.ESHUTDOWN, "the server is shutting down")
