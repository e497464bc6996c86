from __future__ import annotations

import random

import numpy as np
import pytest

from nbdfleece.block.host_file import BELOW, ELSEWHERE, ZEROES
from nbdfleece.qcow2 import entries as entries_module
from nbdfleece.qcow2.entries import (
    COMPRESSED,
    COPIED,
    INVALID,
    OFFSET_MASK,
    SUBCLUSTERS,
    ZERO,
    Kind,
    L2Table,
    Layout,
    find_runs,
    host_places,
    kind_of,
)
from nbdfleece.qcow2.table_codec import pack_table, unpack_table

SIZE = 65536


def random_table(rng: random.Random, count: int) -> L2Table:
    """Entries of all kinds, with runs in them."""
    values: list[int] = []
    while len(values) < count:
        host = rng.randrange(1, 1 << 20) * SIZE
        plain = [0, ZERO, host | COPIED, host, host | COPIED | ZERO]
        start = rng.choice([*plain, COMPRESSED | 12345, SUBCLUSTERS | host, INVALID])
        step = SIZE if start & OFFSET_MASK and not start & (COMPRESSED | SUBCLUSTERS) else 0
        values += [start + i * step for i in range(rng.choice([1, 2, 30, 100]))]
    return L2Table(SIZE, np.array(values[:count], dtype=np.uint64), None)


@pytest.mark.parametrize("seed", range(20))
def test_runs_found_one_by_one_and_at_once_are_the_same(
    seed: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    rng = random.Random(seed)
    table = random_table(rng, 1000)
    first, end = sorted(rng.sample(range(1001), 2))
    at_once = find_runs(table, first, end, SIZE)
    monkeypatch.setattr(entries_module, "_SCALAR_MAX", 1 << 20)
    assert find_runs(table, first, end, SIZE) == at_once
    assert sum(run.clusters for run in at_once) == end - first
    index = first
    for run in at_once:
        assert run.entry == table.entries[index]
        kinds = {kind_of(entry) for entry in table.entries[index : index + run.clusters]}
        assert kinds == {run.kind}
        index += run.clusters


@pytest.mark.parametrize("unallocated", [ZEROES, BELOW])
@pytest.mark.parametrize("seed", range(5))
def test_places_are_told_of_what_is_the_disks_alone(seed: int, unallocated: int) -> None:
    table = random_table(random.Random(seed), 1000)
    for entry, place in zip(table.entries, host_places(table.array, unallocated), strict=True):
        kind = kind_of(entry)
        if kind is Kind.NORMAL:
            assert place == (entry & OFFSET_MASK if entry & COPIED else ELSEWHERE)
        elif kind is Kind.UNALLOCATED:
            assert place == unallocated
        else:
            assert place == (ZEROES if kind in (Kind.ZERO_PLAIN, Kind.ZERO_ALLOC) else ELSEWHERE)


@pytest.mark.parametrize("count", [1, 64, 65, 500])
def test_set_run_steps_through_host_clusters(count: int) -> None:
    table = L2Table(0, np.zeros(600, dtype=np.uint64), None)
    table.set_run(7, count, COPIED | SIZE, SIZE)
    assert find_runs(table, 7, 7 + count, SIZE) == [(Kind.NORMAL, count, COPIED | SIZE)]
    assert not table.array[:7].any()
    assert not table.array[7 + count :].any()


@pytest.mark.parametrize("is_run", [True, False])
def test_who_wants_a_table_as_it_is_is_told_before_it_changes(is_run: bool) -> None:
    """Rule 4: a flush writes what it has taken."""
    table = L2Table(0, np.zeros(600, dtype=np.uint64), np.zeros(600, dtype=np.uint64))
    seen = []

    def look() -> None:
        table.before_change = None
        seen.append(table.entries[7] + table.bitmap(7))

    table.before_change = look
    for _ in range(2):
        if is_run:
            table.set_run(7, 1, COPIED | SIZE, SIZE)
        else:
            table.set_bitmap(7, 1)
    assert seen == [0]


@pytest.mark.parametrize(
    ("version", "entry", "kind"),
    [
        (3, 0, Kind.UNALLOCATED),
        (3, COPIED, Kind.UNALLOCATED),
        (3, 1, Kind.ZERO_PLAIN),
        (3, COPIED | SIZE, Kind.NORMAL),
        (3, SIZE | 1, Kind.ZERO_ALLOC),
        (3, COMPRESSED | 7, Kind.COMPRESSED),
        (3, SIZE | 1 << 60 | 2, Kind.NORMAL),  # reserved bits: reported by check, not obeyed
        (3, SIZE + 512, Kind.INVALID),
        (3, 100 * SIZE, Kind.INVALID),
        (2, 1, Kind.INVALID),
    ],
)
def test_entry_of_the_file_has_its_kind(version: int, entry: int, kind: Kind) -> None:
    layout = Layout(16, version, has_extended_l2=False, has_data_file=False)
    raw = entry.to_bytes(8, "big") + bytes(SIZE - 8)
    table = unpack_table(raw, SIZE, layout, 100 * SIZE, 0)
    assert kind_of(table.entries[0]) is kind
    assert table.is_invalid == (kind is Kind.INVALID)


@pytest.mark.parametrize(
    ("entry", "bitmap", "kind"),
    [
        (0, 0, Kind.UNALLOCATED),
        (0, 0xFFFFFFFF << 32, Kind.ZERO_PLAIN),
        (COPIED | SIZE, 0xFFFFFFFF, Kind.NORMAL),
        (COPIED | SIZE, 0xFFFFFFFF << 32, Kind.ZERO_ALLOC),
        (COPIED | SIZE, 1, Kind.SUBCLUSTERS),
        (COPIED | SIZE, 0, Kind.SUBCLUSTERS),
        (0, 1 << 40, Kind.SUBCLUSTERS),
        (COMPRESSED | 7, 0, Kind.COMPRESSED),
        (COMPRESSED | 7, 1, Kind.INVALID),
        (0, 1, Kind.INVALID),
        (COPIED | SIZE, 1 << 32 | 1, Kind.INVALID),
    ],
)
def test_extended_entry_has_its_kind_and_is_packed_alike(
    entry: int, bitmap: int, kind: Kind
) -> None:
    layout = Layout(16, 3, has_extended_l2=True, has_data_file=False)
    raw = entry.to_bytes(8, "big") + bitmap.to_bytes(8, "big") + bytes(SIZE - 16)
    table = unpack_table(raw, SIZE, layout, 100 * SIZE, 0)
    assert kind_of(table.entries[0]) is kind
    if kind is not Kind.INVALID:
        assert pack_table(table, 0, 1) == raw[:16]


def test_data_file_entry_must_be_at_its_guest_offset() -> None:
    layout = Layout(16, 3, has_extended_l2=False, has_data_file=True)
    values = [COPIED, COPIED | SIZE, COPIED | 5 * SIZE]
    raw = b"".join(value.to_bytes(8, "big") for value in values).ljust(SIZE, b"\0")
    table = unpack_table(raw, SIZE, layout, 2 * SIZE, 0)
    kinds = [kind_of(entry) for entry in table.entries[:3]]
    assert kinds == [Kind.NORMAL, Kind.NORMAL, Kind.INVALID]
