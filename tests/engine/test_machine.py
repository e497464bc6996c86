"""The engine against a plain model: bytes, and sets of clusters.

Guest writes, zeroes and discards of any alignment on two disks; snapshots, checkpoints,
deletions, backups that are committed or aborted, restarts and kills, in any order. After
each step every snapshot that stands must read as the disk was at its instant (rule 1), and
every interval that is reported must contain every change (rule 2), and nothing else as long
as no kill has made it coarse.
"""

from __future__ import annotations

import asyncio
import shutil
import tempfile
from collections.abc import Coroutine
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from tests.engine.rig import (
    CLUSTER,
    dirty_clusters,
    killed,
    make_image,
    open_engine,
    read_export,
    stored_bitmaps,
)

SIZE = 12 * CLUSTER + 25 * 512
NAMES = ("vda", "vdb")
SECONDS_MAX = 120


@dataclass
class ModelDisk:
    """What a disk must hold.

    ``changed`` has, for each checkpoint of the chain, the clusters written since;
    ``unflushed`` the clusters that a kill may take back.
    """

    content: bytearray = field(default_factory=lambda: bytearray(SIZE))
    changed: dict[str, set[int]] = field(default_factory=dict)
    unflushed: set[int] = field(default_factory=set)

    def touch(self, offset: int, length: int) -> None:
        clusters = set(range(offset // CLUSTER, (offset + length - 1) // CLUSTER + 1))
        self.unflushed |= clusters
        for found in self.changed.values():
            found |= clusters


@dataclass
class ModelSnapshot:
    """What a snapshot must show: bytes and changes at its instant, by disk."""

    frozen: dict[str, bytes]
    changed: dict[str, dict[str, set[int]]]
    pending: str | None


ranges = st.tuples(st.integers(0, SIZE - 1), st.integers(1, 3 * CLUSTER))
some_disk = st.sampled_from(NAMES)


class EngineAgainstModel(RuleBasedStateMachine):
    def __init__(self) -> None:
        super().__init__()
        self.loop = asyncio.new_event_loop()
        self.folder = Path(tempfile.mkdtemp(prefix="nbdfleece-machine-", dir="/dev/shm"))
        self.images = [make_image(self.folder / f"{name}.qcow2", SIZE) for name in NAMES]
        self.made = 0
        self.is_exact = True

    def run(self, work: Coroutine[Any, Any, Any]) -> Any:
        return self.loop.run_until_complete(asyncio.wait_for(work, SECONDS_MAX))

    @initialize()
    def start(self) -> None:
        self.disks = {name: ModelDisk() for name in NAMES}
        self.snapshots: dict[str, ModelSnapshot] = {}
        self.engine = self.run(open_engine(self.folder, *self.images))

    def teardown(self) -> None:
        if hasattr(self, "engine"):
            self.run(self.engine.close())
            for image in self.images:
                stored_bitmaps(image, after_kill=True)
        self.loop.close()
        shutil.rmtree(self.folder)

    def name(self, prefix: str) -> str:
        self.made += 1
        return f"{prefix}{self.made}"

    # The guest

    @rule(disk=some_disk, where=ranges, byte=st.integers(0, 255))
    def write(self, disk: str, where: tuple[int, int], byte: int) -> None:
        offset, length = where[0], min(where[1], SIZE - where[0])
        data = bytes([byte]) * length
        self.run(self.engine.disk(disk).node.write(offset, memoryview(data)))
        self.disks[disk].content[offset : offset + length] = data
        self.disks[disk].touch(offset, length)

    @rule(disk=some_disk, where=ranges, unmap=st.booleans())
    def write_zeroes(self, disk: str, where: tuple[int, int], unmap: bool) -> None:
        offset, length = where[0], min(where[1], SIZE - where[0])
        self.run(self.engine.disk(disk).node.write_zeroes(offset, length, unmap=unmap))
        self.disks[disk].content[offset : offset + length] = bytes(length)
        self.disks[disk].touch(offset, length)

    @rule(disk=some_disk, where=ranges)
    def discard(self, disk: str, where: tuple[int, int]) -> None:
        """What a discarded range reads as is the disk's choice; outside it nothing changes."""
        offset, length = where[0], min(where[1], SIZE - where[0])
        self.run(self.engine.disk(disk).node.trim(offset, length))
        now = self.run(read_export(self.engine, disk))
        content = self.disks[disk].content
        content[offset : offset + length] = now[offset : offset + length]
        assert now == content
        self.disks[disk].touch(offset, length)

    @rule(disk=some_disk)
    def flush(self, disk: str) -> None:
        self.run(self.engine.disk(disk).node.flush())
        self.disks[disk].unflushed.clear()

    # Backups

    def remember(self, name: str, disks: list[str], pending: str | None) -> None:
        self.snapshots[name] = ModelSnapshot(
            {disk: bytes(self.disks[disk].content) for disk in disks},
            {
                disk: {cp: set(found) for cp, found in self.disks[disk].changed.items()}
                for disk in disks
            },
            pending,
        )

    @precondition(lambda self: len(self.snapshots) < 4)
    @rule(disks=st.sets(some_disk, min_size=1), with_checkpoint=st.booleans())
    def begin(self, disks: set[str], with_checkpoint: bool) -> None:
        name, chosen = self.name("job"), sorted(disks)
        checkpoint = self.name("cp") if with_checkpoint else None
        self.remember(name, chosen, checkpoint)
        self.run(self.engine.begin_backup(name, chosen, checkpoint=checkpoint))
        if checkpoint is not None:
            for disk in chosen:
                self.disks[disk].changed[checkpoint] = set()
        for disk in chosen:
            for known in self.snapshots[name].changed[disk]:
                export = f"{name}/{disk}/{known}"
                add = self.engine.add_export(name, disk, name=export, since={known: known})
                self.run(add)

    @precondition(lambda self: self.snapshots)
    @rule(data=st.data())
    def commit(self, data: st.DataObject) -> None:
        name = data.draw(st.sampled_from(sorted(self.snapshots)))
        self.run(self.engine.commit_backup(name))
        del self.snapshots[name]

    @precondition(lambda self: self.snapshots)
    @rule(data=st.data())
    def abort(self, data: st.DataObject) -> None:
        name = data.draw(st.sampled_from(sorted(self.snapshots)))
        self.run(self.engine.abort_backup(name))
        self.forget_checkpoint(self.snapshots.pop(name).pending)

    def forget_checkpoint(self, checkpoint: str | None) -> None:
        for disk in self.disks.values():
            disk.changed.pop(checkpoint or "", None)

    def committed(self) -> list[str]:
        pending = {each.pending for each in self.snapshots.values()}
        return sorted({cp for disk in self.disks.values() for cp in disk.changed} - pending)

    @precondition(lambda self: self.committed())
    @rule(data=st.data())
    def delete_checkpoint(self, data: st.DataObject) -> None:
        name = data.draw(st.sampled_from(self.committed()))
        self.run(self.engine.delete_checkpoint(name))
        self.forget_checkpoint(name)

    @rule(disks=st.sets(some_disk, min_size=1))
    def create_checkpoint(self, disks: set[str]) -> None:
        name = self.name("cp")
        self.run(self.engine.create_checkpoint(name, sorted(disks)))
        for disk in disks:
            self.disks[disk].changed[name] = set()

    # Ends

    def forget_snapshots(self) -> None:
        for snapshot in self.snapshots.values():
            self.forget_checkpoint(snapshot.pending)
        self.snapshots.clear()

    @rule()
    def restart(self) -> None:
        self.run(self.engine.close())
        self.forget_snapshots()
        for disk in self.disks.values():
            disk.unflushed.clear()
        self.engine = self.run(open_engine(self.folder, *self.images))

    @rule()
    def kill(self) -> None:
        """What was not flushed may be lost, in whole or in part; nothing else is (rule 4)."""
        left = self.run(killed(self.engine, self.folder))
        self.run(self.engine.close())
        for old, new in zip(self.images, left, strict=True):
            new.replace(old)
        left[0].parent.rmdir()
        self.forget_snapshots()
        self.is_exact = False
        self.engine = self.run(open_engine(self.folder, *self.images))
        for name, disk in self.disks.items():
            now = self.run(read_export(self.engine, name))
            for begin in range(0, SIZE, CLUSTER):
                if begin // CLUSTER not in disk.unflushed:
                    assert now[begin : begin + CLUSTER] == disk.content[begin : begin + CLUSTER]
            disk.content[:] = now
            disk.unflushed.clear()

    # What must hold

    @invariant()
    def snapshots_are_exact(self) -> None:
        for name, snapshot in getattr(self, "snapshots", {}).items():
            for disk, frozen in snapshot.frozen.items():
                assert self.run(read_export(self.engine, f"{name}/{disk}")) == frozen
                for checkpoint, changed in snapshot.changed[disk].items():
                    export = f"{name}/{disk}/{checkpoint}"
                    told = self.run(dirty_clusters(self.engine, export, checkpoint))
                    assert told >= changed
                    assert told == changed or not self.is_exact

    @invariant()
    def disks_are_exact(self) -> None:
        for name, disk in getattr(self, "disks", {}).items():
            assert self.run(read_export(self.engine, name)) == disk.content
            chain = self.engine.disk(name).state.chain
            assert [each.name for each in chain.checkpoints] == list(disk.changed)


EngineAgainstModel.TestCase.settings = settings(max_examples=30, stateful_step_count=25)
TestEngineAgainstModel = EngineAgainstModel.TestCase
