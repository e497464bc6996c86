"""Damaged images by the thousand: mutations of headers, tables, refcounts and bitmap directories.

Each image is opened in all the ways there are, read, described, checked, and written. Whatever
it is made to say,

* the end comes in seconds, with at most :data:`MEMORY_BYTES_MAX` more memory;
* what cannot be done ends with an error that we raise on purpose, never with a traceback;
* an image that is refused is as it was, byte for byte;
* guest data never lie over metadata, and an image found damaged takes no further writes.
"""

from __future__ import annotations

import argparse
import asyncio
import collections
import ctypes
import json
import logging
import random
import resource
import signal
import sys
import tempfile
import threading
import time
from collections.abc import Awaitable
from pathlib import Path
from typing import Any, NamedTuple

from nbdfleece.errors import NbdfleeceError
from nbdfleece.qcow2.bitmap_store import BitmapStore
from nbdfleece.qcow2.check import Repair, check_image
from nbdfleece.qcow2.describe import describe_image
from nbdfleece.qcow2.image import Qcow2Image
from tests.qcow2.guest import qemu_img, qemu_io

MEMORY_BYTES_MAX = 1 << 30
"""Above what the interpreter has taken: an L1 table of 32 MiB, caches of 48 MiB, and a bitmap,
whose bits may take 512 MiB."""

SECONDS_MAX = 120
"""An image takes a fraction of one; a loaded machine may stretch it."""

_M_ARENA_MAX = -8
"""mallopt(3)."""

SIZE = 2 << 20
PATTERN = b"guest\xa5\x5a!" * 64
"""A sector of what the guest writes."""

BASES = {
    "small clusters": "cluster_size=512",
    "large clusters": "cluster_size=65536",
    "version 2": "compat=0.10,cluster_size=4096",
    "subclusters": "extended_l2=on,cluster_size=16384",
    "narrow refcounts": "refcount_bits=1,cluster_size=1024",
    "lazy": "lazy_refcounts=on,cluster_size=2048",
}


class Base(NamedTuple):
    """A sound image and where its metadata are."""

    content: bytes
    places: list[int]
    """Offsets of 8-byte words that are not zero, in metadata."""


async def make_base(folder: Path, options: str) -> Base:
    """An image with all kinds of clusters, a snapshot and bitmaps, as far as they go together."""
    raw, path = folder / "base.raw", folder / "base.qcow2"
    raw.write_bytes((b"compresses well " * SIZE)[:SIZE])
    qemu_img("convert", "-c", "-O", "qcow2", "-o", options, raw, path)
    qemu_io(path, ["write -P 7 0 200k", "write -z 300k 100k", "discard 500k 100k"])
    if "refcount_bits" not in options:
        qemu_img("snapshot", "-c", "before", path)
        qemu_io(path, ["write -P 8 100k 50k"])
    if "0.10" not in options:
        qemu_img("bitmap", "--add", path, "recording")
        qemu_img("bitmap", "--add", "--disable", path, "frozen")
        qemu_io(path, ["write -P 9 700k 300k"])
    image = await Qcow2Image.open(path, read_only=False)
    if image.header.version >= 3:
        await BitmapStore.load(image)
    clusters = sorted(image.metadata.clusters)
    size = image.cluster_size
    await image.close()
    content = path.read_bytes()
    path.unlink()
    words = [
        offset for cluster in clusters for offset in range(cluster * size, cluster * size + size, 8)
    ]
    places = [offset for offset in words if any(content[offset : offset + 8])]
    return Base(content, places)


def mutate(base: Base, rng: random.Random) -> bytes:
    """Change a few words of metadata, and sometimes the file's length."""
    content = bytearray(base.content)
    for _ in range(rng.choice([1, 1, 1, 2, 3, 8])):
        place = rng.choice(base.places)
        if rng.random() < 0.4:  # of the header there is little, and much hangs on it
            place = rng.randrange(16) * 8 if rng.random() < 0.7 else rng.randrange(80) * 8
        content[place : place + 8] = damaged_word(content, base, place, rng)
    if rng.random() < 0.1:
        del content[rng.randrange(len(content)) :]
    elif rng.random() < 0.05:
        content += bytes(rng.randrange(100_000))
    return bytes(content)


def damaged_word(content: bytearray, base: Base, place: int, rng: random.Random) -> bytes:
    """Another word for the one at ``place``."""
    word = int.from_bytes(content[place : place + 8], "big")
    other = rng.choice(base.places)
    changed = rng.choice(
        [
            word ^ 1 << rng.randrange(64),
            word ^ rng.randrange(256) << 8 * rng.randrange(8),
            rng.randrange(1 << 64),
            rng.choice([0, 1, (1 << 64) - 1, 1 << 63, len(content), 0x7FFFFFFF]),
            rng.choice([0, 1 << 63]) | other // 512 * 512,  # leads to metadata
            int.from_bytes(content[other : other + 8], "big"),
            word + rng.choice([-1, 1]) * (1 << rng.choice([0, 9, 12, 16, 32])),
        ]
    )
    return (changed & (1 << 64) - 1).to_bytes(8, "big")


async def read_about(image: Qcow2Image, rng: random.Random) -> None:
    """Read here and there, and ask what is where."""
    end = image.size
    for _ in range(6):
        offset = rng.choice([0, rng.randrange(min(end, SIZE) or 1), rng.randrange(end or 1)])
        length = min(100_000, end - offset)
        if length > 0:
            await expected(image.read_into(offset, memoryview(bytearray(length))))
            await expected(image.block_status(offset, end - offset, extents_max=1000))


async def expected(work: Awaitable[Any]) -> bool:
    """Do something that may fail as things may fail; whether it went well."""
    try:
        await work
    except (NbdfleeceError, OSError):
        return False
    return True


async def look(path: Path, rng: random.Random) -> None:
    """Everything that only reads."""
    for snapshot in (None, "before"):
        try:
            image = await Qcow2Image.open(path, read_only=True, snapshot=snapshot)
        except (NbdfleeceError, OSError):
            continue
        try:
            await read_about(image, rng)
            store = await BitmapStore.load(image)
            for entry in store.entries[:5]:
                await expected(store.load_bits(entry.name))
        except (NbdfleeceError, OSError):
            pass
        finally:
            await image.close()
    await expected(check_image(path))
    await expected(describe_image(path))


async def write(path: Path, rng: random.Random) -> str:
    """Write to the image; return what became of it."""
    before = path.read_bytes()
    try:
        image = await Qcow2Image.open(path, read_only=False)
    except (NbdfleeceError, OSError):
        is_dirty = len(before) > 79 and before[79] & 1
        if not is_dirty:  # a dirty one may have been repaired before it was refused
            assert path.read_bytes() == before, "an image that is refused was written"
        return "refused"
    metadata: set[int] = set()
    try:
        for _ in range(8):
            await write_once(image, rng)
        metadata = set(image.metadata.clusters)
    finally:
        closed = await expected(image.close())
    check_metadata(path, metadata, image.cluster_size)
    if not image.is_corrupt:
        return "written" if closed else "failed"
    return "found damaged"


async def write_once(image: Qcow2Image, rng: random.Random) -> None:
    """One change; none of them if the image has been found damaged."""
    was_corrupt = image.is_corrupt
    end = min(image.size, SIZE) // 512
    if not end:
        return
    offset = rng.randrange(end) * 512
    length = min(rng.choice([512, 4096, 65536, 300 << 10]), end * 512 - offset)
    data = memoryview(PATTERN * (length // 512))
    works = [
        lambda: image.write(offset, data),
        lambda: image.write(offset, data),
        lambda: image.write_zeroes(offset, length, unmap=rng.random() < 0.5),
        lambda: image.trim(offset, length),
    ]
    done = await expected(rng.choice(works)())
    assert not (was_corrupt and done), "an image that was found damaged was changed"
    if rng.random() < 0.4:
        await expected(image.flush())


def check_metadata(path: Path, clusters: set[int], size: int) -> None:
    """Insist that no guest data lie where metadata are."""
    content = path.read_bytes()
    place = content.find(PATTERN)
    while place >= 0:
        assert place // size not in clusters, f"guest data over metadata at {place:#x}"
        place = content.find(PATTERN, place + 512)


async def repair(path: Path) -> None:
    """Repairing ends, and what it has done holds."""
    if await expected(check_image(path, repair=Repair.ALL)):
        await expected(check_image(path))


def fuzz_once(folder: Path, base: Base, seed: str) -> str:
    """One image; return what became of it."""
    rng = random.Random(seed)
    content = mutate(base, rng)
    path = folder / "fuzzed.qcow2"
    path.write_bytes(content)
    signal.setitimer(signal.ITIMER_REAL, SECONDS_MAX)
    try:
        asyncio.run(look(path, rng))
        assert path.read_bytes() == content, "reading has written"
        outcome = asyncio.run(write(path, rng))
        path.write_bytes(content)
        asyncio.run(repair(path))
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
    return outcome


def _too_long(*_arguments: object) -> None:
    raise AssertionError(f"no end after {SECONDS_MAX} s")


def run_fuzzer(folder: Path, images: int, seed: int, first: int = 0) -> collections.Counter[str]:
    """Damage ``images`` images, from number ``first`` on; return how often what became of them.

    Raises:
        Exception: Whatever it was that should not have been; the image is in a note.
    """
    signal.signal(signal.SIGALRM, _too_long)
    logging.disable(logging.CRITICAL)
    bases = [asyncio.run(make_base(folder, options)) for options in BASES.values()]
    _limit_memory()
    outcomes: collections.Counter[str] = collections.Counter()
    for number in range(first, first + images):
        try:
            outcomes[fuzz_once(folder, bases[number % len(bases)], f"{seed}:{number}")] += 1
        except BaseException as error:
            error.add_note(f"again: --seed {seed} --first {number} --images 1")
            raise
    return outcomes


def _limit_memory() -> None:
    """From here on MemoryError is what comes of taking too much.

    What counts is address space, of which glibc gives each thread some 72 MiB by default; and how
    many threads there are depends on the machine.
    """
    ctypes.CDLL(None).mallopt(_M_ARENA_MAX, 1)
    threading.stack_size(1 << 20)
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    limit = pages * resource.getpagesize() + MEMORY_BYTES_MAX
    resource.setrlimit(resource.RLIMIT_AS, (limit, resource.RLIM_INFINITY))


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(prog="fuzz-images", description=__doc__)
    parser.add_argument("--images", type=int, default=10_000)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--first", type=int, default=0, help="number of the first image")
    options = parser.parse_args()
    begun = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="fuzz-", dir="/dev/shm") as name:
        outcomes = run_fuzzer(Path(name), options.images, options.seed, options.first)
    print(json.dumps(outcomes), file=sys.stdout)
    seconds = time.monotonic() - begun
    print(f"{options.images} images in {seconds:.0f} s, seed {options.seed}")


if __name__ == "__main__":
    main()
