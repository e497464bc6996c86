"""The disk that the servers under test serve: known content, in a raw and a qcow2 image.

The layout has what replies are made of: data, zeroes that are allocated, holes, a stretch
where data and holes take turns, a backing image, a run of more than 4 GiB, data at the very
end, and two dirty bitmaps whose bits are known.
"""

from __future__ import annotations

import random
import shutil
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

KIB, MIB, GIB = 1 << 10, 1 << 20, 1 << 30
DISK_BYTES = 6 * GIB + 1536
SMALL_DISK_BYTES = 64 * MIB
BLOCK = 64 * KIB
ZEROES = (1 * MIB, 2 * MIB)
HOLE = (2 * MIB, 3 * MIB)
BAD_SECTOR = 3 * MIB + 512 * KIB
CHECKERED = (4 * MIB, 6 * MIB)
BACKED = (6 * MIB, 7 * MIB)
FAR = 5 * GIB
SCRATCH = (8 * MIB, 48 * MIB)
"""Nothing but a hole: cases that write do it here."""


@dataclass(frozen=True)
class Bitmap:
    """A dirty bitmap with its dirty ranges, half-open and in order."""

    name: str
    granularity: int
    writes: tuple[tuple[int, int], ...]


FIRST_BITMAP = Bitmap("b0", 65536, ((0, BLOCK), (3 * MIB, 3 * MIB + 2 * BLOCK)))
SECOND_BITMAP = Bitmap("virtnbdbackup.0", 4096, ((4 * MIB, 4 * MIB + 4096),))
DIRTY: dict[str, tuple[tuple[int, int], ...]] = {
    FIRST_BITMAP.name: (*FIRST_BITMAP.writes, (4 * MIB, 4 * MIB + BLOCK)),
    SECOND_BITMAP.name: SECOND_BITMAP.writes,
}


@dataclass(frozen=True)
class Content:
    """What each byte of a disk of ``size`` bytes is."""

    size: int

    def data_ranges(self) -> Iterator[tuple[int, int]]:
        """Where there is data, as half-open ranges in order."""
        ranges = [(0, MIB), (3 * MIB, 4 * MIB)]
        ranges += [(start, start + BLOCK) for start in range(*CHECKERED, 2 * BLOCK)]
        ranges += [BACKED, (FAR, FAR + BLOCK), (self.size - 1536, self.size)]
        return ((start, end) for start, end in ranges if end <= self.size)

    def read(self, offset: int, length: int) -> bytes:
        made = bytearray(length)
        end = offset + length
        for start, stop in self.data_ranges():
            for block in range(start, stop, BLOCK):
                _overlay(made, offset, end, block, _pattern(block)[: stop - block])
        return bytes(made)

    def is_data(self, offset: int) -> bool:
        return any(start <= offset < end for start, end in self.data_ranges())


def _overlay(made: bytearray, offset: int, end: int, start: int, data: bytes) -> None:
    first, last = max(offset, start), min(end, start + len(data))
    if first < last:
        made[first - offset : last - offset] = data[first - start : last - start]


_patterns: dict[int, bytes] = {}


def _pattern(block: int) -> bytes:
    if block not in _patterns:
        _patterns[block] = random.Random(block).randbytes(BLOCK)
    return _patterns[block]


@dataclass(frozen=True)
class Images:
    """The same disk as ``raw`` (sparse) and ``qcow2`` (with a backing image and bitmaps)."""

    content: Content
    raw: Path
    qcow2: Path
    base: Path

    def copy(self, kind: str, name: str) -> Path:
        """A copy of the ``raw`` or ``qcow2`` image that a case may write to."""
        source = self.raw if kind == "raw" else self.qcow2
        target = source.with_name(name)
        subprocess.run(["cp", "--sparse=always", source, target], check=True)
        return target


def make_images(folder: Path, size: int = DISK_BYTES) -> Images:
    """Make both images in ``folder``; needs qemu-img and qemu-io."""
    content = Content(size)
    raw, base, top = folder / "disk.raw", folder / "base.qcow2", folder / "disk.qcow2"
    write_raw(content, raw, list(content.data_ranges()))
    backed = folder / "base.raw"
    write_raw(content, backed, [BACKED])
    _run("qemu-img", "convert", "-f", "raw", "-O", "qcow2", backed, base)
    backed.unlink()
    _run("qemu-img", "create", "-q", "-f", "qcow2", "-b", base.name, "-F", "qcow2", top, size)
    _fill(content, top, folder)
    return Images(content, raw, top, base)


def write_raw(content: Content, path: Path, ranges: list[tuple[int, int]]) -> None:
    with path.open("wb") as file:
        file.truncate(content.size)
        for start, end in ranges:
            file.seek(start)
            file.write(content.read(start, end - start))


def _fill(content: Content, top: Path, folder: Path) -> None:
    piece = folder / "piece"
    ranges = [part for part in content.data_ranges() if part != BACKED]
    _write(content, top, piece, ranges, [f"write -q -z {ZEROES[0]} {MIB}"])
    for bitmap in (FIRST_BITMAP, SECOND_BITMAP):
        _run("qemu-img", "bitmap", "--add", "-g", bitmap.granularity, top, bitmap.name)
        _write(content, top, piece, list(bitmap.writes), [])
    for bitmap in (FIRST_BITMAP, SECOND_BITMAP):
        _run("qemu-img", "bitmap", "--disable", top, bitmap.name)


def _write(
    content: Content, top: Path, piece: Path, ranges: list[tuple[int, int]], more: list[str]
) -> None:
    commands = list(more)
    for index, (start, end) in enumerate(ranges):
        part = piece.with_name(f"piece{index}")
        part.write_bytes(content.read(start, end - start))
        commands.append(f"write -q -s {part} {start} {end - start}")
    _run("qemu-io", "-f", "qcow2", *(word for line in commands for word in ("-c", line)), top)
    for part in piece.parent.glob("piece*"):
        part.unlink()


def _run(*words: object) -> None:
    program = shutil.which(str(words[0]))
    if program is None:
        raise FileNotFoundError(f"{words[0]} is needed to make the images")
    result = subprocess.run(
        [program, *map(str, words[1:])], capture_output=True, text=True, timeout=180
    )
    if result.returncode:
        raise RuntimeError(f"{' '.join(map(str, words))}: {result.stderr.strip()}")
