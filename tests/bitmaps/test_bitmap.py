"""Bitmaps against a plain set of granules."""

from __future__ import annotations

import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

from nbdfleece.bitmaps import bitmap as bitmap_module
from nbdfleece.bitmaps.bitmap import Bitmap
from nbdfleece.extents import Extents

sizes = st.integers(1, 3_000_000)
granularities = st.sampled_from([512, 1024, 4096, 65536])


@st.composite
def ranges(draw: st.DrawFn, size: int) -> tuple[int, int]:
    offset = draw(st.integers(0, size - 1))
    return offset, draw(st.integers(1, size - offset))


def granules(bitmap: Bitmap, offset: int, length: int) -> set[int]:
    return set(range(offset // bitmap.granularity, (offset + length - 1) // bitmap.granularity + 1))


def as_set(bitmap: Bitmap) -> set[int]:
    return {i for i in range(bitmap.bit_count) if bitmap.is_set(i * bitmap.granularity)}


class BitmapAgainstSet(RuleBasedStateMachine):
    """Setting, clearing and asking, in any order, agrees with a set of granule numbers."""

    @initialize(size=sizes, granularity=granularities)
    def make(self, size: int, granularity: int) -> None:
        self.bitmap = Bitmap(size, granularity)
        self.model: set[int] = set()

    @rule(data=st.data())
    def set_range(self, data: st.DataObject) -> None:
        offset, length = data.draw(ranges(self.bitmap.size))
        self.bitmap.set_range(offset, length)
        self.model |= granules(self.bitmap, offset, length)

    @rule(data=st.data())
    def clear_range(self, data: st.DataObject) -> None:
        offset, length = data.draw(ranges(self.bitmap.size))
        self.bitmap.clear_range(offset, length)
        self.model -= granules(self.bitmap, offset, length)

    @rule()
    def set_all(self) -> None:
        self.bitmap.set_all()
        self.model = set(range(self.bitmap.bit_count))

    @rule(data=st.data())
    def ask_extents(self, data: st.DataObject) -> None:
        offset, length = data.draw(ranges(self.bitmap.size))
        extents = self.bitmap.extents(offset, length)
        assert extents.total() == length
        at, before = offset, None
        for part, status in extents.pairs():
            assert status != before, "equal neighbours"
            found = {granule in self.model for granule in granules(self.bitmap, at, part)}
            assert found == {bool(status)}
            at, before = at + part, status

    @invariant()
    def counts_agree(self) -> None:
        if not hasattr(self, "bitmap"):
            return
        assert self.bitmap.bits_set() == len(self.model)
        assert self.bitmap.is_empty() == (not self.model)
        each = self.bitmap.granularity
        dirty = sum(min(each, self.bitmap.size - i * each) for i in self.model)
        assert self.bitmap.dirty_bytes() == dirty
        assert sum(length for _, length in self.bitmap.dirty_ranges()) >= dirty


TestBitmapAgainstSet = BitmapAgainstSet.TestCase
TestBitmapAgainstSet.settings = settings(max_examples=50, stateful_step_count=30)


@given(st.data(), sizes, granularities, granularities)
def test_merge_across_granularities_never_misses_a_change(
    data: st.DataObject, size: int, mine: int, other: int
) -> None:
    """Rule 2: a merge may report too much, never too little; and not more than granules demand."""
    target, source = Bitmap(size, mine), Bitmap(size, other)
    for bitmap in (target, source):
        for offset, length in data.draw(st.lists(ranges(size), max_size=4)):
            bitmap.set_range(offset, length)
    expected = as_set(target)
    for granule in as_set(source):
        begin = granule * other
        expected |= granules(target, begin, min(other, size - begin))
    target.merge(source)
    assert as_set(target) == expected


def test_merge_of_another_size_is_refused() -> None:
    with pytest.raises(ValueError, match="cannot be merged"):
        Bitmap(1000, 512).merge(Bitmap(2000, 512))


@given(st.data(), sizes, granularities)
def test_subtract_leaves_what_the_other_lacks(
    data: st.DataObject, size: int, granularity: int
) -> None:
    first, second = Bitmap(size, granularity), Bitmap(size, granularity)
    for bitmap in (first, second):
        for offset, length in data.draw(st.lists(ranges(size), max_size=4)):
            bitmap.set_range(offset, length)
    expected = as_set(first) - as_set(second)
    first.subtract(second)
    assert as_set(first) == expected


@given(st.data(), sizes, sizes, granularities)
def test_resized_keeps_what_lies_inside_and_adds_nothing(
    data: st.DataObject, size: int, new_size: int, granularity: int
) -> None:
    bitmap = Bitmap(size, granularity)
    for offset, length in data.draw(st.lists(ranges(size), max_size=4)):
        bitmap.set_range(offset, length)
    resized = bitmap.resized(new_size)
    assert as_set(resized) == {i for i in as_set(bitmap) if i < resized.bit_count}


def test_bits_past_the_end_are_never_set() -> None:
    """QEMU's stored bitmaps have zero bits there; so have ours, whatever was loaded."""
    bitmap = Bitmap(3 * 512, 512, b"\xff")
    assert bytes(bitmap.data) == b"\x07"
    bitmap.set_all()
    assert bytes(bitmap.data) == b"\x07"


def test_data_is_packed_least_significant_bit_first() -> None:
    bitmap = Bitmap(16 * 512, 512)
    bitmap.set_range(0, 1)
    bitmap.set_range(9 * 512, 1)
    assert bytes(bitmap.data) == b"\x01\x02"


@pytest.mark.parametrize("granularity", [0, 256, 513, 3 << 9, 1 << 32])
def test_granularity_that_qemu_refuses_is_refused(granularity: int) -> None:
    with pytest.raises(ValueError, match="granularity"):
        Bitmap(4096, granularity)


def test_more_data_than_bits_is_refused() -> None:
    with pytest.raises(ValueError, match="bytes of bits"):
        Bitmap(4096, 512, bytes(2))


def test_extents_reach_across_scan_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    """Runs that cross the pieces in which a bitmap is scanned come out as one extent."""
    monkeypatch.setattr(bitmap_module, "_SCAN_BYTES", 2)
    bitmap = Bitmap(64 * 512, 512)
    bitmap.set_range(10 * 512, 30 * 512)
    expected = [(10 * 512, 0), (30 * 512, 1), (24 * 512, 0)]
    assert bitmap.extents(0, bitmap.size).pairs() == expected
    assert list(bitmap.dirty_ranges()) == [(10 * 512, 30 * 512)]


def test_extents_stop_at_the_maximum() -> None:
    bitmap = Bitmap(1000 * 512, 512)
    for granule in range(0, 1000, 2):
        bitmap.set_range(granule * 512, 1)
    assert bitmap.extents(0, bitmap.size, extents_max=3).pairs() == [(512, 1), (512, 0), (512, 1)]


class WatchedBitmap(Bitmap):
    """Notes how many granules are unpacked at once."""

    __slots__ = ("unpacked",)

    def _alternating(self, offset: int, end: int) -> Extents:
        self.unpacked.append(-(-end // self.granularity) - offset // self.granularity)
        return super()._alternating(offset, end)


@pytest.mark.parametrize("extents_max", [1, 2, 4095, 32768, 131072, 524287, 600_000, 1 << 20])
@pytest.mark.parametrize("pattern", [0xAA, 0x01, 0x10])
def test_no_more_is_unpacked_than_may_be_full_of_extents(extents_max: int, pattern: int) -> None:
    """What is found beyond the maximum is thrown away; memory for it has to be cleared (rule 5)."""
    bitmap = WatchedBitmap(512 * (1 << 20), 512)
    bitmap.array()[:: 2 if pattern == 0x10 else 1] = pattern
    bitmap.unpacked = []
    offset = 512 * 5 + 7
    whole = bitmap.extents(offset, bitmap.size - offset, extents_max=1 << 20)
    bitmap.unpacked = []
    found = bitmap.extents(offset, bitmap.size - offset, extents_max=extents_max)
    assert found.pairs() == whole.pairs()[:extents_max]
    assert max(bitmap.unpacked) <= max(extents_max + 24, 8 * 4096)


@pytest.mark.parametrize("size", [1 << 40, (1 << 40) - 12345, 40 << 30])
def test_large_bitmaps_copy_and_merge_alike(size: int) -> None:
    """Where memory is mapped and zeroes are skipped, by whole pages, nothing else is."""
    chance = random.Random(size)
    ours, theirs = Bitmap(size), Bitmap(size)
    expected = [bytearray(len(ours.data)) for _ in range(2)]
    for bitmap, bits in zip((ours, theirs), expected, strict=True):
        for _ in range(200):
            bit = chance.choice([chance.randrange(bitmap.bit_count), bitmap.bit_count - 1])
            bitmap.set_range(bit * 65536, 1)
            bits[bit >> 3] |= 1 << (bit & 7)
    assert ours.copy() == ours
    assert bytes(ours.copy().data) == expected[0]
    ours.merge(theirs)
    merged = bytes(a | b for a, b in zip(*expected, strict=True))
    assert bytes(ours.data) == merged
    assert ours.bits_set() == int.from_bytes(merged, "little").bit_count()


@pytest.mark.parametrize("size", [1 << 40, 65536 * 13])
def test_put_stores_what_lies_in_the_disk(size: int) -> None:
    bitmap = Bitmap(size)
    last = len(bitmap.data) - 1
    bitmap.put(0, memoryview(b"\x05"))
    bitmap.put(last, memoryview(b"\xff" * 100))
    bitmap.put(last + 1, memoryview(b"\xff" * 100))
    inside = bitmap.bit_count - 8 * last
    assert bitmap.bits_set() == 2 + inside
    bitmap.put(0, memoryview(b"\0"))
    assert bitmap.bits_set() == inside


def test_bits_of_a_range_are_the_bytes_of_all_granules_that_it_touches() -> None:
    bitmap = Bitmap(100 * 512, 512, bytes(range(13)))
    assert bitmap.bits_of(0, 1) == b"\0"
    assert bitmap.bits_of(8 * 512 - 1, 2) == b"\0\1"
    assert bitmap.bits_of(8 * 512, 16 * 512) == b"\1\2"
    assert bitmap.bits_of(0, bitmap.size) == bitmap.data
    assert bitmap.bits_of(0, 1).readonly
