"""Engines over real qcow2 images, and what QEMU says of these."""

from __future__ import annotations

import json
import shutil
import subprocess
from pathlib import Path
from typing import Any

from nbdfleece.engine.disk import ScratchOptions
from nbdfleece.engine.engine import Engine
from nbdfleece.export.contexts import DIRTY_BITMAP_PREFIX
from nbdfleece.export.export import ExportTable

SIZE = 4 << 20
CLUSTER = 65536


LEAKS = 3
"""Exit status of ``qemu-img check`` when clusters are leaked and nothing is wrong."""


def qemu_img(*words: str | Path, statuses: tuple[int, ...] = (0,)) -> str:
    done = subprocess.run(
        ["qemu-img", *map(str, words)], capture_output=True, text=True, check=False
    )
    assert done.returncode in statuses, done.stdout + done.stderr
    return done.stdout


def make_image(path: Path, size: int = SIZE, options: str = "") -> Path:
    words = ["-o", options] if options else []
    qemu_img("create", "-q", "-f", "qcow2", *words, path, str(size))
    return path


def stored_bitmaps(path: Path, *, after_kill: bool = False) -> dict[str, list[str]]:
    """The flags of an image's bitmaps by name, as QEMU sees them; the image is sound (rule 4)."""
    qemu_img("check", "-q", path, statuses=(0, LEAKS) if after_kill else (0,))
    info: dict[str, Any] = json.loads(qemu_img("info", "--output=json", path))
    found = info["format-specific"]["data"].get("bitmaps", [])
    return {each["name"]: each["flags"] for each in found}


async def open_engine(folder: Path, *images: Path) -> Engine:
    """An engine over images, each a disk named as its file, after what a start does."""
    engine = Engine(ExportTable(), ScratchOptions(directory=folder))
    for image in images:
        await engine.open_disk(image.stem, image)
    await engine.recover()
    return engine


async def killed(engine: Engine, folder: Path, number: int = 0) -> list[Path]:
    """Copies of an engine's images as a SIGKILL at this moment would leave them."""
    target = folder / f"killed-{number}"
    target.mkdir()
    return [
        Path(shutil.copyfile(disk.image.path, target / Path(disk.image.path).name))
        for disk in engine.disks.values()
    ]


async def read_export(engine: Engine, name: str) -> bytes:
    """All bytes of an export."""
    export = engine.exports.find(name)
    assert export is not None
    buffer = bytearray(export.size)
    await export.node.read_into(0, memoryview(buffer))
    return bytes(buffer)


async def write(engine: Engine, disk: str, offset: int, data: bytes) -> None:
    await engine.disk(disk).node.write(offset, memoryview(data))


async def dirty_clusters(engine: Engine, export_name: str, bitmap: str) -> set[int]:
    """The clusters that a bitmap of an export shows as dirty."""
    export = engine.exports.find(export_name)
    assert export is not None
    context = export.context(DIRTY_BITMAP_PREFIX + bitmap)
    assert context is not None
    found, at = set(), 0
    for length, status in (await context.extents(0, export.size, extents_max=1 << 20)).pairs():
        if status:
            found |= set(range(at // CLUSTER, (at + length - 1) // CLUSTER + 1))
        at += length
    return found
