"""What a server says about a whole disk: block status, walked, checked and merged.

A server's word decides what is read and what is not, so nothing that cannot be true is
passed on: every answer must name each negotiated context exactly once, with extents that
are not empty, begin where they were asked for, and stay inside the export. What a server
may do by the protocol is accepted: describe less than was asked for (the walk goes on
where all contexts are known), or let the last extent reach further.

Spec: proto.md, "NBD_REPLY_TYPE_BLOCK_STATUS".
"""

from __future__ import annotations

from typing import Final, Protocol

import numpy as np

from ..extents import Extents
from .errors import ServerError

ALLOCATION: Final = "base:allocation"
DIRTY_PREFIX: Final = "qemu:dirty-bitmap:"

DIRTY: Final = 1
ZERO: Final = 2
"""Bits of a merged status: 0 clean, 1 dirty, 2 zero, 3 dirty and zero."""

REQUEST_BYTES_MAX: Final = 1 << 30
"""Asked for at once: lengths have 32 bits on the wire, and some servers sign them."""

_ALLOCATION_ZERO: Final = 2
"""Bit of base:allocation: reads as zeroes. The hole bit alone promises nothing of the kind."""


class Describer(Protocol):
    """Who answers for block status; a connection, or a test's."""

    async def block_status(self, offset: int, length: int) -> list[tuple[str, list[int]]]:
        """Name, and lengths and status in turns, of each answer."""


async def walk(
    server: Describer, uri: str, size: int, contexts: tuple[str, ...]
) -> dict[str, Extents]:
    """Ask for the whole disk's block status.

    Args:
        server: Whom to ask.
        uri: The server's name in messages.
        size: Bytes of the disk.
        contexts: What was negotiated.

    Returns:
        For each context extents that together are exactly ``size`` bytes.

    Raises:
        ServerError: The server fails, or says what cannot be true.
    """
    if not contexts:
        return {}
    parts: dict[str, list[Extents]] = {context: [] for context in contexts}
    offset = 0
    while offset < size:
        asked = min(REQUEST_BYTES_MAX, size - offset)
        answers = await server.block_status(offset, asked)
        extents = _check_answers(uri, answers, contexts, offset, asked, size)
        known = min(part.total() for part in extents.values())
        for context, part in extents.items():
            parts[context].append(part.clipped(known))
        offset += known
    return {context: Extents.concatenate(found) for context, found in parts.items() if found}


def _check_answers(
    uri: str,
    answers: list[tuple[str, list[int]]],
    contexts: tuple[str, ...],
    offset: int,
    asked: int,
    size: int,
) -> dict[str, Extents]:
    """The answers of one request, if they can be true."""
    found: dict[str, Extents] = {}
    for context, entries in answers:
        if context not in contexts or context in found:
            raise _lie(uri, context, offset, "was answered for twice or unasked")
        found[context] = _check_extents(uri, context, entries, offset, asked, size)
    for context in contexts:
        if context not in found:
            raise _lie(uri, context, offset, "got no answer")
    return found


def _check_extents(
    uri: str, context: str, entries: list[int], offset: int, asked: int, size: int
) -> Extents:
    """One answer as extents, the last one cut at the end of the request."""
    if not entries or len(entries) % 2:
        raise _lie(uri, context, offset, "got an answer without extents")
    array = np.array(entries, dtype=np.uint64).reshape(-1, 2)
    lengths = array[:, 0]
    if (lengths == 0).any():
        raise _lie(uri, context, offset, "got an extent of no bytes")
    if (lengths > np.uint64(size - offset)).any():
        raise _lie(uri, context, offset, "got an extent past the end of the disk")
    ends = np.cumsum(lengths.astype(np.int64))
    if len(ends) > 1 and ends[-2] >= asked:
        raise _lie(uri, context, offset, "got extents past what was asked for")
    if ends[-1] > size - offset:
        raise _lie(uri, context, offset, "got extents past the end of the disk")
    # A status of 64 bits comes only with contexts that nobody asks for here; what its upper
    # bits mean is not known, so they count.
    status = (array[:, 1] | array[:, 1] >> np.uint64(32)).astype(np.uint32)
    return Extents(lengths.astype(np.int64), status).clipped(asked)


def _lie(uri: str, context: str, offset: int, what: str) -> ServerError:
    return ServerError(f"{uri}: the block status at {offset} cannot be trusted: {context!r} {what}")


def overlay(first: Extents, second: Extents) -> tuple[Extents, Extents]:
    """Two descriptions of the same range, cut at the boundaries of both.

    Args:
        first: As many bytes as ``second``.
        second: As many bytes as ``first``.

    Returns:
        Both with the same lengths; equal neighbours are not merged. Linear in the number
        of extents.
    """
    first_ends, second_ends = np.cumsum(first.lengths), np.cumsum(second.lengths)
    ends = np.union1d(first_ends, second_ends)
    lengths = np.diff(ends, prepend=0)
    return (
        Extents(lengths, first.status[np.searchsorted(first_ends, ends)]),
        Extents(lengths, second.status[np.searchsorted(second_ends, ends)]),
    )


def merge(allocation: Extents, dirty: Extents) -> Extents:
    """What is dirty and what is zero in one description (:data:`DIRTY`, :data:`ZERO`).

    Args:
        allocation: Status of base:allocation.
        dirty: Status of a dirty bitmap; any bit set counts as dirty.
    """
    zeroes, changes = overlay(allocation, dirty)
    status = np.where(changes.status != 0, DIRTY, 0) | np.where(
        zeroes.status & _ALLOCATION_ZERO, ZERO, 0
    )
    return zeroes.with_status(status.astype(np.uint32))
