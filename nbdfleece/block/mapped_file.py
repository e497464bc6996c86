"""A disk's bytes, read by another process where the disk's clusters lie in its file."""

from __future__ import annotations

import asyncio
import contextlib
import errno
from collections import OrderedDict
from collections.abc import Awaitable, Callable
from functools import partial
from typing import Final

from ..errors import SnapshotError
from .file import FileNode
from .host_file import BELOW, ELSEWHERE, ZEROES, Places
from .node import BlockNode, readable_part
from .single_flight import SingleFlight

CACHE_CLUSTERS: Final = 4 << 20
"""Clusters of a disk whose places are kept: 32 MiB, for 256 GiB at clusters of 64 KiB."""


class MappedFile:
    """The bytes of a disk, read from a file where the disk's clusters are said to lie.

    Args:
        file: The file, which others write and let grow.
        size: Bytes of the disk.
        cluster_bits, map_bits: As in :class:`~.host_file.HostFile`.
        locate: As :meth:`~.node.BlockNode.locate` of the disk.
        below: What is below the file, in this process.
    """

    def __init__(
        self,
        file: FileNode,
        size: int,
        cluster_bits: int,
        map_bits: int,
        locate: Callable[[int], Awaitable[Places]],
        below: BlockNode | None,
    ) -> None:
        self._file = file
        self._cluster_bits = cluster_bits
        self._map_bits = map_bits
        self._locate = locate
        self._below = below
        self._parts: OrderedDict[int, memoryview] = OrderedDict()
        self._parts_end = (size - 1 >> map_bits) + 1
        self._parts_max = max(2, CACHE_CLUSTERS >> map_bits - cluster_bits)
        self._locating = SingleFlight()
        self._ahead: asyncio.Task[None] | None = None
        self._ahead_part = 0
        """The last one that was located, or should have been, before anybody read of it."""

    def read_at_once(self, offset: int, view: memoryview) -> bool:
        """Fill ``view`` if places are known and the bytes are at hand; else it holds anything."""
        end = offset + len(view)
        for number in range(offset >> self._map_bits, (end - 1 >> self._map_bits) + 1):
            if number not in self._parts:
                return False
            if number + 1 not in self._parts:
                self._look_ahead(number)
        pieces = self._pieces(offset, end)
        if len(pieces) == 1 and pieces[0][0] < ZEROES:
            return self._file.read_at_once(pieces[0][0], view)
        stored = []
        for place, length in pieces:
            piece, view = view[:length], view[length:]
            if place < ZEROES:
                stored.append((place, piece))
            elif place == ELSEWHERE:
                return False
            else:
                below = self._below if place == BELOW else None
                part = readable_part(below, offset, piece)
                if below is not None and part and not below.read_at_once(offset, part):
                    return False
            offset += length
        return self._file.read_pieces_at_once(stored)

    async def read_into(self, offset: int, view: memoryview) -> None:
        """Fill ``view`` with the bytes from ``offset`` on.

        Raises:
            OSError: ENODATA: some of them lie elsewhere; or they could not be read, or located.
        """
        while len(view):
            number = offset >> self._map_bits
            end = min(offset + len(view), number + 1 << self._map_bits)
            while number not in self._parts:
                await self._locating.run(number, partial(self._load, number))
            for place, length in self._pieces(offset, end):
                piece, view = view[:length], view[length:]
                if place < ZEROES:
                    await self._file.read_into(place, piece)
                elif place == ELSEWHERE:
                    raise OSError(errno.ENODATA, "not in the disk's file")
                else:
                    below = self._below if place == BELOW else None
                    part = readable_part(below, offset, piece)
                    if below is not None and part:
                        await below.read_into(offset, part)
                offset += length

    def _look_ahead(self, number: int) -> None:
        """Have the part after one located while that one is read, for who goes from part to part.

        That is who has come from the part before. Who jumps about would be told in vain.
        """
        following = number + 1
        if following in (self._ahead_part, self._parts_end):
            return
        is_busy = self._ahead is not None and not self._ahead.done()
        if not is_busy and (number == 0 or number - 1 in self._parts):
            self._ahead_part = following
            self._ahead = asyncio.create_task(self._locate_ahead(following))

    async def _locate_ahead(self, number: int) -> None:
        if number in self._parts:
            return
        with contextlib.suppress(OSError, SnapshotError):  # told to who reads of it
            await self._locating.run(number, partial(self._load, number))

    async def close(self) -> None:
        """Ask for nothing any more."""
        if self._ahead is not None:
            self._ahead.cancel()
            await asyncio.wait([self._ahead])

    async def _load(self, number: int) -> None:
        """Have a part located, and forget the one that has been known for longest."""
        places = await self._locate(number)
        if len(self._parts) >= self._parts_max:
            self._parts.popitem(last=False)
        self._parts[number] = places.data

    def _pieces(self, offset: int, end: int) -> list[tuple[int, int]]:
        """``(place, length)`` of what lies in one piece, or nowhere, of a range that is located."""
        bits, part_bits = self._cluster_bits, self._map_bits - self._cluster_bits
        pieces: list[tuple[int, int]] = []
        following = -1
        while offset < end:
            cluster = offset >> bits
            length = min(end, cluster + 1 << bits) - offset
            place = self._parts[cluster >> part_bits][cluster & (1 << part_bits) - 1]
            if place < ZEROES:
                place += offset & (1 << bits) - 1
            if place == following:
                pieces[-1] = pieces[-1][0], pieces[-1][1] + length
            else:
                pieces.append((place, length))
            following = place + length
            offset += length
        return pieces
