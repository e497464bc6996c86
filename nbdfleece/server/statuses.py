"""Block status: what the contexts say, and what a walk goes on with, found ahead.

A client that walks through a large map asks for the next part only when it has digested the
last, so that it and the server would work in turn. After a reply of many extents the server
therefore looks ahead: when all who wait have had their turn, it finds and packs what comes next,
while the client is busy.

**What may be trusted** (rule 2). What was found ahead is kept with the bits that it was made
from. It is sent only if the request is the one that was foreseen, and if the bitmap has the same
bits then; else it is dropped, and all is as if nobody had looked ahead. So nobody must tell us
that a bitmap has changed. Other contexts cannot be compared: they are asked when the client is.

**What it may cost** (rule 5). A search ahead is a turn like any other: of no more contexts than
a block status searches in one, and of no more of a bitmap than may be kept to compare. One
waits at a time, and it is given up if the client asks anything else meanwhile. What is kept is
no more than one reply, until the next block status of the connection.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Iterator, Mapping
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

_CONTEXTS_PER_TURN: Final = 4
"""Contexts that one block status searches before the others have their turn."""

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
    """

    def __init__(
        self,
        contexts: Mapping[int, MetadataContext],
        extents_max: int,
        export: Export,
        statistics: Statistics,
    ) -> None:
        self._contexts = contexts
        self._extents_max = min(extents_max, STATUS_EXTENTS_MAX // max(1, len(contexts)))
        self._export = export
        self._statistics = statistics
        self._pool = BufferPool(_IDLE_BYTES_MAX)
        """Its own: what is found ahead may have nobody to give its buffer back."""
        self._foreseen: Foreseen | None = None
        self._ahead: dict[int, tuple[bytes, Packed]] = {}
        """By context id, with the bits; for what was foreseen."""
        self._requests = 0
        """The connection's, up to the one that it was foreseen from."""
        self._is_waiting = False
        """For the turn in which to look ahead."""

    async def find(self, request: Request, query: StatusQuery) -> list[Found]:
        """What each context of the query says, from the request's offset on.

        Raises:
            OSError: A node cannot tell.
            SnapshotError: A view is dead.
        """
        extents_max = 1 if request.flags & _REQ_ONE else self._extents_max
        ahead = self._take_ahead(request, query)
        found: list[Found] = []
        for context_id in query.context_ids:
            if found and len(found) % _CONTEXTS_PER_TURN == 0:
                await asyncio.sleep(0)
            context = self._contexts[context_id]
            bits, packed = ahead.get(context_id, (None, None))
            if packed is not None and _bits(context, request.offset, packed.length) == bits:
                found.append((context_id, packed))
                continue
            extents = await context.extents(request.offset, query.length, extents_max=extents_max)
            fitting = fit_extents(extents, request, query.length, extents_max=extents_max)
            found.append((context_id, fitting))
        return found

    def _take_ahead(self, request: Request, query: StatusQuery) -> dict[int, tuple[bytes, Packed]]:
        """What was found ahead, if for this request; it is kept no longer."""
        ahead, self._ahead = self._ahead, {}
        foreseen, self._foreseen = self._foreseen, None
        asked = Foreseen(request.offset, query.length, query.context_ids)
        return ahead if foreseen == asked and not request.flags & _REQ_ONE else {}

    def put(self, outbox: Outbox, replies: Replies, request: Request, found: list[Found]) -> None:
        """Queue one chunk per context, DONE on the last."""
        last = found[-1][0]
        for context_id, each in found:
            done = context_id == last
            if isinstance(replies, ChunkedReplies) and _count(each) >= MANY_EXTENTS:
                packed = each if isinstance(each, Packed) else self._pack(replies, each)
                outbox.put(replies.status_head(request, context_id, packed.extent_count, done=done))
                outbox.commit(packed.buffer, 0, packed.size)
            else:
                assert isinstance(each, Extents)
                outbox.put(replies.block_status(request, context_id, each, done=done))

    def _pack(self, replies: ChunkedReplies, extents: Extents) -> Packed:
        count = len(extents.lengths)
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
        return not self._is_waiting

    async def look_ahead(self, replies: Replies, turn: Awaitable[None]) -> None:
        """Find what was foreseen in a later turn, unless the client has asked again by then."""
        self._is_waiting = True
        try:
            await turn
        finally:
            self._is_waiting = False
        if self._foreseen is None or self._requests != self._statistics.requests:
            return
        if isinstance(replies, ChunkedReplies):
            self._ahead = dict(self._search(replies, self._foreseen))

    def _search(
        self, replies: ChunkedReplies, foreseen: Foreseen
    ) -> Iterator[tuple[int, tuple[bytes, Packed]]]:
        """What was foreseen, as far as it can be compared and is worth it."""
        for context_id in foreseen.context_ids:
            context = self._contexts[context_id]
            offset, length = foreseen.offset, foreseen.length
            if not isinstance(context, DirtyBitmap) or offset + length > context.bitmap.size:
                continue  # the disk may have grown
            reach = min(length, _reach(context, offset))
            extents = context.bitmap.extents(offset, reach, extents_max=self._extents_max)
            count, total = len(extents.lengths), extents.total()
            is_whole = total < reach or reach == length or count == self._extents_max
            if is_whole and count >= MANY_EXTENTS:
                yield context_id, (_bits(context, offset, total), self._pack(replies, extents))


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
