"""Images that grow by thousands of random operations, QEMU and this driver taking turns.

Each image has options of its own, over the whole matrix: version, cluster size, subclusters,
compression, refcount width, data file, length of the backing chain, preallocation, and what its
writers do about discards and zeroes. Some have internal snapshots, and bitmaps that are added,
merged, cleared and removed by either program between the turns. After each turn

* ``qemu-img check`` finds nothing, and our check what it finds;
* both programs read what was written, to the disk and before each snapshot;
* their maps, allocation depths and bitmaps are the same;
* a bitmap has all that was written while it recorded, and nothing that was not touched.
"""

from __future__ import annotations

import argparse
import asyncio
import collections
import json
import random
import tempfile
import time
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from nbdfleece.block.guest_options import DetectZeroes, GuestOptions
from nbdfleece.block.node import DEPTH_SHIFT, BlockNode, BlockStatus
from nbdfleece.engine.chain import PendingChange
from nbdfleece.engine.offline import change_bitmaps
from nbdfleece.extents import Extents
from nbdfleece.qcow2.backing import BackingPolicy
from nbdfleece.qcow2.bitmap_store import BitmapStore
from nbdfleece.qcow2.check import check_image
from nbdfleece.qcow2.create import create_image
from nbdfleece.qcow2.describe import map_image
from nbdfleece.qcow2.image import Qcow2Image
from nbdfleece.standalone.recording_node import RecordingNode
from tests.qcow2.qemu import Qemu, Rows, View
from tests.qcow2.test_check import shown

MIB = 1 << 20
SECTOR = 512
LENGTH_MAX = 300_000
BITMAPS_MAX = 4
SNAPSHOTS_MAX = 2

Sectors = npt.NDArray[np.bool_]
"""One per sector of the disk."""


class Shape(NamedTuple):
    """An image's options and its writers'."""

    size: int
    version: int
    cluster_size: int
    extended_l2: bool
    refcount_bits: int
    compression: str
    """``none``, or the type of clusters that QEMU compresses."""
    data_file: str
    """``none``, ``external`` or ``raw``."""
    backing_length: int
    preallocation: str
    lazy_refcounts: bool
    discard: bool
    detect_zeroes: DetectZeroes
    is_ours: bool
    """Made by us, not by QEMU."""

    @property
    def unit(self) -> int:
        """Bytes of a cluster or subcluster."""
        return self.cluster_size // 32 if self.extended_l2 else self.cluster_size

    @property
    def can_snapshot(self) -> bool:
        """Whether refcounts are wide enough for many references to compressed clusters."""
        return self.data_file == "none" and self.refcount_bits >= 16


def choose_shape(rng: random.Random) -> Shape:
    """Options that go together."""
    version = rng.choice([2, 3, 3, 3])
    cluster_bits = rng.randint(9, 21)
    data_file = rng.choice(["none"] * 4 + ["external", "raw"]) if version == 3 else "none"
    backing_length = 0 if data_file == "raw" else rng.choice([0, 1, 2, 3])
    compression = rng.choice(["none", "zlib", "zstd"]) if version == 3 else "zlib"
    preallocations = ["off", "off", "metadata", "falloc"] if not backing_length else ["off"]
    discard = rng.random() < 0.7
    detections = list(DetectZeroes) if discard else [DetectZeroes.OFF, DetectZeroes.ON]
    return Shape(
        size=max(rng.choice([2, 3, 5]) * MIB, 5 << cluster_bits) + SECTOR * rng.randrange(99),
        version=version,
        cluster_size=1 << cluster_bits,
        extended_l2=version == 3 and cluster_bits >= 14 and rng.random() < 0.5,
        refcount_bits=1 << rng.randint(0, 6) if version == 3 else 16,
        compression=compression if data_file == "none" else "none",
        data_file=data_file,
        backing_length=backing_length,
        preallocation=rng.choice(preallocations),
        lazy_refcounts=version == 3 and rng.random() < 0.3,
        discard=discard,
        detect_zeroes=rng.choice(detections),
        is_ours=backing_length > 0 and rng.random() < 0.5,
    )


class Operation(NamedTuple):
    """What a guest does."""

    kind: str
    """``write``, ``zero``, ``unmap``, ``discard`` or ``compress``."""
    offset: int
    length: int
    byte: int

    def command(self) -> str:
        """For qemu-io."""
        place = f"{self.offset} {self.length}"
        verbs = {
            "write": f"write -P {self.byte}",
            "compress": f"write -c -P {self.byte}",
            "zero": "write -z",
            "unmap": "write -z -u",
            "discard": "discard",
        }
        return f"{verbs[self.kind]} {place}"


KINDS = ["write"] * 5 + ["zero", "unmap", "discard", "discard"]


def choose_operation(rng: random.Random, shape: Shape, alignment: int) -> Operation:
    """One at an awkward place, or at a cluster's edge; zeroes are written as data, too."""
    kind = rng.choice(KINDS + ["compress"] * 2 * (shape.compression != "none"))
    byte = rng.choice([0, rng.randrange(1, 256)])
    if kind == "compress":
        cluster = rng.randrange(shape.size // shape.cluster_size)
        return Operation(kind, cluster * shape.cluster_size, shape.cluster_size, byte)
    edge = shape.unit if rng.random() < 0.4 else alignment
    length = rng.choice([1, 511, 512, 4096, shape.unit, 3 * shape.unit, LENGTH_MAX])
    length = min(rng.randint(1, length), max(LENGTH_MAX, 2 * shape.unit))
    length = -(-length // edge) * edge
    offset = rng.randrange(shape.size) // edge * edge
    return Operation(kind, offset, min(length, shape.size - offset), byte)


class Marks:
    """What a bitmap may and must have, by sectors."""

    def __init__(self, sectors: int, granularity: int) -> None:
        self.granularity = granularity
        self.recording = True
        self.must: Sectors = np.zeros(sectors, dtype=np.bool_)
        self.may: Sectors = np.zeros(sectors, dtype=np.bool_)

    def touch(self, sectors: slice, *, surely: bool) -> None:
        """Note a change, or what may count as one."""
        self.may[sectors] = True
        if surely:
            self.must[sectors] = True

    def check(self, rows: Rows, name: str) -> None:
        """Insist that a bitmap is right; from then on its bits are what it must have."""
        bits = np.repeat([value for _, value in rows], [length // SECTOR for length, _ in rows])
        dirty: Sectors = bits.astype(np.bool_)
        assert not (self.must & ~dirty).any(), f"bitmap {name} misses a change (rule 2)"
        assert not (dirty & ~self.whole_granules(self.may)).any(), f"bitmap {name} has too much"
        self.must, self.may = dirty, dirty.copy()

    def whole_granules(self, sectors: Sectors) -> Sectors:
        """All sectors of the granules that some of ``sectors`` are in."""
        per_granule = self.granularity // SECTOR
        padded = np.zeros(-(-len(sectors) // per_granule) * per_granule, dtype=np.bool_)
        padded[: len(sectors)] = sectors
        granules = padded.reshape(-1, per_granule).any(axis=1)
        whole: Sectors = np.repeat(granules, per_granule)[: len(sectors)]
        return whole


class Disk:
    """One image's life, and what it must be."""

    def __init__(self, folder: Path, rng: random.Random, tree: Path | None) -> None:
        self.folder = folder
        self.rng = rng
        self.qemu = Qemu(folder, tree)
        self.path = folder / "disk.qcow2"
        self.shape = choose_shape(rng)
        self.content = bytearray()
        self.loose: Sectors = np.zeros(self.shape.size // SECTOR, dtype=np.bool_)
        """Sectors that were discarded last: they have the old content, or zeroes."""
        self.marks: dict[str, Marks] = {}
        self.snapshots: dict[str, bytes] = {}
        self.numbers = iter(range(1 << 30))

    # -- making ----------------------------------------------------------------------------

    async def create(self) -> None:
        """Make the image and what is behind it; QEMU says what that reads as."""
        backing: tuple[str, str] | None = None
        for number in range(self.shape.backing_length):
            backing = self._make_backing(number, backing)
        if self.shape.is_ours:
            await self._create_ours(backing)
        else:
            self._create_qemus(backing)
        self.content = bytearray(self.qemu.view(self.path).content)

    def _make_backing(self, number: int, below: tuple[str, str] | None) -> tuple[str, str]:
        """A backing file of another size; return its name and format."""
        name = f"b{number}"
        form = "raw" if below is None and self.rng.random() < 0.4 else "qcow2"
        sectors = self.shape.size // SECTOR
        size = self.rng.choice([sectors // 3, sectors - 1, sectors, sectors * 3 // 2]) * SECTOR
        words: list[object] = ["create", "-q", "-f", form]
        if below is not None:
            words += ["-b", below[0], "-F", below[1]]
        if form == "qcow2":
            words += ["-o", f"cluster_size={1 << self.rng.randint(9, 17)}"]
        self.qemu.img(*words, self.folder / name, size)
        shape = self.shape._replace(size=size, compression="none", extended_l2=False)
        works = [choose_operation(self.rng, shape, SECTOR) for _ in range(12)]
        commands = [word for work in works for word in ("-c", work.command())]
        self.qemu.run("qemu-io", "-f", form, *commands, self.folder / name)
        return name, form

    async def _create_ours(self, backing: tuple[str, str] | None) -> None:
        assert backing is not None
        shape = self.shape
        await create_image(
            self.path,
            shape.size,
            cluster_size=shape.cluster_size,
            version=shape.version,
            refcount_bits=shape.refcount_bits,
            extended_l2=shape.extended_l2,
            backing_file=backing[0],
            backing_format=backing[1],
            lazy_refcounts=shape.lazy_refcounts,
            compression_type=int(shape.compression == "zstd"),
            # QEMU looks for a relative name in its own folder.
            data_file=None if shape.data_file == "none" else f"{self.folder}/data",
        )

    def _create_qemus(self, backing: tuple[str, str] | None) -> None:
        shape = self.shape
        options = (
            f"cluster_size={shape.cluster_size},compat={'0.10' if shape.version == 2 else 1.1}"
        )
        options += f",preallocation={shape.preallocation}"
        if shape.version == 3:
            options += f",refcount_bits={shape.refcount_bits},extended_l2={_on(shape.extended_l2)}"
            options += f",lazy_refcounts={_on(shape.lazy_refcounts)}"
        if shape.compression != "none":
            options += f",compression_type={shape.compression}"
        if shape.data_file != "none":
            is_raw = shape.data_file == "raw"
            options += f",data_file={self.folder}/data,data_file_raw={_on(is_raw)}"
        words: list[object] = ["-b", backing[0], "-F", backing[1]] if backing else []
        self.qemu.img("create", "-q", "-f", "qcow2", *words, "-o", options, self.path, shape.size)

    # -- turns -----------------------------------------------------------------------------

    async def take_turn(self, is_ours: bool, operations: int) -> None:
        """One program writes, and both say what came of it."""
        if is_ours:
            await self._work(operations)
        else:
            self._have_qemu_work(operations)
        await self.check()
        await self.tend()

    async def _work(self, count: int) -> None:
        """We write as for a guest."""
        image = await Qcow2Image.open(self.path, read_only=False)
        node = GuestOptions(
            await RecordingNode.begin(image),
            discard=self.shape.discard,
            zeroes_unmap=True,
            detect_zeroes=self.shape.detect_zeroes,
        )
        try:
            for _ in range(count):
                await self._do(node, choose_operation(self.rng, self.shape, 1))
                if self.rng.random() < 0.1:
                    await node.flush()
            assert await _read(node, 0, node.size) == self.content
        finally:
            await node.close()

    async def _do(self, node: BlockNode, work: Operation) -> None:
        """Do one operation; what a discard does is what is read after it."""
        end = work.offset + work.length
        data = bytes([work.byte]) * work.length
        if work.byte:
            data = self.rng.randbytes(work.length)
        if work.kind in ("zero", "unmap"):
            await node.write_zeroes(work.offset, work.length, unmap=work.kind == "unmap")
            data = bytes(work.length)
        elif work.kind == "discard":
            await node.trim(work.offset, work.length)
            data = await _read(node, work.offset, work.length)
            old = np.frombuffer(self.content[work.offset : end], dtype=np.uint8)
            new = np.frombuffer(data, dtype=np.uint8)
            assert ((new == 0) | (new == old)).all(), f"{work}: neither old nor zeroes"
        else:
            await node.write(work.offset, memoryview(data))
        self._note(work, data)

    def _have_qemu_work(self, count: int) -> None:
        """QEMU writes.

        It compresses first: once it has freed clusters in the same session, 7.2 and 10.0 put
        compressed data into a host cluster that is another's by then, and corrupt the image.
        """
        works = [choose_operation(self.rng, self.shape, SECTOR) for _ in range(count)]
        works.sort(key=lambda work: work.kind != "compress")
        discard = "unmap" if self.shape.discard else "ignore"
        done = self.qemu.io(
            self.path,
            [work.command() for work in works],
            discard=discard,
            detect_zeroes=self.shape.detect_zeroes.value,
        )
        for work, succeeded in zip(works, done, strict=True):
            end = work.offset + work.length
            data = bytes([work.byte]) * work.length
            if work.kind in ("zero", "unmap"):
                data = bytes(work.length)
            elif work.kind == "discard":
                self.loose[work.offset // SECTOR : end // SECTOR] = True
                data = bytes(self.content[work.offset : end])
            elif not succeeded:  # QEMU compresses only what is not allocated yet
                assert work.kind == "compress", work
                data = bytes(self.content[work.offset : end])
            if work.kind != "discard" and succeeded:
                self.loose[work.offset // SECTOR : end // SECTOR] = False
            self._note(work, data, surely=succeeded)

    def _note(self, work: Operation, data: bytes, *, surely: bool = True) -> None:
        """The disk now has ``data``, and bitmaps know it."""
        end = work.offset + work.length
        self.content[work.offset : end] = data
        sectors = slice(work.offset // SECTOR, -(-end // SECTOR))
        for marks in self.marks.values():
            if marks.recording:
                marks.touch(sectors, surely=surely and work.kind != "discard")

    # -- judging ---------------------------------------------------------------------------

    async def check(self) -> None:
        """Both programs show what there must be, and the same."""
        findings = self.qemu.check(self.path)
        assert not {"corruptions", "leaks"} & set(findings), findings
        assert findings["check-errors"] == 0
        assert shown(await check_image(self.path)) == findings
        view = self.qemu.view(self.path, list(self.marks))
        self._check_content(view.content)
        await self._check_ours(view)
        theirs = json_map(self.qemu, self.path)
        ours = await our_map(self.path, theirs)
        differing = [pair for pair in zip(ours, theirs, strict=False) if pair[0] != pair[1]]
        assert ours == theirs, f"{len(ours)} and {len(theirs)} extents: {differing[:2]}"
        for name, marks in self.marks.items():
            marks.check(view.bitmaps[name], name)
        if self.shape.data_file == "raw":
            assert (self.folder / "data").read_bytes()[: self.shape.size] == self.content

    def _check_content(self, content: bytes) -> None:
        new = np.frombuffer(content, dtype=np.uint8).reshape(-1, SECTOR)
        old = np.frombuffer(self.content, dtype=np.uint8).reshape(-1, SECTOR)
        is_same = (new == old).all(axis=1)
        is_zero = ~new.any(axis=1)
        wrong = np.flatnonzero(~(is_same | (self.loose & is_zero)))
        assert not len(wrong), f"sectors {wrong[:10].tolist()} are wrong"
        self.content[:] = content
        self.loose[:] = False

    async def _check_ours(self, view: View) -> None:
        """What we read is what QEMU reads."""
        image = await Qcow2Image.open(self.path, read_only=True)
        try:
            assert await _read(image, 0, image.size) == view.content
            rows = (await image.block_status(0, image.size)).pairs()
            depths = Extents.from_pairs((length, word >> DEPTH_SHIFT) for length, word in rows)
            assert depths.pairs() == view.depths
            offset = 0
            for length, word in rows:
                zero = bool(word & BlockStatus.ZERO)
                assert not (zero and any(view.content[offset : offset + length]))
                offset += length
            store = await BitmapStore.load(image)
            assert {entry.name for entry in store.entries} == set(self.marks)
            for entry in store.entries:
                assert entry.recording == self.marks[entry.name].recording
                bits = await store.load_bits(entry.name)
                assert bits.extents(0, image.size).pairs() == view.bitmaps[entry.name], entry
        finally:
            await image.close()
        for name, content in self.snapshots.items():
            image = await Qcow2Image.open(self.path, read_only=True, snapshot=name)
            assert await _read(image, 0, image.size) == content, f"snapshot {name} changed"
            await image.close()

    # -- between turns ---------------------------------------------------------------------

    async def tend(self) -> None:
        """Change snapshots and bitmaps, now and then."""
        if self.shape.can_snapshot and self.rng.random() < 0.3:
            self._change_snapshots()
        if self.shape.version == 3 and self.rng.random() < 0.8:
            for _ in range(self.rng.randint(1, 3)):
                await self._change_bitmaps()

    def _change_snapshots(self) -> None:
        if len(self.snapshots) < SNAPSHOTS_MAX:
            name = f"s{next(self.numbers)}"
            self.qemu.img("snapshot", "-c", name, self.path)
            self.snapshots[name] = bytes(self.content)
        else:
            name = self.rng.choice(sorted(self.snapshots))
            self.qemu.img("snapshot", "-d", name, self.path)
            del self.snapshots[name]

    async def _change_bitmaps(self) -> None:
        """One change by either program."""
        names = sorted(self.marks)
        operations = ["add"] * (len(names) < BITMAPS_MAX)
        operations += ["clear", "enable", "disable", "remove"] * bool(names)
        operations += ["merge"] * 4 * (len(names) > 1)
        operation = self.rng.choice(operations)
        name = f"b{next(self.numbers)}" if operation == "add" else self.rng.choice(names)
        change = PendingChange(
            operation=operation,
            bitmap=name,
            sources=tuple(self.rng.sample([n for n in names if n != name], 1))
            if operation == "merge"
            else (),
            granularity=1 << self.rng.randint(9, 20) if operation == "add" else 0,
        )
        if self.rng.random() < 0.5:
            await change_bitmaps([self.path], change)
        else:
            self.qemu.img("bitmap", *_words(change), self.path, name)
        self._note_change(change)

    def _note_change(self, change: PendingChange) -> None:
        name = change.bitmap
        if change.operation == "add":
            self.marks[name] = Marks(self.shape.size // SECTOR, change.granularity)
        elif change.operation == "remove":
            del self.marks[name]
        elif change.operation == "merge":
            source = self.marks[change.sources[0]]
            self.marks[name].must |= source.whole_granules(source.must)
            self.marks[name].may |= source.whole_granules(source.may)
        elif change.operation == "clear":
            self.marks[name].must[:] = False
            self.marks[name].may[:] = False
        else:
            self.marks[name].recording = change.operation == "enable"


def _words(change: PendingChange) -> list[object]:
    """The flags of ``qemu-img bitmap``."""
    words: list[object] = [f"--{change.operation}"]
    if change.granularity:
        words += ["-g", change.granularity]
    return [*words, *change.sources]


def _on(value: bool) -> str:
    return "on" if value else "off"


async def _read(node: BlockNode, offset: int, length: int) -> bytes:
    buffer = bytearray(length)
    await node.read_into(offset, memoryview(buffer))
    return bytes(buffer)


def json_map(qemu: Qemu, path: Path) -> list[dict[str, Any]]:
    """The map by qemu-img."""
    found: list[dict[str, Any]] = json.loads(qemu.img("map", "--output=json", path))
    return found


async def our_map(path: Path, theirs: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Our map, with the keys that this QEMU prints: before 8.2 it did not tell of compression."""
    policy = BackingPolicy.SAME_FOLDER
    entries = [each._asdict() async for each in map_image(path, backing_policy=policy)]
    if "compressed" not in theirs[0]:
        for each in entries:
            del each["compressed"]
    return [{key: value for key, value in each.items() if value is not None} for each in entries]


async def live(folder: Path, seed: str, turns: int, operations: int, tree: Path | None) -> Shape:
    """One image's life; return what it was like."""
    disk = Disk(folder, random.Random(seed), tree)
    try:
        await disk.create()
        await disk.tend()
        for turn in range(turns):
            await disk.take_turn(turn % 2 == 0, operations)
    except BaseException as error:
        error.add_note(str(disk.shape))
        raise
    return disk.shape


def run_campaign(
    images: int, turns: int, operations: int, seed: int, first: int = 0, tree: Path | None = None
) -> collections.Counter[str]:
    """Let images grow; return how many of them had which option.

    Args:
        images: How many.
        turns: Of each image; we begin.
        operations: In each turn.
        seed: Of all of them.
        first: Number of the first image.
        tree: A Debian tree whose QEMU takes part, instead of this system's.

    Raises:
        AssertionError: The programs disagree; the image is in a note.
    """
    seen: collections.Counter[str] = collections.Counter()
    for number in range(first, first + images):
        with tempfile.TemporaryDirectory(
            prefix="turns-", dir="/tmp" if tree else "/dev/shm"
        ) as name:
            try:
                shape = asyncio.run(live(Path(name), f"{seed}:{number}", turns, operations, tree))
            except BaseException as error:
                error.add_note(f"again: --seed {seed} --first {number} --images 1")
                raise
        seen.update(f"{key} {value}" for key, value in shape._asdict().items() if key != "size")
    return seen


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(prog="turns-campaign", description=__doc__)
    parser.add_argument("--images", type=int, default=150)
    parser.add_argument("--turns", type=int, default=10, help="of each image")
    parser.add_argument("--operations", type=int, default=60, help="in each turn")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--first", type=int, default=0, help="number of the first image")
    parser.add_argument("--tree", type=Path, help="a Debian tree whose QEMU takes part")
    options = parser.parse_args()
    begun = time.monotonic()
    seen = run_campaign(**vars(options))
    for option, count in sorted(seen.items()):
        print(f"{option:32} {count:5} images")
    total = options.images * options.turns * options.operations
    print(f"{total} operations agreed on in {time.monotonic() - begun:.0f} s, seed {options.seed}")


if __name__ == "__main__":
    main()
