"""Changing images that no server has open: their bitmaps, several images all or nothing.

Each image is changed by one atomic switch, which brings its bitmaps and its chain record
into force together. Over several images the record also holds the *change* that is under way
(:class:`~nbdfleece.engine.chain.PendingChange`), with the identities of all images that it
concerns:

0. every image gets an identity, if it has none;
1. the change is noted on every image, one after another;
2. it is done on every image, and its note says so;
3. the notes are taken away.

What :func:`settle` does about a change that was interrupted, given all of its images:

=======================================  ==========================================
found                                    then
=======================================  ==========================================
none has done it                         the notes go: as if it had not begun
some have done it                        the others, which have the note, do it too
=======================================  ==========================================

An image without the note is one that step 1 has not reached, if none has done the change, or
one that step 3 has left: each time there is nothing to be done on it. Given only some of the
images, nobody can know, and they are refused until all are there. So does
:class:`~nbdfleece.engine.disk.Disk`, because a change that is done late must not meet bits
that were recorded in between (rule 2). If another program wrote such an image in between,
the note is stale: the change is not done there any more, and the user is told.

One image alone needs no note. Nor does another size (:func:`resize_disk`), but it waits until
nothing is left to settle.
"""

from __future__ import annotations

import logging
from collections.abc import AsyncIterator, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import NamedTuple

import msgspec

from ..bitmaps.bitmap import Bitmap
from ..errors import StateError, UsageError
from ..qcow2.bitmap_store import BitmapDescriptor, BitmapStore, RepairReport, StoredBitmap
from ..qcow2.image import Qcow2Image
from ..qcow2.resize import disk_error, resize_image
from . import joint
from .chain import (
    Chain,
    Checkpoint,
    PendingChange,
    check_name,
    new_identity,
    pack_chain,
    unpack_chain,
)
from .disk import Disk, ScratchOptions
from .disk_state import DiskBitmap, DiskState
from .info import CheckpointInfo, LinkInfo
from .layers import LayersBelow, stored_changes

_log = logging.getLogger("nbdfleece.engine")

GRANULARITY_RANGE = (512, 1 << 31)
"""Bytes per bit that the format allows."""


@dataclass(slots=True)
class OfflineImage:
    """An image, its bitmaps and its chain record.

    Attributes:
        chain: As the record in force says, or an empty one.
        has_record: The image has a chain record.
        is_fresh: Nobody else has written the image since that record.
    """

    image: Qcow2Image
    store: BitmapStore
    chain: Chain
    has_record: bool
    is_fresh: bool
    _below: LayersBelow

    @property
    def path(self) -> str:
        """The image's file name."""
        return self.image.path

    @classmethod
    async def open(cls, path: Path, *, read_only: bool, force_share: bool) -> OfflineImage:
        """Open an image's bitmaps; nothing is written.

        Raises:
            OSError: The file cannot be opened or read.
            ImageError: It is in use, damaged or not supported.
            StateError: Its chain record is none that can be understood.
        """
        image = await Qcow2Image.open(path, read_only=read_only, force_share=force_share)
        try:
            store = await BitmapStore.load(image)
            record = store.record
            chain = Chain() if record is None else unpack_chain(record.payload)
        except BaseException:
            await image.close()
            raise
        is_fresh = record is not None and record.matches_directory
        return cls(image, store, chain, record is not None, is_fresh, LayersBelow(image))

    async def replace(self, bitmaps: Sequence[StoredBitmap], chain: Chain) -> None:
        """Put bitmaps and chain into force together; errors as of the store."""
        # A record that is stale stays so: what it says of the bitmaps' logs is void.
        chain = chain if self.is_fresh else chain.with_logs(False)
        has_record = self.has_record or chain != Chain()
        await self.store.replace(bitmaps, pack_chain(chain) if has_record else None)
        self.chain, self.has_record = chain, has_record
        self.is_fresh = has_record

    async def recover(self) -> None:
        """Store what a crash left in use but a log has kept a superset, as not in use."""
        bitmaps = []
        for entry in self.store.entries:
            bitmap = _kept(entry)
            if entry.inconsistent and not self.is_inconsistent(entry):
                content = await self.store.load_bits(entry.name)
                bitmap = bitmap._replace(in_use=False, content=content)
            bitmaps.append(bitmap)
        if bitmaps != self.kept():
            await self.replace(bitmaps, self.chain.with_logs(False))

    def is_inconsistent(self, bitmap: BitmapDescriptor) -> bool:
        """Whether its bits may miss changes; not if a log has kept them a superset."""
        is_logged = self.chain.logged and self.is_fresh and bitmap.recording
        return bitmap.inconsistent and not is_logged

    def _state(self) -> DiskState:
        """Bitmaps and chain as a disk would have them, without bits."""
        bitmaps = {
            each.name: DiskBitmap(
                each.name, each.granularity, each.recording, self.is_inconsistent(each)
            )
            for each in self.store.entries
        }
        return DiskState(bitmaps, self.chain)

    async def link_info(self, checkpoint: Checkpoint) -> LinkInfo:
        """Describe a checkpoint of this image."""
        problem = self._state().problem(checkpoint)
        name = checkpoint.bitmap_name
        changed = None if problem else await self.store.dirty_bytes(name)
        return LinkInfo(size=checkpoint.size, changed=changed, problem=problem)

    async def changes_since(self, name: str) -> Bitmap:
        """The changes from a checkpoint to now, as one new bitmap.

        Raises:
            StateError: There is no such checkpoint, or the changes since it are not known.
            OSError, ImageError: A bitmap could not be read.
        """
        return await stored_changes(self.path, self._below, self.store, self._state(), name)

    def kept(self) -> list[StoredBitmap]:
        """All bitmaps as they are stored."""
        return [_kept(entry) for entry in self.store.entries]


def _kept(entry: BitmapDescriptor) -> StoredBitmap:
    return StoredBitmap(entry.name, entry.granularity, entry.recording, in_use=entry.inconsistent)


class Listed(NamedTuple):
    """A bitmap as a list of an image's bitmaps tells it.

    Attributes:
        dirty_bytes: Bytes that it marks; None where that is not known.
        checkpoint: The checkpoint that it belongs to.
        damage: Why it cannot be believed; None if it can.
    """

    name: str | None
    granularity: int | None
    recording: bool
    inconsistent: bool
    dirty_bytes: int | None
    checkpoint: str | None
    damage: str | None


@asynccontextmanager
async def open_images(
    paths: Sequence[Path], *, read_only: bool = False, force_share: bool = False
) -> AsyncIterator[list[OfflineImage]]:
    """Open several images at once, with the locks of all of them.

    Raises:
        StateError: An image is named twice.
        OSError, ImageError: As :meth:`OfflineImage.open`.
    """
    async with AsyncExitStack() as opened:
        images: list[OfflineImage] = []
        for path in paths:
            each = await OfflineImage.open(path, read_only=read_only, force_share=force_share)
            opened.push_async_exit(partial(_close, each.image))
            images.append(each)
        if len({each.image.file.identity for each in images}) < len(images):
            raise StateError("an image is named twice")
        yield images


async def _close(
    image: Qcow2Image, kind: type[BaseException] | None, error: BaseException | None, _: object
) -> None:
    """Close an image; if that fails after something else has, what has failed first is told."""
    try:
        await image.close()
    except OSError:
        if error is None:
            raise


async def list_bitmaps(path: Path, *, force_share: bool = False) -> list[Listed]:
    """The bitmaps of an image, good and damaged ones; errors as :func:`open_images`."""
    async with open_images([path], read_only=True, force_share=force_share) as [opened]:
        owners = {each.bitmap_name: each.name for each in opened.chain.checkpoints}
        found = []
        for entry in opened.store.entries:
            inconsistent = opened.is_inconsistent(entry)
            dirty = None if inconsistent else await opened.store.dirty_bytes(entry.name)
            found.append(
                Listed(
                    entry.name,
                    entry.granularity,
                    entry.recording,
                    inconsistent,
                    dirty,
                    owners.get(entry.name),
                    None,
                )
            )
        for damaged in opened.store.damaged:
            found.append(Listed(damaged.name, None, False, False, None, None, damaged.reason))
        return found


async def list_checkpoints(
    paths: Sequence[Path], *, force_share: bool = False
) -> list[CheckpointInfo]:
    """The checkpoints of images, oldest first; nothing is written, nor settled.

    Raises:
        As :func:`open_images`.
    """
    found: dict[str, CheckpointInfo] = {}
    async with open_images(paths, read_only=True, force_share=force_share) as images:
        for each in images:
            parent = None
            for checkpoint in each.chain.checkpoints:
                info = found.setdefault(checkpoint.name, CheckpointInfo.of(checkpoint, parent))
                info.disks[each.path] = await each.link_info(checkpoint)
                parent = checkpoint.name
    return sorted(found.values(), key=lambda info: info.created)


async def repair_bitmaps(paths: Sequence[Path]) -> list[RepairReport]:
    """Drop what is damaged from images' bitmap directories; errors as the store's repair."""
    async with open_images(paths) as images:
        return [await each.store.repair() for each in images]


async def change_bitmaps(paths: Sequence[Path], change: PendingChange) -> None:
    """Do a change on all images, or on none, also if the process is killed in between (rule 6).

    Args:
        paths: The images, all different.
        change: What to do; its identities are filled in here.

    Raises:
        StateError: It cannot be done on one of them; nothing was changed.
        OSError, ImageError: An image could not be opened or written. What was begun is settled
            with the next change of the same images.
    """
    async with open_images(paths) as images:
        await _settle_all(images)
        if await _drop_damaged(images, change):
            return
        for each in images:  # what cannot be done on one is done on none
            await _changed(each, change)
        if len(images) == 1:
            await images[0].replace(await _changed(images[0], change), images[0].chain)
            return
        await _change_together(images, change)


async def _settle_all(images: Sequence[OfflineImage]) -> None:
    """:func:`settle`, and insist that no server's transaction is left either."""
    await settle(images)
    for each in images:
        if each.chain.joint is not None:
            raise StateError(_unsettled(each.path))


async def resize_disk(
    path: Path, size: int, *, is_relative: bool = False, shrink: bool = False
) -> tuple[int, int]:
    """Give a disk another size; its bitmaps and checkpoints stay.

    Args:
        path: The image.
        size: Bytes.
        is_relative: ``size`` is how many more than now; negative for fewer.
        shrink: It may become smaller.

    Returns:
        The size that it had, and that it has.

    Raises:
        UsageError: It cannot have that size, or would become smaller.
        StateError: As :func:`settle` and :func:`~nbdfleece.qcow2.resize.resize_image`.
        OSError, ImageError: The image could not be opened or written.
    """
    async with open_images([path]) as [opened]:
        old = opened.image.size
        new = old + size if is_relative else size
        if new <= 0 or new % 512:
            raise UsageError(
                f"{path}: the size of a disk is a positive multiple of 512 bytes, not {new}"
            )
        if new < old and not shrink:
            raise UsageError(
                f"{path}: the disk has {old} bytes: with {new} all data past its new end would"
                " be lost; --shrink allows that"
            )
        await _settle_all([opened])
        await opened.recover()
        try:
            await resize_image(opened.image, opened.store, new)
        except OSError as error:
            if error.filename is not None:  # it says what has become of the disk
                raise
            raise disk_error(opened.image, f"still has {old} bytes", error) from error
        return old, new


async def _change_together(images: list[OfflineImage], change: PendingChange) -> None:
    for each in images:
        if not each.chain.disk_id:  # before others refer to it
            await each.replace(each.kept(), each.chain.with_identity())
    noted = msgspec.structs.replace(
        change,
        id=new_identity(),
        disks=tuple(each.chain.disk_id for each in images),
        names=tuple(Path(each.path).name for each in images),
    )
    try:
        for each in images:
            await each.replace(each.kept(), each.chain.with_change(noted))
    except (StateError, OSError):
        for each in images:
            if each.chain.change is not None:
                await each.replace(each.kept(), each.chain.with_change(None))
        raise
    await _finish(images)


async def settle(images: Sequence[OfflineImage]) -> None:
    """Finish or take back what was interrupted on these images.

    Raises:
        StateError: A change concerns other images too, or one was written in between.
        OSError: An image could not be written.
    """
    while unsettled := [each for each in images if each.chain.change is not None]:
        change = unsettled[0].chain.change
        assert change is not None
        concerned = [each for each in images if each.chain.disk_id in change.disks]
        here = {each.chain.disk_id for each in concerned}
        if len(concerned) < len(change.disks) or not here.issuperset(change.disks):
            raise StateError(change.describe(unsettled[0].path))
        holders = [each for each in concerned if _has_change(each, change)]
        if any(each.chain.change.done for each in holders if each.chain.change):
            _log.warning("finishing '%s' of bitmap '%s'", change.operation, change.bitmap)
            await _finish(holders)
        else:
            _log.warning("taking back '%s' of bitmap '%s'", change.operation, change.bitmap)
            await _forget(holders)


def _has_change(image: OfflineImage, change: PendingChange) -> bool:
    return image.chain.change is not None and image.chain.change.id == change.id


async def _finish(images: Sequence[OfflineImage]) -> None:
    """Do a change that is noted on all images that have not done it, then forget it."""
    for each in images:
        change = each.chain.change
        assert change is not None
        if not change.done and not each.is_fresh:
            raise StateError(
                f"{each.path}: was written by another program after '{change.operation}' of bitmap"
                f" '{change.bitmap}' was interrupted, so it is not done here any more;"
                " 'nbdfleece bitmap settle --forget' leaves every image as it is"
            )
    for each in images:
        change = each.chain.change
        if change is not None and not change.done:
            done = msgspec.structs.replace(change, done=True)
            await each.replace(await _changed(each, change), each.chain.with_change(done))
    await _forget(images)


async def _forget(images: Sequence[OfflineImage]) -> None:
    for each in images:
        await each.replace(each.kept(), each.chain.with_change(None))


async def settle_images(paths: Sequence[Path], *, forget: bool = False) -> None:
    """Settle what was interrupted on images.

    Args:
        paths: All images that it concerns.
        forget: Leave every image as it is, whether the change was done on it or not.

    Raises:
        As :func:`settle` and :func:`open_images`.
    """
    async with open_images(paths) as images:
        if forget:
            await _forget([each for each in images if each.chain.change is not None])
        else:
            await settle(images)
        is_joint = any(each.chain.joint is not None for each in images)
    if is_joint:
        await _settle_joint(paths, forget=forget)


async def _settle_joint(paths: Sequence[Path], *, forget: bool) -> None:
    """Settle a server's transaction over several disks.

    Raises:
        StateError: It concerns other images too.
        OSError, ImageError: An image could not be opened or written.
    """
    async with AsyncExitStack() as opened:
        disks: list[Disk] = []
        for path in paths:
            disks.append(await Disk.open(str(path), path, ScratchOptions()))
            opened.push_async_callback(disks[-1].close)
        await joint.settle(disks, forget=forget)
        for disk in disks:
            if disk.state.chain.joint is not None:
                raise StateError(_unsettled(disk.name))


def _unsettled(path: str) -> str:
    return (
        f"{path}: a transaction over several disks was interrupted: run"
        " 'nbdfleece bitmap settle' with all of their images"
    )


async def _drop_damaged(images: list[OfflineImage], change: PendingChange) -> bool:
    """Remove a bitmap that is the only damage of an image; whether that was all.

    Raises:
        StateError: A directory is damaged in another way.
    """
    damaged = [each for each in images if each.store.damaged]
    if not damaged:
        return False
    is_all = [each.name for each in damaged[0].store.damaged] == [change.bitmap]
    if change.operation != "remove" or not is_all or len(images) > 1:
        reason = damaged[0].store.damaged[0]
        raise StateError(
            f"{damaged[0].path}: the bitmap directory is damaged (bitmap '{reason.name or '?'}'"
            f" {reason.reason}): 'nbdfleece bitmap repair' drops what is damaged"
        )
    await damaged[0].store.repair()
    return True


# -- the changes --------------------------------------------------------------------------


async def _changed(image: OfflineImage, change: PendingChange) -> list[StoredBitmap]:
    """All bitmaps of an image as they are to be after a change.

    Raises:
        StateError: The change cannot be done.
    """
    bitmaps = {each.name: each for each in image.kept()}
    if change.operation == "add":
        bitmaps[change.bitmap] = _added(image, change)
        return list(bitmaps.values())
    found = _own(image, change.bitmap)
    if change.operation == "remove":
        del bitmaps[change.bitmap]
        return list(bitmaps.values())
    if found.in_use:
        raise StateError(
            f"{image.path}: bitmap '{change.bitmap}' is inconsistent and can only be removed"
        )
    bitmaps[change.bitmap] = await _with_change(image, found, change)
    return list(bitmaps.values())


def _added(image: OfflineImage, change: PendingChange) -> StoredBitmap:
    check_name(change.bitmap, "bitmap")
    if any(each.name == change.bitmap for each in image.store.entries):
        raise StateError(f"{image.path}: bitmap '{change.bitmap}' exists already")
    granularity = change.granularity or min(max(image.image.cluster_size, 4096), 65536)
    least, most = GRANULARITY_RANGE
    if granularity & (granularity - 1) or not least <= granularity <= most:
        raise StateError(f"the granularity is a power of two from {least} to {most}")
    bits = Bitmap(image.image.size, granularity)
    return StoredBitmap(change.bitmap, granularity, change.recording, in_use=False, content=bits)


def _own(image: OfflineImage, name: str) -> StoredBitmap:
    """A bitmap that belongs to no checkpoint: what those mean depends on one another."""
    for checkpoint in image.chain.checkpoints:
        if checkpoint.bitmap_name == name:
            raise StateError(
                f"{image.path}: bitmap '{name}' belongs to checkpoint '{checkpoint.name}'"
            )
    for each in image.kept():
        if each.name == name:
            return each
    raise StateError(f"{image.path}: there is no bitmap '{name}'")


async def _with_change(
    image: OfflineImage, found: StoredBitmap, change: PendingChange
) -> StoredBitmap:
    if change.operation == "clear":
        return found._replace(content=Bitmap(image.image.size, found.granularity))
    if change.operation in ("enable", "disable"):
        return found._replace(recording=change.operation == "enable")
    if change.operation != "merge":
        raise StateError(f"{image.path}: the unknown change '{change.operation}' of its bitmaps")
    bits = await image.store.load_bits(found.name)
    for name in change.sources:
        if not any(each.name == name for each in image.store.entries):
            raise StateError(f"{image.path}: there is no bitmap '{name}'")
        if any(each.name == name and each.inconsistent for each in image.store.entries):
            raise StateError(f"{image.path}: bitmap '{name}' is inconsistent, not merged")
        bits.merge(await image.store.load_bits(name))
    return found._replace(content=bits)
