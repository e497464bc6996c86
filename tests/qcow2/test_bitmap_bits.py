"""Bits cut into clusters: what is uniform takes no space, the rest comes back exactly."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from nbdfleece.bitmaps.bitmap import Bitmap
from nbdfleece.qcow2.bitmap_bits import cluster_runs, data_clusters, pack_bits, span_clusters

CLUSTER = 512


@given(st.integers(1, 20_000), st.lists(st.tuples(st.integers(0, 19_999), st.integers(1, 9000))))
def test_table_and_data_say_what_the_bits_say(
    bit_count: int, ranges: list[tuple[int, int]]
) -> None:
    bitmap = Bitmap(bit_count * 512, 512)
    for first, count in ranges:
        if first < bit_count:
            bitmap.set_range(first * 512, min(count, bit_count - first) * 512)
    packed = pack_bits(bytes(bitmap.data), bit_count, CLUSTER)
    table = packed.table(1 << 20)
    parts = []
    for entry in table.tolist():
        index = (entry - (1 << 20)) // CLUSTER
        uniform = {0: bytes(CLUSTER), 1: b"\xff" * CLUSTER}
        parts.append(uniform[entry] if entry < 2 else packed.data[index].tobytes())
    assert Bitmap(bit_count * 512, 512, b"".join(parts)[: len(bitmap.data)]) == bitmap
    stored = [part for part, entry in zip(parts, table, strict=True) if entry > 1]
    assert all(any(part) and part != b"\xff" * CLUSTER for part in stored)


@pytest.mark.parametrize(
    ("bit_count", "stored"),
    [(1, 1), (63, 1), (64, 0), (4095, 1), (4096, 0), (4097, 1), (4096 + 64, 0), (5000, 1)],
)
def test_bits_that_are_all_set_take_no_cluster_unless_a_word_reaches_past_the_end(
    bit_count: int, stored: int
) -> None:
    bitmap = Bitmap(bit_count * 512, 512)
    assert not len(pack_bits(bytes(bitmap.data), bit_count, CLUSTER).data)
    bitmap.set_all()
    assert len(pack_bits(bytes(bitmap.data), bit_count, CLUSTER).data) == stored


def test_runs_are_ascending_and_as_long_as_they_can_be() -> None:
    offsets = np.array([9, 4, 5, 7, 8, 1], dtype=np.uint64) * np.uint64(CLUSTER)
    runs = [(offset // CLUSTER, count) for offset, count in cluster_runs(offsets, CLUSTER)]
    assert runs == [(1, 1), (4, 2), (7, 3)]
    assert list(cluster_runs(offsets[:0], CLUSTER)) == []


def test_span_covers_a_part_of_a_cluster() -> None:
    assert span_clusters(1024, 513, CLUSTER).tolist() == [1024, 1536]
    assert span_clusters(0, 0, CLUSTER).tolist() == []


def test_data_clusters_leaves_out_what_takes_no_space() -> None:
    assert data_clusters(np.array([0, 512, 1, 1024], dtype=np.uint64)).tolist() == [512, 1024]
