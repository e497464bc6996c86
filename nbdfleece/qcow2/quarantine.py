"""Freed host clusters between their freeing and their reuse.

A host cluster that a guest cluster has given up may be used again only when

1. the table without the old entry is durable: otherwise a power cut brings back an
   entry that leads to somebody else's data (QEMU 10 loses stable data this way), and
2. no read that began before the freeing is under way: it still reads the old place.

Life of a freed run: :meth:`Quarantine.add` when the entry changes in memory;
:meth:`Quarantine.close` when a flush takes its copy of the tables, which ends the
current batch of reads; :meth:`Quarantine.settle` when that flush is durable;
:meth:`Quarantine.take_released` once the batches of reads have drained.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple


class ReadBatch:
    """Counts reads under way; whoever reads adds one and takes it away at the end."""

    __slots__ = ("count",)

    def __init__(self) -> None:
        self.count = 0


class FreedRun(NamedTuple):
    """Consecutive host clusters, each of which loses one reference."""

    offset: int
    length: int
    punch: bool
    """The guest gave the space up: give it back to the host."""


@dataclass(slots=True)
class FreedBatch:
    """What was freed between two flushes, and the reads that may still see it."""

    runs: list[FreedRun]
    reads: list[ReadBatch]


class Quarantine:
    """Freed runs that must not be reused yet."""

    def __init__(self) -> None:
        self.reads = ReadBatch()
        """The batch in which a read that begins now counts itself."""
        self._draining: list[ReadBatch] = []
        self._fresh: list[FreedRun] = []
        self._settled: list[FreedBatch] = []

    @property
    def has_unsettled(self) -> bool:
        """Whether anything was freed since the last flush took its copy."""
        return bool(self._fresh)

    @property
    def runs_waiting(self) -> int:
        """Runs freed since the last flush took its copy."""
        return len(self._fresh)

    def add(self, offset: int, length: int, *, punch: bool = False) -> None:
        """Put a run into quarantine; the entry that led to it is gone from memory."""
        if self._fresh:
            last = self._fresh[-1]
            if last.offset + last.length == offset and last.punch == punch:
                self._fresh[-1] = FreedRun(last.offset, last.length + length, punch)
                return
        self._fresh.append(FreedRun(offset, length, punch))

    def close(self) -> FreedBatch:
        """End the batch of reads, and hand out what was freed for a flush to settle."""
        self._draining = [reads for reads in [*self._draining, self.reads] if reads.count]
        self.reads = ReadBatch()
        batch = FreedBatch(self._fresh, list(self._draining))
        self._fresh = []
        return batch

    def settle(self, batch: FreedBatch) -> None:
        """The tables without the batch's entries are durable."""
        if batch.runs:
            self._settled.append(batch)

    def restore(self, batch: FreedBatch) -> None:
        """The flush failed: the batch waits for the next one."""
        self._fresh[:0] = batch.runs

    def take_released(self) -> list[FreedRun]:
        """Hand out every run that may be reused now."""
        ready = [batch for batch in self._settled if not any(r.count for r in batch.reads)]
        self._settled = [batch for batch in self._settled if any(r.count for r in batch.reads)]
        return [run for batch in ready for run in batch.runs]
