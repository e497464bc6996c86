"""A limit on bytes per second that can be changed while it is in force."""

from __future__ import annotations

import asyncio
import os
import re
import time
from typing import Final

from ..errors import UsageError

_SIZE: Final = re.compile(r"(\d+)([bskmgtpe]?)", re.IGNORECASE)
_UNITS: Final = {
    "": 1,
    "b": 1,
    "s": 512,
    "k": 1 << 10,
    "m": 1 << 20,
    "g": 1 << 30,
    "t": 1 << 40,
    "p": 1 << 50,
    "e": 1 << 60,
}
_LOOK_SECONDS: Final = 1.0
"""How often the file is looked at, and the longest that a change goes unnoticed."""


def parse_size(text: str) -> int:
    """A number of bytes as nbdkit writes it: ``512``, ``64k``, ``10M``, ``2s`` (sectors).

    Raises:
        UsageError: It is none.
    """
    match = _SIZE.fullmatch(text.strip())
    if match is None:
        raise UsageError(f"{text!r} is not a size: a number, and one of b s k M G T P E after it")
    return int(match[1]) * _UNITS[match[2].lower()]


class RateLimit:
    """Lets at most so many bytes pass in a second.

    Args:
        bytes_per_second: The limit; 0 is none. Assign to :attr:`bytes_per_second` to change it.
        file: A file with a size in it that overrides the limit; it is read again about every
            second. While it is missing, empty or not a size, the last limit stays.
    """

    def __init__(
        self, bytes_per_second: int = 0, file: str | os.PathLike[str] | None = None
    ) -> None:
        self.bytes_per_second = bytes_per_second
        self._file = file
        self._looked_at = -_LOOK_SECONDS
        self._debt = 0.0
        """Bytes that have passed but that time has not yet paid for."""
        self._paid_at = 0.0

    async def take(self, amount: int) -> None:
        """Wait until the bytes that passed before are paid for, then let these pass."""
        self._pay()
        while self.bytes_per_second and self._debt > 0:
            wait = min(self._debt / self.bytes_per_second, _LOOK_SECONDS)
            await asyncio.sleep(wait)
            self._pay()
        self._debt += amount

    def _pay(self) -> None:
        now = time.monotonic()
        if not self.bytes_per_second:
            self._debt = 0.0
        else:
            self._debt = max(0.0, self._debt - (now - self._paid_at) * self.bytes_per_second)
        self._paid_at = now
        if self._file is not None and now - self._looked_at >= _LOOK_SECONDS:
            self._looked_at = now
            self._look(self._file)

    def _look(self, file: str | os.PathLike[str]) -> None:
        try:
            with open(file) as stream:
                self.bytes_per_second = parse_size(stream.read(64))
        except (OSError, UsageError):
            return  # being written just now, or not there yet: the next look may see it
