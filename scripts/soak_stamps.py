"""Stamped blocks, and what a view of a disk full of them may show.

Every block of 4 KiB that a writer writes carries its offset, the number of the operation
that wrote it, the writer's epoch and a checksum. A writer never has two operations on one
block in flight, and its numbers grow; so what a block may hold at an instant is known from
when its operations were issued and acknowledged.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

BLOCK = 4096
WORDS = BLOCK // 8
OFFSET, NUMBER, EPOCH, FILL, CHECKSUM = 0, 1, 2, 3, WORDS - 1

Words = npt.NDArray[np.uint64]
Numbers = npt.NDArray[np.int64]


class Operation(NamedTuple):
    """What a writer did.

    Attributes:
        number: Unique; grows in the order in which a writer issues.
        epoch: How many barriers the writer had passed: everything acknowledged, then a flush.
        is_zero: A write of zeroes; else of stamps.
        first: The first block.
        count: How many blocks; 0 for a flush.
        issued: Seconds.
        acknowledged: Seconds; infinity if it is in flight, or never was answered.
    """

    number: int
    epoch: int
    is_zero: bool
    first: int
    count: int
    issued: float
    acknowledged: float = math.inf

    @property
    def blocks(self) -> slice:
        """Which ones."""
        return slice(self.first, self.first + self.count)


def stamped(first: int, numbers: Any, epochs: Any) -> Words:
    """Blocks with stamps, from block ``first`` on; shape (blocks, words)."""
    words = np.zeros((len(numbers), WORDS), dtype=np.uint64)
    words[:, OFFSET] = np.arange(first, first + len(numbers)) * BLOCK
    words[:, NUMBER] = numbers
    words[:, EPOCH] = epochs
    seed = (words[:, NUMBER] << np.uint64(20)) ^ words[:, OFFSET]
    words[:, FILL:CHECKSUM] = seed[:, None] + np.arange(CHECKSUM - FILL, dtype=np.uint64)
    words[:, CHECKSUM] = ~words[:, :CHECKSUM].sum(axis=1, dtype=np.uint64)
    return words


class View(NamedTuple):
    """What a disk shows, block by block; a block of zeroes has number and epoch -1."""

    numbers: Numbers
    epochs: Numbers


def view_of(content: bytes | memoryview) -> View:
    """Read all stamps of a disk.

    Raises:
        AssertionError: A block is neither zeroes nor what its stamp says.
    """
    words = np.frombuffer(content, dtype=np.uint64).reshape(-1, WORDS)
    zero = ~words.any(axis=1)
    expected = stamped(0, words[:, NUMBER], words[:, EPOCH])
    torn = np.flatnonzero((words != expected).any(axis=1) & ~zero)
    assert not len(torn), f"blocks that are not what their stamps say: {torn[:10].tolist()}"
    numbers, epochs = (words[:, each].astype(np.int64) for each in (NUMBER, EPOCH))
    return View(np.where(zero, -1, numbers), np.where(zero, -1, epochs))


class Model:
    """What is known of a disk: a settled state, and the operations since.

    Args:
        blocks: How many the disk has; all are zeroes at first.
        writers: How many write to it; writer ``n`` issues the numbers that are ``n`` modulo that.
    """

    def __init__(self, blocks: int, writers: int) -> None:
        self._writers = writers
        self._numbers = np.full(blocks, -1, dtype=np.int64)
        """The newest operation on each block that has been flushed."""
        self._is_zero = np.ones(blocks, dtype=np.bool_)
        self._operations: dict[int, Operation] = {}

    def add(self, operations: list[Operation]) -> None:
        """Take a writer's report; an operation may come again once it is acknowledged."""
        self._operations.update((each.number, each) for each in operations)

    def _ordered(self) -> list[Operation]:
        return [self._operations[number] for number in sorted(self._operations)]

    def check_instant(self, view: View, before: float, after: float) -> None:
        """Check what was seen of an instant between two times."""
        self._check(view, lambda each: each.acknowledged < before, after)
        for writer in range(self._writers):
            mine = view.numbers % self._writers == writer
            newest = int(view.epochs[mine & (view.numbers >= 0)].max(initial=0))
            self._check(
                view,
                lambda each, w=writer, e=newest: (
                    each.number % self._writers == w and each.epoch < e
                ),
                after,
            )

    def check_survivors(self, view: View) -> None:
        """Check what is there after a crash, and take it for the settled state."""
        flushed = self._flushed_until()
        self._check(view, lambda each: each.acknowledged < flushed, math.inf)
        self._numbers = np.maximum(view.numbers, -1)
        self._is_zero = view.numbers < 0
        self._operations.clear()

    def _flushed_until(self) -> float:
        """What was acknowledged before this time has been flushed."""
        return max(
            (
                each.issued
                for each in self._operations.values()
                if not each.count and each.acknowledged < math.inf
            ),
            default=0.0,
        )

    def _check(self, view: View, is_certain: Any, until: float) -> None:
        """Each block shows its newest certain operation, or a later one issued ``until`` then."""
        low, is_zero = self._numbers.copy(), self._is_zero.copy()
        operations = [each for each in self._ordered() if each.count and each.issued < until]
        for each in operations:
            if is_certain(each):
                low[each.blocks] = each.number
                is_zero[each.blocks] = each.is_zero
        high, may_be_zero = low.copy(), is_zero.copy()
        for each in operations:
            if not is_certain(each):
                part = each.blocks
                newer = each.number > low[part]
                high[part] = np.where(newer, each.number, high[part])
                may_be_zero[part] |= newer & each.is_zero
        wrong = np.where(
            view.numbers < 0, ~may_be_zero, (view.numbers < low) | (view.numbers > high)
        )
        found = np.flatnonzero(wrong)
        assert not len(found), "wrong blocks (offset, shown, from, to): " + str(
            [(at * BLOCK, view.numbers[at], low[at], high[at]) for at in found[:10].tolist()]
        )

    def settle(self) -> None:
        """Forget the operations that were flushed, keeping what they came to."""
        flushed = self._flushed_until()
        for each in self._ordered():
            if each.acknowledged < flushed:
                if each.count:
                    self._numbers[each.blocks] = each.number
                    self._is_zero[each.blocks] = each.is_zero
                del self._operations[each.number]
