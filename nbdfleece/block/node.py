"""The one interface of the block layer: what every block node can do.

A block node is a linear array of bytes: a raw file, a qcow2 image, a filter
that copies before it writes, the view of a snapshot. Nodes know nothing of NBD.

**Coroutines that do not wait.** All data methods are coroutines, and on the hot
path they finish without suspending: page-cached bytes are read and written
inline, and only what would block is handed to a thread and awaited. A caller
may therefore start the coroutine with ``send(None)`` and use its result at
once, without a task (:mod:`nbdfleece.server.eager` does). For this to hold, a
node never awaits anything merely for fairness, and never relies on
``asyncio.current_task()``.

**At once.** A coroutine per layer is a third of what a cached 4 KiB read or write costs. So
nodes may have :meth:`BlockNode.read_at_once` and :meth:`BlockNode.write_at_once`: plain
functions for the usual case, which leave every other case to the coroutines. A node that
overrides ``read_into`` or ``write`` of a class that has them overrides them, too.

**Errors** are ``OSError`` with the right ``errno``; a view that is dead raises
:class:`~nbdfleece.errors.SnapshotError`. Callers check ranges before they call:
``0 <= offset`` and ``offset + length <= size``.

**Ranges** are bytes, of any alignment, never empty.
"""

from __future__ import annotations

import errno
from abc import ABC, abstractmethod
from enum import IntFlag
from typing import Final

import numpy as np

from ..extents import Extents, Status
from .host_file import HostFile, Places
from .stable import StablePlace


class BlockStatus(IntFlag):
    """The low bits of a node's block status; the depth lies above, see :func:`allocation_depth`."""

    DATA = 0
    HOLE = 1
    """Writing here needs new space on the host."""
    ZERO = 2
    """Reads as zeroes."""


DEPTH_SHIFT: Final = 8
"""Bits of a status below the allocation depth."""


def block_status_word(flags: BlockStatus, depth: int) -> int:
    """Pack flags and allocation depth into one status word.

    Args:
        flags: How the range reads and whether it has space.
        depth: 0 unallocated everywhere, 1 in this layer, 2 in its backing file, and so on.
    """
    return int(flags) | depth << DEPTH_SHIFT


def allocation_flags(status: Status) -> Status:
    """The HOLE and ZERO bits of status words of shape (n,)."""
    return status & np.uint32(BlockStatus.HOLE | BlockStatus.ZERO)


def allocation_depth(status: Status) -> Status:
    """The allocation depths of status words of shape (n,)."""
    return status >> np.uint32(DEPTH_SHIFT)


class BlockNode(ABC):
    """A linear array of bytes that can be read, perhaps written, and described."""

    size: int
    """Bytes; any number, not only multiples of a sector."""
    read_only: bool
    """Writing methods raise ``OSError(EPERM)``, or are never called."""
    preferred_block_size: int = 4096
    """Bytes, a power of two: what reads and writes are best aligned to."""
    reads_as_asked: bool = False
    """A READ is one :meth:`read_into` of its range: nothing is asked again in smaller parts to
    find what is bad, and no block status to find what is a hole."""

    @abstractmethod
    async def read_into(self, offset: int, view: memoryview) -> None:
        """Fill ``view`` with the ``len(view)`` bytes from ``offset`` on.

        Raises:
            OSError: The bytes could not be read; ``view`` holds anything.
        """

    def read_at_once(self, offset: int, view: memoryview) -> bool:
        """Read as :meth:`read_into`, if that is possible without waiting.

        Returns:
            Whether ``view`` is filled; if not it holds anything, and :meth:`read_into` will do.

        Raises:
            OSError: The bytes could not be read; :meth:`read_into` will say so as well.
        """
        return False

    @abstractmethod
    async def block_status(
        self, offset: int, length: int, *, extents_max: int = 1 << 20
    ) -> Extents:
        """Describe the range by status words (:class:`BlockStatus` and depth).

        Returns:
            At least one extent, adjacent equal ones merged. The extents begin at
            ``offset``, never reach past ``offset + length``, and may end before it
            (after ``extents_max`` extents, or where going on would be expensive).
        """

    def read_with_status(self, offset: int, view: memoryview) -> int | None:
        """Status and content of a small range, if that needs no waiting.

        Returns:
            The status word that all of the range has, with ``view`` filled unless it says
            ZERO. None only means that :meth:`block_status` and :meth:`read_into` must be
            asked; ``view`` then holds anything.

        Raises:
            OSError: The bytes could not be read.
        """
        return None

    def stable_places(self, offset: int, length: int) -> list[StablePlace] | None:
        """Where the whole range lies, piece by piece, in files that nobody can overwrite.

        None if it does not, or in so many pieces that it had better be read.
        """
        return None

    def host_file(self) -> HostFile | None:
        """The file where the data lie; None if other processes could not read them there."""
        return None

    async def locate(self, part: int) -> Places:
        """Where the clusters of one of the parts of :meth:`host_file` lie.

        Raises:
            OSError: That could not be read.
        """
        raise OSError(errno.ENOTSUP, "the node's data are in no file")

    async def write(self, offset: int, data: memoryview) -> None:
        """Write ``data`` at ``offset``; on return reads see it, on :meth:`flush` it is durable.

        ``data`` is not kept beyond the return and may then be overwritten by the caller.
        """
        raise PermissionError(1, "the node is read-only")

    def write_at_once(self, offset: int, data: memoryview) -> bool:
        """Write as :meth:`write`, if that is possible without waiting.

        Returns:
            Whether it is written; if not, the disk is as it was, and :meth:`write` will do.

        Raises:
            OSError: As :meth:`write`.
        """
        return False

    async def write_zeroes(
        self, offset: int, length: int, *, unmap: bool = True, fast: bool = False
    ) -> None:
        """Make the range read as zeroes.

        Args:
            offset: Where, in bytes.
            length: How much, in bytes.
            unmap: The space on the host may be given up; without it the range stays (or
                becomes) provisioned.
            fast: Raise ``OSError(ENOTSUP)``, with nothing changed, if this would be no
                faster than writing zeroes as data.
        """
        raise PermissionError(1, "the node is read-only")

    async def trim(self, offset: int, length: int) -> None:
        """Give up the range's content; whole clusters inside it become holes, the rest may stay."""
        raise PermissionError(1, "the node is read-only")

    async def flush(self) -> None:
        """Make everything durable that was written before this call.

        Raises:
            OSError: It may not be durable; the node stays usable.
        """

    # FUA: as the methods without it, and durable on return. A node overrides them if it can do
    # better than to flush everything.

    async def write_fua(self, offset: int, data: memoryview) -> None:
        """Write ``data`` at ``offset``, durably."""
        await self.write(offset, data)
        await self.flush()

    async def write_zeroes_fua(
        self, offset: int, length: int, *, unmap: bool = True, fast: bool = False
    ) -> None:
        """Make the range read as zeroes, durably."""
        await self.write_zeroes(offset, length, unmap=unmap, fast=fast)
        await self.flush()

    async def trim_fua(self, offset: int, length: int) -> None:
        """Give up the range's content, durably."""
        await self.trim(offset, length)
        await self.flush()

    async def cache(self, offset: int, length: int) -> None:
        """Hint that the range will be read soon."""

    @abstractmethod
    async def close(self) -> None:
        """Flush what is writable and give up files and locks; the node is unusable afterwards."""


def readable_part(below: BlockNode | None, offset: int, view: memoryview) -> memoryview:
    """What of a range's view is to be read from what lies below; the rest is past its end: zeroed.

    Args:
        below: A backing file, which may be shorter than what is over it; None for nothing.
        offset: Where the range begins.
        view: Its bytes.
    """
    length = 0 if below is None else max(0, min(len(view), below.size - offset))
    view[length:] = bytes(len(view) - length)
    return view[:length]
