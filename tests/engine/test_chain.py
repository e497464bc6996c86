"""The chain record: what goes into the image comes out of it, and nothing else does."""

from __future__ import annotations

import zlib
from contextlib import suppress

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from nbdfleece.engine import chain as chain_module
from nbdfleece.engine.chain import (
    Chain,
    Checkpoint,
    CheckpointState,
    check_name,
    new_identity,
    pack_chain,
    unpack_chain,
)
from nbdfleece.errors import StateError

identities = st.binary(min_size=8, max_size=8).map(bytes.hex)
checkpoints = st.builds(
    Checkpoint,
    id=identities,
    name=st.text(min_size=1, max_size=40),
    created_ns=st.integers(0, 1 << 62),
    size=st.integers(0, 1 << 62),
    owner=st.text(max_size=20),
    bitmap=st.text(max_size=20),
    state=st.sampled_from(CheckpointState),
    disks=st.lists(identities, max_size=3).map(tuple),
)
chains = st.lists(checkpoints, max_size=20, unique_by=lambda each: each.name).map(
    lambda found: Chain(disk_id="0123456789abcdef", checkpoints=tuple(found))
)


def checkpoint(name: str, **changes: object) -> Checkpoint:
    return Checkpoint(id=new_identity(), name=name, created_ns=1, size=1 << 30, **changes)  # type: ignore[arg-type]


@given(chains)
def test_record_survives_packing(chain: Chain) -> None:
    assert unpack_chain(pack_chain(chain)) == chain


@given(chains, st.data())
def test_damaged_record_is_refused_or_another_valid_one(chain: Chain, data: st.DataObject) -> None:
    record = bytearray(pack_chain(chain))
    position = data.draw(st.integers(0, len(record) - 1))
    record[position] ^= 1 << data.draw(st.integers(0, 7))
    with suppress(StateError):
        assert isinstance(unpack_chain(bytes(record)), Chain)


def test_thousand_checkpoints_fit_into_a_slot_of_32_kib() -> None:
    """The design: history is as long as you like; a slot of a 64 KiB cluster bears a thousand."""
    found = tuple(
        checkpoint(f"backup-2026-{number:04d}", owner="nightly") for number in range(1000)
    )
    assert len(pack_chain(Chain(disk_id=new_identity(), checkpoints=found))) < 31 << 10


def test_record_that_inflates_without_end_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(chain_module, "RECORD_BYTES_MAX", 1000)
    with pytest.raises(StateError, match="larger than"):
        unpack_chain(zlib.compress(bytes(100_000)))


def test_later_version_is_refused_by_its_number() -> None:
    with pytest.raises(StateError, match="version 2"):
        unpack_chain(pack_chain(Chain(version=2)))


def test_record_with_a_name_twice_is_refused() -> None:
    twice = Chain(checkpoints=(checkpoint("a"), checkpoint("a")))
    with pytest.raises(StateError, match="twice"):
        unpack_chain(pack_chain(twice))


@pytest.mark.parametrize("record", [b"", b"junk", zlib.compress(b"junk"), zlib.compress(b"")])
def test_junk_is_refused(record: bytes) -> None:
    with pytest.raises(StateError, match="chain record"):
        unpack_chain(record)


def test_settled_checkpoint_forgets_its_disks() -> None:
    pending = checkpoint("a", state=CheckpointState.PENDING, disks=("1", "2"))
    assert pending.in_state(CheckpointState.COMMITTED).disks == ()


@pytest.mark.parametrize("name", ["monday", "owner/näme 1", "x" * 255, "^a:b"])
def test_names_that_can_serve_are_taken(name: str) -> None:
    check_name(name, "checkpoint")


@pytest.mark.parametrize("name", ["", "x" * 256, "ä" * 128, "a\nb", "a\0b", "\udc80"])
def test_names_that_cannot_serve_are_refused(name: str) -> None:
    with pytest.raises(StateError):
        check_name(name, "checkpoint")


def test_later_versions_may_add_fields_at_the_end() -> None:
    """MessagePack arrays with more entries than this program knows still decode."""
    packed = msgspec.msgpack.encode([1, "0123456789abcdef", [], True, None, None, "new field"])
    assert unpack_chain(zlib.compress(packed)).disk_id == "0123456789abcdef"
