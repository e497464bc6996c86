"""Looking at the sockets for a moment longer instead of going to sleep.

A client that asks for one small thing at a time sends its next request some 20 us after a reply.
One that sends more than its side of the socket holds goes on as soon as there is room, which the
receive before has made. To fall asleep and be woken takes as long again. So then the loop goes on
looking at **all** its sockets, as long as QEMU's I/O threads do: nobody waits for it, unlike for a
look at one socket only.

What it costs is bounded (rule 5). There is one look for a small request that has been answered,
none for a part of one, one for each receive that leaves a large message incomplete, and none while
the client's socket has no room for replies. When the time is up, or another client's request is
found, no look is taken the next time, the next three times, and in the end 63, until a look finds
what it is for. A client with pauses between its requests, or with others beside it, costs less
than a microsecond more for each.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from time import perf_counter
from typing import Final, Protocol

SKIPPED_MAX: Final = 63
"""How many times the loop does not look, at most, before it tries again."""


class Loop(Protocol):
    """What is needed of the event loop."""

    def call_soon(self, callback: Callable[[], object], /) -> object:
        """Call after the next look at the sockets."""


class Polling:
    """When the loop of one server looks on.

    Args:
        loop: It looks at its sockets before it calls what it is given.
        seconds: How long it looks; 0 for not at all.
    """

    def __init__(self, loop: Loop, seconds: float) -> None:
        self._loop = loop
        self._seconds = seconds
        # The client needs another processor meanwhile.
        self._is_useful = seconds > 0 and len(os.sched_getaffinity(0)) > 1
        self._client: object = None
        """Whose next request is looked for; None: nobody's."""
        self._deadline = 0.0
        self._is_looking = False
        self._skipped = 0
        self._skips_left = 0

    def begin(self, client: object) -> None:
        """The client is about to send: look for it, if that was worth it lately."""
        if self._skips_left:
            self._skips_left -= 1
            return
        if not self._is_useful:
            return
        self._client = client
        self._deadline = perf_counter() + self._seconds
        if not self._is_looking:
            self._is_looking = True
            self._loop.call_soon(self._look)

    def found(self, client: object) -> None:
        """Something has arrived."""
        if self._client is client:
            self._client = None
            self._skipped = 0
        elif self._client is not None:
            self._give_up()

    def _look(self) -> None:
        if self._client is not None and perf_counter() >= self._deadline:
            self._give_up()
        if self._client is None:
            self._is_looking = False
        else:
            self._loop.call_soon(self._look)

    def _give_up(self) -> None:
        self._client = None
        self._skipped = self._skips_left = min(2 * self._skipped + 1, SKIPPED_MAX)
