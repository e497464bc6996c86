"""Granule maps against a plain dictionary."""

from __future__ import annotations

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from nbdfleece.block.granule_map import PAGE_GRANULES, GranuleMap, page_end

GRANULES = 5 * PAGE_GRANULES
writes = st.lists(
    st.tuples(st.integers(0, GRANULES - 1), st.integers(1, 700), st.integers(1, 1 << 31)),
    max_size=8,
)


@given(writes, st.integers(0, GRANULES - 1), st.integers(1, GRANULES))
def test_codes_are_what_was_set_last(
    rows: list[tuple[int, int, int]], first: int, length: int
) -> None:
    granules, model = GranuleMap(), {}
    for begin, count, code in rows:
        codes = np.arange(code, code + count, dtype=np.uint32)
        granules.set(begin, codes)
        model.update(zip(range(begin, begin + count), codes.tolist(), strict=True))
    found = granules.codes(first, first + length).tolist()
    assert found == [model.get(i, 0) for i in range(first, first + length)]
    assert granules.code(first) == model.get(first, 0)
    pages = sorted({granule // PAGE_GRANULES * PAGE_GRANULES for granule in model})
    touched = [max(first, page) for page in pages if page_end(page) > first]
    assert granules.next_page(first, first + length) == min([*touched, first + length])
    taken = {}
    for begin, codes in granules.take_pages():
        taken.update({begin + i: code for i, code in enumerate(codes.tolist()) if code})
    assert taken == model
    assert len(granules) == 0
