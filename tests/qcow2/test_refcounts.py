from __future__ import annotations

import random
from pathlib import Path

import numpy as np
import pytest

from nbdfleece.qcow2.create import create_image
from nbdfleece.qcow2.image import Qcow2Image
from nbdfleece.qcow2.quarantine import Quarantine
from nbdfleece.qcow2.refcount_codec import empty_counts, pack_counts, unpack_counts
from tests.qcow2.fake_disk import FakeDisk
from tests.qcow2.guest import check

MIB = 1 << 20


@pytest.mark.parametrize("bits", [1, 2, 4, 8, 16, 32, 64])
def test_refcounts_of_every_width_survive_packing(bits: int) -> None:
    rng = random.Random(bits)
    counts = empty_counts(64, bits)
    counts[:] = np.array([rng.randrange(1 << bits) for _ in range(64)], dtype=counts.dtype)
    packed = pack_counts(counts, bits)
    assert len(packed) == 64 * bits // 8
    assert unpack_counts(packed, bits).tolist() == counts.tolist()


def test_narrow_refcounts_have_the_lowest_bits_first() -> None:
    assert unpack_counts(b"\x01\x80", 1).tolist() == [1] + [0] * 14 + [1]
    assert unpack_counts(b"\x21", 4).tolist() == [1, 2]


async def open_image(
    folder: Path, cluster_size: int = 65536, refcount_bits: int = 16
) -> tuple[Qcow2Image, FakeDisk, Path]:
    path = folder / "disk.qcow2"
    await create_image(path, 4 * MIB, cluster_size=cluster_size, refcount_bits=refcount_bits)
    disk = FakeDisk(path.read_bytes())
    return await Qcow2Image.from_file(disk), disk, path


@pytest.mark.parametrize("refcount_bits", [1, 16, 64])
async def test_allocations_never_overlap_and_are_accounted_for(
    folder: Path, refcount_bits: int
) -> None:
    image, disk, path = await open_image(folder, cluster_size=512, refcount_bits=refcount_bits)
    rng = random.Random(refcount_bits)
    taken: dict[int, int] = {}
    for _ in range(300):
        if taken and rng.random() < 0.4:
            offset = rng.choice(list(taken))
            image.free_clusters(offset, taken.pop(offset))
            await image.flush()
            continue
        count = rng.choice([1, 1, 2, 7, 100])
        offset = await image.allocate_clusters(count)
        for other, other_count in taken.items():
            assert offset + count * 512 <= other or other + other_count * 512 <= offset
        taken[offset] = count
    for offset, count in taken.items():
        image.free_clusters(offset, count)
    await image.close()
    path.write_bytes(disk.content)
    check(path)


async def test_freed_clusters_are_not_given_out_before_a_flush(folder: Path) -> None:
    image, _, _ = await open_image(folder)
    first = await image.allocate_clusters(4)
    await image.flush()
    image.free_clusters(first, 4)
    assert await image.allocate_clusters(4) != first
    await image.flush()
    assert await image.allocate_clusters(4) == first


def test_quarantine_releases_when_settled_and_older_reads_have_ended() -> None:
    quarantine = Quarantine()
    older = quarantine.reads
    older.count += 1
    quarantine.add(0, 512)
    quarantine.add(512, 512)
    batch = quarantine.close()
    quarantine.reads.count += 1  # a younger read: it sees the new entries
    assert quarantine.take_released() == []
    quarantine.settle(batch)
    assert quarantine.take_released() == []
    older.count -= 1
    assert quarantine.take_released() == [(0, 1024, False)]
    assert quarantine.take_released() == []


def test_quarantine_takes_back_what_a_failed_flush_had() -> None:
    quarantine = Quarantine()
    quarantine.add(0, 512)
    quarantine.restore(quarantine.close())
    assert quarantine.has_unsettled
    quarantine.settle(quarantine.close())
    assert quarantine.take_released() == [(0, 512, False)]
