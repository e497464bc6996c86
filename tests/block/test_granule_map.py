"""Granule maps against a plain dictionary."""

from __future__ import annotations

import gc
import tracemalloc

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from nbdfleece.block.granule_map import PAGE_GRANULES, GranuleMap, page_end

GRANULES = 5 * PAGE_GRANULES
writes = st.lists(
    st.tuples(
        st.integers(0, GRANULES - 1),
        st.integers(1, 2 * PAGE_GRANULES + 100),
        st.integers(0, 1 << 31),
        st.sampled_from([0, 1]),
    ),
    max_size=8,
)


@given(writes, st.integers(0, GRANULES - 1), st.integers(1, GRANULES))
def test_codes_are_what_was_set_last(
    rows: list[tuple[int, int, int, int]], first: int, length: int
) -> None:
    granules, model = GranuleMap(), {}
    for begin, count, code, step in rows:
        codes = (np.arange(count) * step + code).astype(np.uint32)
        granules.set(begin, codes)
        model.update(zip(range(begin, begin + count), codes.tolist(), strict=True))
        granules.set_one(begin, code + 7)
        model[begin] = code + 7
    found = granules.codes(first, first + length).tolist()
    assert found == [model.get(i, 0) for i in range(first, first + length)]
    assert granules.code_list(first, first + length) == found
    assert granules.code(first) == model.get(first, 0)
    model = {granule: code for granule, code in model.items() if code}
    pages = sorted({granule // PAGE_GRANULES * PAGE_GRANULES for granule in model})
    touched = [max(first, page) for page in pages if page_end(page) > first]
    assert granules.next_page(first, first + length) == min([*touched, first + length])
    taken = {}
    for number in granules.pages():
        begin = number * PAGE_GRANULES
        codes = granules.codes(begin, begin + PAGE_GRANULES)
        taken.update({begin + i: code for i, code in enumerate(codes.tolist()) if code})
        granules.drop_page(number)
    assert taken == model
    assert granules.pages() == []
    assert len(granules) == 0


def test_codes_that_are_alike_take_no_memory() -> None:
    """Rule 5: a guest that discards terabytes has few codes but no copies that a quota counts."""
    granules = GranuleMap()
    half = np.full(PAGE_GRANULES // 2, 3, dtype=np.uint32)
    for first in range(0, 3000 * PAGE_GRANULES, PAGE_GRANULES // 2):
        granules.set(first, half)
    assert len(granules) == 0
    assert granules.code(2999 * PAGE_GRANULES) == 3
    granules.set_one(70, 9)
    assert granules.code_list(69, 72) == [3, 9, 3]
    assert len(granules) == 1


def test_memory_goes_with_the_last_page_that_takes_some() -> None:
    """Rule 5: a snapshot that stands on after it was broken or released keeps nothing."""
    granules = GranuleMap()
    tracemalloc.start()
    try:
        for page in range(2000):
            granules.set_one(page * PAGE_GRANULES + 1, 7)
        assert tracemalloc.get_traced_memory()[0] > 2000 * 4 * PAGE_GRANULES
        for page in granules.pages():
            granules.drop_page(page)
        assert tracemalloc.get_traced_memory()[0] < 100_000
    finally:
        tracemalloc.stop()
    granules.set_one(3, 7)
    assert granules.code_list(2, 5) == [0, 7, 0]


def test_pages_are_no_objects_that_the_garbage_collector_visits() -> None:
    granules = GranuleMap()
    granules.set_one(0, 1)
    before = len(gc.get_objects())
    for page in range(500):
        granules.set_one(page * PAGE_GRANULES, 1)
    assert len(granules) == 500
    assert len(gc.get_objects()) - before < 10


def test_next_page_of_a_huge_disk_is_found_by_what_exists() -> None:
    """Rule 5: a disk of 2 PiB has a quarter of a million directories, few of which exist."""
    granules = GranuleMap()
    end = 1 << 39
    assert granules.next_page(5, end) == end
    far = [7, 1 << 30, (1 << 38) + 9]
    for granule in far:
        granules.set_one(granule, 1)
    pages = [granule // PAGE_GRANULES * PAGE_GRANULES for granule in far]
    assert [granules.next_page(page_end(page), end) for page in pages] == [*pages[1:], end]
    assert granules.next_page(page_end(pages[0]), 1 << 29) == 1 << 29
