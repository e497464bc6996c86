"""Snapshots, checkpoints and backups over real images, and QEMU's opinion of the result."""

from __future__ import annotations

import asyncio
import errno
import subprocess
from pathlib import Path
from typing import Any

import pytest

from nbdfleece.block.file import FileNode
from nbdfleece.engine.chain import CheckpointState
from nbdfleece.engine.engine import Engine
from nbdfleece.errors import ImageLockedError, StateError
from nbdfleece.qcow2.activity_log import REGION_BYTES
from tests.engine.rig import (
    CLUSTER,
    SIZE,
    dirty_clusters,
    killed,
    make_image,
    open_engine,
    qemu_img,
    read_export,
    stored_bitmaps,
    write,
)


@pytest.fixture
def images(tmp_path: Path) -> list[Path]:
    return [make_image(tmp_path / f"{name}.qcow2") for name in ("vda", "vdb")]


async def backup(engine: Engine, name: str, since: str | None = None) -> None:
    await engine.begin_backup(f"job-{name}", checkpoint=name, since=since)
    await engine.commit_backup(f"job-{name}")


async def test_backup_shows_what_changed_since_and_the_bytes_of_its_instant(
    tmp_path: Path, images: list[Path]
) -> None:
    engine = await open_engine(tmp_path, *images)
    await write(engine, "vda", 0, b"1" * CLUSTER)
    await backup(engine, "monday")
    await write(engine, "vda", CLUSTER, b"2" * CLUSTER)
    await write(engine, "vdb", 5 * CLUSTER, b"3")
    told = await engine.begin_backup("job", checkpoint="tuesday", since="monday")
    frozen = await read_export(engine, "vda")
    await write(engine, "vda", 0, b"4" * (3 * CLUSTER))
    assert [each.context for each in told] == ["qemu:dirty-bitmap:monday"] * 2
    assert [each.reason for each in told] == [None] * 2
    assert await dirty_clusters(engine, "job/vda", "monday") == {1}
    assert await dirty_clusters(engine, "job/vdb", "monday") == {5}
    assert await read_export(engine, "job/vda") == frozen
    await engine.commit_backup("job")
    await engine.begin_backup("next", since="tuesday")
    assert await dirty_clusters(engine, "next/vda", "tuesday") == {0, 1, 2}
    await engine.close()


async def test_closed_images_are_clean_and_list_their_bitmaps_in_qemu(
    tmp_path: Path, images: list[Path]
) -> None:
    """Rule 7: what we write, QEMU reads, with its bitmaps."""
    engine = await open_engine(tmp_path, *images)
    await backup(engine, "monday")
    await write(engine, "vda", 0, b"x")
    await backup(engine, "tuesday")
    await engine.close()
    for image in images:
        assert stored_bitmaps(image) == {"monday": [], "tuesday": ["auto"]}


async def test_chain_survives_a_restart(tmp_path: Path, images: list[Path]) -> None:
    engine = await open_engine(tmp_path, *images)
    await backup(engine, "monday")
    await write(engine, "vda", 0, b"x")
    await backup(engine, "tuesday")
    await write(engine, "vda", 3 * CLUSTER, b"x")
    await engine.close()
    engine = await open_engine(tmp_path, *images)
    await write(engine, "vda", 5 * CLUSTER, b"x")
    await engine.begin_backup("job", since="monday")
    assert await dirty_clusters(engine, "job/vda", "monday") == {0, 3, 5}
    await engine.add_export("job", "vda", name="since-tuesday", since={"tuesday": "changes"})
    assert await dirty_clusters(engine, "since-tuesday", "changes") == {3, 5}
    await engine.close()


async def test_aborted_backup_leaves_the_chain_as_if_it_had_not_begun(
    tmp_path: Path, images: list[Path]
) -> None:
    engine = await open_engine(tmp_path, *images)
    await backup(engine, "monday")
    await write(engine, "vda", 0, b"x")
    await engine.begin_backup("job", checkpoint="tuesday", since="monday")
    await write(engine, "vda", 2 * CLUSTER, b"x")
    await engine.abort_backup("job")
    await write(engine, "vda", 4 * CLUSTER, b"x")
    await engine.begin_backup("again", checkpoint="tuesday", since="monday")
    assert await dirty_clusters(engine, "again/vda", "monday") == {0, 2, 4}
    await engine.commit_backup("again")
    await engine.close()
    assert stored_bitmaps(images[0]) == {"monday": [], "tuesday": ["auto"]}


async def test_pending_backup_is_aborted_when_the_server_stops(
    tmp_path: Path, images: list[Path]
) -> None:
    engine = await open_engine(tmp_path, *images)
    await backup(engine, "monday")
    await engine.begin_backup("job", checkpoint="tuesday", since="monday")
    await write(engine, "vda", 0, b"x")
    await engine.close()
    engine = await open_engine(tmp_path, *images)
    await engine.begin_backup("job", checkpoint="tuesday", since="monday")
    assert await dirty_clusters(engine, "job/vda", "monday") == {0}
    await engine.close()


@pytest.mark.parametrize("deleted", ["one", "two", "three"])
async def test_any_checkpoint_can_be_deleted(
    tmp_path: Path, images: list[Path], deleted: str
) -> None:
    """Oldest, middle and newest: its changes go to the one before, also across a restart."""
    engine = await open_engine(tmp_path, *images)
    for number, name in enumerate(["one", "two", "three"]):
        await backup(engine, name)
        await write(engine, "vda", number * CLUSTER, b"x")
    await engine.delete_checkpoint(deleted)
    for _ in range(2):
        await engine.begin_backup("job")
        for number, name in enumerate(["one", "two", "three"]):
            if name == deleted:
                with pytest.raises(StateError, match=f"no checkpoint '{name}'"):
                    await engine.add_export("job", "vda", name=name, since={name: name})
            else:
                await engine.add_export("job", "vda", name=name, since={name: name})
                assert await dirty_clusters(engine, name, name) == set(range(number, 3))
        await engine.close()
        stored = stored_bitmaps(images[0])
        assert deleted not in stored
        assert list(stored.values()) == [[], ["auto"]]
        engine = await open_engine(tmp_path, *images)
    await engine.close()


async def test_any_past_interval_can_be_asked_for(tmp_path: Path, images: list[Path]) -> None:
    """The changes from K to N are the union of the bitmaps of K to N-1, for any two."""
    engine = await open_engine(tmp_path, *images)
    names = ["one", "two", "three", "four"]
    for number, name in enumerate(names):
        await backup(engine, name)
        await write(engine, "vda", number * CLUSTER, b"x")
    await engine.begin_backup("job")
    between = {
        f"{first}-{last}": (first, last)
        for index, first in enumerate(names)
        for last in names[index + 1 :]
    }
    await engine.add_export("job", "vda", name="all", since={"one": "now"}, between=between)
    for leaf, (first, last) in between.items():
        expected = set(range(names.index(first), names.index(last)))
        assert await dirty_clusters(engine, "all", leaf) == expected
    assert await dirty_clusters(engine, "all", "now") == {0, 1, 2, 3}
    for first, last in (("two", "one"), ("one", "one")):
        with pytest.raises(StateError, match="not newer"):
            await engine.add_export("job", "vda", name="bad", between={"x": (first, last)})
    await engine.close()


@pytest.mark.parametrize(
    ("options", "left"),
    [
        ({"keep": 2}, ["c", "d"]),
        ({"keep": 1, "owner": "night"}, ["b", "c", "d"]),
        ({"keep": 0, "owner": "night"}, ["b", "d"]),
        ({"keep": 9}, ["a", "b", "c", "d"]),
        ({"older_than_seconds": 0}, []),
        ({"older_than_seconds": 3600}, ["a", "b", "c", "d"]),
        ({"keep": 3, "older_than_seconds": 0}, ["b", "c", "d"]),
    ],
)
async def test_prune_by_count_age_and_owner(
    tmp_path: Path, images: list[Path], options: dict[str, Any], left: list[str]
) -> None:
    """Several owners with independent needs on one disk: each prunes its own."""
    engine = await open_engine(tmp_path, images[0])
    for name, owner in (("a", "night"), ("b", "week"), ("c", "night"), ("d", "week")):
        await engine.create_checkpoint(name, owner=owner)
        await write(engine, "vda", 0, name.encode())
    gone = await engine.prune_checkpoints(**options)
    assert [each.name for each in engine.disk("vda").state.chain.checkpoints] == left
    assert sorted([*gone, *left]) == ["a", "b", "c", "d"]
    with pytest.raises(StateError, match="how many"):
        await engine.prune_checkpoints(owner="night")
    await engine.close()


async def test_owners_prune_their_own_and_take_nothing_from_the_others(
    tmp_path: Path, images: list[Path]
) -> None:
    """What the checkpoints of one mark goes to those of the other."""
    engine = await open_engine(tmp_path, images[0])
    expected: dict[str, set[int]] = {}
    for cluster, owner in enumerate(["week", "night", "night", "week", "night", "night"]):
        name = f"{owner}-{cluster}"
        await engine.create_checkpoint(name, owner=owner)
        await write(engine, "vda", cluster * CLUSTER, b"x")
        expected[name] = set()
        for changed in expected.values():
            changed.add(cluster)
    assert await engine.prune_checkpoints(keep=1, owner="night") == [
        "night-1",
        "night-2",
        "night-4",
    ]
    for name in ("week-0", "week-3", "night-5"):
        (part,) = await engine.begin_backup("look", since=name)
        assert await dirty_clusters(engine, part.export, name) == expected[name]
        await engine.abort_backup("look")
    await engine.close()


async def test_disk_without_the_checkpoint_is_read_in_full_with_the_reason(
    tmp_path: Path, images: list[Path]
) -> None:
    """A disk added later gets a full backup for that disk only."""
    engine = await open_engine(tmp_path, *images)
    await engine.begin_backup("first", ["vda"], checkpoint="monday")
    await engine.commit_backup("first")
    told = await engine.begin_backup("job", checkpoint="tuesday", since="monday")
    assert [each.context is not None for each in told] == [True, False]
    assert told[1].reason == "there is no checkpoint 'monday'"
    await engine.close()


# Kills


async def test_kill_loses_no_change_of_the_recording_bitmap(
    tmp_path: Path, images: list[Path]
) -> None:
    """Rule 2, where others need a full backup: whole regions are reported, none too few."""
    big = make_image(tmp_path / "big.qcow2", 1 << 30)
    engine = await open_engine(tmp_path, *images, big)
    await backup(engine, "monday")
    await write(engine, "big", 5 * REGION_BYTES, b"x")
    await backup(engine, "tuesday")
    await write(engine, "big", 3 * REGION_BYTES - 1, b"xy")
    await engine.disk("big").node.trim(9 * REGION_BYTES, CLUSTER)
    left = await killed(engine, tmp_path)
    await engine.close()
    assert stored_bitmaps(left[2], after_kill=True) == {"monday": [], "tuesday": ["in-use", "auto"]}
    for _ in range(2):
        engine = await open_engine(tmp_path, *left)
        told = await engine.begin_backup("job", since="tuesday")
        assert [each.reason for each in told] == [None] * 3
        dirty = await dirty_clusters(engine, "job/big", "tuesday")
        assert {cluster * CLUSTER // REGION_BYTES for cluster in dirty} == {2, 3, 9}
        await engine.add_export("job", "big", name="monday", since={"monday": "m"})
        dirty = await dirty_clusters(engine, "monday", "m")
        assert {cluster * CLUSTER // REGION_BYTES for cluster in dirty} == {2, 3, 5, 9}
        await engine.close()


async def test_kill_before_commit_leaves_the_chain_as_if_not_begun(
    tmp_path: Path, images: list[Path]
) -> None:
    """A crash before commit: the next incremental loses nothing."""
    big = make_image(tmp_path / "big.qcow2", 1 << 30)
    engine = await open_engine(tmp_path, big)
    await backup(engine, "monday")
    await write(engine, "big", 0, b"x")
    await engine.begin_backup("job", checkpoint="tuesday", since="monday")
    await write(engine, "big", 4 * REGION_BYTES, b"x")
    left = await killed(engine, tmp_path)
    await engine.close()
    engine = await open_engine(tmp_path, *left)
    assert [each.name for each in engine.disk("big").state.chain.checkpoints] == ["monday"]
    await engine.begin_backup("job", checkpoint="tuesday", since="monday")
    dirty = await dirty_clusters(engine, "job/big", "monday")
    assert {cluster * CLUSTER // REGION_BYTES for cluster in dirty} == {0, 4}
    await engine.close()


async def test_write_by_another_program_after_a_kill_voids_the_log(
    tmp_path: Path, images: list[Path]
) -> None:
    """Rule 2: recovery is allowed only if nobody else wrote in between; the reason is told."""
    engine = await open_engine(tmp_path, *images)
    await backup(engine, "monday")
    left = await killed(engine, tmp_path)
    await engine.close()
    qemu_io = ["qemu-io", "-f", "qcow2", "-c", "write 0 64k", str(left[0])]
    await asyncio.to_thread(subprocess.run, qemu_io, check=True, capture_output=True)
    engine = await open_engine(tmp_path, *left)
    told = await engine.begin_backup("job", checkpoint="tuesday", since="monday")
    assert "'monday' is inconsistent" in (told[0].reason or "")
    assert told[1].reason is None
    await engine.commit_backup("job")
    await write(engine, "vda", 2 * CLUSTER, b"x")
    await engine.begin_backup("next", since="tuesday")
    assert await dirty_clusters(engine, "next/vda", "tuesday") == {2}
    await engine.close()


OPERATIONS = {
    "begin": lambda engine: engine.begin_backup("job", checkpoint="wednesday", since="tuesday"),
    "snapshot": lambda engine: engine.create_snapshot("snap", checkpoint="wednesday"),
    "delete-oldest": lambda engine: engine.delete_checkpoint("monday"),
    "delete-newest": lambda engine: engine.delete_checkpoint("tuesday"),
}
AFTER = {
    "begin": [["monday", "tuesday"]],
    "snapshot": [["monday", "tuesday"], ["monday", "tuesday", "wednesday"]],
    "delete-oldest": [["monday", "tuesday"], ["tuesday"]],
    "delete-newest": [["monday", "tuesday"], ["monday"]],
}


@pytest.mark.parametrize("operation", OPERATIONS)
async def test_kill_at_every_file_write_leaves_all_or_nothing_and_no_change_missing(
    tmp_path: Path, images: list[Path], monkeypatch: pytest.MonkeyPatch, operation: str
) -> None:
    """Rules 2 and 6: killed before each write to an image while an operation runs."""
    engine = await open_engine(tmp_path, *images)
    await backup(engine, "monday")
    await write(engine, "vda", 0, b"x")
    await backup(engine, "tuesday")
    await write(engine, "vda", CLUSTER, b"x")
    real_write, points = FileNode.write, []

    async def write_or_die(self: FileNode, offset: int, data: memoryview) -> None:
        points.append(await killed(engine, tmp_path, len(points)))
        await real_write(self, offset, data)

    with monkeypatch.context() as patch:
        patch.setattr(FileNode, "write", write_or_die)
        await OPERATIONS[operation](engine)
    await engine.close()
    assert len(points) > 8
    for left in points:
        engine = await open_engine(tmp_path, *left)
        chains = [
            [each.name for each in disk.state.chain.checkpoints] for disk in engine.disks.values()
        ]
        assert chains[0] == chains[1]
        assert chains[0] in AFTER[operation]
        for name, changed in (("monday", {0, 1}), ("tuesday", {1})):
            if name in chains[0]:
                told = await engine.begin_backup(name, since=name)
                assert [each.reason for each in told] == [None, None]
                assert await dirty_clusters(engine, f"{name}/vda", name) >= changed
        await engine.close()
        for image in left:
            stored_bitmaps(image, after_kill=True)


# Several disks: rule 6


async def failing_store(engine: Engine, disk: str, monkeypatch: pytest.MonkeyPatch) -> None:
    async def fail(*_: Any, **__: Any) -> None:
        raise OSError(errno.EIO, "the image cannot be written")

    monkeypatch.setattr(engine.disk(disk), "_write", fail)


@pytest.mark.parametrize("failing", ["vda", "vdb"])
async def test_begin_that_fails_on_one_disk_happened_on_none(
    tmp_path: Path, images: list[Path], monkeypatch: pytest.MonkeyPatch, failing: str
) -> None:
    """Rule 6, and rule 2: writes of the failed attempt are in the next incremental."""
    engine = await open_engine(tmp_path, *images)
    await backup(engine, "monday")
    with monkeypatch.context() as patch:
        await failing_store(engine, failing, patch)
        with pytest.raises(OSError, match="cannot be written"):
            await engine.begin_backup("job", checkpoint="tuesday", since="monday")
    for name in ("vda", "vdb"):
        assert [each.name for each in engine.disk(name).state.chain.checkpoints] == ["monday"]
        await write(engine, name, 0, b"x")
    assert engine.snapshots == {}
    await engine.begin_backup("job", checkpoint="tuesday", since="monday")
    for name in ("vda", "vdb"):
        assert await dirty_clusters(engine, f"job/{name}", "monday") == {0}
    await engine.close()


@pytest.mark.parametrize(
    ("states", "left"),
    [
        ((CheckpointState.PENDING, CheckpointState.PENDING), []),
        ((CheckpointState.PENDING, None), []),
        ((CheckpointState.COMMITTED, CheckpointState.PENDING), ["tuesday"]),
        ((CheckpointState.PENDING, CheckpointState.COMMITTED), ["tuesday"]),
        ((CheckpointState.DELETING, CheckpointState.COMMITTED), []),
        ((CheckpointState.DELETING, None), []),
        ((None, CheckpointState.DELETING), []),
    ],
)
async def test_start_settles_what_a_crash_left_of_several_disks(
    tmp_path: Path,
    images: list[Path],
    states: tuple[CheckpointState | None, ...],
    left: list[str],
) -> None:
    """Rule 6: a pending checkpoint goes, a commit or deletion that began is finished."""
    engine = await open_engine(tmp_path, *images)
    await backup(engine, "monday")
    await engine.begin_backup("job", checkpoint="tuesday")
    for name, state in zip(("vda", "vdb"), states, strict=True):
        disk = engine.disk(name)
        if state is None:
            await disk.remove_checkpoint("tuesday")
        elif state is not CheckpointState.PENDING:
            await disk.store(disk.state.with_checkpoint_state("tuesday", state))
    copies = await killed(engine, tmp_path)
    await engine.close()
    engine = await open_engine(tmp_path, *copies)
    for disk in engine.disks.values():
        names = [each.name for each in disk.state.chain.checkpoints]
        assert names == ["monday", *left]
        assert {each.state for each in disk.state.chain.checkpoints} == {CheckpointState.COMMITTED}
    await engine.close()


async def test_pending_checkpoint_waits_for_a_disk_that_is_not_there(
    tmp_path: Path, images: list[Path]
) -> None:
    engine = await open_engine(tmp_path, *images)
    await engine.begin_backup("job", checkpoint="monday")
    copies = await killed(engine, tmp_path)
    await engine.close()
    engine = await open_engine(tmp_path, copies[0])
    found = engine.disk("vda").state.chain.find("monday")
    assert found is not None
    assert found.state is CheckpointState.PENDING
    await engine.close()
    engine = await open_engine(tmp_path, *copies)
    assert len(engine.disk("vda").state.chain) == 0
    await engine.close()


# Writes at every await point of a begin: rule 3


@pytest.mark.parametrize("steps", range(24))
async def test_write_at_any_await_of_begin_is_in_the_snapshot_or_after_it(
    tmp_path: Path, images: list[Path], steps: int
) -> None:
    """Rule 3: in the snapshot on all accounts or after it on all accounts, on every disk."""
    engine = await open_engine(tmp_path, *images)
    await backup(engine, "monday")
    writes = 0

    async def writer() -> None:
        nonlocal writes
        for _ in range(steps):
            await asyncio.sleep(0)
        for number in range(6):
            for name in ("vda", "vdb"):
                await write(engine, name, number * CLUSTER, b"w" * CLUSTER)
                writes += 1
                await asyncio.sleep(0)

    writing = asyncio.ensure_future(writer())
    await engine.begin_backup("job", checkpoint="tuesday", since="monday")
    await writing
    await engine.begin_backup("later", since="tuesday")
    for name in ("vda", "vdb"):
        frozen = await read_export(engine, f"job/{name}")
        inside = {at // CLUSTER for at in range(0, SIZE, CLUSTER) if any(frozen[at : at + CLUSTER])}
        assert await dirty_clusters(engine, f"job/{name}", "monday") == inside
        after = await dirty_clusters(engine, f"later/{name}", "tuesday")
        assert inside | after == set(range(6))
        assert not inside & after
    await engine.close()


# Bad input: nothing changed


async def test_taken_and_unknown_names_are_refused_and_change_nothing(
    tmp_path: Path, images: list[Path]
) -> None:
    engine = await open_engine(tmp_path, *images)
    await backup(engine, "monday")
    await engine.create_snapshot("snap")
    attempts = [
        (engine.begin_backup("job", checkpoint="monday"), "'monday' exists"),
        (engine.begin_backup("job", since="sunday"), "no checkpoint 'sunday'"),
        (engine.begin_backup("job", ["vdz"]), "no disk 'vdz'"),
        (engine.begin_backup("snap"), "'snap' exists"),
        (engine.create_snapshot("other", checkpoint=""), "1 to 255 bytes"),
        (engine.delete_checkpoint("sunday"), "no checkpoint 'sunday'"),
        (engine.drop_snapshot("none"), "no snapshot 'none'"),
        (engine.commit_backup("none"), "no backup 'none'"),
        (engine.add_export("snap", "vdz"), "has no disk 'vdz'"),
        (engine.remove_export("vda"), "no export 'vda' of a snapshot"),
    ]
    for attempt, text in attempts:
        with pytest.raises(StateError, match=text):
            await attempt
    assert list(engine.snapshots) == ["snap"]
    assert [each.name for each in engine.disk("vda").state.chain.checkpoints] == ["monday"]
    await engine.close()


async def test_image_that_qemu_writes_is_refused(tmp_path: Path, images: list[Path]) -> None:
    """Rule 7: two programs never hold one image for writing."""
    engine = await open_engine(tmp_path, *images)
    with pytest.raises(ImageLockedError):
        await open_engine(tmp_path, images[0])
    with pytest.raises(AssertionError, match="lock"):
        qemu_img("bitmap", "--add", images[0], "b")
    await engine.close()


async def test_foreign_bitmaps_record_on(tmp_path: Path, images: list[Path]) -> None:
    """Bitmaps that other tools made are tracked as QEMU would track them."""
    qemu_img("bitmap", "--add", images[0], "theirs")
    engine = await open_engine(tmp_path, *images)
    await write(engine, "vda", 2 * CLUSTER, b"x")
    await backup(engine, "monday")
    await write(engine, "vda", 4 * CLUSTER, b"x")
    await engine.close()
    assert stored_bitmaps(images[0]) == {"theirs": ["auto"], "monday": ["auto"]}
    engine = await open_engine(tmp_path, *images)
    assert (await engine.disk("vda").bits("theirs")).dirty_bytes() == 2 * CLUSTER
    await engine.close()
