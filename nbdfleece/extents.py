"""Extents: what lies where, as two numpy arrays.

An :class:`Extents` describes consecutive ranges that start at an offset that
the caller knows: entry ``i`` is ``lengths[i]`` bytes long and has the status
``status[i]``. Block nodes and bitmaps produce them, metadata contexts map their
status, and the wire packs them; none of them looks at single entries in a loop.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

Lengths = npt.NDArray[np.int64]
Status = npt.NDArray[np.uint32]


class Extents(NamedTuple):
    """Consecutive ranges with a status each.

    ``lengths`` has shape (n,), in bytes, every entry greater than zero;
    ``status`` has shape (n,). What a status means is the producer's affair.
    """

    lengths: Lengths
    status: Status

    @classmethod
    def single(cls, length: int, status: int) -> Extents:
        """One extent of ``length`` bytes."""
        return cls(np.array([length], dtype=np.int64), np.array([status], dtype=np.uint32))

    @classmethod
    def from_pairs(cls, pairs: Iterable[tuple[int, int]]) -> Extents:
        """Extents from ``(length, status)`` pairs; adjacent equal ones are merged."""
        rows = list(pairs)
        lengths = np.array([length for length, _ in rows], dtype=np.int64)
        status = np.array([state for _, state in rows], dtype=np.uint32)
        return cls(lengths, status).merged()

    @classmethod
    def concatenate(cls, parts: Iterable[Extents]) -> Extents:
        """The parts one after another, adjacent equal extents merged."""
        rows = list(parts)
        if len(rows) == 1:
            return rows[0].merged()
        return cls(
            np.concatenate([part.lengths for part in rows]),
            np.concatenate([part.status for part in rows]),
        ).merged()

    def pairs(self) -> list[tuple[int, int]]:
        """The extents as ``(length, status)`` pairs of plain integers."""
        return list(zip(self.lengths.tolist(), self.status.tolist(), strict=True))

    def total(self) -> int:
        """The bytes that all extents describe together."""
        return int(self.lengths.sum())

    def merged(self) -> Extents:
        """The same description with adjacent equal extents joined."""
        if len(self.status) < 2:
            return self
        differs = self.status[1:] != self.status[:-1]
        if differs.all():
            return self
        starts = np.flatnonzero(differs) + 1
        starts = np.concatenate([np.zeros(1, dtype=starts.dtype), starts])
        return Extents(np.add.reduceat(self.lengths, starts), self.status[starts])

    def clipped(self, length: int) -> Extents:
        """At most the first ``length`` bytes; the last extent is cut where it reaches over."""
        if self.total() <= length:
            return self
        ends = np.cumsum(self.lengths)
        count = int(np.searchsorted(ends, length, side="left")) + 1
        lengths = self.lengths[:count].copy()
        lengths[-1] -= ends[count - 1] - length
        return Extents(lengths, self.status[:count])

    def limited(self, extents_max: int) -> Extents:
        """At most the first ``extents_max`` extents."""
        if len(self.lengths) <= extents_max:
            return self
        return Extents(self.lengths[:extents_max], self.status[:extents_max])

    def with_status(self, status: Status) -> Extents:
        """The same ranges under another status, adjacent equal ones merged."""
        return Extents(self.lengths, status.astype(np.uint32, copy=False)).merged()
