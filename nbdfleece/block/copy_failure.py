"""When a copy of old data has failed, and whom that concerns."""

from __future__ import annotations

from collections.abc import Iterable
from enum import Enum
from typing import Final, NamedTuple


class OnCbwError(Enum):
    """What a failure to copy old data breaks; QEMU's names, not QEMU's default."""

    BREAK_SNAPSHOT = "break-snapshot"
    BREAK_GUEST_WRITE = "break-guest-write"


class CopyFailure(NamedTuple):
    """What a snapshot wants.

    Attributes:
        on_error: What a failure to copy breaks.
        timeout_seconds: A copy that takes longer is a failure; None waits for ever.
    """

    on_error: OnCbwError = OnCbwError.BREAK_SNAPSHOT
    timeout_seconds: float | None = None


USUAL: Final = CopyFailure()
"""The guest comes first (rule 5)."""


def shortest_timeout(failures: Iterable[CopyFailure]) -> float | None:
    """The first of the timeouts to be over; None if there is none."""
    return min(
        (each.timeout_seconds for each in failures if each.timeout_seconds is not None),
        default=None,
    )
