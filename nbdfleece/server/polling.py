"""Looking at the sockets for a moment longer instead of going to sleep.

A client that asks for one small thing at a time sends its next request some 20 us after a reply.
To fall asleep and be woken takes as long again. So after such a reply the loop goes on looking
at **all** its sockets, for :data:`POLL_SECONDS`: nobody waits for it, unlike for a look at one
socket only.

What it costs is bounded (rule 5): a look that finds nothing is not taken again for the next small
requests, for one, then three, and in the end 63, until one finds something. A client with pauses
between its requests costs less than a microsecond more for each.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from time import perf_counter
from typing import Final, Protocol

POLL_SECONDS: Final = 32e-6
"""How long the loop looks, as long as QEMU's I/O threads do."""

SKIPPED_MAX: Final = 63
"""Small requests after which the loop does not look, at most, before it tries again."""


class Loop(Protocol):
    """What is needed of the event loop."""

    def call_soon(self, callback: Callable[[], object], /) -> object:
        """Call after the next look at the sockets."""


class Polling:
    """When the loop of one server looks on.

    Args:
        loop: It looks at its sockets before it calls what it is given.
    """

    def __init__(self, loop: Loop) -> None:
        self._loop = loop
        self._can_client_run = len(os.sched_getaffinity(0)) > 1
        """Another processor is there for it meanwhile."""
        self._deadline = 0.0
        self._is_looking = False
        self._skipped = 0
        self._skips_left = 0

    def begin(self) -> None:
        """A small request has been answered: look for the next one, if that was worth it lately."""
        if self._skips_left:
            self._skips_left -= 1
            return
        self._deadline = perf_counter() + POLL_SECONDS
        if not self._is_looking and self._can_client_run:
            self._is_looking = True
            self._loop.call_soon(self._look)

    def found(self) -> None:
        """Something has arrived."""
        if self._is_looking:
            self._deadline = 0.0
            self._skipped = 0

    def _look(self) -> None:
        if perf_counter() < self._deadline:
            self._loop.call_soon(self._look)
            return
        self._is_looking = False
        if self._deadline:
            self._skipped = self._skips_left = min(2 * self._skipped + 1, SKIPPED_MAX)
