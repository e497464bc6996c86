"""Reading and describing what QEMU makes, over the matrix of formats."""

from __future__ import annotations

import json
import os
import random
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

from nbdfleece.block.node import DEPTH_SHIFT, BlockStatus
from nbdfleece.errors import ImageError, StateError, UnsupportedImageError, UsageError
from nbdfleece.extents import Extents
from nbdfleece.qcow2.backing import BackingPolicy
from nbdfleece.qcow2.create import create_image
from nbdfleece.qcow2.describe import describe_image
from nbdfleece.qcow2.image import Qcow2Image
from tests.qcow2.guest import qemu_content, qemu_img, qemu_io

MIB = 1 << 20
SIZE = 6 * MIB + 512


def work_of_qemu(rng: random.Random, count: int, size: int, cluster_size: int) -> list[str]:
    """Commands that leave data, zeroes, holes and partly written clusters."""
    commands = []
    for _ in range(count):
        length = rng.choice([512, 4096, cluster_size, 5 * cluster_size, 200_704])
        length = min(length, MIB)
        offset = rng.randrange((size - length) // 512) * 512
        if rng.random() < 0.5:
            offset = offset // cluster_size * cluster_size
        kind = rng.choice(["write -P {p}", "write -P {p}", "write -z", "write -z -u", "discard"])
        commands.append(f"{kind.format(p=rng.randrange(1, 256))} {offset} {length}")
    return commands


async def read_all(image: Qcow2Image, rng: random.Random) -> bytes:
    """The guest's bytes, read in pieces of awkward lengths."""
    content = bytearray(image.size)
    offset = 0
    while offset < image.size:
        length = min(image.size - offset, rng.choice([1, 511, 4096, 65536, 65537, 300_000]))
        await image.read_into(offset, memoryview(content)[offset : offset + length])
        offset += length
    return bytes(content)


def merged(rows: list[tuple[int, int]]) -> list[tuple[int, int]]:
    """``(length, status)`` rows with equal neighbours joined."""
    return Extents.from_pairs(rows).pairs()


async def our_map(image: Qcow2Image) -> list[tuple[int, int]]:
    """``(length, status word)`` of the whole disk, asked for in small portions."""
    rows: list[tuple[int, int]] = []
    offset = 0
    while offset < image.size:
        extents = await image.block_status(offset, image.size - offset, extents_max=7)
        rows += extents.pairs()
        offset += extents.total()
    return rows


def qemu_zeroes(path: Path) -> list[tuple[int, int]]:
    """``(length, reads as zeroes)`` from ``qemu-img map``."""
    entries = json.loads(qemu_img("map", "--output=json", path))
    return merged([(entry["length"], int(entry["zero"])) for entry in entries])


def qemu_depths(path: Path) -> list[tuple[int, int]]:
    """``(length, allocation depth)`` from qemu-nbd."""
    server = ["[", "qemu-nbd", "-r", "-A", "-f", "qcow2", str(path), "]"]
    info = ["nbdinfo", "--json", "--map=qemu:allocation-depth", "--", *server]
    done = subprocess.run(info, capture_output=True, check=True)
    return merged([(entry["length"], entry["type"]) for entry in json.loads(done.stdout)])


async def compare(path: Path, rng: random.Random) -> None:
    """Content, zeroes and allocation depths are what QEMU says."""
    image = await Qcow2Image.open(path, read_only=True)
    assert await read_all(image, rng) == qemu_content(path)
    ours = await our_map(image)
    zeroes = merged([(length, int(bool(s & BlockStatus.ZERO))) for length, s in ours])
    assert zeroes == qemu_zeroes(path)
    assert merged([(length, s >> DEPTH_SHIFT) for length, s in ours]) == qemu_depths(path)
    await check_reads_at_once(image, rng)
    await image.close()


async def check_reads_at_once(image: Qcow2Image, rng: random.Random) -> None:
    """What is known at once is what is found by looking; the content is there unless zero."""
    for _ in range(300):
        offset = rng.randrange(image.size)
        length = min(rng.choice([1, 512, 4096, 70_000]), image.size - offset)
        found, expected = bytearray(length), bytearray(length)
        known = image.read_with_status(offset, memoryview(found))
        if known is None:
            continue
        assert (await image.block_status(offset, length)).pairs() == [(length, known)]
        await image.read_into(offset, memoryview(expected))
        assert (bytes(length) if known & BlockStatus.ZERO else found) == expected


async def test_clusters_one_behind_the_other_are_read_at_once(folder: Path) -> None:
    path = folder / "disk.qcow2"
    await create_image(path, 4 * MIB)
    image = await Qcow2Image.open(path, read_only=False)
    content = random.Random(1).randbytes(4 * MIB)
    await image.write(0, memoryview(content)[: 2 * MIB])
    await image.write(3 * MIB, memoryview(content)[3 * MIB :])
    await image.write(2 * MIB, memoryview(content)[2 * MIB : 3 * MIB])
    buffer = bytearray(300_000)
    for offset, is_one_piece in ((5, True), (2 * MIB - 100_000, False), (3 * MIB, True)):
        assert image.read_at_once(offset, memoryview(buffer)) == is_one_piece
        assert not is_one_piece or buffer == content[offset : offset + 300_000]
    await image.close()


@pytest.mark.parametrize("cluster_size", [512, 4096, 65536, 2 * MIB])
@pytest.mark.parametrize("compat", ["0.10", "1.1"])
@pytest.mark.parametrize("preallocation", ["off", "metadata"])
async def test_image_that_qemu_wrote_reads_and_maps_alike(
    folder: Path, cluster_size: int, compat: str, preallocation: str
) -> None:
    path = folder / "disk.qcow2"
    options = f"cluster_size={cluster_size},compat={compat},preallocation={preallocation}"
    qemu_img("create", "-q", "-f", "qcow2", "-o", options, path, str(SIZE))
    rng = random.Random(cluster_size)
    qemu_io(path, work_of_qemu(rng, 40, SIZE, cluster_size))
    await compare(path, rng)


@pytest.mark.parametrize("cluster_size", [16384, 65536, 2 * MIB])
@pytest.mark.parametrize("has_backing", [False, True])
async def test_image_with_extended_l2_entries_reads_and_maps_alike(
    folder: Path, cluster_size: int, has_backing: bool
) -> None:
    path = folder / "disk.qcow2"
    rng = random.Random(cluster_size)
    backing = []
    if has_backing:
        qemu_img("create", "-q", "-f", "qcow2", folder / "base.qcow2", "5M")
        qemu_io(folder / "base.qcow2", work_of_qemu(rng, 20, 5 * MIB, 65536))
        backing = ["-b", "base.qcow2", "-F", "qcow2"]
    options = f"cluster_size={cluster_size},extended_l2=on"
    qemu_img("create", "-q", "-f", "qcow2", "-o", options, *backing, path, str(SIZE))
    qemu_io(path, work_of_qemu(rng, 40, SIZE, cluster_size // 32))
    await compare(path, rng)


async def test_internal_snapshots_read_alike_by_id_and_name(folder: Path) -> None:
    path = folder / "disk.qcow2"
    rng = random.Random(3)
    qemu_img("create", "-q", "-f", "qcow2", path, "3M")
    states: dict[str, bytes] = {}
    for name in ("first", "second", "third"):
        qemu_io(path, work_of_qemu(rng, 20, 3 * MIB, 65536))
        states[name] = qemu_content(path)
        qemu_img("snapshot", "-c", name, path)
    qemu_io(path, work_of_qemu(rng, 20, 3 * MIB, 65536))
    for number, (name, state) in enumerate(states.items()):
        for wanted in (name, str(number + 1)):
            image = await Qcow2Image.open(path, read_only=True, snapshot=wanted)
            assert await read_all(image, rng) == state
            await image.close()
    await compare(path, rng)


async def test_internal_snapshot_that_is_not_there_or_to_be_written_is_refused(
    folder: Path,
) -> None:
    path = folder / "disk.qcow2"
    qemu_img("create", "-q", "-f", "qcow2", path, "3M")
    qemu_img("snapshot", "-c", "first", path)
    with pytest.raises(StateError, match="no internal snapshot 'second'"):
        await Qcow2Image.open(path, read_only=True, snapshot="second")
    with pytest.raises(UsageError, match="only be read"):
        await Qcow2Image.open(path, read_only=False, snapshot="first")


async def test_internal_snapshot_of_a_disk_that_was_resized_has_its_size(folder: Path) -> None:
    path = folder / "disk.qcow2"
    qemu_img("create", "-q", "-f", "qcow2", path, "1M")
    qemu_io(path, ["write -P 5 0 1M"])
    qemu_img("snapshot", "-c", "small", path)
    qemu_img("resize", "-q", path, "3G")
    image = await Qcow2Image.open(path, read_only=True, snapshot="small")
    assert await read_all(image, random.Random(1)) == b"\5" * MIB
    await image.close()


@pytest.mark.parametrize("is_raw", ["off", "on"])
@pytest.mark.parametrize("is_extended", ["off", "on"])
async def test_image_with_external_data_file_reads_alike(
    folder: Path, is_raw: str, is_extended: str
) -> None:
    path = folder / "disk.qcow2"
    rng = random.Random(1)
    options = f"data_file={folder}/data.raw,data_file_raw={is_raw},extended_l2={is_extended}"
    qemu_img("create", "-q", "-f", "qcow2", "-o", options, path, str(SIZE))
    qemu_io(path, work_of_qemu(rng, 40, SIZE, 65536))
    await compare(path, rng)


@pytest.mark.parametrize("policy", [BackingPolicy.REFUSE, BackingPolicy.SAME_FOLDER])
async def test_data_file_that_may_not_be_opened_is_refused(
    folder: Path, policy: BackingPolicy
) -> None:
    (folder / "in").mkdir()
    path = folder / "in" / "disk.qcow2"
    options = f"data_file={folder}/data.raw"
    qemu_img("create", "-q", "-f", "qcow2", "-o", options, path, str(SIZE))
    with pytest.raises(ImageError, match=r"data\.raw"):
        await Qcow2Image.open(path, read_only=True, backing_policy=policy)


@pytest.mark.parametrize("compression", ["zlib", "zstd"])
@pytest.mark.parametrize("cluster_size", [512, 65536, 2 * MIB])
async def test_compressed_image_reads_alike(
    folder: Path, cluster_size: int, compression: str
) -> None:
    rng = random.Random(cluster_size)
    raw, path = folder / "disk.raw", folder / "disk.qcow2"
    parts = [rng.choice([b"text " * 9000, bytes(40_000), rng.randbytes(30_000)]) for _ in range(99)]
    raw.write_bytes(b"".join(parts)[: SIZE - 100])
    options = f"cluster_size={cluster_size},compression_type={compression}"
    qemu_img("convert", "-c", "-f", "raw", "-O", "qcow2", "-o", options, raw, path)
    await compare(path, rng)


@pytest.mark.parametrize("base_size", [2 * MIB + 512, SIZE, 9 * MIB])
@pytest.mark.parametrize("base_format", ["raw", "qcow2"])
async def test_chain_of_three_reads_and_maps_alike(
    folder: Path, base_size: int, base_format: str
) -> None:
    rng = random.Random(base_size)
    base, middle, top = folder / "base", folder / "middle.qcow2", folder / "top.qcow2"
    qemu_img("create", "-q", "-f", base_format, base, str(base_size))
    commands = work_of_qemu(rng, 20, base_size, 65536)
    if base_format == "raw":
        commands = [command for command in commands if not command.startswith("discard")]
    subprocess_io(base, base_format, commands)
    qemu_img("create", "-q", "-f", "qcow2", "-b", "base", "-F", base_format, middle, "4M")
    qemu_io(middle, work_of_qemu(rng, 10, 4 * MIB, 65536))
    backing = ["-b", "middle.qcow2", "-F", "qcow2"]
    qemu_img("create", "-q", "-f", "qcow2", "-o", "cluster_size=4096", *backing, top, str(SIZE))
    qemu_io(top, work_of_qemu(rng, 10, SIZE, 4096))
    await compare(top, rng)


def subprocess_io(path: Path, image_format: str, commands: list[str]) -> None:
    arguments = [argument for command in commands for argument in ("-c", command)]
    subprocess.run(
        ["qemu-io", "-f", image_format, *arguments, path], check=True, capture_output=True
    )


async def test_backing_file_outside_the_folder_is_opened_only_when_allowed(folder: Path) -> None:
    (folder / "in").mkdir()
    (folder / "base.raw").write_bytes(bytes(MIB))
    path = folder / "in" / "disk.qcow2"
    qemu_img("create", "-q", "-f", "qcow2", "-b", "../base.raw", "-F", "raw", path)
    with pytest.raises(ImageError, match="outside its folder"):
        await Qcow2Image.open(path, read_only=True)
    image = await Qcow2Image.open(path, read_only=True, backing_policy=BackingPolicy.ANY)
    await image.close()


async def test_backing_file_behind_a_link_out_of_the_folder_is_refused(folder: Path) -> None:
    (folder / "in").mkdir()
    (folder / "base.raw").write_bytes(bytes(MIB))
    os.symlink("../base.raw", folder / "in" / "link.raw")
    path = folder / "in" / "disk.qcow2"
    qemu_img("create", "-q", "-f", "qcow2", "-b", "link.raw", "-F", "raw", path)
    with pytest.raises(ImageError, match="outside its folder"):
        await Qcow2Image.open(path, read_only=True)


@pytest.mark.parametrize("name", ["json:{}", "nbd://localhost", "nbd:unix:x"])
async def test_backing_name_of_a_protocol_is_refused_by_name(folder: Path, name: str) -> None:
    path = folder / "disk.qcow2"
    qemu_img("create", "-q", "-f", "qcow2", "-u", "-b", name, "-F", "raw", path, "1M")
    with pytest.raises(UnsupportedImageError, match="only plain file names"):
        await Qcow2Image.open(path, read_only=True, backing_policy=BackingPolicy.ANY)


@pytest.mark.parametrize("name", ["json:{}", "nbd://localhost", "nbd:unix:x"])
async def test_data_file_name_of_a_protocol_is_refused_by_name(folder: Path, name: str) -> None:
    """CVE-2024-4467: an image must not choose what its reader opens; info opens nothing."""
    path = folder / "disk.qcow2"
    await create_image(path, MIB, data_file="d" * len(name))
    path.write_bytes(path.read_bytes().replace(b"d" * len(name), name.encode(), 1))
    for policy in BackingPolicy:
        with pytest.raises(ImageError, match="only plain file names"):
            await Qcow2Image.open(path, read_only=True, backing_policy=policy)
    assert (await describe_image(path))["format-specific"]["data"]["data-file"] == name


async def test_info_opens_neither_backing_nor_data_file(folder: Path) -> None:
    """Both are FIFOs here, at which opening would wait for ever."""
    path = folder / "disk.qcow2"
    backing = {"backing_file": "base", "backing_format": "raw"}
    await create_image(path, MIB, data_file="data", **backing)
    (folder / "data").unlink()
    for name in ("data", "base"):
        os.mkfifo(folder / name)
    assert (await describe_image(path))["backing-filename"] == "base"


@pytest.mark.parametrize("link", [os.link, os.symlink])
async def test_chain_that_comes_back_under_another_name_is_refused(
    folder: Path, link: Callable[[Path, Path], None]
) -> None:
    """Files are known by device and inode."""
    path = folder / "disk.qcow2"
    qemu_img("create", "-q", "-f", "qcow2", "-u", "-b", "alias", "-F", "qcow2", path, "1M")
    link(path, folder / "alias")
    with pytest.raises(ImageError, match="comes back"):
        await Qcow2Image.open(path, read_only=True)


async def test_chain_that_comes_back_to_itself_is_refused(folder: Path) -> None:
    """qemu-img recurses without end here."""
    one, two = folder / "one.qcow2", folder / "two.qcow2"
    qemu_img("create", "-q", "-f", "qcow2", "-u", "-b", "two.qcow2", "-F", "qcow2", one, "1M")
    qemu_img("create", "-q", "-f", "qcow2", "-u", "-b", "one.qcow2", "-F", "qcow2", two, "1M")
    with pytest.raises(ImageError, match="comes back"):
        await Qcow2Image.open(one, read_only=True)


@pytest.mark.parametrize(("method", "name"), [(1, "AES"), (2, "LUKS")])
async def test_encrypted_image_is_refused_by_name(folder: Path, method: int, name: str) -> None:
    path = folder / "disk.qcow2"
    await create_image(path, MIB)
    with path.open("r+b") as file:
        file.seek(32)
        file.write(method.to_bytes(4, "big"))
    with pytest.raises(UnsupportedImageError, match=name):
        await Qcow2Image.open(path, read_only=True)
