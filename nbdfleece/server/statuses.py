"""Block status: what the contexts say, and what a walk goes on with, found ahead.

A client that walks through a large map asks for the next part only when it has digested the
last, so that it and the server would work in turn. After a reply of many extents the server
therefore looks ahead: when all who wait have had their turn, it finds and packs what comes next,
while the client is busy.

**What may be trusted** (rule 2). What was found ahead is kept with the bits that it was made
from. It is sent only if the request is the one that was foreseen, and if the bitmap has the same
bits then; else it is dropped, and all is as if nobody had looked ahead. So nobody must tell us
that a bitmap has changed. Other contexts cannot be compared: they are asked when the client is.

**What it may cost** (rule 5). Contexts of many extents are searched and packed one in a turn,
those of few several. They may be of different moments within the request, as they are where a
node has to wait: each is told as it is in its turn. A search ahead has a turn for each context, is
of no more of a bitmap than may be kept to compare, and is given up if the client asks anything
else meanwhile. One is under way at a time. What is kept is no more than one reply, until the next
block status of the connection.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Mapping
from typing import Final, NamedTuple

from ..export.contexts import DirtyBitmap, MetadataContext
from ..export.export import Export
from ..extents import Extents
from ..nbd.constants import CommandFlag
from ..nbd.replies import ChunkedReplies, Replies, fit_extents
from ..nbd.requests import Request, StatusQuery
from .buffers import Buffer, BufferPool
from .outbox import Outbox
from .statistics import Statistics

STATUS_EXTENTS_MAX: Final = 1 << 19
"""Extents in one block status reply, all its contexts together: 4 MiB, 8 MiB extended."""

MANY_EXTENTS: Final = 1 << 12
"""So many extents of a context are packed where they are sent from, and worth to look ahead: they
take some 0.1 ms."""

BITS_BYTES_MAX: Final = 1 << 16
"""Bytes of a bitmap that are kept to compare: 32 GiB of a disk at granules of 64 KiB. To compare
so much takes a hundredth of the search."""

_EXTENTS_PER_TURN: Final = 1 << 16
"""So many extents, found and packed, are a turn: 0.2 ms."""

_CONTEXTS_PER_TURN: Final = 4
"""Contexts that one block status searches before the others have their turn, however little it
finds; of more none is searched ahead, lest much is kept."""

_IDLE_BYTES_MAX: Final = 4 << 20
"""Bytes of buffers that wait for the next part of a walk: those of two sizes, that parts of about
one size alternate between."""

_REQ_ONE: Final = int(CommandFlag.REQ_ONE)


class Packed(NamedTuple):
    """Many extents of a context as they are sent: in ``buffer``, whose one user this is.

    ``extent_count`` extents, which describe ``length`` bytes of the disk, take ``size`` bytes.
    """

    extent_count: int
    length: int
    size: int
    buffer: Buffer


Found = tuple[int, Extents | Packed]
"""A context's id, and what it says."""


class Foreseen(NamedTuple):
    """The request that goes on where a reply ended, if it is the client's next."""

    offset: int
    length: int
    context_ids: tuple[int, ...]


class BlockStatuses:
    """The block statuses of one connection.

    Args:
        contexts: The selected contexts by id.
        extents_max: Extents in one chunk, by the limits of the wire.
        export: What they describe.
        statistics: Counts the connection's requests.
        replies: What is packed for the client.
        give_way: Lets the others have their turn.
    """

    def __init__(
        self,
        contexts: Mapping[int, MetadataContext],
        extents_max: int,
        export: Export,
        statistics: Statistics,
        replies: Replies,
        give_way: Callable[[], Awaitable[None]],
    ) -> None:
        self._contexts = contexts
        self._extents_max = min(extents_max, STATUS_EXTENTS_MAX // max(1, len(contexts)))
        self._export = export
        self._statistics = statistics
        self._replies = replies
        self._give_way = give_way
        self._pool = BufferPool(_IDLE_BYTES_MAX)
        """Its own: what is found ahead may have nobody to give its buffer back."""
        self._foreseen: Foreseen | None = None
        self._to_search: list[tuple[int, DirtyBitmap]] = []
        """Contexts by id that are still to be searched for it."""
        self._ahead: dict[int, tuple[bytes, Packed]] = {}
        """What was found for it, by context id, with the bits."""
        self._requests = 0
        """The connection's, up to the one that it was foreseen from."""
        self._is_looking = False
        """Ahead, or waiting for the turn to."""

    async def find(self, request: Request, query: StatusQuery) -> list[Found]:
        """What each context of the query says, from the request's offset on.

        Raises:
            OSError: A node cannot tell.
            SnapshotError: A view is dead.
        """
        extents_max = 1 if request.flags & _REQ_ONE else self._extents_max
        ahead = self._take_ahead(request, query)
        found: list[Found] = []
        turn_left = _EXTENTS_PER_TURN
        for context_id in query.context_ids:
            if turn_left <= 0:
                await self._give_way()
                turn_left = _EXTENTS_PER_TURN
            turn_left -= _EXTENTS_PER_TURN // _CONTEXTS_PER_TURN
            context = self._contexts[context_id]
            bits, packed = ahead.get(context_id, (None, None))
            if packed is not None and _bits(context, request.offset, packed.length) == bits:
                found.append((context_id, packed))
                continue
            extents = await context.extents(request.offset, query.length, extents_max=extents_max)
            fitting = fit_extents(extents, request, query.length, extents_max=extents_max)
            found.append((context_id, self._pack(fitting)))
            turn_left -= len(fitting.lengths)
        return found

    def _take_ahead(self, request: Request, query: StatusQuery) -> dict[int, tuple[bytes, Packed]]:
        """What was found ahead, if for this request; it is kept no longer."""
        ahead, self._ahead = self._ahead, {}
        foreseen, self._foreseen = self._foreseen, None
        self._to_search = []
        asked = Foreseen(request.offset, query.length, query.context_ids)
        return ahead if foreseen == asked and not request.flags & _REQ_ONE else {}

    def put(self, outbox: Outbox, request: Request, found: list[Found]) -> None:
        """Queue one chunk per context, DONE on the last."""
        replies = self._replies
        last = found[-1][0]
        for context_id, each in found:
            done = context_id == last
            if isinstance(each, Extents):
                outbox.put(replies.block_status(request, context_id, each, done=done))
            else:
                assert isinstance(replies, ChunkedReplies), "for others nothing is packed"
                outbox.put(replies.status_head(request, context_id, each.extent_count, done=done))
                outbox.commit(each.buffer, 0, each.size)

    def _pack(self, extents: Extents) -> Extents | Packed:
        """The extents, packed if they are many."""
        count = len(extents.lengths)
        replies = self._replies
        if count < MANY_EXTENTS or not isinstance(replies, ChunkedReplies):
            return extents
        size = count * replies.extent_bytes
        buffer = self._pool.take(size)
        replies.pack_extents(extents, buffer.view[:size])
        return Packed(count, extents.total(), size, buffer)

    def foresee(self, request: Request, query: StatusQuery, found: list[Found]) -> bool:
        """Note what the client goes on with; whether :meth:`look_ahead` is to be started.

        Who has several contexts goes on where the first of them ends, and asks for as much again.
        """
        offset = length = 0
        if max(_count(each) for _, each in found) >= MANY_EXTENTS:
            offset = request.offset + min(_length(each) for _, each in found)
            length = min(query.length, self._export.size - offset)
        if length <= 0:  # below: the disk has become smaller
            if self._pool.idle_bytes:  # the walk is over, or over what was dense
                self._pool = BufferPool(_IDLE_BYTES_MAX)
            return False
        if len(found) > _CONTEXTS_PER_TURN:
            return False
        self._foreseen = Foreseen(offset, length, query.context_ids)
        self._requests = self._statistics.requests
        self._to_search = [
            (context_id, context)
            for context_id in query.context_ids
            if isinstance(context := self._contexts[context_id], DirtyBitmap)
            and offset + length <= context.bitmap.size  # the disk may have grown
        ]
        return bool(self._to_search) and not self._is_looking

    async def look_ahead(self) -> None:
        """Find what was foreseen, in later turns, until the client asks again."""
        self._is_looking = True
        try:
            while self._to_search:
                await self._give_way()
                if self._requests != self._statistics.requests:
                    self._to_search = []
                elif self._to_search:
                    self._search(*self._to_search.pop(0))
        finally:
            self._is_looking = False

    def _search(self, context_id: int, context: DirtyBitmap) -> None:
        """Keep what a context says of what was foreseen, if it can be compared and is worth it."""
        assert self._foreseen is not None, "nothing else is to be searched for"
        offset, length, _ = self._foreseen
        reach = min(length, _reach(context, offset))
        extents = context.bitmap.extents(offset, reach, extents_max=self._extents_max)
        count, total = len(extents.lengths), extents.total()
        is_whole = total < reach or reach == length or count == self._extents_max
        if is_whole and isinstance(packed := self._pack(extents), Packed):
            self._ahead[context_id] = _bits(context, offset, total), packed


def _count(found: Extents | Packed) -> int:
    """How many extents."""
    return found.extent_count if isinstance(found, Packed) else len(found.lengths)


def _length(found: Extents | Packed) -> int:
    """Bytes of the disk that they describe."""
    return found.length if isinstance(found, Packed) else found.total()


def _bits(context: MetadataContext, offset: int, length: int) -> bytes:
    """All that the extents of the range are made from."""
    assert isinstance(context, DirtyBitmap), "only what can be compared is found ahead"
    return bytes(context.bitmap.bits_of(offset, length))


def _reach(context: DirtyBitmap, offset: int) -> int:
    """From the offset on, the bytes of the disk whose bits may be kept."""
    disk_bytes = 8 * context.bitmap.granularity  # of a byte of the bitmap
    return (offset // disk_bytes + BITS_BYTES_MAX) * disk_bytes - offset
