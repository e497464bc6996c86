"""Large READs that follow one another on a disk: fetched together, then sent without a copy.

What holds still is sent out of the page cache (rule 1), and a thread brings it there first if it
is cold (rule 5). To hand one READ to a thread and to take it back costs the loop several times
what it costs to send it. So the READs of a cold stream wait in a queue, and a thread fetches **a
run** of them at a time: those that lie one behind the other in a file and whose replies are one
turn's work, which is when they are sent. Only a READ that begins where the last one ended waits
here; any other is fetched by itself at once. Requests whose data are at hand overtake.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Coroutine
from typing import Any, Final, Protocol

from ..block.stable import Fetcher, StablePlace
from ..nbd.requests import Request
from .outbox import Outbox
from .turns import COPIES_PER_SENDFILE, REQUEST_COST

FETCHES_MAX: Final = 2
"""Runs of one connection that are fetched at a time, of the 16 that threads fetch for all: while
one is waited for, the kernel reads ahead for the other. More only disturb each other."""


class Host(Protocol):
    """What is needed of the transmission phase."""

    def hold(self, cost: int) -> None:
        """Count a request as in flight, and the bytes that it holds."""

    def let_go(self, cost: int) -> None:
        """Count it no longer."""

    def start_read(self, request: Request) -> None:
        """Answer a READ by a coroutine of its own."""

    def start_task(self, work: Coroutine[Any, Any, None], cost: int = 0) -> None:
        """Run a coroutine; as long as it waits it counts as in flight."""

    async def next_turn(self) -> None:
        """Wait until all who wait have had their turn."""

    def flush(self) -> None:
        """Send what is queued, and go on with what the client asks for."""


class ColdReads:
    """The READs of one connection that wait for a thread.

    Args:
        turn_bytes: What a turn may cost.
        put: Queues the reply to a READ whose data are at hand.
        outbox: Where the replies go; once it is closed, nobody wants them any more.
        host: The transmission phase.
    """

    def __init__(
        self,
        turn_bytes: int,
        put: Callable[[Request, list[StablePlace]], None],
        outbox: Outbox,
        host: Host,
    ) -> None:
        self._turn_bytes = turn_bytes
        self._put = put
        self._outbox = outbox
        self._host = host
        self._queue: deque[tuple[Request, StablePlace]] = deque()
        self._fetches = 0

    def add(self, request: Request, place: StablePlace) -> None:
        """Have a READ answered when a thread has brought its data to hand.

        Args:
            place: Where they lie, in a file whose pages stay in the page cache.
        """
        self._host.hold(place.length)
        self._queue.append((request, place))
        if self._fetches < FETCHES_MAX:
            self._fetches += 1
            self._host.start_task(self._fetch_runs())

    async def _fetch_runs(self) -> None:
        try:
            with Fetcher() as fetcher:
                while self._queue and not self._outbox.is_closed:
                    await self._fetch_run(fetcher)
        finally:
            self._fetches -= 1
            if self._outbox.is_closed:
                for _, place in self._queue:
                    self._host.let_go(place.length)
                self._queue.clear()

    async def _fetch_run(self, fetcher: Fetcher) -> None:
        run, whole = self._next_run()
        try:
            is_at_hand = await fetcher.bring_to_hand([whole])
            await self._host.next_turn()
        finally:
            for _, place in run:
                self._host.let_go(place.length)
        self._end_run(run, is_at_hand=is_at_hand)
        self._host.flush()

    def _next_run(self) -> tuple[list[tuple[Request, StablePlace]], StablePlace]:
        """Take the next READs from the queue; returns where the data of all of them lie, too."""
        run = [self._queue.popleft()]
        file, begin, length = run[0][1]
        cost = _cost(run[0][1])
        while self._queue:
            place = self._queue[0][1]
            cost += _cost(place)
            if place.file is not file or place.offset != begin + length or cost > self._turn_bytes:
                break
            run.append(self._queue.popleft())
            length += place.length
        return run, StablePlace(file, begin, length)

    def _end_run(self, run: list[tuple[Request, StablePlace]], *, is_at_hand: bool) -> None:
        for request, place in run:
            if is_at_hand:
                self._put(request, [place])
            elif not self._outbox.is_closed:
                # Each by itself: some of it may be good, and what is not must be told.
                self._host.start_read(request)


def _cost(place: StablePlace) -> int:
    """What the reply counts for in the turn in which it is sent."""
    return REQUEST_COST + place.length // COPIES_PER_SENDFILE
