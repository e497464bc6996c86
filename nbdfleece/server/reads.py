"""READ: from where the data lie into the outbox, in one chunk or several.

Most of what is read is at hand (:meth:`Reads.begin`): it lies in memory, or in a file that
holds still, from where it is sent without a copy (rule 1). Cold streams out of such a file are
fetched several READs at a time (:mod:`.cold_reads`). The rest is a coroutine's work
(:meth:`Reads.answer`): to wait for a disk, to find out what is a hole, to read more than goes
into one chunk, and to tell the good part of a range from the bad.

Spec: proto.md, "NBD_CMD_READ", "Structured reply types".
"""

from __future__ import annotations

from collections.abc import Coroutine
from typing import Any, Final, Protocol

from ..block.node import BlockNode
from ..block.stable import StablePlace, bring_to_hand
from ..nbd.constants import CommandFlag
from ..nbd.errors import RequestError
from ..nbd.replies import Replies
from ..nbd.requests import Request
from . import cold_reads
from .buffers import Buffer
from .cold_reads import ColdReads
from .outbox import Outbox
from .pieces import ends_in_zeroes, find_holes, halve
from .statistics import Statistics

BAD_BLOCKS_MAX: Final = 16
"""A READ that meets errors is given up after so many bad blocks: each may cost a disk seconds."""

SPARSE_BYTES_MIN: Final = 32 << 10
"""Parts of a READ that are smaller are never sent as holes: to ask where they are costs more."""

ZERO_COPY_BYTES_MIN: Final = 32 << 10
"""A READ of at least this size is sent from where it lies, if that holds still (rule 1): below,
the second system call costs more than the copies."""

_DF: Final = int(CommandFlag.DF)


class Host(cold_reads.Host, Protocol):
    """What is needed of the transmission phase."""

    statistics: Statistics

    def succeed(self, request: Request) -> None:
        """Answer that a request is done."""

    def fail(self, request: Request, error: Exception) -> None:
        """Answer that a request could not be carried out."""

    def explain(self, request: Request, error: Exception) -> RequestError:
        """What the client is told of an error."""

    def note_sendfile(self, length: int) -> None:
        """Bytes of this turn are sent without a copy."""

    async def give_way(self) -> None:
        """Let other connections have their turn and the client read."""


class Reads:
    """The READs of one connection.

    Args:
        node: What is read.
        replies: The form of the replies.
        outbox: Where they go.
        chunk_max: Bytes of one chunk; a READ of more takes several.
        turn_bytes: What a turn may cost.
        host: The transmission phase.
    """

    def __init__(
        self,
        node: BlockNode,
        replies: Replies,
        outbox: Outbox,
        chunk_max: int,
        turn_bytes: int,
        host: Host,
    ) -> None:
        self._node = node
        self._replies = replies
        self._outbox = outbox
        self._chunk_max = chunk_max
        self._host = host
        self._statistics = host.statistics
        self._as_asked = node.reads_as_asked
        self._cold = ColdReads(turn_bytes, self._answer_from, outbox, host)
        self._stream_end = 0

    def begin(self, request: Request) -> Coroutine[Any, Any, None] | None:
        """Answer a READ by one chunk if its data are at hand, or will be with others'.

        Returns:
            What is left to be done; None if nothing is.
        """
        offset, length = request[4], request[5]
        if length > self._chunk_max:
            return self.answer(request)
        places = self._stable_places(offset, length)
        if places is not None:
            return self._begin_places(request, places)
        outbox = self._outbox
        header = self._replies.data(request, offset, length, done=True)
        buffer, begin = outbox.reserve(len(header) + length)
        data = begin + len(header)
        end = data + length
        view = buffer.view[data:end]
        try:
            is_read = self._node.read_at_once(offset, view)
        except Exception:  # told when it is read again
            is_read = False
        if not is_read:
            outbox.take_back(buffer, begin)
            return self.answer(request)
        self._statistics.read_bytes += length
        if length >= SPARSE_BYTES_MIN and self._may_be_sparse(request, view):
            return self._answer_sparse(request, buffer, view)
        buffer.view[begin:data] = header
        outbox.commit(buffer, begin, end)
        return None

    def _begin_places(
        self, request: Request, places: list[StablePlace]
    ) -> Coroutine[Any, Any, None] | None:
        """As :meth:`begin`, from what holds still: now, or with the stream that goes on with it."""
        offset, length = request[4], request[5]
        goes_on = offset == self._stream_end
        self._stream_end = offset + length
        if all(place.is_at_hand for place in places):
            self._answer_from(request, places)
        elif goes_on and len(places) == 1 and places[0].file.is_cached:
            self._cold.add(request, places[0])
        else:
            return self.answer(request)
        return None

    async def _answer_sparse(self, request: Request, buffer: Buffer, data: memoryview) -> None:
        """Answer a READ whose data are here, in ``buffer``, and may be a hole in part."""
        try:
            await self._send_sparse(request, request[4], buffer, data, True)
        except Exception as error:
            self._host.fail(request, error)

    async def answer(self, request: Request) -> None:
        """Answer any READ."""
        length = request[5]
        single = not self._replies.chunked or request[1] & _DF
        if single or length <= self._chunk_max:
            try:
                await self._send_data(request, request[4], length, True)
                return
            except Exception as error:
                if single or self._as_asked or not isinstance(error, OSError):
                    self._host.fail(request, error)
                    return
        await self._answer_in_chunks(request)

    def _stable_places(self, offset: int, length: int) -> list[StablePlace] | None:
        """Where a range can be sent from without a copy; None if it must be read."""
        if length < ZERO_COPY_BYTES_MIN or self._outbox.sendfile is None:
            return None
        return self._node.stable_places(offset, length)

    def _answer_from(self, request: Request, places: list[StablePlace]) -> None:
        """Answer a READ by one chunk, whose data are at hand."""
        header = self._replies.data(request, request[4], request[5], done=True)
        self._put_places(header, places, request[5])

    def _put_places(self, header: bytes, places: list[StablePlace], length: int) -> None:
        """Queue one chunk whose data are sent from where they lie."""
        self._outbox.put(header)
        for place in places:
            self._outbox.put_file(place)
        self._host.note_sendfile(length)
        self._statistics.read_bytes += length

    async def _send_data(self, request: Request, offset: int, length: int, done: bool) -> None:
        """Read into a place in the outbox and queue it as one chunk, or as a simple reply."""
        outbox = self._outbox
        header = self._replies.data(request, offset, length, done=done)
        places = self._stable_places(offset, length)
        if places is not None and await bring_to_hand(places):
            self._put_places(header, places, length)
            return
        buffer, begin = outbox.reserve(len(header) + length)
        data = begin + len(header)
        end = data + length
        try:
            await self._node.read_into(offset, buffer.view[data:end])
        except BaseException:
            outbox.discard(buffer)
            raise
        self._statistics.read_bytes += length
        if length >= SPARSE_BYTES_MIN and self._may_be_sparse(request, buffer.view[data:end]):
            await self._send_sparse(request, offset, buffer, buffer.view[data:end], done)
            return
        buffer.view[begin:data] = header
        outbox.commit(buffer, begin, end)

    def _may_be_sparse(self, request: Request, data: memoryview) -> bool:
        """Whether to ask the node for holes: cheap, and seldom wrong."""
        if self._as_asked or request[1] & _DF or not self._replies.chunked:
            return False
        return ends_in_zeroes(data)

    async def _send_sparse(
        self, request: Request, offset: int, buffer: Buffer, data: memoryview, done: bool
    ) -> None:
        """Queue what was read into a place of ``buffer`` as chunks of data and of holes."""
        position = 0
        try:
            for length, is_zero in await find_holes(self._node, offset, len(data)):
                end = position + length
                place, last = offset + position, done and end == len(data)
                if is_zero:
                    self._outbox.put(self._replies.hole(request, place, length, done=last))
                else:
                    header = self._replies.data(request, place, length, done=last)
                    self._outbox.put(header + data[position:end])
                position = end
        finally:
            self._outbox.discard(buffer)

    async def _answer_in_chunks(self, request: Request) -> None:
        """Answer a READ that is large, or a part of which cannot be read.

        What is good is sent as data. What is bad is halved until it lies in one block of the
        export's preferred size, and then told as an error with its offset.
        """
        parts = [(request.offset, request.offset + request.length)]
        bad_blocks = 0
        while parts and bad_blocks < BAD_BLOCKS_MAX and not self._outbox.is_closed:
            begin, end = parts.pop()
            if end - begin > self._chunk_max:
                parts.append((begin + self._chunk_max, end))
                end = begin + self._chunk_max
            done = not parts and not bad_blocks
            try:
                await self._send_data(request, begin, end - begin, done)
            except OSError as error:
                block_size = end if self._as_asked else self._node.preferred_block_size
                halves = halve(begin, end, block_size)
                if not halves:
                    bad_blocks += 1
                    self._tell_bad_block(request, begin, error)
                parts += halves
            except Exception as error:
                self._host.fail(request, error)
                return
            await self._host.give_way()
        if bad_blocks:
            self._host.succeed(request)

    def _tell_bad_block(self, request: Request, offset: int, error: OSError) -> None:
        told = self._host.explain(request, error)
        self._outbox.put(self._replies.error_at(request, told.error, told.text, offset, done=False))
        self._statistics.errors += 1
