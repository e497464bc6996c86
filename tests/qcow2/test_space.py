"""Compressed clusters that are written here: QEMU reads them, and no power cut costs any."""

from __future__ import annotations

import random
from pathlib import Path

import pytest

from nbdfleece.qcow2.compressed import (
    ZLIB,
    ZSTD,
    compressed_entry,
    compressed_range,
    deflate,
    inflate,
)
from nbdfleece.qcow2.create import create_image
from nbdfleece.qcow2.image import Qcow2Image
from tests.qcow2.fake_disk import FakeDisk
from tests.qcow2.guest import Guest, check, qemu_content
from tests.qcow2.test_crash import CrashingGuest

MIB = 1 << 20
TYPES = [ZLIB, ZSTD]


@pytest.mark.parametrize("cluster_bits", [9, 12, 16, 21])
def test_entry_says_where_the_bytes_are(cluster_bits: int) -> None:
    source = random.Random(cluster_bits)
    for _ in range(200):
        host = source.randrange(1 << 40)
        length = source.randrange(1, 1 << cluster_bits)
        offset, bytes_to_sector_end = compressed_range(
            compressed_entry(host, length, cluster_bits), cluster_bits
        )
        assert offset == host
        assert 0 <= bytes_to_sector_end - length < 512


@pytest.mark.parametrize("kind", TYPES)
def test_what_was_deflated_inflates(kind: int) -> None:
    cluster = b"some text that compresses well " * 2114 + b"\0\1"
    packed = deflate(memoryview(cluster), kind)
    assert packed is not None
    assert inflate(packed + b"what follows", len(cluster), kind) == cluster
    assert deflate(random.Random(1).randbytes(65536), kind) is None


class Packer(Guest):
    """A guest half of whose writes are of whole clusters, compressed."""

    kind = ZLIB

    async def write(self, offset: int, length: int) -> None:
        await pack(self, self.kind, offset, length)


class CrashingPacker(CrashingGuest):
    async def write(self, offset: int, length: int) -> None:
        await pack(self, ZLIB, offset, length)


async def pack(guest: Guest, kind: int, offset: int, length: int) -> None:
    if guest.rng.random() < 0.5:
        await Guest.write(guest, offset, length)
        return
    size, end = guest.cluster_size, len(guest.content)
    for start in range(offset // size * size, offset + length, size):
        text = guest.rng.randbytes(guest.rng.randrange(1, size // 2))
        cluster = text.ljust(size, b"\7")
        guest._change(start, cluster[: end - start])
        packed = deflate(cluster, kind)
        if packed is None:
            await guest.node.write(start, memoryview(cluster)[: end - start])
        else:
            assert isinstance(guest.node, Qcow2Image)
            await guest.node.write_packed(start, memoryview(packed))


@pytest.mark.parametrize("kind", TYPES)
@pytest.mark.parametrize(("cluster_size", "refcount_bits"), [(4096, 16), (4096, 1), (65536, 16)])
async def test_random_work_with_compressed_writes_agrees_with_qemu(
    folder: Path, kind: int, cluster_size: int, refcount_bits: int
) -> None:
    path = folder / "disk.qcow2"
    await create_image(
        path,
        4 * MIB + 3 * 512,
        cluster_size=cluster_size,
        refcount_bits=refcount_bits,
        compression_type=kind,
    )
    content, rng = bytearray(4 * MIB + 3 * 512), random.Random(kind)
    for _ in range(4):
        image = await Qcow2Image.open(path, read_only=False)
        guest = Packer(image, cluster_size, rng)
        guest.kind = kind
        guest.content[:] = content
        await guest.steps(60)
        await guest.check_all()
        await image.close()
        content = guest.content
        check(path)
        assert qemu_content(path) == content


async def test_compressed_clusters_share_host_clusters(folder: Path) -> None:
    path = folder / "disk.qcow2"
    await create_image(path, 4 * MIB)
    image = await Qcow2Image.open(path, read_only=False)
    packed = deflate(b"x" * 65536, ZLIB)
    assert packed is not None
    for offset in range(0, 4 * MIB, 65536):
        await image.write_packed(offset, memoryview(packed))
    await image.close()
    check(path)
    assert path.stat().st_size <= 6 * 65536  # header, table, block, L1, L2, and one of data
    assert qemu_content(path) == b"x" * (4 * MIB)


@pytest.mark.parametrize("cluster_size", [512, 4096])
async def test_power_cut_leaves_compressed_clusters_that_were_flushed(
    folder: Path, cluster_size: int
) -> None:
    path = folder / "start.qcow2"
    await create_image(path, MIB // 2, cluster_size=cluster_size)
    disk = FakeDisk(path.read_bytes())
    image = await Qcow2Image.from_file(disk)
    guest = CrashingPacker(image, cluster_size, random.Random(cluster_size))
    guest.track()
    await guest.work_and_crash(folder, disk, steps=25, crashes_per_step=1)
    await image.close()
