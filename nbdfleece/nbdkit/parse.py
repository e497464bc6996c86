"""How nbdkit reads sizes, delays, probabilities and passwords.

The forms are those of nbdkit 1.42. What it computes wrongly by overflow is refused here.
"""

from __future__ import annotations

import getpass
import math
import os
import re
import sys
from typing import Final

SIZE_END: Final = 1 << 63
_SECONDS_END: Final = 1 << 31

_FLOAT: Final = re.compile(
    r"[ \t\n\v\f\r]*(?P<sign>[+-]?)(?:"
    r"(?P<hex>0[xX](?:[0-9a-fA-F]+\.?[0-9a-fA-F]*|\.[0-9a-fA-F]+)(?:[pP][+-]?[0-9]+)?)|"
    r"(?P<decimal>(?:[0-9]+\.?[0-9]*|\.[0-9]+)(?:[eE][+-]?[0-9]+)?))"
)
_SIZE: Final = re.compile(r"[ \t\n\v\f\r]*([+-]?[0-9]+)(.?)", re.DOTALL)
_SCALES: Final = {"": 1, "b": 1, "s": 512} | {
    unit: 1 << 10 * power for power, unit in enumerate("kmgtpe", 1)
}
_NANOSECONDS: Final = {"": 10**9, "s": 10**9, "ms": 10**6, "us": 10**3, "µs": 10**3, "ns": 1}


def parse_size(text: str) -> int:
    """Read a size in bytes: digits, and perhaps one of b k m g t p e, or s for 512.

    Raises:
        ValueError: It is none; the text says why.
    """
    match = _SIZE.match(text)
    if match is None:
        raise ValueError(f"could not parse size string: {text}")
    scale = _SCALES.get(match[2].lower())
    if scale is None or match.end() != len(text):
        raise ValueError(f"could not parse size: unknown suffix: {text[match.end(1) :]}")
    size = int(match[1])
    if size < 0:
        raise ValueError(f"could not parse size: size is negative: {text}")
    if size * scale >= SIZE_END:
        raise ValueError(f"could not parse size: too large: {text}")
    return size * scale


def parse_delay(what: str, text: str) -> tuple[int, int]:
    """Read a delay: a number of seconds, or one with s, ms, us or ns.

    Returns:
        Seconds, and nanoseconds below 10^9.

    Raises:
        ValueError: It is none; the text begins with ``what``.
    """
    number, rest = _parse_float(text)
    scale = _NANOSECONDS.get(rest)
    if number is None or scale is None or number < 0:
        raise ValueError(f'{what}: could not parse delay or sleep: "{text}"')
    nanoseconds = round(number * scale)
    if nanoseconds >= _SECONDS_END * 10**9:
        raise ValueError(f'{what}: delay or sleep is too long: "{text}"')
    return divmod(nanoseconds, 10**9)


def parse_probability(what: str, text: str) -> float:
    """Read a probability: a number, a percentage ``N%``, or odds ``N:M`` or ``N/M``.

    Raises:
        ValueError: It is none; the text begins with ``what``.
    """
    number, rest = _parse_float(text)
    if number is not None and rest == "%":
        number, rest = number / 100, ""
    elif number is not None and rest[:1] in (":", "/"):
        divisor, rest = _parse_float(rest[1:])
        number = number / divisor if divisor else None
    if number is None or rest or number < 0:
        raise ValueError(f"{what}: could not parse '{text}' as a probability")
    return number


def _parse_float(text: str) -> tuple[float | None, str]:
    """The number that a text begins with, as strtod(3) reads it, if it is finite; and the rest."""
    match = _FLOAT.match(text)
    if match is None:
        return None, text
    number = float.fromhex(match["hex"]) if match["hex"] else float(match["decimal"])
    if not math.isfinite(number):
        return None, text
    return -number if match["sign"] == "-" else number, text[match.end() :]


def read_password(value: str, *, stdin_is_free: bool) -> bytes:
    """Read a password as a parameter names it.

    Args:
        value: ``-`` to ask at the terminal, ``-FD`` to read an open file, ``+FILE`` to read a
            file, or the password itself. Of files the first line is taken.
        stdin_is_free: Whether stdin may be read now.

    Raises:
        ValueError: It could not be read; the text says why.
    """
    if value == "-":
        return _ask_password(stdin_is_free)
    try:
        if value.startswith("-"):
            return _read_line(_parse_descriptor(value[1:]))
        if value.startswith("+"):
            return _read_line(os.open(value[1:], os.O_RDONLY | os.O_CLOEXEC))
    except OSError as error:
        raise ValueError(f"open {value[1:]}: {error.strerror}") from error
    return os.fsencode(value)


def _ask_password(stdin_is_free: bool) -> bytes:
    if not stdin_is_free:
        raise ValueError("stdin is not available for reading password")
    if not sys.stdin.isatty():
        raise ValueError("stdin is not a tty, cannot read password interactively")
    try:
        return os.fsencode(getpass.getpass("password: "))
    except EOFError:
        return b""


def _parse_descriptor(text: str) -> int:
    try:
        fd = int(text, 0)
    except ValueError:
        fd = -1
    if fd < 0:
        raise ValueError(f"password file descriptor: could not parse number: {text!r}")
    if fd <= 2:
        raise ValueError("cannot use password -FD for stdin/stdout/stderr")
    return fd


def _read_line(fd: int) -> bytes:
    with open(fd, "rb") as stream:
        return stream.readline().removesuffix(b"\n")
