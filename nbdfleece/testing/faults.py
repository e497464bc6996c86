"""What can go wrong with a server, as values.

A fault says which requests it befalls: those of one command, that touch a range, not the first
ones, only so many. All faults that fit a request befall it, in the order in which they were
added.
"""

from __future__ import annotations

import errno
import struct
from collections.abc import Callable
from dataclasses import dataclass
from enum import Enum
from typing import Final

from ..nbd.constants import Command

Pairs = list[tuple[int, int]]
"""Extents of a block status reply: length in bytes and status."""

_COOKIE: Final = struct.Struct(">Q")
_COOKIE_POSITION: Final = 8
"""In the headers of replies of all three forms."""
_WRONG_MAGIC: Final = bytes.fromhex("0badf00d")


@dataclass(frozen=True, slots=True, kw_only=True)
class Fault:
    """Which requests are befallen; the subclass says by what.

    Attributes:
        command: Only requests of this command.
        offset: Only requests that reach beyond this offset, in bytes.
        end: Only requests that begin before this offset, in bytes; None for all.
        skip: So many requests that fit pass first.
        count: After so many it is over; None for never.
    """

    command: Command | None = None
    offset: int = 0
    end: int | None = None
    skip: int = 0
    count: int | None = None

    def fits(self, command: int, offset: int, length: int) -> bool:
        """Whether a request is one of those that are meant; FLUSH touches the whole disk."""
        if self.command is not None and command != self.command:
            return False
        if command == Command.FLUSH:
            return True
        return offset + length > self.offset and (self.end is None or offset < self.end)


@dataclass(frozen=True, slots=True, kw_only=True)
class Delay(Fault):
    """The request is carried out later.

    Attributes:
        seconds: How much.
    """

    seconds: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Fail(Fault):
    """The request is not carried out but answered with an error.

    Attributes:
        error: The number on the wire, sent as it is; NBD's are Linux's errno.
        text: For people; sent with structured replies.
    """

    error: int = errno.EIO
    text: str = "a fault of the test server"


@dataclass(frozen=True, slots=True, kw_only=True)
class Drop(Fault):
    """The connection is closed instead of an answer; the request is not carried out."""


@dataclass(frozen=True, slots=True, kw_only=True)
class WrongCookie(Fault):
    """The answer is for a request that nobody sent."""

    def spoil(self, message: bytes) -> bytes:
        """A reply that begins with a header, with another cookie."""
        (cookie,) = _COOKIE.unpack_from(message, _COOKIE_POSITION)
        end = _COOKIE_POSITION + _COOKIE.size
        return message[:_COOKIE_POSITION] + _COOKIE.pack(cookie ^ 1 << 63) + message[end:]


@dataclass(frozen=True, slots=True, kw_only=True)
class BadMagic(Fault):
    """The answer begins with no magic number of NBD."""

    def spoil(self, message: bytes) -> bytes:
        """A reply that begins with a header, with another magic."""
        return _WRONG_MAGIC + message[len(_WRONG_MAGIC) :]


class Lie(Enum):
    """How a block status answer can be wrong, or surprising."""

    TOO_LONG = "too long"
    """The last extent reaches past the end of the export."""
    SHORT = "short"
    """Only half of the first extent is told; the protocol allows that, clients must ask on."""
    ZERO_LENGTH = "zero length"
    """The first extent has no bytes."""
    OVERLAPPING = "overlapping"
    """Every context is described twice, by two chunks."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Lying(Fault):
    """Block status is answered with something else than the truth.

    Attributes:
        how: A :class:`Lie`, or a function of the request's offset and length and the true
            extents, that returns what to send as it is.
        context: Only this metadata context is lied about; None for all.
    """

    context: str | None = None
    how: Lie | Callable[[int, int, Pairs], Pairs]

    def distort(self, offset: int, length: int, pairs: Pairs, size: int) -> Pairs:
        """What is told of one context.

        Args:
            offset: The request's, in bytes.
            length: Likewise.
            pairs: The truth.
            size: Bytes of the export.
        """
        if not isinstance(self.how, Lie):
            return self.how(offset, length, pairs)
        first, last = pairs[0], pairs[-1]
        if self.how is Lie.TOO_LONG:
            return [*pairs[:-1], (last[0] + size, last[1])]
        if self.how is Lie.SHORT:
            return [((first[0] + 1) // 2, first[1])]
        return [(0, first[1]), *pairs] if self.how is Lie.ZERO_LENGTH else pairs


@dataclass(frozen=True, slots=True, kw_only=True)
class Cut:
    """Connections are closed in the middle of what the server sends, handshake included.

    Attributes:
        at_byte: How many bytes a client receives.
        skip: So many connections pass first.
        count: After so many it is over; None for never.
    """

    at_byte: int
    skip: int = 0
    count: int | None = None


AnyFault = Fault | Cut


class FaultList:
    """The faults of a server, and how often each has fitted."""

    def __init__(self) -> None:
        self._faults: dict[int, AnyFault] = {}
        self._fitted: dict[int, int] = {}
        self._added = 0

    def add(self, *faults: AnyFault) -> None:
        """Faults that begin now; the same one may be added again."""
        for fault in faults:
            self._faults[self._added] = fault
            self._fitted[self._added] = 0
            self._added += 1

    def clear(self) -> None:
        """No more faults."""
        self._faults.clear()

    def for_request(self, command: int, offset: int, length: int) -> list[Fault]:
        """What befalls a request."""
        return [
            fault
            for number, fault in list(self._faults.items())
            if isinstance(fault, Fault)
            and fault.fits(command, offset, length)
            and self._is_due(number, fault)
        ]

    def cut_for_connection(self) -> int | None:
        """How many bytes a new connection may send; None for all."""
        for number, fault in list(self._faults.items()):
            if isinstance(fault, Cut) and self._is_due(number, fault):
                return fault.at_byte
        return None

    def _is_due(self, number: int, fault: AnyFault) -> bool:
        fitted = self._fitted[number]
        self._fitted[number] = fitted + 1
        return fitted >= fault.skip and (fault.count is None or fitted < fault.skip + fault.count)
