"""Chains against a plain list of sets: whatever is deleted, no change is lost (rule 2)."""

from __future__ import annotations

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from nbdfleece.bitmaps.bitmap import Bitmap
from nbdfleece.engine.chain import Chain, Checkpoint, CheckpointState, new_identity
from nbdfleece.engine.disk_state import DiskBitmap, DiskState
from nbdfleece.errors import StateError

SIZE = 64 * 4096
GRANULES = 64


def checkpoint(name: str) -> Checkpoint:
    return Checkpoint(id=new_identity(), name=name, created_ns=0, size=SIZE)


def state_with(*names: str) -> DiskState:
    state = DiskState({}, Chain())
    for name in names:
        state = state.with_checkpoint(checkpoint(name), 4096)
    return state


def granules_of(bitmap: Bitmap) -> set[int]:
    return {i for i in range(GRANULES) if bitmap.is_set(i * 4096)}


def since(state: DiskState, name: str) -> set[int]:
    """What the state says has changed since a checkpoint."""
    state.check_since(name)
    found: set[int] = set()
    for each in state.chain.checkpoints[state.chain.index(name) :]:
        bits = state.bitmaps[each.bitmap_name].bits
        assert bits is not None
        found |= granules_of(bits)
    return found


class ChainAgainstSets(RuleBasedStateMachine):
    """Writes, new checkpoints and deletions of any checkpoint, in any order.

    The model keeps, for every checkpoint that exists, the set of granules written since.
    """

    def __init__(self) -> None:
        super().__init__()
        self.state = DiskState({}, Chain())
        self.written: dict[str, set[int]] = {}
        self.made = 0

    @rule(granule=st.integers(0, GRANULES - 1))
    def write(self, granule: int) -> None:
        for bits in self.state.recording:
            bits.set_range(granule * 4096, 4096)
        for changed in self.written.values():
            changed.add(granule)

    @rule()
    def add(self) -> None:
        name = f"c{self.made}"
        self.made += 1
        self.state = self.state.with_checkpoint(checkpoint(name), 4096)
        self.written[name] = set()

    @precondition(lambda self: self.written)
    @rule(data=st.data())
    def delete(self, data: st.DataObject) -> None:
        name = data.draw(st.sampled_from(sorted(self.written)))
        self.state = self.state.without_checkpoint(name)
        del self.written[name]

    @invariant()
    def changes_are_exact(self) -> None:
        for name, changed in self.written.items():
            assert since(self.state, name) == changed

    @invariant()
    def one_bitmap_records(self) -> None:
        """The design: however many checkpoints there are, a write marks one bitmap."""
        assert len(self.state.recording) == bool(self.written)

    @invariant()
    def no_bitmap_is_left_over(self) -> None:
        assert set(self.state.bitmaps) == set(self.written)


TestChainAgainstSets = ChainAgainstSets.TestCase
TestChainAgainstSets.settings = settings(max_examples=50, stateful_step_count=30)


def test_name_of_a_checkpoint_is_taken() -> None:
    with pytest.raises(StateError, match="checkpoint 'a' exists"):
        state_with("a").with_checkpoint(checkpoint("a"), 4096)


def test_name_of_a_foreign_bitmap_is_taken() -> None:
    foreign = DiskBitmap("a", 4096, True, bits=Bitmap(SIZE, 4096))
    with pytest.raises(StateError, match="bitmap 'a' exists"):
        DiskState({"a": foreign}, Chain()).with_checkpoint(checkpoint("a"), 4096)


def test_foreign_bitmaps_go_on_recording() -> None:
    foreign = DiskBitmap("theirs", 4096, True, bits=Bitmap(SIZE, 4096))
    state = DiskState({"theirs": foreign}, Chain()).with_checkpoint(checkpoint("a"), 4096)
    assert len(state.recording) == 2


@pytest.mark.parametrize(
    ("broken", "good"), [("a", ["b", "c"]), ("b", ["c"]), ("c", [])], ids=["first", "mid", "last"]
)
def test_broken_link_spoils_only_what_goes_through_it(broken: str, good: list[str]) -> None:
    """A chain with a missing or inconsistent link says which and from where it is unusable."""
    state = state_with("a", "b", "c")
    damaged = state.bitmaps[broken]._replace(inconsistent=True, bits=None)
    state = state._replace(bitmaps={**state.bitmaps, broken: damaged})
    for name in ("a", "b", "c"):
        if name in good:
            state.check_since(name)
        else:
            with pytest.raises(StateError, match=f"'{broken}' is inconsistent"):
                state.check_since(name)


def test_missing_bitmap_is_a_broken_link() -> None:
    state = state_with("a", "b")
    left = {name: each for name, each in state.bitmaps.items() if name != "a"}
    with pytest.raises(StateError, match="'a' is missing"):
        state._replace(bitmaps=left).check_since("a")


def test_disabled_newest_bitmap_is_a_broken_link() -> None:
    state = state_with("a")
    stopped = state.bitmaps["a"]._replace(recording=False)
    state = state._replace(bitmaps={"a": stopped})
    with pytest.raises(StateError, match="disabled"):
        state.check_since("a")


@pytest.mark.parametrize("broken", ["a", "b"])
def test_merging_with_a_broken_link_stays_broken(broken: str) -> None:
    """Rule 2: what cannot be proven complete is inconsistent, never exported as if it were good."""
    state = state_with("a", "b", "c")
    damaged = state.bitmaps[broken]._replace(inconsistent=True, bits=None)
    state = state._replace(bitmaps={**state.bitmaps, broken: damaged}).without_checkpoint("b")
    with pytest.raises(StateError, match="inconsistent"):
        state.check_since("a")
    state.check_since("c")


def test_deleting_a_broken_oldest_checkpoint_heals_the_chain() -> None:
    state = state_with("a", "b")
    damaged = state.bitmaps["a"]._replace(inconsistent=True, bits=None)
    state = state._replace(bitmaps={**state.bitmaps, "a": damaged}).without_checkpoint("a")
    state.check_since("b")
    assert list(state.bitmaps) == ["b"]


def test_deleting_the_newest_lets_the_one_before_record_again() -> None:
    state = state_with("a", "b").without_checkpoint("b")
    assert state.bitmaps["a"].recording


@pytest.mark.parametrize("closing", [False, True])
def test_only_recording_bitmaps_are_in_use_and_only_while_open(closing: bool) -> None:
    """Frozen bitmaps stay clean on disk, so that a crash costs one bitmap and not the chain."""
    stored = [each.stored(closing=closing) for each in state_with("a", "b").bitmaps.values()]
    assert [(each.name, each.recording, each.in_use) for each in stored] == [
        ("a", False, False),
        ("b", True, not closing),
    ]


def test_frozen_bits_leave_memory_once_stored() -> None:
    state = state_with("a", "b").after_store()
    assert state.bitmaps["a"].bits is None
    assert state.bitmaps["b"].bits is not None


def test_state_of_a_checkpoint_changes_without_touching_bitmaps() -> None:
    state = state_with("a")
    changed = state.with_checkpoint_state("a", CheckpointState.DELETING)
    assert changed.bitmaps is state.bitmaps
    found = changed.chain.find("a")
    assert found is not None
    assert found.state is CheckpointState.DELETING
