"""Many guests at once, on a disk whose every operation may suspend."""

from __future__ import annotations

import asyncio
import random
from pathlib import Path

import pytest

from nbdfleece.qcow2 import epochs as epochs_module
from nbdfleece.qcow2 import image as image_module
from nbdfleece.qcow2 import refcounts as refcounts_module
from nbdfleece.qcow2.create import create_image
from nbdfleece.qcow2.image import Qcow2Image
from tests.qcow2.fake_disk import FakeDisk
from tests.qcow2.guest import check, qemu_content, qemu_img, qemu_io

MIB = 1 << 20
SIZE = MIB
TASKS = 8


async def work(
    image: Qcow2Image, content: bytearray, owned: list[range], rng: random.Random
) -> None:
    """Write, zero and read what is ours alone, and flush now and then."""
    for _ in range(60):
        piece = rng.choice(owned)
        first = rng.randrange(piece.start, piece.stop)
        length = rng.randint(1, piece.stop - first)
        kind = rng.choice(["write"] * 4 + ["zero", "zero", "read", "flush"])
        if kind == "write":
            data = rng.randbytes(length)
            await image.write(first, memoryview(data))
            content[first : first + length] = data
        elif kind == "zero":
            await image.write_zeroes(first, length, unmap=rng.random() < 0.5)
            content[first : first + length] = bytes(length)
        elif kind == "read":
            buffer = bytearray(length)
            await image.read_into(first, memoryview(buffer))
            assert buffer == content[first : first + length]
        else:
            await image.flush()


@pytest.fixture(params=["large caches", "small caches"])
def caches(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """With small caches tables are given up and flushed in the background all the time."""
    if request.param == "small caches":
        monkeypatch.setattr(image_module, "CACHE_BYTES", 0)
        monkeypatch.setattr(refcounts_module, "CACHE_BYTES", 0)
        monkeypatch.setattr(epochs_module, "DIRTY_BYTES_MAX", 4096)


@pytest.mark.usefixtures("caches")
@pytest.mark.parametrize("piece", [300, 5000, 40_000])
@pytest.mark.parametrize(
    ("kind", "cluster_size"),
    [
        ("new", 512),
        ("new", 4096),
        ("shared", 512),
        ("shared", 4096),
        ("compressed", 4096),
        ("extended", 16384),
    ],
)
async def test_guests_that_share_clusters_do_not_disturb_one_another(
    folder: Path, kind: str, cluster_size: int, piece: int
) -> None:
    path = folder / "disk.qcow2"
    content = bytearray(SIZE)
    options = f"cluster_size={cluster_size}"
    if kind == "shared":
        qemu_img("create", "-q", "-f", "qcow2", "-o", options, path, str(SIZE))
        qemu_io(path, [f"write -P 7 0 {SIZE}"])
        qemu_img("snapshot", "-c", "before", path)
        content[:] = b"\7" * SIZE
    elif kind == "compressed":
        content[:] = (b"compresses well " * SIZE)[:SIZE]
        (folder / "raw").write_bytes(content)
        qemu_img("convert", "-c", "-O", "qcow2", "-o", options, folder / "raw", path)
    else:
        is_extended = kind == "extended"
        await create_image(
            path, SIZE, cluster_size=cluster_size, extended_l2=is_extended, refcount_bits=64
        )
    rng = random.Random(piece)
    disk = FakeDisk(path.read_bytes(), rng=rng)
    image = await Qcow2Image.from_file(disk)
    pieces = [range(start, min(SIZE, start + piece)) for start in range(0, SIZE, piece)]
    workers = [
        work(image, content, pieces[number::TASKS], random.Random(number))
        for number in range(TASKS)
    ]
    await asyncio.gather(*workers)
    buffer = bytearray(SIZE)
    await image.read_into(0, memoryview(buffer))
    assert buffer == content
    await image.close()
    path.write_bytes(disk.content)
    check(path)
    assert qemu_content(path) == content


async def test_freed_cluster_is_not_reused_while_an_older_read_is_under_way(folder: Path) -> None:
    path = folder / "disk.qcow2"
    await create_image(path, MIB)
    disk = FakeDisk(path.read_bytes())
    image = await Qcow2Image.from_file(disk)
    await image.write(0, memoryview(b"old" * 20_000))
    await image.flush()
    disk.gate = gate = asyncio.Event()
    buffer = bytearray(60_000)
    reading = asyncio.ensure_future(image.read_into(0, memoryview(buffer)))
    await asyncio.sleep(0)
    disk.gate = None
    await image.trim(0, 65536)
    for cluster in range(1, 8):
        await image.flush()
        await image.write(cluster * 65536, memoryview(b"new" * 20_000))
    gate.set()
    await reading
    assert buffer == b"old" * 20_000
    await image.flush()
    size = disk.size
    await image.write(9 * 65536, memoryview(b"x" * 65536))
    await image.flush()
    assert disk.size == size, "the freed cluster is used now"
    await image.close()


async def test_flushes_asked_for_together_are_few(folder: Path) -> None:
    path = folder / "disk.qcow2"
    await create_image(path, MIB)
    disk = FakeDisk(path.read_bytes(), rng=random.Random(1))
    image = await Qcow2Image.from_file(disk)
    await image.write(0, memoryview(b"x" * 65536))
    before = len(disk.log.flushes)
    await asyncio.gather(*[image.flush() for _ in range(50)])
    assert len(disk.log.flushes) - before <= 4
    await image.close()


async def test_flush_without_dirty_metadata_is_one_flush_of_the_file(folder: Path) -> None:
    path = folder / "disk.qcow2"
    await create_image(path, MIB)
    disk = FakeDisk(path.read_bytes())
    image = await Qcow2Image.from_file(disk)
    await image.write(0, memoryview(b"x" * 65536))
    await image.flush()
    before = len(disk.log.flushes)
    await image.write(100, memoryview(b"y" * 1000))
    await image.flush()
    assert len(disk.log.flushes) == before + 1
    await image.close()


async def test_cluster_whose_last_reader_ends_after_the_last_flush_is_freed_all_the_same(
    folder: Path,
) -> None:
    """A clean end leaks nothing."""
    path = folder / "disk.qcow2"
    await create_image(path, MIB)
    disk = FakeDisk(path.read_bytes())
    image = await Qcow2Image.from_file(disk)
    await image.write(0, memoryview(b"old" * 20_000))
    await image.flush()
    disk.gate = gate = asyncio.Event()
    reading = asyncio.ensure_future(image.read_into(0, memoryview(bytearray(60_000))))
    await asyncio.sleep(0)
    disk.gate = None
    await image.trim(0, 65536)
    await image.flush()
    gate.set()
    await reading
    await image.close()
    path.write_bytes(disk.content)
    check(path)
