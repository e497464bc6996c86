"""Reading a range some granules of which lie elsewhere: in a scratch, or nowhere at all.

Codes are lists here and not arrays: a request has some dozen granules, and numpy's calls
would cost more than a loop over them.
"""

from __future__ import annotations

import errno
from collections.abc import Iterator, Sequence
from typing import Final, Protocol

from .granule_codes import COPIED, FORGOTTEN, UNTOUCHED

_WHOLE_SHARE: Final = 4
"""The base is read in one piece if one of so many granules lies there, at least."""


class Base(Protocol):
    """What has the granules that lie where they were; as :class:`~.node.BlockNode` reads."""

    async def read_into(self, offset: int, view: memoryview) -> None:
        """Fill ``view`` from ``offset`` on."""

    def read_at_once(self, offset: int, view: memoryview) -> bool:
        """The same, if that needs no waiting; whether it was done."""


class Copies(Protocol):
    """What has the others; as :class:`~.file.FileNode` reads."""

    async def read_pieces(self, pieces: Sequence[tuple[int, memoryview]]) -> None:
        """Fill several views, each from so many bytes after the beginning on."""

    def read_pieces_at_once(self, pieces: Sequence[tuple[int, memoryview]]) -> bool:
        """The same, if that needs no waiting; whether it was done."""


def read_granules_at_once(
    base: Base, scratch: Copies, codes: list[int], shift: int, offset: int, view: memoryview
) -> bool:
    """As :func:`read_granules`, if the base is read in one piece and nothing need be waited for.

    Returns:
        Whether the view is filled; if not it holds anything, and :func:`read_granules` will do.

    Raises:
        OSError: The base could not be read.
    """
    if not _is_read_whole(codes) or FORGOTTEN in codes or not base.read_at_once(offset, view):
        return False
    displaced = _displaced_runs(codes)
    return scratch.read_pieces_at_once(_copies(codes, displaced, shift, offset, view))


async def read_granules(
    base: Base, scratch: Copies, codes: list[int], shift: int, offset: int, view: memoryview
) -> None:
    """Fill a view from where its granules lie.

    Unless nearly all is displaced, the base is read in one piece and what was displaced is
    put over it: to copy some KiB too many costs less than a read for every gap.

    Args:
        base: What has the UNTOUCHED granules.
        scratch: What has the COPIED ones.
        codes: Of all granules that the range touches.
        shift: Bits of an offset within a granule.
        offset: Where the range begins in ``base``.
        view: Its bytes, to be filled.

    Raises:
        OSError: EACCES: one of the granules was FORGOTTEN; or as reading raised it.
    """
    if FORGOTTEN in codes:
        raise OSError(errno.EACCES, "the range was released and has been overwritten")
    displaced = _displaced_runs(codes)
    if not _is_read_whole(codes) or not await _read_whole(base, offset, view):
        for begin, end in _between(displaced, len(codes), shift, offset, len(view)):
            await base.read_into(offset + begin, view[begin:end])
    await scratch.read_pieces(_copies(codes, displaced, shift, offset, view))


def _is_read_whole(codes: list[int]) -> bool:
    return codes.count(UNTOUCHED) * _WHOLE_SHARE >= len(codes)


async def _read_whole(base: Base, offset: int, view: memoryview) -> bool:
    """Read the range from the base; False if some of it, which may be displaced, is bad."""
    try:
        await base.read_into(offset, view)
    except OSError:
        return False
    return True


def _displaced_runs(codes: list[int]) -> list[tuple[int, int]]:
    """``(start, stop)`` of displaced granules that can be read together."""
    found = []
    start = stop = following = 0
    for number, code in enumerate(codes):
        if code == UNTOUCHED:
            continue
        if number != stop or code != following:
            if stop:
                found.append((start, stop))
            start = number
        stop = number + 1
        following = code + (code >= COPIED)
    if stop:
        found.append((start, stop))
    return found


def _copies(
    codes: list[int], displaced: list[tuple[int, int]], shift: int, offset: int, view: memoryview
) -> list[tuple[int, memoryview]]:
    """What of the view is to be read from the scratch, and where it lies there in bytes.

    What reads as zeroes is zeroed.
    """
    lead = offset & (1 << shift) - 1
    copies = []
    for start, stop in displaced:
        begin = max(0, (start << shift) - lead)
        part = view[begin : (stop << shift) - lead]
        code = codes[start]
        if code >= COPIED:
            copies.append((((code - COPIED - start) << shift) + begin + lead, part))
        else:
            part[:] = bytes(len(part))
    return copies


def _between(
    displaced: list[tuple[int, int]], count: int, shift: int, offset: int, length: int
) -> Iterator[tuple[int, int]]:
    """``(begin, end)`` in bytes from ``offset`` on of what lies between displaced granules."""
    lead = offset & (1 << shift) - 1
    before = 0
    for start, stop in [*displaced, (count, count)]:
        if start > before:
            yield max(0, (before << shift) - lead), min(length, (start << shift) - lead)
        before = stop
