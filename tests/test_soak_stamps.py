"""The soak's judge: it must find what it is there to find."""

from __future__ import annotations

import math

import numpy as np
import pytest

from scripts.soak_stamps import BLOCK, Model, Operation, stamped, view_of

BLOCKS = 8
WRITERS = 2
INSTANT = 10.0


def disk(*writes: tuple[int, int, int]) -> bytes:
    """A disk of zeroes with stamped blocks: (block, number, epoch)."""
    content = bytearray(BLOCKS * BLOCK)
    for block, number, epoch in writes:
        words = stamped(block, np.array([number]), np.array([epoch]))
        content[block * BLOCK : (block + 1) * BLOCK] = words.tobytes()
    return bytes(content)


def operation(
    number: int, block: int, issued: float, acknowledged: float = math.inf, **more: int
) -> Operation:
    known = {"epoch": 1, "is_zero": False, "count": 1, **more}
    return Operation(number=number, first=block, issued=issued, acknowledged=acknowledged, **known)


def check(content: bytes, *operations: Operation) -> None:
    model = Model(BLOCKS, WRITERS)
    model.add(list(operations))
    model.check_instant(view_of(content), INSTANT, INSTANT)


OLD = operation(2, 3, 1, 2)
NEW = operation(4, 3, 5, 6)
IN_FLIGHT = operation(6, 3, 9, 11)
LATE = operation(8, 3, 12, 13)


@pytest.mark.parametrize("number", [4, 6])
def test_acknowledged_or_in_flight_write_may_be_seen(number: int) -> None:
    check(disk((3, number, 1)), OLD, NEW, IN_FLIGHT, LATE)


@pytest.mark.parametrize("number", [2, 8])
def test_stale_or_future_write_is_found(number: int) -> None:
    with pytest.raises(AssertionError, match="wrong blocks"):
        check(disk((3, number, 1)), OLD, NEW, IN_FLIGHT, LATE)


def test_lost_write_is_found() -> None:
    with pytest.raises(AssertionError, match="wrong blocks"):
        check(disk(), OLD)


def test_zeroes_are_seen_only_where_some_were_written() -> None:
    zeroes = operation(4, 3, 5, 6, is_zero=True)
    check(disk(), OLD, zeroes)
    with pytest.raises(AssertionError, match="wrong blocks"):
        check(disk((3, 2, 1)), OLD, zeroes)
    with pytest.raises(AssertionError, match="wrong blocks"):
        check(disk(), OLD, zeroes, operation(6, 3, 7, 8))


def test_epoch_without_the_one_before_is_found() -> None:
    """Neither write was acknowledged before the instant, but one was before the other."""
    first = operation(2, 1, 9, 11, epoch=1)
    second = operation(4, 5, 12, 13, epoch=2)
    model = Model(BLOCKS, WRITERS)
    model.add([first, second])
    model.check_instant(view_of(disk((1, 2, 1), (5, 4, 2))), 8, 14)
    model.check_instant(view_of(disk((1, 2, 1))), 8, 14)
    with pytest.raises(AssertionError, match="wrong blocks"):
        model.check_instant(view_of(disk((5, 4, 2))), 8, 14)


def test_after_a_crash_only_what_was_flushed_must_be_there() -> None:
    flush = operation(6, 0, 3, 4, count=0)
    model = Model(BLOCKS, WRITERS)
    model.add([OLD, NEW, flush])
    with pytest.raises(AssertionError, match="wrong blocks"):
        model.check_survivors(view_of(disk()))
    model.check_survivors(view_of(disk((3, 2, 1))))
    model.check_instant(view_of(disk((3, 2, 1))), INSTANT, INSTANT)


def test_settled_operations_still_count() -> None:
    model = Model(BLOCKS, WRITERS)
    model.add([OLD, operation(6, 0, 3, 4, count=0)])
    model.settle()
    model.check_instant(view_of(disk((3, 2, 1))), INSTANT, INSTANT)
    with pytest.raises(AssertionError, match="wrong blocks"):
        model.check_instant(view_of(disk()), INSTANT, INSTANT)


@pytest.mark.parametrize("at", [0, 8, 700, BLOCK - 1])
def test_torn_block_is_found(at: int) -> None:
    content = bytearray(disk((3, 2, 1)))
    content[3 * BLOCK + at] ^= 1
    with pytest.raises(AssertionError, match="not what their stamps say"):
        view_of(bytes(content))


def test_block_in_another_place_is_found() -> None:
    content = disk((3, 2, 1))
    with pytest.raises(AssertionError, match="not what their stamps say"):
        view_of(content[BLOCK:] + bytes(BLOCK))
