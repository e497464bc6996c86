"""The header against QEMU's, against damage, and kept byte for byte where unknown."""

from __future__ import annotations

import random
from pathlib import Path

import pytest

from nbdfleece.bitmaps.bitmap import Bitmap
from nbdfleece.errors import ImageError, NbdfleeceError, UnsupportedImageError
from nbdfleece.qcow2.bitmap_store import BitmapStore
from nbdfleece.qcow2.create import create_image
from nbdfleece.qcow2.header import (
    EXTENSION_BACKING_FORMAT,
    EXTENSION_FEATURE_NAMES,
    Header,
    HeaderExtension,
    pack_header,
    unpack_header,
)
from nbdfleece.qcow2.image import Qcow2Image
from nbdfleece.qcow2.resize import resize_image
from tests.qcow2.guest import check, qemu_img
from tests.qcow2.stored_bitmaps import insert_extension, recording

MIB = 1 << 20


def read_header(path: Path) -> tuple[Header, bytes]:
    content = path.read_bytes()
    return unpack_header(content, str(path), len(content)), content


@pytest.mark.parametrize(
    "options",
    [
        "compat=0.10",
        "compat=1.1,cluster_size=2M",
        "compat=1.1,refcount_bits=1,lazy_refcounts=on",
        "compat=1.1,extended_l2=on,compression_type=zstd",
    ],
)
def test_header_of_qemu_is_packed_byte_for_byte(folder: Path, options: str) -> None:
    path = folder / "disk.qcow2"
    (folder / "base.raw").write_bytes(bytes(MIB))
    backing = ["-b", "base.raw", "-F", "raw"]
    qemu_img("create", "-q", "-f", "qcow2", "-o", options, *backing, path, "1M")
    header, content = read_header(path)
    assert pack_header(header, "x") == content[: header.cluster_size]
    assert header.backing_file == b"base.raw"
    assert header.backing_format == "raw"


def test_unknown_extensions_and_fields_are_kept_in_their_order(folder: Path) -> None:
    path = folder / "disk.qcow2"
    qemu_img("create", "-q", "-f", "qcow2", path, "1M")
    header, content = read_header(path)
    unknown = [HeaderExtension(0x11223344, b"abcde"), HeaderExtension(0x55667788, b"")]
    header.extensions[:0] = unknown
    header.header_length = 128
    header.unknown_fields = bytes(range(23))
    header.compatible_features |= 1 << 40
    again = unpack_header(pack_header(header, "x"), "x", len(content))
    assert again == header
    assert [e.type for e in again.extensions] == [0x11223344, 0x55667788, EXTENSION_FEATURE_NAMES]


def test_extension_knows_its_place_in_the_file(folder: Path) -> None:
    path = folder / "disk.qcow2"
    qemu_img("create", "-q", "-f", "qcow2", path, "1M")
    header, _ = read_header(path)
    header.extensions.insert(0, HeaderExtension(0x4E424446, b"payload"))
    packed = pack_header(header, "x")
    place = header.extensions[0].offset_in_file
    assert packed[place : place + 7] == b"payload"


def test_header_that_does_not_fit_its_cluster_is_refused() -> None:
    header = Header(3, 9, MIB, 1, 512, 1024, 1)
    header.extensions = [HeaderExtension(1, bytes(400))]
    with pytest.raises(ImageError, match="does not fit"):
        pack_header(header, "x")


async def make(folder: Path) -> Path:
    path = folder / "disk.qcow2"
    await create_image(path, MIB)
    return path


def patch(path: Path, offset: int, value: int, length: int) -> None:
    with path.open("r+b") as file:
        file.seek(offset)
        file.write(value.to_bytes(length, "big"))


@pytest.mark.parametrize(
    ("offset", "value", "length", "message"),
    [
        (0, 0, 4, "not a qcow2 image"),
        (4, 4, 4, "version 4"),
        (20, 8, 4, "cluster_bits"),
        (20, 22, 4, "cluster_bits"),
        (24, 1 << 60, 8, "L1 table is too small"),
        (36, 1 << 30, 4, "L1 table is too large"),
        (40, 0x10001, 8, "L1 table is not at a cluster"),
        (40, 1 << 50, 8, "L1 table lies past the end"),
        (48, 1 << 50, 8, "refcount table lies past the end"),
        (56, 1 << 20, 4, "refcount table is too large"),
        (56, 0, 4, "no refcount table"),
        (60, 65537, 4, "too many internal snapshots"),
        (60, 3, 4, "snapshot table"),
        (72, 1 << 3, 8, "compression type"),
        (72, 1 << 5, 8, "incompatible feature bit 5"),
        (96, 7, 4, "refcount order"),
        (100, 103, 4, "header length"),
        (100, 1 << 30, 4, "header length"),
        (104, 1, 1, "compression type"),
        (116, 1 << 30, 4, "too long"),
    ],
)
async def test_damaged_header_is_refused_with_its_reason(
    folder: Path, offset: int, value: int, length: int, message: str
) -> None:
    path = await make(folder)
    patch(path, offset, value, length)
    for read_only in (True, False):
        with pytest.raises(ImageError, match=message):
            await Qcow2Image.open(path, read_only=read_only)


async def test_unknown_incompatible_feature_is_refused_by_the_images_name_for_it(
    folder: Path,
) -> None:
    path = await make(folder)
    header, _ = read_header(path)
    row = bytes([0, 17]) + b"time travel".ljust(46, b"\0")
    header.extensions = [HeaderExtension(EXTENSION_FEATURE_NAMES, row)]
    header.incompatible_features |= 1 << 17
    with path.open("r+b") as file:
        file.write(pack_header(header, "x"))
    with pytest.raises(UnsupportedImageError, match="time travel"):
        await Qcow2Image.open(path, read_only=True)


async def test_unknown_autoclear_bits_stay_when_reading_and_go_when_writing(folder: Path) -> None:
    path = await make(folder)
    patch(path, 88, 1 << 20, 8)
    await (await Qcow2Image.open(path, read_only=True)).close()
    assert read_header(path)[0].autoclear_features == 1 << 20
    await (await Qcow2Image.open(path, read_only=False)).close()
    assert read_header(path)[0].autoclear_features == 0


async def test_unknown_compatible_bits_and_extensions_survive_a_writer(folder: Path) -> None:
    """Whatever the header is changed for: bitmaps, the size, the place of a table."""
    path = await make(folder)
    patch(path, 80, 1 << 40, 8)
    insert_extension(path, 0x12345678, b"of another program")
    image = await Qcow2Image.open(path, read_only=False)
    await image.write(0, memoryview(b"x" * 100_000))
    await resize_image(image, await BitmapStore.load(image), 40 << 30)
    store = await BitmapStore.load(image)
    await store.replace([recording("b", Bitmap(image.size, 1 << 20), in_use=False)], b"record")
    await image.close()
    header, _ = read_header(path)
    assert header.compatible_features == 1 << 40
    assert b"of another program" in [each.data for each in header.extensions]
    check(path)


async def test_mutated_images_neither_hang_nor_escape(folder: Path) -> None:
    """Whatever is wrong: a named error or an errno, never a traceback of another kind."""
    path = folder / "start.qcow2"
    (folder / "base.raw").write_bytes(bytes(MIB))
    await create_image(path, MIB, cluster_size=4096, backing_file="base.raw", backing_format="raw")
    image = await Qcow2Image.open(path, read_only=False)
    await image.write(5000, memoryview(b"x" * 200_000))
    await image.close()
    start = path.read_bytes()
    rng = random.Random(7)
    mutant = folder / "mutant.qcow2"
    for _ in range(400):
        content = bytearray(start)
        region = rng.choice([112, 4096, len(content)])
        for _ in range(rng.choice([1, 1, 3, 30])):
            content[rng.randrange(region)] = rng.choice(
                [0, 1, 0x7F, 0x80, 0xFF, rng.randrange(256)]
            )
        mutant.write_bytes(
            content[: rng.choice([len(content)] * 5 + [rng.randrange(len(content))])]
        )
        await use(mutant, read_only=rng.random() < 0.5)
        assert mutant.stat().st_size < 16 * MIB


async def use(path: Path, *, read_only: bool) -> None:
    try:
        image = await Qcow2Image.open(path, read_only=read_only)
    except (OSError, NbdfleeceError):
        return
    buffer = memoryview(bytearray(65536))
    for offset in range(0, min(image.size, 2 * MIB) - 65536, 65536):
        try:
            await image.read_into(offset, buffer)
            await image.block_status(offset, 65536)
            if not read_only:
                await image.write(offset + 100, buffer[:5000])
        except OSError:
            continue
    try:
        await image.close()
    except OSError:
        return


def test_backing_format_is_the_text_of_its_extension() -> None:
    header = Header(3, 16, MIB, 1, 65536, 131072, 1)
    header.extensions = [HeaderExtension(EXTENSION_BACKING_FORMAT, b"qcow2")]
    assert header.backing_format == "qcow2"
    assert header.data_file is None
