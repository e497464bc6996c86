"""Writing against QEMU: after every round qemu-img must agree on content and structure."""

from __future__ import annotations

import errno
import random
from pathlib import Path

import pytest

from nbdfleece.errors import ImageError
from nbdfleece.qcow2.create import create_image
from nbdfleece.qcow2.image import Qcow2Image
from tests.loop_turns import turns_of
from tests.qcow2.fake_disk import FakeDisk, Fault
from tests.qcow2.guest import Guest, check, qemu_content, qemu_img, qemu_io

KIB = 1 << 10
MIB = 1 << 20

FORMATS = [
    (512, 1, 3),
    (512, 64, 3),
    (512, 16, 2),
    (4096, 16, 3),
    (4096, 2, 3),
    (65536, 16, 3),
    (65536, 16, 2),
    (65536, 4, 3),
    (65536, 32, 3),
    (2 * MIB, 8, 3),
    (2 * MIB, 16, 2),
]
"""Cluster size, refcount width, version."""


@pytest.mark.parametrize("cluster_size", [16384, 65536, 2 * MIB])
@pytest.mark.parametrize("has_backing", [False, True])
async def test_random_work_on_extended_l2_entries_with_qemu_taking_turns_agrees(
    folder: Path, cluster_size: int, has_backing: bool
) -> None:
    path = folder / "disk.qcow2"
    size = 16 * MIB + 3 * 512
    rng = random.Random(cluster_size)
    content = bytearray(size)
    backing: dict[str, str] = {}
    if has_backing:
        content[: 5 * MIB] = rng.randbytes(5 * MIB)
        (folder / "base.raw").write_bytes(content[: 5 * MIB])
        backing = {"backing_file": "base.raw", "backing_format": "raw"}
    await create_image(path, size, cluster_size=cluster_size, extended_l2=True, **backing)
    await take_turns(path, content, cluster_size, rng)


@pytest.mark.parametrize("is_raw", ["off", "on"])
@pytest.mark.parametrize("is_extended", ["off", "on"])
async def test_random_work_on_an_external_data_file_with_qemu_taking_turns_agrees(
    folder: Path, is_raw: str, is_extended: str
) -> None:
    path, data = folder / "disk.qcow2", folder / "data.raw"
    size = 4 * MIB + 3 * 512
    options = f"data_file={data},data_file_raw={is_raw},extended_l2={is_extended}"
    qemu_img("create", "-q", "-f", "qcow2", "-o", options, path, str(size))
    content = bytearray(size)
    await take_turns(path, content, 65536, random.Random(8))
    if is_raw == "on":
        assert data.read_bytes()[:size] == content  # QEMU rounds it up to whole clusters


@pytest.mark.parametrize(("cluster_size", "refcount_bits", "version"), FORMATS)
async def test_random_work_with_qemu_taking_turns_agrees(
    folder: Path, cluster_size: int, refcount_bits: int, version: int
) -> None:
    path = folder / "disk.qcow2"
    size = (16 if cluster_size >= 65536 else 4) * MIB + 3 * 512
    compat = "1.1" if version == 3 else "0.10"
    options = f"cluster_size={cluster_size},refcount_bits={refcount_bits},compat={compat}"
    qemu_img("create", "-q", "-f", "qcow2", "-o", options, path, str(size))
    rng = random.Random(cluster_size * 100 + refcount_bits + version)
    await take_turns(path, bytearray(size), cluster_size, rng)


async def take_turns(path: Path, content: bytearray, cluster_size: int, rng: random.Random) -> None:
    """We work, QEMU judges and works, three times over."""
    for _ in range(3):
        image = await Qcow2Image.open(path, read_only=False)
        guest = Guest(image, cluster_size, rng)
        guest.content = content
        await guest.check_all()
        await guest.steps(120)
        await guest.check_all()
        await image.close()
        check(path)
        assert qemu_content(path) == content
        qemu_works(path, content, rng)


def qemu_works(path: Path, content: bytearray, rng: random.Random) -> None:
    """QEMU writes and zeroes here and there."""
    commands = []
    for _ in range(10):
        length = rng.choice([512, 4096, 65536, 100 * 512])
        offset = rng.randrange((len(content) - length) // 512) * 512
        pattern = rng.randrange(1, 256)
        if rng.random() < 0.3:
            pattern = 0
            commands.append(f"write -z {offset} {length}")
        else:
            commands.append(f"write -P {pattern} {offset} {length}")
        content[offset : offset + length] = bytes([pattern]) * length
    qemu_io(path, commands)


async def test_size_that_is_no_multiple_of_a_sector_is_served_whole(folder: Path) -> None:
    path = folder / "disk.qcow2"
    await create_image(path, MIB + 77)
    image = await Qcow2Image.open(path, read_only=False)
    guest = Guest(image, 65536, random.Random(1))
    await guest.write(MIB - 10, 87)
    await guest.trim(MIB, 77)
    await guest.zero(MIB - 5, 5)
    await guest.check_all()
    await image.close()
    check(path)


async def test_write_to_clusters_shared_with_a_snapshot_leaves_it_alone(folder: Path) -> None:
    path = folder / "disk.qcow2"
    qemu_img("create", "-q", "-f", "qcow2", path, "4M")
    qemu_io(path, ["write -P 7 0 4M"])
    qemu_img("snapshot", "-c", "before", path)
    image = await Qcow2Image.open(path, read_only=False)
    guest = Guest(image, 65536, random.Random(2))
    guest.content[:] = b"\7" * (4 * MIB)
    await guest.check_all()
    await guest.steps(100)
    await guest.check_all()
    await image.close()
    check(path)
    assert qemu_content(path) == guest.content
    qemu_img("snapshot", "-a", "before", path)
    assert qemu_content(path) == b"\7" * (4 * MIB)
    check(path)


@pytest.mark.parametrize("compression", ["zlib", "zstd"])
async def test_write_over_compressed_clusters_keeps_the_rest(
    folder: Path, compression: str
) -> None:
    raw, path = folder / "disk.raw", folder / "disk.qcow2"
    content = (b"some text that compresses well " * 200_000)[: 4 * MIB]
    raw.write_bytes(content)
    qemu_img("convert", "-c", "-O", "qcow2", "-o", f"compression_type={compression}", raw, path)
    image = await Qcow2Image.open(path, read_only=False)
    guest = Guest(image, 65536, random.Random(3))
    guest.content[:] = content
    await guest.check_all()
    await guest.steps(100)
    await guest.check_all()
    await image.close()
    check(path)
    assert qemu_content(path) == guest.content


@pytest.mark.parametrize("backing_size", [MIB + 512, 4 * MIB, 6 * MIB])
@pytest.mark.parametrize("version", [2, 3])
async def test_write_over_a_backing_file_keeps_the_rest(
    folder: Path, backing_size: int, version: int
) -> None:
    raw, path = folder / "base.raw", folder / "disk.qcow2"
    base = random.Random(4).randbytes(backing_size)
    raw.write_bytes(base)
    await create_image(
        path, 4 * MIB, version=version, backing_file="base.raw", backing_format="raw"
    )
    image = await Qcow2Image.open(path, read_only=False)
    guest = Guest(image, 65536, random.Random(5))
    guest.content[:] = base[: 4 * MIB].ljust(4 * MIB, b"\0")
    if version == 2:  # no zero flag: QEMU does not discard over a backing file either
        guest.trim = guest.zero  # type: ignore[method-assign]  # zeroes are what a trim may do
    await guest.check_all()
    await guest.steps(150)
    await guest.check_all()
    await image.close()
    check(path)
    assert qemu_content(path) == guest.content
    assert raw.read_bytes() == base


async def test_trim_gives_host_space_back_after_the_flush(folder: Path) -> None:
    path = folder / "disk.qcow2"
    await create_image(path, 8 * MIB)
    image = await Qcow2Image.open(path, read_only=False)
    await image.write(0, memoryview(b"x" * (8 * MIB)))
    await image.flush()
    used = path.stat().st_blocks
    await image.trim(0, 8 * MIB)
    await image.flush()
    assert path.stat().st_blocks < used // 10
    await image.close()
    check(path)


async def test_freed_clusters_are_used_again_after_the_flush(folder: Path) -> None:
    path = folder / "disk.qcow2"
    await create_image(path, 8 * MIB)
    image = await Qcow2Image.open(path, read_only=False)
    for _ in range(5):
        await image.write(0, memoryview(b"x" * (4 * MIB)))
        await image.trim(0, 4 * MIB)
        await image.flush()
    await image.close()
    assert path.stat().st_size < 6 * MIB
    check(path)


async def test_write_zeroes_without_unmap_keeps_and_takes_space(folder: Path) -> None:
    path = folder / "disk.qcow2"
    await create_image(path, MIB)
    image = await Qcow2Image.open(path, read_only=False)
    await image.write(0, memoryview(b"x" * 65536))
    await image.write_zeroes(0, MIB, unmap=False)
    status = await image.block_status(0, MIB)
    assert status.pairs() == [(MIB, 0x102)]  # zero, no hole, depth 1
    await image.close()
    check(path)
    assert qemu_content(path) == bytes(MIB)


@pytest.mark.parametrize("has_backing", [False, True])
async def test_zeroes_over_whole_subclusters_are_bits_and_no_data(
    folder: Path, has_backing: bool
) -> None:
    path = folder / "disk.qcow2"
    content = bytearray(b"\x05" * 65536 * 2) if has_backing else bytearray(65536 * 2)
    backing: dict[str, str] = {}
    if has_backing:
        (folder / "base.raw").write_bytes(content)
        backing = {"backing_file": "base.raw", "backing_format": "raw"}
    await create_image(path, 65536 * 2, extended_l2=True, **backing)
    image = await Qcow2Image.open(path, read_only=False)
    await image.write(0, memoryview(b"x" * 65536))
    content[:65536] = b"x" * 65536
    await image.flush()
    for offset, length in ((4096, 6144), (65536 + 2048, 30000), (60000, 10000)):
        await image.write_zeroes(offset, length)
        content[offset : offset + length] = bytes(length)
    buffer = bytearray(len(content))
    await image.read_into(0, memoryview(buffer))
    assert buffer == content
    status = await image.block_status(4096, 6144)
    assert status.pairs() == [(6144, 0x102)]  # zero, with a host cluster
    used = path.stat().st_blocks
    await image.write_zeroes(65536 + 40960, 20480)
    content[65536 + 40960 : 65536 + 61440] = bytes(20480)
    await image.close()
    assert path.stat().st_blocks <= used
    check(path)
    assert qemu_content(path) == content


async def test_fast_zero_of_part_of_a_data_cluster_is_refused(folder: Path) -> None:
    path = folder / "disk.qcow2"
    await create_image(path, MIB)
    image = await Qcow2Image.open(path, read_only=False)
    await image.write(0, memoryview(b"x" * 65536))
    with pytest.raises(OSError, match="not supported"):
        await image.write_zeroes(100, 100, fast=True)
    await image.write_zeroes(0, 65536, fast=True)
    await image.write_zeroes(65536 + 5, 100, fast=True)
    await image.close()


async def test_guest_data_over_metadata_is_refused_and_marks_the_image_corrupt(
    folder: Path,
) -> None:
    """Rule 4: an L2 entry that leads to the refcount table must not let the guest destroy it."""
    path = folder / "disk.qcow2"
    qemu_img("create", "-q", "-f", "qcow2", path, "1M")
    qemu_io(path, ["write 0 64k"])
    content = bytearray(path.read_bytes())
    l1 = int.from_bytes(content[40:48], "big")
    l2 = int.from_bytes(content[l1 : l1 + 8], "big") & ~(1 << 63)
    content[l2 : l2 + 8] = (1 << 63 | 65536).to_bytes(8, "big")  # the refcount table
    path.write_bytes(content)
    image = await Qcow2Image.open(path, read_only=False)
    for _ in range(2):
        with pytest.raises(OSError, match=r"metadata|damaged"):
            await image.write(0, memoryview(b"x" * 512))
    assert image.is_corrupt
    await image.close()
    assert path.read_bytes()[65536 : 2 * 65536] == content[65536 : 2 * 65536]
    with pytest.raises(ImageError, match="marked corrupt"):
        await Qcow2Image.open(path, read_only=False)
    await (await Qcow2Image.open(path, read_only=True)).close()


async def test_refcount_table_grows_many_times(folder: Path) -> None:
    path = folder / "disk.qcow2"
    await create_image(path, 64 * MIB, cluster_size=512, refcount_bits=64)
    image = await Qcow2Image.open(path, read_only=False)
    guest = Guest(image, 512, random.Random(6))
    for offset in range(0, 6 * MIB, MIB):
        await guest.write(offset, MIB)
        await guest.flush()
    await guest.check_all()
    await image.close()
    assert image.header.refcount_table_clusters > 1
    check(path)
    assert qemu_content(path) == guest.content


async def test_in_place_write_and_cached_read_do_not_suspend(folder: Path) -> None:
    path = folder / "disk.qcow2"
    await create_image(path, MIB)
    image = await Qcow2Image.open(path, read_only=False)
    await image.write(0, memoryview(b"x" * MIB))
    for length in (4096, 256 * 1024):
        with pytest.raises(StopIteration):
            image.write(0, memoryview(b"y" * length)).send(None)
        buffer = bytearray(length)
        with pytest.raises(StopIteration):
            image.read_into(0, memoryview(buffer)).send(None)
        assert buffer == b"y" * length
    await image.flush()
    await image.close()


async def test_write_of_new_clusters_does_not_suspend_and_qemu_agrees(folder: Path) -> None:
    path = folder / "disk.qcow2"
    await create_image(path, 40 * MIB, cluster_size=4096)  # several tables and refcount blocks
    image = await Qcow2Image.open(path, read_only=False)
    content = random.Random(1).randbytes(40 * MIB)
    at_once = 0
    for offset in range(0, 40 * MIB, 256 * 1024):
        data = memoryview(content)[offset : offset + 256 * 1024]
        if image.write_at_once(offset, data):
            at_once += 1
        else:  # the first of a table, or what a refcount block ends in
            await image.write(offset, data)
    assert 100 < at_once < 160
    await image.close()
    check(path)
    assert qemu_content(path) == content


@pytest.mark.parametrize(
    ("offset", "length"),
    [(MIB + 512, 65536), (MIB, 65536 + 512), (0, 131072), (512 * MIB - 65536, 131072)],
    ids=["unaligned", "partial", "not new", "two tables"],
)
async def test_write_that_is_not_of_new_clusters_only_takes_the_long_way(
    folder: Path, offset: int, length: int
) -> None:
    path = folder / "disk.qcow2"
    await create_image(path, 600 * MIB)
    image = await Qcow2Image.open(path, read_only=False)
    for place in (65536, 512 * MIB + MIB):  # the second cluster, and a second table
        await image.write(place, memoryview(b"old" * 21845 + b"!"))
    assert not image.write_at_once(offset, memoryview(b"n" * length))
    await image.write(offset, memoryview(b"n" * length))
    assert image.write_at_once(2 * MIB, memoryview(b"n" * 65536)), "nothing else is in the way"
    await image.close()
    check(path)


async def test_write_of_nothing_changes_nothing(folder: Path) -> None:
    path = folder / "disk.qcow2"
    await create_image(path, MIB)
    image = await Qcow2Image.open(path, read_only=False)
    await image.write(0, memoryview(b"a" * 512))
    await image.write(65536, memoryview(b""))
    assert image.file.size == path.stat().st_size
    await image.close()
    check(path)


@pytest.mark.parametrize("is_short", [False, True])
async def test_write_of_new_clusters_that_fails_takes_none_and_leaves_nothing(
    folder: Path, is_short: bool
) -> None:
    """What a short write has left must not show around a later write into the cluster."""
    path = folder / "disk.qcow2"
    await create_image(path, MIB)
    disk = FakeDisk(path.read_bytes())
    image = await Qcow2Image.from_file(disk)
    await image.write(0, memoryview(b"a" * 65536))
    end = image.refcounts.end
    disk.faults[disk.operations] = Fault(errno.ENOSPC, is_short=is_short)
    with pytest.raises(OSError, match="fails once"):
        image.write_at_once(131072, memoryview(b"b" * 131072))
    await image.write(131072 + 512, memoryview(b"c" * 512))
    assert image.refcounts.end <= end + 131072, "the clusters are used now"
    expected = b"a" * 65536 + bytes(65536 + 512) + b"c" * 512
    content = bytearray(MIB)
    await image.read_into(0, memoryview(content))
    assert content == expected.ljust(MIB, b"\0")
    await image.close()
    path.write_bytes(disk.content)
    check(path)


async def test_others_have_turns_while_a_request_goes_over_many_tables(folder: Path) -> None:
    """Rule 5: one request may be 4 GiB long, and a table of small clusters maps little."""
    tables = 50
    path = folder / "many.qcow2"
    await create_image(path, tables * 32 * KIB, cluster_size=512)
    image = await Qcow2Image.from_file(FakeDisk(path.read_bytes()))
    assert await turns_of(image.write_zeroes(0, image.size, unmap=False)) >= tables
    assert await turns_of(image.trim(0, image.size)) >= tables
    await image.close()


async def test_others_have_turns_while_many_tables_are_described(folder: Path) -> None:
    """Rule 5: with extended headers a client may ask for a whole disk at once."""
    tables = 50
    path = folder / "many.qcow2"
    size = tables * 32 * KIB
    qemu_img("create", "-q", "-f", "qcow2", "-o", "cluster_size=512,preallocation=metadata",
             path, str(size))  # fmt: skip
    image = await Qcow2Image.from_file(FakeDisk(path.read_bytes(), read_only=True))
    assert await turns_of(image.block_status(0, size)) >= tables
    await image.close()


async def test_others_have_turns_while_a_free_cluster_is_looked_for(folder: Path) -> None:
    """Rule 5: a preallocated image has a thousand full refcount blocks."""
    path = folder / "full.qcow2"
    await create_image(path, 2 << 20, cluster_size=512, refcount_bits=64)
    image = await Qcow2Image.open(path, read_only=False)
    for _ in range(40 * 64):
        await image.allocate_clusters(1)
    await image.close()
    image = await Qcow2Image.from_file(FakeDisk(path.read_bytes()))
    assert max([await turns_of(image.allocate_clusters(1)) for _ in range(100)]) >= 20
    await image.close()
