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
    lead = offset & (1 << shift) - 1
    untouched = codes.count(UNTOUCHED)
    is_whole = untouched * _WHOLE_SHARE >= len(codes) and await _read_whole(base, offset, view)
    copied = []
    for code, start, stop in _runs(codes):
        begin = max(0, (start << shift) - lead)
        part = view[begin : (stop << shift) - lead]
        if code >= COPIED:
            copied.append((code - COPIED, begin + lead - (start << shift), part))
        elif code != UNTOUCHED:
            part[:] = bytes(len(part))
        elif not is_whole:
            await base.read_into(offset + begin, part)
    await scratch.read_pieces(copied)


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
