"""A disk's bitmaps and chain as one immutable value, and the steps from one value to the next.

A change of bitmaps is computed here as a new value, stored in the image as a
whole, and only then takes the place of the old one; if storing fails, the old
value is still there (rule 6). The bits themselves are not copied: two values
share the :class:`~nbdfleece.bitmaps.bitmap.Bitmap` objects that they both have.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from ..bitmaps.bitmap import Bitmap
from ..errors import StateError
from ..qcow2.activity_log import ActivityLog
from ..qcow2.bitmap_store import StoredBitmap
from .chain import Chain, Checkpoint, CheckpointState


class DiskBitmap(NamedTuple):
    """One dirty bitmap of a disk.

    Attributes:
        name: Unique on the disk.
        granularity: Bytes per bit.
        recording: Guest writes mark it.
        inconsistent: It may miss changes; good only for being removed.
        bits: None while the bits are only in the image.
        in_image: The image's directory has it, so that its stored bits can be kept.
        log: Keeps its stored bits a superset while it records.
        persistent: The image is to hold it.
    """

    name: str
    granularity: int
    recording: bool
    inconsistent: bool = False
    bits: Bitmap | None = None
    in_image: bool = True
    log: ActivityLog | None = None
    persistent: bool = True

    @property
    def is_changing(self) -> bool:
        """Guest writes mark its bits."""
        return self.recording and not self.inconsistent

    def stored(self, *, closing: bool) -> StoredBitmap:
        """What the image is to hold: a recording bitmap is in use until the disk is closed."""
        if not self.is_changing or closing:
            in_use, content, log = self.inconsistent, self.bits, None
        else:
            in_use, content, log = True, None if self.in_image or self.log else self.bits, self.log
        return StoredBitmap(self.name, self.granularity, self.recording, in_use, content, log)

    def after_store(self) -> DiskBitmap:
        """The bitmap once the image holds it: frozen bits need not stay in memory."""
        if not self.persistent:
            return self
        if self.is_changing:
            return self._replace(in_image=True)
        return self._replace(in_image=True, bits=None, log=None)


class DiskState(NamedTuple):
    """All bitmaps of a disk by name, in the image's order, and its chain."""

    bitmaps: dict[str, DiskBitmap]
    chain: Chain

    @property
    def recording(self) -> tuple[Bitmap, ...]:
        """The bits that guest writes mark."""
        return tuple(
            each.bits
            for each in self.bitmaps.values()
            if each.is_changing and each.bits is not None
        )

    @property
    def logs(self) -> tuple[ActivityLog, ...]:
        """What must cover a guest write before it is issued."""
        return tuple(
            each.log for each in self.bitmaps.values() if each.is_changing and each.log is not None
        )

    @property
    def is_logged(self) -> bool:
        """Whether all that records and persists has a log, and a chain record can say so."""
        return bool(self.chain.disk_id) and not self.unlogged()

    def unlogged(self) -> list[str]:
        """The recording bitmaps that are to have a log and have none."""
        changing = [each for each in self.bitmaps.values() if each.is_changing and each.persistent]
        return [each.name for each in changing if self.chain.disk_id and each.log is None]

    def with_log(self, name: str, log: ActivityLog) -> DiskState:
        """The same state with a log for a recording bitmap."""
        return self._replace(bitmaps={**self.bitmaps, name: self.bitmaps[name]._replace(log=log)})

    def newest_bitmap(self) -> DiskBitmap | None:
        """The bitmap of the newest checkpoint, if the disk has one and it is there."""
        newest = self.chain.newest
        return None if newest is None else self.bitmaps.get(newest.bitmap_name)

    def problem(self, checkpoint: Checkpoint) -> str | None:
        """Why the changes after a checkpoint are not known up to the next; None if they are."""
        bitmap = self.bitmaps.get(checkpoint.bitmap_name)
        if bitmap is None:
            return f"bitmap '{checkpoint.bitmap_name}' is missing in the image"
        if bitmap.inconsistent:
            return f"bitmap '{bitmap.name}' is inconsistent: the image was not closed properly"
        if checkpoint is self.chain.newest and not bitmap.recording:
            return f"bitmap '{bitmap.name}' was disabled and has missed changes"
        return None

    def check_since(self, name: str) -> None:
        """Refuse a checkpoint from which the changes up to now are not known.

        Raises:
            StateError: There is no such checkpoint, or the chain is broken after it; the
                text says where and why.
        """
        self._check_links(self.chain.checkpoints[self.chain.index(name) :])

    def links_between(self, first: str, last: str) -> tuple[Checkpoint, ...]:
        """The checkpoints whose bitmaps together hold the changes from one to a later one.

        Raises:
            StateError: One is unknown, they are not in this order, or the changes are not known.
        """
        links = self.chain.checkpoints[self.chain.index(first) : self.chain.index(last)]
        if not links:
            raise StateError(f"checkpoint '{last}' is not newer than '{first}'")
        self._check_links(links)
        return links

    def _check_links(self, links: Sequence[Checkpoint]) -> None:
        for checkpoint in links:
            problem = self.problem(checkpoint)
            if problem is not None:
                raise StateError(
                    f"the changes since checkpoint '{links[0].name}' are not known: {problem}"
                )

    def with_checkpoint(self, checkpoint: Checkpoint, granularity: int) -> DiskState:
        """The state in which the newest bitmap is frozen and one for ``checkpoint`` records.

        Args:
            checkpoint: The new checkpoint.
            granularity: Bytes per bit of its bitmap.

        Raises:
            StateError: The name is taken.
        """
        name = checkpoint.bitmap_name
        if self.chain.find(checkpoint.name) is not None:
            raise StateError(f"checkpoint '{checkpoint.name}' exists already")
        if name in self.bitmaps:
            raise StateError(f"a bitmap '{name}' exists already and is not a checkpoint's")
        bitmaps = dict(self.bitmaps)
        frozen = self.newest_bitmap()
        if frozen is not None:
            bitmaps[frozen.name] = frozen._replace(recording=False)
        fresh = Bitmap(checkpoint.size, granularity)
        bitmaps[name] = DiskBitmap(name, granularity, True, bits=fresh, in_image=False)
        return DiskState(bitmaps, self.chain.with_added(checkpoint))

    def with_identity(self) -> DiskState:
        """The same state of a disk that can be named by others."""
        return self._replace(chain=self.chain.with_identity())

    def with_checkpoint_state(self, name: str, state: CheckpointState) -> DiskState:
        """The same bitmaps with one checkpoint in another state."""
        return self._replace(chain=self.chain.with_state(name, state))

    def without_checkpoint(self, name: str) -> DiskState:
        """The state in which a checkpoint's changes belong to the one before it.

        The bits of both bitmaps must be in memory (:meth:`merge_partners`) unless one of
        them is inconsistent or missing; the merged one then is inconsistent, because what
        cannot be proven complete must not look so (rule 2).

        Raises:
            StateError: There is no such checkpoint.
        """
        bitmaps = dict(self.bitmaps)
        gone = bitmaps.pop(self.chain.checkpoints[self.chain.index(name)].bitmap_name, None)
        older = self._older_bitmap(name)
        if older is not None and self.merge_partners(name):
            bitmaps[older.name] = _merged(older, gone)
        elif older is not None:
            bitmaps[older.name] = older._replace(inconsistent=True, bits=None)
        return DiskState(bitmaps, self.chain.without(name))

    def _older_bitmap(self, name: str) -> DiskBitmap | None:
        """The bitmap of the checkpoint before the named one, if there is one and it is there."""
        index = self.chain.index(name)
        older = self.chain.checkpoints[index - 1] if index else None
        return None if older is None else self.bitmaps.get(older.bitmap_name)

    def merge_partners(self, name: str) -> list[str]:
        """The bitmaps whose bits :meth:`without_checkpoint` merges: its own and the one before's.

        Returns:
            Both names; nothing if there is none before, or one of the two is not known.

        Raises:
            StateError: There is no such checkpoint.
        """
        index = self.chain.index(name)
        pair = self.chain.checkpoints[max(0, index - 1) : index + 1]
        if len(pair) < 2 or any(self.problem(each) for each in pair):
            return []
        return [each.bitmap_name for each in pair]

    def with_bits(self, name: str, bits: Bitmap) -> DiskState:
        """The same state with a bitmap's bits in memory."""
        return self._replace(bitmaps={**self.bitmaps, name: self.bitmaps[name]._replace(bits=bits)})

    def after_store(self) -> DiskState:
        """The state once the image holds it."""
        stored = {name: each.after_store() for name, each in self.bitmaps.items()}
        return self._replace(bitmaps=stored)


def _merged(older: DiskBitmap, newer: DiskBitmap | None) -> DiskBitmap:
    """The older bitmap with the newer one's changes; it records if the newer one did.

    It keeps the log that it has if the image was never told that it was frozen.
    """
    assert newer is not None, "merge partners exist"
    assert older.bits is not None, "bits not loaded"
    assert newer.bits is not None, "bits not loaded"
    bits = older.bits.copy()
    bits.merge(newer.bits)
    return older._replace(recording=newer.recording, bits=bits, in_image=False)
