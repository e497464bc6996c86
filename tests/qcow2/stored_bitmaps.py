"""Bitmaps to store in images, and what images hold."""

from __future__ import annotations

import random
import struct
import subprocess
from pathlib import Path

from nbdfleece.bitmaps.bitmap import Bitmap
from nbdfleece.qcow2.bitmap_store import BitmapStore, StoredBitmap
from nbdfleece.qcow2.extension_area import scan_extension_area
from nbdfleece.qcow2.image import Qcow2Image
from tests.qcow2.bitmap_image import qemu_img

MIB = 1 << 20
BITMAPS_EXTENSION = 0x23852875


def marked(size: int, granularity: int, seed: float, ranges: int = 12) -> Bitmap:
    """A bitmap with some random ranges, and the disk's last byte, marked."""
    choose = random.Random(seed)
    bitmap = Bitmap(size, granularity)
    for _ in range(ranges):
        offset = choose.randrange(size)
        bitmap.set_range(offset, choose.randrange(1, min(size - offset, 40 * granularity) + 1))
    bitmap.set_range(size - 1, 1)
    return bitmap


NEW_BITS = marked(10 * MIB, 65536, seed=21)


def frozen(name: str, content: Bitmap) -> StoredBitmap:
    return StoredBitmap(name, content.granularity, recording=False, in_use=False, content=content)


def recording(name: str, content: Bitmap, *, in_use: bool = True) -> StoredBitmap:
    return StoredBitmap(name, content.granularity, recording=True, in_use=in_use, content=content)


def kept(name: str, granularity: int = 65536) -> StoredBitmap:
    return StoredBitmap(name, granularity, recording=False, in_use=False)


async def store_in(path: Path, entries: list[StoredBitmap], payload: bytes | None = None) -> None:
    """Open an image, replace its bitmaps, close it."""
    image = await Qcow2Image.open(path, read_only=False)
    try:
        await (await BitmapStore.load(image)).replace(entries, payload)
    finally:
        await image.close()


async def load_from(path: Path) -> tuple[BitmapStore, dict[str, Bitmap]]:
    """What an image holds, read without changing it."""
    image = await Qcow2Image.open(path, read_only=True)
    try:
        store = await BitmapStore.load(image)
        bits = {entry.name: await store.load_bits(entry.name) for entry in store.entries}
        return store, bits
    finally:
        await image.close()


def check_clean(path: Path) -> None:
    assert "No errors" in qemu_img("check", path).stdout


def header_features(path: Path) -> int:
    return int.from_bytes(path.read_bytes()[88:96], "big")


def extension_types(path: Path) -> list[int]:
    area = scan_extension_area(path.read_bytes()[: 1 << 16], str(path))
    return [extension.type for extension in area.extensions]


def qemu_io(path: Path, *commands: str) -> None:
    arguments = [item for command in commands for item in ("-c", command)]
    subprocess.run(
        ["qemu-io", "-f", "qcow2", *arguments, path], check=True, capture_output=True, timeout=120
    )


def insert_extension(path: Path, extension_type: int, data: bytes) -> None:
    """Append an extension behind the ones that are there."""
    content = bytearray(path.read_bytes())
    end = scan_extension_area(bytes(content[: 1 << 16]), "").end
    packed = struct.pack(">II", extension_type, len(data)) + data + bytes(-len(data) % 8)
    content[end : end + len(packed)] = packed
    path.write_bytes(content)
