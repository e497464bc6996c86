"""Sizes on the command line, read and printed."""

from __future__ import annotations

import re
from typing import Final

from ..errors import UsageError

SIZE_MAX: Final = (1 << 63) - 1
"""Offsets and lengths are signed 64-bit numbers to the kernel."""

_SIZE: Final = re.compile(r"(\d{1,19})([bBsSkKmMgGtTpPeE]?)", re.ASCII)
_FACTORS: Final = {"": 1, "b": 1, "s": 512, **{c: 1 << 10 * n for n, c in enumerate("kmgtpe", 1)}}
_UNITS: Final = ("B", "KiB", "MiB", "GiB", "TiB", "PiB", "EiB")


def parse_size(text: str) -> int:
    """Read a size as nbdkit does: ``10M``; powers of 1024, ``s`` for 512; no fractions.

    Returns:
        Bytes.

    Raises:
        UsageError: It is none, or too large.
    """
    match = _SIZE.fullmatch(text)
    if match is None:
        raise UsageError(f"'{text}' is not a size: digits and one of b, s, k, m, g, t, p, e")
    size = int(match[1]) * _FACTORS[match[2].lower()]
    if size > SIZE_MAX:
        raise UsageError(f"the size '{text}' is too large")
    return size


def format_size(size: int | None) -> str:
    """A size for people: ``1.5 MiB``; a question mark if it is not known."""
    if size is None:
        return "?"
    value, unit = float(size), 0
    while value >= 1024 and unit < len(_UNITS) - 1:
        value, unit = value / 1024, unit + 1
    number = f"{value:.1f}".removesuffix(".0")
    return f"{number} {_UNITS[unit]}"


_AGE: Final = re.compile(r"([0-9]+)([smhdw])")
_SECONDS: Final = {"s": 1, "m": 60, "h": 3600, "d": 86400, "w": 604800}


def parse_age(word: str) -> int:
    """Read an age such as 12h or 7d.

    Returns:
        Seconds.

    Raises:
        UsageError: It is none.
    """
    found = _AGE.fullmatch(word)
    if found is None:
        raise UsageError(f"'{word}' is no age; write 90s, 30m, 12h, 7d or 4w")
    return int(found[1]) * _SECONDS[found[2]]
