"""Snapshots of a real image at random: at once or not, whatever is suspended meanwhile.

What :mod:`tests.block.test_copy_before_write` does over a disk in memory is done here over a
:class:`Qcow2Image`, whose small clusters move, are shared, compressed, freed and used again.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import random
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import pytest

from nbdfleece.bitmaps.bitmap import Bitmap
from nbdfleece.block import scratch as scratch_module
from nbdfleece.block import shared_fleece as shared_fleece_module
from nbdfleece.block.copy_before_write import ACCESS_GRANULARITY, CopyBeforeWrite
from nbdfleece.block.file import FileNode
from nbdfleece.block.guest import GuestNode
from nbdfleece.block.guest_options import GuestOptions
from nbdfleece.block.host_file import Places
from nbdfleece.block.node import BlockNode, BlockStatus
from nbdfleece.block.shared_fleece import Share, SharedFleece
from nbdfleece.block.snapshot_access import SnapshotAccess
from nbdfleece.errors import SnapshotError
from nbdfleece.extents import Extents
from nbdfleece.qcow2 import backing as backing_module
from nbdfleece.qcow2 import epochs as epochs_module
from nbdfleece.qcow2 import image as image_module
from nbdfleece.qcow2.create import create_image
from nbdfleece.qcow2.image import Qcow2Image
from tests.qcow2.guest import check, qemu_content, qemu_img

KIB = 1 << 10
SIZE = (1 << 20) + 3 * 64 * KIB + 512
WRITERS = 4
ROUNDS = 20
KINDS = {
    "small clusters": "cluster_size=512",
    "shared clusters": "cluster_size=4k",
    "compressed clusters": "cluster_size=16k",
    "subclusters": "cluster_size=16k,extended_l2=on",
    "over a backing file": "cluster_size=64k",
    "external data file": "cluster_size=4k,data_file=data",
}


@pytest.fixture
def folder(monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    with tempfile.TemporaryDirectory(dir="/dev/shm") as name:
        monkeypatch.chdir(name)
        yield Path(name)


class MoodyFile(FileNode):
    """A file whose bytes are sometimes at hand, and whose operations suspend now and then."""

    chance = random.Random(0)

    async def _pause(self) -> None:
        for _ in range(self.chance.choice([0, 0, 1, 4, 12])):
            await asyncio.sleep(0)

    async def read_into(self, offset: int, view: memoryview) -> None:
        await self._pause()
        count = os.preadv(self.fileno(), [view], offset)
        view[count:] = bytes(len(view) - count)

    def read_cached(self, offset: int, view: memoryview) -> int:
        if self.chance.random() < 0.4:  # not all of it, and garbage behind
            view[:] = b"?" * len(view)
            return super().read_cached(offset, view[: len(view) // 2])
        return super().read_cached(offset, view)

    def read_pieces_at_once(self, pieces: Sequence[tuple[int, memoryview]]) -> bool:
        if self.chance.random() < 0.4:  # not all of them, and garbage in the last
            super().read_pieces_at_once(pieces[: len(pieces) // 2])
            for _, view in pieces[-1:]:
                view[:] = b"?" * len(view)
            return False
        return super().read_pieces_at_once(pieces)

    def read_at_once(self, offset: int, view: memoryview) -> bool:
        return self.chance.random() < 0.6 and super().read_at_once(offset, view)

    async def write(self, offset: int, data: memoryview) -> None:
        if not self.write_at_once(offset, data):
            half = len(data) // 2
            super().write_at_once(offset, data[:half])
            await self._pause()
            super().write_at_once(offset + half, data[half:])

    def write_at_once(self, offset: int, data: memoryview) -> bool:
        return self.chance.random() < 0.6 and super().write_at_once(offset, data)


class MoodyScratch(MoodyFile):
    """Likewise; what is small enough can always be written to it at once."""

    def write_at_once(self, offset: int, data: memoryview) -> bool:
        return FileNode.write_at_once(self, offset, data)


class Log:
    """An activity log that must be waited for now and then."""

    def __init__(self, chance: random.Random) -> None:
        self.marked = Bitmap(SIZE, ACCESS_GRANULARITY)
        self._chance = chance

    def covers(self, offset: int, length: int) -> bool:
        return bool(self.marked.extents(offset, length).status.min())

    async def mark(self, offset: int, length: int) -> None:
        for _ in range(self._chance.randrange(5)):
            await asyncio.sleep(0)
        self.marked.set_range(offset, length)


class Witness(GuestOptions):
    """Sees to it that nothing changes which is not marked (rule 2)."""

    def __init__(self, below: BlockNode) -> None:
        super().__init__(below, discard=True, zeroes_unmap=True)
        self.guest: GuestNode | None = None

    def _look(self, offset: int, length: int) -> None:
        assert self.guest is not None
        for bitmap in self.guest.recording:
            assert bitmap.extents(offset, length).status.min()
        for log in self.guest.logs:
            assert log.covers(offset, length)

    async def write(self, offset: int, data: memoryview) -> None:
        self._look(offset, len(data))
        await super().write(offset, data)

    def write_at_once(self, offset: int, data: memoryview) -> bool:
        self._look(offset, len(data))
        return super().write_at_once(offset, data)

    async def write_zeroes(
        self, offset: int, length: int, *, unmap: bool = True, fast: bool = False
    ) -> None:
        self._look(offset, length)
        await super().write_zeroes(offset, length, unmap=unmap, fast=fast)

    async def trim(self, offset: int, length: int) -> None:
        self._look(offset, length)
        await super().trim(offset, length)


@dataclass
class SlowKeeper:
    """Tells the reader of a share what it asks for, some time."""

    node: SnapshotAccess
    chance: random.Random

    async def _pause(self) -> None:
        for _ in range(self.chance.choice([0, 0, 1, 12])):
            await asyncio.sleep(0)

    async def locate(self, part: int) -> Places:
        places = await self.node.locate(part)
        await self._pause()
        return places.copy()

    async def read_into(self, offset: int, view: memoryview) -> None:
        await self._pause()
        await self.node.read_into(offset, view)

    async def block_status(self, offset: int, length: int, extents_max: int) -> Extents:
        return await self.node.block_status(offset, length, extents_max=extents_max)


@dataclass(eq=False)
class Taken:
    """A snapshot, what it must show, and what of it may be read."""

    node: SnapshotAccess
    content: bytes
    kept: bytearray
    """One byte per access granule: whether the snapshot has it."""
    shared: SharedFleece | None = None
    """What another process would read it by."""
    is_dropped: bool = False

    async def share(self, chance: random.Random) -> SharedFleece | None:
        """Share it, as long as that can be."""
        share = None if self.is_dropped or self.shared else await self.node.share()
        if share is not None and not self.shared:
            file, scratch, codes = map(os.dup, share[1:4])
            below = share.below and await Qcow2Image.open("base.qcow2", read_only=True)
            own = Share(share.geometry, file, scratch, codes, below)
            self.shared = SharedFleece(own, SlowKeeper(self.node, chance))
            return self.shared
        return None

    async def drop(self) -> None:
        """Give it up, whoever reads it."""
        self.is_dropped = True
        await self.node.close()

    def has(self, offset: int, length: int) -> bool:
        """Whether all of a range may be read."""
        first = offset // ACCESS_GRANULARITY
        return all(self.kept[first : (offset + length - 1) // ACCESS_GRANULARITY + 1])


def some_range(chance: random.Random, within: range = range(SIZE)) -> tuple[int, int]:
    first = chance.randrange(within.start, within.stop)
    longest = min(within.stop - first, chance.choice([60, 512, 5000, 100_000]))
    return first, chance.randint(1, longest)


async def read(node: BlockNode, offset: int, length: int) -> bytes:
    buffer = bytearray(length)
    await node.read_into(offset, memoryview(buffer))
    return bytes(buffer)


@dataclass(eq=False)
class Play:
    """A disk, its guest and its snapshots."""

    image: Qcow2Image
    guest: GuestNode
    copies: CopyBeforeWrite
    chance: random.Random
    content: bytearray
    known: bytearray = field(default_factory=lambda: bytearray(b"\1" * SIZE))
    """Where ``content`` is right: a discard leaves open what is read."""
    snapshots: list[Taken] = field(default_factory=list)
    shared: list[SharedFleece] = field(default_factory=list)
    """Readers of all that have been shared."""
    checkpoint: bytes = b""
    """The content when the recording bitmap was begun."""

    async def write(self, own: list[range]) -> None:
        """What one guest does; what it writes is its own, the clusters are not."""
        chance = self.chance
        for _ in range(chance.randrange(8)):
            offset, length = some_range(chance, chance.choice(own))
            kind = chance.random()
            end = offset + length
            if kind < 0.7:
                data = chance.randbytes(length)
                view = memoryview(data)
                if chance.random() < 0.3 or not self.guest.write_at_once(offset, view):
                    await self.guest.write(offset, view)
                self.content[offset:end] = data
                self.known[offset:end] = b"\1" * length
            elif kind < 0.85:
                await self.guest.write_zeroes(offset, length, unmap=chance.random() < 0.5)
                self.content[offset:end] = bytes(length)
                self.known[offset:end] = b"\1" * length
            elif kind < 0.93:
                await self.guest.trim(offset, length)
                self.known[offset:end] = bytes(length)
            else:
                await self.guest.flush()

    async def read(self, taken: Taken) -> None:
        """Rule 1: what is read is what it was, at once or not; or it is refused."""
        chance = self.chance
        for _ in range(chance.randrange(8)):
            offset, length = some_range(chance)
            expected = taken.content[offset : offset + length]
            could = taken.has(offset, length)
            view = memoryview(bytearray(length))
            node = chance.choice([taken.shared or taken.node, taken.node])
            try:
                if chance.random() < 0.3 or not node.read_at_once(offset, view):
                    await node.read_into(offset, view)
            except SnapshotError:
                assert taken.is_dropped
                return
            except PermissionError:
                assert not taken.has(offset, length)
            else:
                assert could
                assert view == expected
            if chance.random() < 0.3 and could and not taken.is_dropped:
                await self.look_at_status(taken, offset, length)

    async def look_at_status(self, taken: Taken, offset: int, length: int) -> None:
        """What a snapshot says is zeroes is zeroes."""
        try:
            extents = await taken.node.block_status(offset, length)
        except SnapshotError:
            assert taken.is_dropped
            return
        for part, status in extents.pairs():
            if status & BlockStatus.ZERO:
                assert not any(taken.content[offset : offset + part])
            offset += part

    async def give_up(self) -> None:
        """Release or limit something amid everything."""
        chance = self.chance
        if not self.snapshots:
            return
        taken = chance.choice(self.snapshots)
        for _ in range(chance.randrange(6)):
            await asyncio.sleep(0)
        kind = chance.random()
        if taken.is_dropped:
            return
        if kind < 0.3:
            with contextlib.suppress(SnapshotError):  # dropped amid
                if (shared := await taken.share(chance)) is not None:
                    self.shared.append(shared)
        elif kind < 0.6:
            first = chance.randrange(len(taken.kept))
            end = min(len(taken.kept), first + chance.randint(1, 3))
            taken.kept[first:end] = bytes(end - first)
            begin, stop = first * ACCESS_GRANULARITY, min(SIZE, end * ACCESS_GRANULARITY)
            await taken.node.trim(begin, stop - begin)
        elif kind < 0.65:
            for index in range(len(taken.kept)):
                taken.kept[index] &= chance.random() < 0.8
            await taken.node.limit(_bitmap(taken.kept))

    async def look(self) -> bytes:
        """See that the disk is what its guests have made of it, none of which is at work."""
        content = await read(self.image, 0, SIZE)
        differs = np.frombuffer(content, np.uint8) != np.frombuffer(self.content, np.uint8)
        assert not (differs & np.frombuffer(self.known, np.bool_)).any()
        self.content[:] = content
        self.known[:] = b"\1" * SIZE
        return content

    async def take(self) -> None:
        """A snapshot, and perhaps a checkpoint with it."""
        chance = self.chance
        await self.guest.drain()
        content = await self.look()
        (bitmap,) = self.guest.recording
        at = 0
        for length, is_dirty in bitmap.extents(0, SIZE).pairs():
            assert is_dirty or content[at : at + length] == self.checkpoint[at : at + length]
            at += length
        if chance.random() < 0.5:
            self.guest.recording = (Bitmap(SIZE, chance.choice([512, 4096, 65536])),)
            self.checkpoint = content
        if len(self.snapshots) < 4:
            kept = bytearray(b"\1" * -(-SIZE // ACCESS_GRANULARITY))
            access = None
            if chance.random() < 0.3:
                kept = bytearray(chance.random() < 0.7 for _ in kept)
                access = _bitmap(kept)
            layer = self.copies.add_layer(access)
            node = SnapshotAccess(self.copies, layer, SIZE, 4096)
            self.snapshots.append(Taken(node, content, kept))
        self.guest.resume()

    async def drop(self) -> None:
        """Give a snapshot up, whoever reads it."""
        for _ in range(self.chance.randrange(20)):
            await asyncio.sleep(0)
        if len(self.snapshots) > 1 and self.chance.random() < 0.3:
            taken = self.snapshots.pop(self.chance.randrange(len(self.snapshots)))
            await taken.drop()


def _bitmap(kept: bytearray) -> Bitmap:
    access = Bitmap(SIZE, ACCESS_GRANULARITY)
    for index, is_kept in enumerate(kept):
        if is_kept:
            begin = index * ACCESS_GRANULARITY
            access.set_range(begin, min(ACCESS_GRANULARITY, SIZE - begin))
    return access


async def make_disk(folder: Path, kind: str, chance: random.Random) -> Path:
    """An image of a kind, half full."""
    path = folder / "disk.qcow2"
    below = bytearray(chance.randbytes(SIZE // 2) + bytes(SIZE - SIZE // 2))
    below[100_000:300_000] = (b"compresses well " * 20_000)[:200_000]
    (folder / "raw").write_bytes(below)
    convert = ["convert", "-f", "raw", "-O", "qcow2", "-o", KINDS[kind]]
    if kind == "compressed clusters":
        qemu_img(*convert, "-c", folder / "raw", path)
    elif kind == "over a backing file":
        qemu_img(*convert, folder / "raw", folder / "base.qcow2")
        await create_image(path, SIZE, backing_file="base.qcow2", backing_format="qcow2")
    else:
        qemu_img(*convert, folder / "raw", path)
    if kind == "shared clusters":
        qemu_img("snapshot", "-c", "before", path)
    return path


@pytest.mark.parametrize("caches", ["large caches", "small caches"])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("seed", range(2))
async def test_snapshots_of_an_image_are_exact_at_once_or_not(
    folder: Path, monkeypatch: pytest.MonkeyPatch, seed: int, kind: str, caches: str
) -> None:
    """Rules 1, 2 and 3, with guests, readers, checkpoints, limits and releases at once."""
    chance = random.Random(f"{seed} {kind} {caches}")
    if caches == "small caches":
        monkeypatch.setattr(image_module, "CACHE_BYTES", 0)
        monkeypatch.setattr(epochs_module, "DIRTY_BYTES_MAX", 4096)
    path = await make_disk(folder, kind, chance)
    monkeypatch.setattr(MoodyFile, "chance", chance)
    monkeypatch.setattr(scratch_module, "FileNode", MoodyScratch)
    monkeypatch.setattr(backing_module, "FileNode", MoodyFile)
    monkeypatch.setattr(image_module, "FileNode", MoodyFile)
    monkeypatch.setattr(shared_fleece_module, "FileNode", MoodyFile)
    image = await Qcow2Image.open(path, read_only=False)
    copies = CopyBeforeWrite(image, folder, granularity=chance.choice([512, 4096, 65536]))
    witness = Witness(image)
    guest = witness.guest = GuestNode(witness, copies)
    guest.recording = (Bitmap(SIZE, 65536),)
    guest.logs = (Log(chance),)
    content = bytearray(await read(image, 0, SIZE))
    play = Play(image, guest, copies, chance, content, checkpoint=bytes(content))
    pieces = [range(at, min(SIZE, at + 7000)) for at in range(0, SIZE, 7000)]
    for _ in range(ROUNDS):
        await asyncio.gather(
            *(play.write(pieces[number::WRITERS]) for number in range(WRITERS)),
            *(play.read(taken) for taken in play.snapshots),
            play.give_up(),
            play.take(),
            play.drop(),
        )
    for taken in play.snapshots:
        await taken.drop()
    for shared in play.shared:
        await shared.close()
    await play.look()
    await image.close()
    check(path)
    assert qemu_content(path) == content
