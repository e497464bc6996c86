"""Several changes of bitmaps, and snapshots, in one instant: all of them or none.

Theory of operation
    What the actions need from images is read first. Then the guests' writes are held back, and
    without awaiting anything each action adds to a :class:`Draft` of the states to come, in
    which later actions see what earlier ones did. If none refuses, guest writes are from this
    instant on recorded by the old states and by the new ones (rule 2), the snapshots stand
    (rule 3), and writes go on. Then the image is written; only if that worked do the new
    states take the place of the old ones, which until then have missed nothing.

All or nothing
    One image changes by one atomic switch. Transient bitmaps and snapshots go with the process
    anyway. Where the persistent bitmaps of several disks change, :mod:`.joint` makes one of the
    switches of all images (rule 6).
"""

from __future__ import annotations

import asyncio
from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from typing import Protocol

from ..bitmaps.bitmap import Bitmap
from ..block.copy_failure import CopyFailure
from ..errors import StateError
from .chain import check_name
from .disk import Disk
from .disk_state import DiskBitmap, DiskState
from .joint import store_together
from .snapshot import Release, Snapshot, freeze_disk


class BitmapNode(Protocol):
    """What has dirty bitmaps: a disk, or a node that was added to the graph.

    Attributes:
        state: Its bitmaps; replaced whole.
        busy: How often each bitmap is used by something that it must not change under.
    """

    state: DiskState
    busy: Counter[str]

    @property
    def name(self) -> str:
        """The node's name."""

    @property
    def size(self) -> int:
        """Bytes."""

    @property
    def can_persist(self) -> bool:
        """Whether there is an image that could hold bitmaps."""

    @property
    def default_granularity(self) -> int:
        """Bytes per bit of a new bitmap."""

    async def bits(self, name: str) -> Bitmap:
        """The bits of a bitmap."""

    async def drain(self) -> None:
        """Hold guest writes back, and wait for those in flight."""

    def resume(self) -> None:
        """Let guest writes go on."""

    def stage(self, state: DiskState) -> None:
        """Let guest writes be recorded by a state to come, too, from this instant on."""

    def unstage(self) -> None:
        """Let guest writes be recorded by the present state only."""

    async def store(self, state: DiskState) -> None:
        """Put a state into the image, and in its place if that worked."""

    def install(self, state: DiskState) -> None:
        """Put a state in its place that differs in nothing that the image holds."""


class Action(ABC):
    """One step of a transaction."""

    __slots__ = ()

    def nodes(self) -> Iterable[BitmapNode]:
        """Whose guest writes must hold still."""
        return ()

    def needs(self) -> Iterable[tuple[BitmapNode, str]]:
        """Bitmaps whose bits :meth:`apply` asks for, if there are such."""
        return ()

    def stores(self) -> Iterable[BitmapNode]:
        """Where persistent bitmaps may change."""
        return ()

    @abstractmethod
    def apply(self, draft: Draft) -> None:
        """Add what the action does to the draft.

        Raises:
            StateError, OSError: It cannot be done; the whole transaction is not.
        """

    def committed(self) -> None:
        """Called once the transaction has happened."""

    def taken_back(self) -> None:
        """Called if the transaction has not happened."""


class Draft:
    """The states to come.

    Args:
        snapshots: Those that there are.
        loaded: Bits that are not in memory, by node and name.

    Attributes:
        frozen: The snapshots that the actions took.
    """

    def __init__(
        self, snapshots: Mapping[str, Snapshot], loaded: Mapping[tuple[int, str], Bitmap]
    ) -> None:
        self._snapshots = snapshots
        self._loaded = loaded
        self._states: dict[int, tuple[BitmapNode, DiskState]] = {}
        self.frozen: dict[str, Snapshot] = {}

    def state(self, node: BitmapNode) -> DiskState:
        """The state of a node after the actions so far."""
        return self._states.get(id(node), (node, node.state))[1]

    def put(self, node: BitmapNode, bitmap: DiskBitmap) -> None:
        """Add a bitmap to a node, or replace it."""
        state = self.state(node)
        bitmaps = {**state.bitmaps, bitmap.name: bitmap}
        self._states[id(node)] = (node, state._replace(bitmaps=bitmaps))

    def remove(self, node: BitmapNode, name: str) -> None:
        """Take a bitmap from a node."""
        state = self.state(node)
        kept = {each: bitmap for each, bitmap in state.bitmaps.items() if each != name}
        self._states[id(node)] = (node, state._replace(bitmaps=kept))

    def bits(self, node: BitmapNode, name: str) -> Bitmap:
        """The bits of a bitmap that an action said it needs."""
        bitmap = self.state(node).bitmaps[name]
        return self._loaded[id(node), name] if bitmap.bits is None else bitmap.bits

    def freeze(
        self,
        name: str,
        disks: Sequence[Disk],
        access: Bitmap | None = None,
        release: Release = Release.NEVER,
        failure: CopyFailure | None = None,
    ) -> Snapshot:
        """Take a snapshot.

        Args:
            name: What to call it.
            disks: Of what.
            access: If given, only what it marks is kept and may be read.
            release: When ranges of it are given up.
            failure: When a copy has failed and what that breaks, if not as usual.

        Raises:
            StateError: The name is taken.
            OSError: The scratch file cannot be made.
        """
        if name in self._snapshots or name in self.frozen:
            raise StateError(f"snapshot '{name}' exists already")
        snapshot = Snapshot(name=name, disks={}, release=release)
        self.frozen[name] = snapshot
        for disk in disks:
            snapshot.disks[disk.name] = freeze_disk(disk, release, access, failure)
        return snapshot

    def stage(self) -> None:
        """Let guest writes be recorded by the states to come, too."""
        for node, state in self._states.values():
            node.stage(state)

    async def store(self) -> None:
        """Let the states take their places, those that are stored first.

        Raises:
            OSError, StateError: They could not be stored, and none has taken its place.
        """
        stored = self._stored()
        if len(stored) == 1:
            await stored[0][0].store(stored[0][1])
        elif stored:
            await store_together(stored)
        ids = {id(disk) for disk, _ in stored}
        for key, (node, state) in self._states.items():
            if key not in ids:
                node.install(state)

    def _stored(self) -> list[tuple[Disk, DiskState]]:
        """The disks whose images must be written.

        Raises:
            StateError: It would be the image of a node that is only read.
        """
        stored = []
        for node, state in self._states.values():
            if _persistent_differ(node, state):
                if not isinstance(node, Disk):
                    raise StateError(f"node '{node.name}' is read-only")
                stored.append((node, state))
        return stored

    async def take_back(self) -> None:
        """Undo what :meth:`stage` and :meth:`freeze` did."""
        for node, _ in self._states.values():
            node.unstage()
        for snapshot in self.frozen.values():
            for part in snapshot.disks.values():
                await part.node.close()


def _persistent_differ(node: BitmapNode, state: DiskState) -> bool:
    """Whether a state has other persistent bitmaps than the node's present one."""
    old = {id(each) for each in node.state.bitmaps.values() if each.persistent}
    new = {id(each) for each in state.bitmaps.values() if each.persistent}
    return old != new


class Freeze(Action):
    """Take a snapshot.

    Args:
        name: What to call it.
        disks: Of what.
        limit: A node's bitmap that marks what is to be kept and may be read; None for all.
        release: When ranges of it are given up.
        failure: When a copy has failed and what that breaks, if not as usual.

    Attributes:
        snapshot: The snapshot, once it has been taken.
    """

    snapshot: Snapshot

    def __init__(
        self,
        name: str,
        disks: Sequence[Disk],
        *,
        limit: tuple[BitmapNode, str] | None = None,
        release: Release = Release.NEVER,
        failure: CopyFailure | None = None,
    ) -> None:
        self._failure = failure
        self._name = name
        self._disks = disks
        self._limit = limit
        self._release = release

    def nodes(self) -> Sequence[BitmapNode]:
        """The disks."""
        return self._disks

    def needs(self) -> Iterable[tuple[BitmapNode, str]]:
        """The limiting bitmap's bits."""
        return () if self._limit is None else (self._limit,)

    def apply(self, draft: Draft) -> None:
        """Take it.

        Raises:
            StateError: The name is taken, or the bitmap is not there or inconsistent.
            OSError: The scratch file cannot be made.
        """
        check_name(self._name, "snapshot")
        access = None if self._limit is None else _usable_bits(draft, *self._limit)
        self.snapshot = draft.freeze(self._name, self._disks, access, self._release, self._failure)


def _usable_bits(draft: Draft, node: BitmapNode, name: str) -> Bitmap:
    bitmap = draft.state(node).bitmaps.get(name)
    if bitmap is None:
        raise StateError(f"Dirty bitmap '{name}' not found")
    if bitmap.inconsistent:
        raise StateError(f"Bitmap '{name}' is inconsistent and cannot be used; remove it")
    return draft.bits(node, name)


async def carry_out(actions: Sequence[Action], snapshots: dict[str, Snapshot]) -> None:
    """Carry out all actions or none; the caller excludes other changes.

    Args:
        actions: In their order.
        snapshots: Those that there are; new ones are added.

    Raises:
        StateError: An action cannot be done, or not together with the others.
        OSError: An image or the scratch directory cannot be written.
    """
    await _identify(actions)
    draft = Draft(snapshots, await _load(actions))
    try:
        await _apply(actions, draft)
        snapshots.update(draft.frozen)
        await draft.store()
    except BaseException:
        for name, snapshot in draft.frozen.items():
            if snapshots.get(name) is snapshot:
                del snapshots[name]
        await draft.take_back()
        for action in actions:
            action.taken_back()
        raise
    for action in actions:
        action.committed()


async def _identify(actions: Sequence[Action]) -> None:
    """Give disks identities, by which records name them, if several images are to change."""
    nodes = {id(node): node for action in actions for node in action.stores()}.values()
    disks = [node for node in nodes if isinstance(node, Disk) and node.can_persist]
    if len(disks) > 1:
        for disk in disks:
            await disk.ensure_identity()


async def _load(actions: Sequence[Action]) -> dict[tuple[int, str], Bitmap]:
    """Read the bits that the actions need and that are only in images."""
    loaded: dict[tuple[int, str], Bitmap] = {}
    for action in actions:
        for node, name in action.needs():
            bitmap = node.state.bitmaps.get(name)
            if bitmap is not None and bitmap.bits is None and not bitmap.inconsistent:
                loaded[id(node), name] = await node.bits(name)
    return loaded


async def _apply(actions: Sequence[Action], draft: Draft) -> None:
    """Hold guest writes for as long as it takes to apply all actions, without I/O."""
    nodes = {id(node): node for action in actions for node in action.nodes()}.values()
    try:
        await asyncio.gather(*(node.drain() for node in nodes))
        for action in actions:
            action.apply(draft)
        draft.stage()
    finally:
        for node in nodes:
            node.resume()
