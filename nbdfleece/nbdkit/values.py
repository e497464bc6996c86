"""What callbacks may return, taken as nbdkit takes it; all else is refused with its reason.

All functions raise ``ValueError`` or ``TypeError``.
"""

from __future__ import annotations

import errno
from collections.abc import Iterable
from typing import Any, Final

Pairs = list[tuple[int, int]]
"""Lengths and types of consecutive extents."""

STRING_BYTES_MAX: Final = 4096
_SIZE_END: Final = 1 << 63
_U32_MAX: Final = (1 << 32) - 1
_MINIMUM_MAX: Final = 64 << 10
_PREFERRED_RANGE: Final = (512, 32 << 20)
_TYPE_MASK: Final = 3


class NothingCoveredError(ValueError):
    """Extents miss the range that they were asked for: nbdkit tells clients EINVAL."""

    errno = errno.EINVAL


def check_true(value: object) -> bool:
    """True alone is true: not 1, not "yes"."""
    return value is True


def check_int(value: object) -> int:
    """A plain number."""
    if not isinstance(value, int):
        raise TypeError(f"must return a number, not {type(value).__name__}")
    return int(value)


def check_level(value: object) -> int:
    """One of NONE, EMULATE and NATIVE."""
    number = check_int(value)
    if not 0 <= number <= 2:
        raise ValueError(f"{number} is none of nbdkit's constants")
    return number


def check_size(value: object) -> int:
    """A disk's size in bytes."""
    size = check_int(value)
    if not 0 <= size < _SIZE_END:
        raise ValueError(f"invalid size {size}")
    return size


def check_text(value: object) -> str:
    """A string for clients."""
    if isinstance(value, bytes):
        value = value.decode()
    if not isinstance(value, str):
        raise TypeError("method did not return a string")
    return value


def fits_the_wire(text: str) -> bool:
    """Whether a string is short enough, and has no NUL."""
    return len(text.encode()) <= STRING_BYTES_MAX and "\0" not in text


def check_exports(value: Iterable[Any]) -> list[tuple[str, str]]:
    """Names and descriptions."""
    exports = []
    for item in _iterate("list_exports", value):
        if isinstance(item, str | bytes):
            item = item, ""
        if not isinstance(item, tuple) or len(item) != 2:
            raise TypeError("list_exports method did not return an iterable of 2-tuples")
        name, description = map(check_text, item)
        if not fits_the_wire(name) or not fits_the_wire(description):
            raise ValueError(f"list_exports: a name or description is too long: {name[:80]!r}")
        exports.append((name, description))
    return exports


def check_names(value: Iterable[Any]) -> list[str]:
    """Names of metadata contexts."""
    return [check_text(name) for name in _iterate("contexts", value)]


def check_block_size(value: object) -> tuple[int, int, int] | None:
    """Minimum, preferred and maximum; None if nothing is known."""
    if not isinstance(value, tuple) or len(value) != 3:
        raise TypeError("must return a tuple (minimum, preferred, maximum)")
    minimum, preferred, maximum = map(check_int, value)
    if minimum == preferred == maximum == 0:
        return None
    least, most = _PREFERRED_RANGE
    if not 1 <= minimum <= _MINIMUM_MAX or not _is_power_of_two(minimum):
        raise ValueError("plugin must set minimum block size to a power of 2 between 1 and 64K")
    if not least <= preferred <= most or not _is_power_of_two(preferred):
        raise ValueError("plugin must set preferred block size to a power of 2 from 512 to 32M")
    if not minimum <= preferred <= maximum <= _U32_MAX:
        raise ValueError("plugin must set minimum block size <= preferred <= maximum")
    if maximum != _U32_MAX and maximum % minimum:
        raise ValueError("plugin must set maximum block size to -1 or a multiple of minimum")
    return minimum, preferred, maximum


def check_extents(what: str, value: Iterable[Any], offset: int, end: int) -> Pairs:
    """Extents that cover ``offset``, in ascending order and without gaps.

    Args:
        what: The callback, for errors.
        value: Tuples (offset, length, type), which may begin before and end after the range.
        offset: Where the range begins.
        end: Where it ends.

    Returns:
        From ``offset`` on, none past ``end``, neighbours of equal type as one.
    """
    pairs: Pairs = []
    position: int | None = None
    for start, length, status in map(_check_extent, _iterate(what, value)):
        if position is not None and start != position:
            raise ValueError(f"{what}: extents must be in ascending order and must be contiguous")
        position = start + length
        begin = max(start, offset)
        length = min(position, end) - begin
        if length <= 0 and (start <= offset or pairs):
            continue
        if not pairs and start > offset:
            raise ValueError(f"{what}: first extent must not be > start ({offset})")
        if pairs and pairs[-1][1] == status:
            pairs[-1] = pairs[-1][0] + length, status
        else:
            pairs.append((length, status))
    if position is None:
        raise ValueError(f"{what} method cannot return an empty list")
    if not pairs:
        raise NothingCoveredError(f"{what}: must return at least one extent that covers {offset}")
    return pairs


def allocation(pairs: Pairs) -> Pairs:
    """Extents with the bits alone that nbdkit knows: hole and zero."""
    return [(length, status & _TYPE_MASK) for length, status in pairs]


def _check_extent(item: object) -> tuple[int, int, int]:
    if not isinstance(item, tuple) or len(item) != 3:
        raise TypeError("did not return an iterable of 3-tuples")
    offset, length, status = map(check_int, item)
    if min(offset, length, status) < 0 or status > _U32_MAX:
        raise ValueError(f"extent {item} is out of range")
    return offset, length, status


def _iterate(what: str, value: Iterable[Any]) -> Iterable[Any]:
    try:
        return iter(value)
    except TypeError:
        raise TypeError(f"{what} method did not return something which is iterable") from None


def _is_power_of_two(number: int) -> bool:
    return number > 0 and number & (number - 1) == 0
