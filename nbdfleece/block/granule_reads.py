"""Reading a range some granules of which lie elsewhere: in a scratch, or nowhere at all.

Codes are lists here and not arrays: a request has some dozen granules, and numpy's calls
would cost more than a loop over them.
"""

from __future__ import annotations

import errno
from collections.abc import Iterator
from typing import Final

from .granule_codes import COPIED, FORGOTTEN, UNTOUCHED
from .node import BlockNode
from .scratch import Scratch

_WHOLE_SHARE: Final = 4
"""The base is read in one piece if one of so many granules lies there, at least."""


def read_granules_at_once(
    base: BlockNode, scratch: Scratch, codes: list[int], shift: int, offset: int, view: memoryview
) -> bool:
    """As :func:`read_granules`, if the base is read in one piece and nothing need be waited for.

    Returns:
        Whether the view is filled; if not it holds anything, and :func:`read_granules` will do.

    Raises:
        OSError: The base could not be read.
    """
    if not _is_read_whole(codes) or FORGOTTEN in codes or not base.read_at_once(offset, view):
        return False
    copied, _ = _place_displaced(codes, shift, offset, view)
    return scratch.read_pieces_at_once(copied)


async def read_granules(
    base: BlockNode, scratch: Scratch, codes: list[int], shift: int, offset: int, view: memoryview
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
    is_whole = _is_read_whole(codes) and await _read_whole(base, offset, view)
    copied, untouched = _place_displaced(codes, shift, offset, view)
    if not is_whole:
        for begin, part in untouched:
            await base.read_into(offset + begin, part)
    await scratch.read_pieces(copied)


def _is_read_whole(codes: list[int]) -> bool:
    return codes.count(UNTOUCHED) * _WHOLE_SHARE >= len(codes)


def _place_displaced(
    codes: list[int], shift: int, offset: int, view: memoryview
) -> tuple[list[tuple[int, int, memoryview]], list[tuple[int, memoryview]]]:
    """Zero what reads as zeroes.

    Returns:
        What is to be read from the scratch, for :meth:`Scratch.read_pieces`, and what from the
        base: ``(bytes from offset on, part of the view)``.
    """
    lead = offset & (1 << shift) - 1
    copied = []
    untouched = []
    for code, start, stop in _runs(codes):
        begin = max(0, (start << shift) - lead)
        part = view[begin : (stop << shift) - lead]
        if code >= COPIED:
            copied.append((code - COPIED, begin + lead - (start << shift), part))
        elif code != UNTOUCHED:
            part[:] = bytes(len(part))
        else:
            untouched.append((begin, part))
    return copied, untouched


async def _read_whole(base: BlockNode, offset: int, view: memoryview) -> bool:
    """Read the range from the base; False if some of it, which may be displaced, is bad."""
    try:
        await base.read_into(offset, view)
    except OSError:
        return False
    return True


def _runs(codes: list[int]) -> Iterator[tuple[int, int, int]]:
    """``(code of the first, start, stop)`` of granules that can be read together."""
    first, start, following, step = codes[0], 0, codes[0], int(codes[0] >= COPIED)
    for number, code in enumerate(codes):
        if code == following:
            following += step
            continue
        yield first, start, number
        first, start, step = code, number, int(code >= COPIED)
        following = code + step
    yield first, start, len(codes)
