"""A disk that the server holds: its image, its bitmaps and chain, and the nodes over it.

guest -> (GuestOptions ->) GuestNode (marks bitmaps, has old data copied) -> Qcow2Image, or another
                      ^ CopyBeforeWrite <- SnapshotAccess (one per snapshot)
"""

from __future__ import annotations

import asyncio
import logging
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Final, NamedTuple, TypeVar

from ..bitmaps.bitmap import Bitmap
from ..block.copy_before_write import CopyBeforeWrite
from ..block.copy_failure import USUAL, CopyFailure
from ..block.file import FileNode
from ..block.guest import GuestNode
from ..block.guest_options import DEFAULT_POLICY, GuestPolicy
from ..block.layer import Layer
from ..block.node import BlockNode
from ..errors import StateError, UsageError
from ..qcow2.bitmap_store import BitmapStore
from ..qcow2.image import Qcow2Image
from .chain import Chain, Checkpoint, pack_chain, unpack_chain
from .disk_state import DiskBitmap, DiskState
from .layers import LayersBelow, check_own, merge_below
from .raw_store import RawStore

GRANULARITY_RANGE: Final = (512, 1 << 20)
"""Bytes: a sector, and what is copied at once."""


_log = logging.getLogger("nbdfleece.engine")

_Item = TypeVar("_Item")


@dataclass(frozen=True, slots=True, kw_only=True)
class ScratchOptions:
    """How snapshots of a disk are kept.

    Attributes:
        directory: Where copies go. /var/tmp rather than /tmp, which may be memory.
        granularity: Bytes that a first guest write copies at least; a power of two.
        quota: Bytes of copies per disk; None leaves the limit to the file system.
        failure: When a copy has failed and what that breaks, unless a snapshot has its own.
    """

    directory: Path = Path("/var/tmp")
    granularity: int = 4096
    quota: int | None = None
    failure: CopyFailure = USUAL

    def __post_init__(self) -> None:
        least, most = GRANULARITY_RANGE
        size = self.granularity
        if not least <= size <= most or size & (size - 1):
            raise UsageError(
                f"the scratch granularity is a power of two from {least} to {most}, not {size}"
            )


class Instant(NamedTuple):
    """A disk's chain as it was at one instant.

    Attributes:
        checkpoint_ids: The checkpoints that there were.
        newest_id: The newest of them.
        changes: What had changed since the newest; None if that was not known.
    """

    checkpoint_ids: frozenset[str]
    newest_id: str | None
    changes: Bitmap | None


class Disk:
    """One disk. Made by :meth:`open`.

    Attributes:
        name: As the operator calls it; also the name of its live export.
        image: Where bitmaps and chain are kept; usually the guest's bytes too.
        data: The guest's bytes.
        node: What the guest writes through.
        policy: What becomes of the guest's discards and zeroes.
        copies: Its snapshots' copy-before-write.
        state: Its bitmaps and chain; replaced whole.
        chain_problem: Why the image's chain record could not be used; None if it could.
        busy: How often each bitmap is used by something that it must not change under.
    """

    def __init__(
        self,
        name: str,
        image: Qcow2Image | FileNode,
        store: BitmapStore | RawStore,
        scratch: ScratchOptions,
        on_broken: Callable[[Layer], None],
        policy: GuestPolicy,
        data: BlockNode | None = None,
    ) -> None:
        self.name = name
        self.image = image
        self.data: BlockNode = image if data is None else data
        self.copies = CopyBeforeWrite(
            self.data,
            scratch.directory,
            granularity=scratch.granularity,
            quota=scratch.quota,
            failure=scratch.failure,
            on_broken=on_broken,
        )
        self._guest = GuestNode(self.data, self.copies)
        self.policy = policy
        self.node = policy.over(self._guest)
        self.state = DiskState({}, Chain())
        self.chain_problem: str | None = None
        self.busy: Counter[str] = Counter()
        self._store = store
        self._below = LayersBelow(self.image)

    @classmethod
    async def open(
        cls,
        name: str,
        path: Path,
        scratch: ScratchOptions,
        on_broken: Callable[[Layer], None] = lambda layer: None,
        policy: GuestPolicy = DEFAULT_POLICY,
        *,
        is_raw: bool = False,
        data: BlockNode | None = None,
    ) -> Disk:
        """Open an image for writing, load what records, and mark it in use before any write.

        Args:
            name: What to call the disk.
            path: The image.
            scratch: How snapshots of it are kept.
            on_broken: Called when a copy failed and a snapshot was broken for it.
            policy: What becomes of the guest's discards and zeroes.
            is_raw: The file's bytes are the disk's; it holds no bitmaps.
            data: What has the guest's bytes instead of the image, which then has bitmaps only;
                the disk's from now on.

        Raises:
            UsageError: The image is not of the size of ``data``.
            OSError: The image cannot be opened.
            ImageError: It is damaged, in use, or of a kind that is not supported.
            StateError: A change of its bitmaps was interrupted and must be settled first.
        """
        if is_raw:
            file = FileNode.open(path, read_only=False)
            return cls(name, file, RawStore(file.path), scratch, on_broken, policy)
        image = await Qcow2Image.open(path, read_only=False)
        try:
            if data is not None and data.size != image.size:
                raise UsageError(
                    f"{path} has bitmaps of a disk of {image.size} bytes; disk '{name}' has"
                    f" {data.size}"
                )
            store = await BitmapStore.load(image)
            disk = cls(name, image, store, scratch, on_broken, policy, data)
            await disk._load_state()
        except BaseException:
            await image.close()
            raise
        return disk

    @property
    def size(self) -> int:
        """Bytes."""
        return self.image.size

    @property
    def default_granularity(self) -> int:
        """Bytes per bit of a new bitmap: the cluster size within 4 KiB and 64 KiB, as in QEMU."""
        return min(max(self.cluster_size, 4096), 65536)

    @property
    def cluster_size(self) -> int:
        """Bytes of a cluster; of a raw file what QEMU takes for one."""
        return self.image.cluster_size if isinstance(self.image, Qcow2Image) else 65536

    @property
    def format(self) -> str:
        """QEMU's name for what the image is."""
        return "qcow2" if self.can_persist else "raw"

    @property
    def can_persist(self) -> bool:
        """Whether the image can hold bitmaps."""
        return isinstance(self.image, Qcow2Image)

    async def drain(self) -> None:
        """Hold guest writes back, and wait for those in flight."""
        await self._guest.drain()

    def resume(self) -> None:
        """Let guest writes go on."""
        self._guest.resume()

    async def _load_state(self) -> None:
        chain = self._load_chain()
        record = self._store.record
        is_logged = chain.logged and record is not None and record.matches_directory
        bitmaps = {}
        for entry in self._store.entries:
            bitmap = DiskBitmap(entry.name, entry.granularity, entry.recording, entry.inconsistent)
            if bitmap.inconsistent and bitmap.recording and is_logged:
                bitmap = bitmap._replace(inconsistent=False)
                _log.warning(
                    "disk '%s': bitmap '%s' was recovered by its log; it may report more"
                    " than has changed",
                    self.name,
                    entry.name,
                )
            if bitmap.is_changing:
                bitmap = bitmap._replace(bits=await self._store.load_bits(entry.name))
            bitmaps[entry.name] = bitmap
        self.state = DiskState(bitmaps, chain)
        if chain.joint is not None:
            self.busy.update(chain.joint.names)
        if chain.disk_id:
            await self.store(self.state)
        else:
            await self._store.mark_in_use()
            self._guest.recording = self.state.recording

    def _load_chain(self) -> Chain:
        record = self._store.record
        if record is None:
            return Chain()
        try:
            chain = unpack_chain(record.payload)
        except StateError as error:
            self.chain_problem = str(error)
            return Chain()
        if chain.change is not None:
            # What is done late must not meet bits recorded in between (rule 2).
            raise StateError(chain.change.describe(self.image.path))
        return chain

    async def ensure_identity(self) -> None:
        """Give the disk an identity in its image, if it has none, before others refer to it.

        Raises:
            OSError, StateError: As :meth:`store`.
        """
        if not self.state.chain.disk_id:
            await self.store(self.state.with_identity())

    async def bits(self, name: str) -> Bitmap:
        """The bits of a bitmap, read from the image if they are not in memory.

        Raises:
            StateError: There is no such bitmap, or it is inconsistent.
        """
        bitmap = self.state.bitmaps.get(name)
        if bitmap is None:
            raise StateError(f"disk '{self.name}' has no bitmap '{name}'")
        if bitmap.inconsistent:
            raise StateError(f"bitmap '{name}' of disk '{self.name}' is inconsistent")
        return bitmap.bits or await self._store.load_bits(name)

    async def store(self, state: DiskState) -> None:
        """Put a new state into the image, and in its place if that worked.

        Guest writes that happen meanwhile are recorded in the bitmaps of both states, so
        that neither misses one (rule 2).

        Raises:
            OSError: The image does not hold the new state; the old one stays.
            StateError: The chain does not fit into the image's header.
        """
        old = self.state
        self._record_in(old, state)
        try:
            for name in state.unlogged():
                state = await self._with_log(state, name)
            await self._write(state, closing=False)
        except BaseException:
            self._record_in(old)
            self._discard_logs(state, old)
            raise
        self.state = state.after_store()
        self._record_in(self.state)

    def stage(self, state: DiskState) -> None:
        """Let guest writes be recorded by a state to come, too, from this instant on."""
        self._record_in(self.state, state)

    def unstage(self) -> None:
        """Let guest writes be recorded by the present state only."""
        self._record_in(self.state)

    def _record_in(self, *states: DiskState) -> None:
        """Let guest writes be recorded in the bitmaps and logs of all these states."""
        self._guest.recording = _union(*(state.recording for state in states))
        self._guest.logs = _union(*(state.logs for state in states))

    async def _with_log(self, state: DiskState, name: str) -> DiskState:
        """Give a log to a bitmap of a state in whose bits guest writes are recorded already.

        Those that come while the log is filled are marked in it at the end.
        """
        bits = state.bitmaps[name].bits
        assert bits is not None, "what records is in memory"
        stored = bits.copy()
        log = await self._store.prepare_log(bits.granularity, stored)
        state = state.with_log(name, log)
        self._record_in(self.state, state)
        missed = bits.copy()
        missed.subtract(stored)
        try:
            for offset, length in missed.dirty_ranges():
                await log.mark(offset, length)
        except BaseException:
            self._store.discard_log(log)
            raise
        return state

    def _discard_logs(self, state: DiskState, kept: DiskState) -> None:
        """Give up the logs of a state that was not stored, apart from another state's."""
        for log in state.logs:
            if log not in kept.logs:
                self._store.discard_log(log)

    async def prepare_checkpoint(self, checkpoint: Checkpoint) -> DiskState:
        """The state for :meth:`install` in which a new checkpoint's bitmap records.

        Raises:
            StateError: The name is taken.
            OSError: There is no space for its bitmap.
        """
        granularity = self.default_granularity
        state = self.state.with_checkpoint(checkpoint, granularity)
        log = await self._store.prepare_log(granularity)
        return state.with_log(checkpoint.bitmap_name, log)

    def install(self, state: DiskState) -> None:
        """Let guest writes be recorded by a new state from this instant on; not stored yet.

        Between :meth:`GuestNode.drain` and ``resume``, so that no write is in flight (rule 3).
        As long as the image holds the old state, a crash falls back to it, so the old logs
        are kept up too.
        """
        old, self.state = self.state, state
        self._guest.recording = state.recording
        self._guest.logs = _union(old.logs, state.logs)

    async def store_installed(self) -> None:
        """Put the installed state into the image.

        Raises:
            OSError, StateError: As :meth:`store`; the state stays installed.
        """
        await self._write(self.state, closing=False)
        self.state = self.state.after_store()
        self._record_in(self.state)

    def uninstall(self, checkpoint: str) -> None:
        """Undo :meth:`install` of a new checkpoint that was not stored, as if it had not begun.

        Nothing is awaited, so no change is missed (rule 2); the image still holds the state
        from before.
        """
        new, self.state = self.state, self.state.without_checkpoint(checkpoint)
        self._record_in(self.state)
        self.discard(new)

    def discard(self, state: DiskState) -> None:
        """Give up a state of :meth:`prepare_checkpoint` that is not to be stored."""
        self._discard_logs(state, self.state)

    async def remove_checkpoint(self, name: str) -> None:
        """Delete a checkpoint, merging its changes into the one before it.

        Raises:
            OSError: The image could not be changed; the checkpoint is still there.
            StateError: There is no such checkpoint.
        """
        state = self.state
        for partner in state.merge_partners(name):
            state = state.with_bits(partner, await self.bits(partner))
        await self.store(state.without_checkpoint(name))

    async def changes_since(self, name: str, instant: Instant) -> Bitmap:
        """The changes from a checkpoint to an instant, as one new bitmap.

        Raises:
            StateError: The checkpoint is unknown or newer than the instant, or the changes
                since it are not known.
        """
        layers = await self._below.load()
        check_own(self.image.path, self.state.chain, layers, name)
        self.state.check_since(name)
        links = self.state.chain.checkpoints[self.state.chain.index(name) :]
        if links[0].id not in instant.checkpoint_ids or instant.changes is None:
            raise StateError(f"checkpoint '{name}' is not older than the snapshot")
        merged = instant.changes.copy()
        for link in links:
            if link.id in instant.checkpoint_ids and link.id != instant.newest_id:
                await asyncio.sleep(0)  # a guest's write must not wait for all of them
                merged.merge(await self.bits(link.bitmap_name))
        await merge_below(merged, layers, name)
        return merged

    async def changes_between(self, first: str, last: str) -> Bitmap:
        """The changes from a checkpoint to a later one, as one new bitmap.

        Raises:
            StateError: As :meth:`DiskState.links_between`.
        """
        links = self.state.links_between(first, last)
        merged = (await self.bits(links[0].bitmap_name)).copy()
        for link in links[1:]:
            await asyncio.sleep(0)
            merged.merge(await self.bits(link.bitmap_name))
        await merge_below(merged, await self._below.load(), first, last)
        return merged

    async def knows(self, name: str) -> bool:
        """Whether the disk, or an image behind it, has a checkpoint."""
        if self.state.chain.find(name) is not None:
            return True
        return any(layer.has(name) for layer in await self._below.load())

    def instant(self, *, freezing: bool) -> Instant:
        """What must be remembered of this instant to tell later what had changed until it.

        Args:
            freezing: The newest bitmap is about to be frozen, so that its bits need no copy.
        """
        newest = self.state.chain.newest
        bitmap = self.state.newest_bitmap()
        bits = bitmap.bits if bitmap is not None else None
        return Instant(
            frozenset(each.id for each in self.state.chain.checkpoints),
            newest.id if newest is not None else None,
            bits if bits is None or freezing else bits.copy(),
        )

    async def close(self) -> None:
        """Store all bitmaps as no longer in use, and give the image up."""
        await self._guest.drain()
        try:
            await self._write(self.state, closing=True)
        finally:
            try:
                await self.image.close()
            finally:
                if self.data is not self.image:
                    await self.data.close()

    async def _write(self, state: DiskState, *, closing: bool) -> None:
        persistent = [each for each in state.bitmaps.values() if each.persistent]
        stored = [each.stored(closing=closing) for each in persistent]
        if stored or self._store.entries or state.chain.disk_id:
            if self.data is not self.image and not closing:
                # What a power cut took back would be a change that no bitmap after this has.
                await self.data.flush()
            chain = state.chain.with_logs(state.is_logged and not closing)
            await self._store.replace(stored, pack_chain(chain))


def _union(*parts: Iterable[_Item]) -> tuple[_Item, ...]:
    """What is in any of the parts, each object once."""
    return tuple({id(item): item for part in parts for item in part}.values())
