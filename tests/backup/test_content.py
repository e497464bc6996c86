from __future__ import annotations

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from nbdfleece.backup.blocks import ABSENT, DATA, ZEROES
from nbdfleece.backup.content import PENDING, compose, stack
from nbdfleece.extents import Extents

LAYER = st.lists(st.sampled_from([ABSENT, DATA, ZEROES]), max_size=12)


def packed(states: list[int]) -> Extents:
    return Extents.from_pairs((1, state) for state in states)


@given(st.lists(LAYER, min_size=1, max_size=4))
def test_every_byte_is_in_the_topmost_layer_that_says_anything(layers: list[list[int]]) -> None:
    """Also past the end of shorter layers, where what is below is cut off."""
    size = len(layers[0])
    expected = []
    for position in range(size):
        found = PENDING
        for number, layer in enumerate(layers):
            if position >= len(layer):
                found = 0
            elif layer[position] != ABSENT:
                found = number + 1 if layer[position] == DATA else 0
            else:
                continue
            break
        expected.append(found)
    extents = stack([packed(layer) for layer in layers], size)
    assert np.repeat(extents.status, extents.lengths).tolist() == expected
    whole = compose([packed(layer) for layer in layers], size)
    assert np.repeat(whole.status, whole.lengths).tolist() == [
        0 if state == PENDING else state for state in expected
    ]
