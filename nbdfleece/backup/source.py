"""An export to pull from: its connections, and what it says about its content."""

from __future__ import annotations

from typing import Final

import numpy as np

from ..errors import UsageError
from ..extents import Extents
from .block_status import ALLOCATION, DIRTY, DIRTY_PREFIX, merge, walk
from .connection import (
    TIMEOUT_SECONDS,
    Connection,
    ConnectOptions,
    connect,
    offered_contexts,
)
from .errors import ServerError
from .tasks import gather

CONNECTIONS_DEFAULT: Final = 4
"""More than two or three gain little; the fourth hides the slowest."""

READ_BYTES_MAX: Final = 1 << 20
"""One read: large enough that its cost is that of its bytes, small enough to spread."""


class Source:
    """An export that is read. Made by :meth:`open`.

    Attributes:
        uri: Where it is.
        size: Bytes of the disk.
        export_name: As the server calls it.
        description: The export's description, "" if it has none.
        contexts: The metadata contexts that were negotiated.
    """

    def __init__(self, uri: str, connections: list[Connection], contexts: tuple[str, ...]) -> None:
        first = connections[0]
        self.uri = uri
        self.size = first.size
        self.export_name = first.export_name
        self.description = first.description
        self.contexts = contexts
        self._connections = connections
        self._read_bytes_max = min(READ_BYTES_MAX, first.request_bytes_max)

    @classmethod
    async def open(
        cls,
        uri: str,
        *,
        dirty_bitmap: str | None = None,
        connections: int = CONNECTIONS_DEFAULT,
        timeout_seconds: float | None = TIMEOUT_SECONDS,
    ) -> Source:
        """Connect, and negotiate what there is to know.

        Args:
            uri: The export.
            dirty_bitmap: The context that tells what has changed, by its full name
                (``qemu:dirty-bitmap:NAME``); None to pull everything.
            connections: How many at most; a server that does not promise that they all see
                the same (NBD_FLAG_CAN_MULTI_CONN) gets one.
            timeout_seconds: How long the server may be silent while it owes answers; None for
                ever.

        Raises:
            ServerError: There is no server, or it does not offer the bitmap.
            UsageError: libnbd is missing, or ``dirty_bitmap`` is none.
        """
        if dirty_bitmap is not None and not dirty_bitmap.startswith(DIRTY_PREFIX):
            raise UsageError(f"{dirty_bitmap!r} is not a dirty bitmap: {DIRTY_PREFIX}NAME is")
        wanted = (ALLOCATION,) if dirty_bitmap is None else (ALLOCATION, dirty_bitmap)
        first = await connect(uri, ConnectOptions(wanted, True, timeout_seconds))
        opened = [first]
        try:
            contexts = tuple(name for name in wanted if first.has_context(name))
            if dirty_bitmap is not None and dirty_bitmap not in contexts:
                raise ServerError(f"{uri}: the server does not offer {dirty_bitmap!r}")
            extra = connections - 1 if first.can("multi_conn") else 0
            for _ in range(extra):
                options = ConnectOptions(timeout_seconds=timeout_seconds)
                opened.append(await connect(uri, options))
                _check_same_size(first, opened[-1])
        except BaseException:
            for connection in opened:
                connection.close()
            raise
        return cls(uri, opened, contexts)

    @property
    def connection_count(self) -> int:
        """How many connections there are."""
        return len(self._connections)

    async def extents(self) -> Extents:
        """What of the disk is dirty and what is zero, merged from both contexts.

        Without a bitmap everything is dirty; without base:allocation nothing is known to
        be zero.

        Returns:
            Extents of :data:`~nbdfleece.backup.block_status.DIRTY` and ``ZERO`` bits that
            together are ``size`` bytes; none for a disk of no bytes.

        Raises:
            ServerError: The server fails, or says what cannot be true.
        """
        if not self.size:
            return Extents.from_pairs([])
        found = await walk(self._connections[0], self.uri, self.size, self.contexts)
        nothing = Extents.single(self.size, 0)
        dirty = Extents.single(self.size, DIRTY)
        for context, extents in found.items():
            if context.startswith(DIRTY_PREFIX):
                dirty = extents
        return merge(found.get(ALLOCATION, nothing), dirty)

    async def context(self, name: str) -> Extents:
        """What one negotiated context says of the whole disk, just as the server does."""
        if not self.size:
            return Extents.from_pairs([])
        return (await walk(self._connections[0], self.uri, self.size, self.contexts))[name]

    async def read_into(self, offset: int, view: memoryview) -> None:
        """Fill ``view`` from ``offset`` on, in several reads side by side if it is large.

        Raises:
            ServerError: A read failed; ``view`` holds anything.
        """
        step = self._read_bytes_max
        if len(view) <= step:
            await self._idlest().read_into(offset, view)
            return
        await gather(
            self._idlest().read_into(offset + start, view[start : start + step])
            for start in range(0, len(view), step)
        )

    def _idlest(self) -> Connection:
        """The connection with the fewest commands under way."""
        return min(self._connections, key=lambda connection: connection.in_flight)

    async def close(self) -> None:
        """Disconnect."""
        for connection in self._connections:
            connection.disconnect()


async def offered_bitmaps(
    uri: str, *, timeout_seconds: float | None = TIMEOUT_SECONDS
) -> list[str]:
    """The names of the dirty bitmaps that an export offers, without the context's prefix.

    Raises:
        ServerError: There is no server, no such export, no way to ask, or no answer.
    """
    names = await offered_contexts(uri, (DIRTY_PREFIX,), timeout_seconds=timeout_seconds)
    return [name.removeprefix(DIRTY_PREFIX) for name in names if name.startswith(DIRTY_PREFIX)]


def read_as_dirty_from(extents: Extents, offset: int) -> Extents:
    """The same description with everything from ``offset`` on dirty.

    A disk that has grown since the bitmap began: QEMU leaves what is new clean there.
    """
    ends = np.cumsum(extents.lengths)
    if not len(ends) or offset >= ends[-1]:
        return extents
    head = extents.clipped(offset) if offset else Extents.from_pairs([])
    index = int(np.searchsorted(ends, offset, side="right"))
    lengths = extents.lengths[index:].copy()
    lengths[0] = ends[index] - offset
    return Extents.concatenate([head, Extents(lengths, extents.status[index:] | np.uint32(DIRTY))])


def _check_same_size(first: Connection, other: Connection) -> None:
    if first.size != other.size:
        raise ServerError(f"{first.uri}: two connections see {first.size} and {other.size} bytes")
