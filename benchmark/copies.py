"""Images that a server may write to: copies, which are filled anew rather than made anew.

Pages that a file in memory has already are written in half the time of new ones, and a benchmark
copies a disk of a gigabyte a hundred times.
"""

from __future__ import annotations

import errno
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, BinaryIO

if TYPE_CHECKING:
    from .place import Place


class Copies:
    """Copies of images, each in use by one server at a time. Threads may share this."""

    def __init__(self) -> None:
        self._spare: dict[Path, list[Path]] = {}

    @contextmanager
    def of(self, source: Path, place: Place) -> Iterator[Path]:
        """A copy with the content of its source now, until the server has ended.

        One with holes is a new file, and goes afterwards: a server has filled them.
        """
        has_holes = source.stat().st_blocks * 512 < source.stat().st_size
        spare = self._spare.setdefault(source, [])
        path = spare.pop() if spare else place.path(".img")
        copy_sparse(source, path)
        try:
            yield path
        finally:
            if has_holes:
                path.unlink()
            else:
                spare.append(path)

    def clear(self) -> None:
        """Delete what nobody uses."""
        for spare in self._spare.values():
            while spare:
                spare.pop().unlink()


def copy_sparse(source: Path, target: Path) -> None:
    """Copy an image over what the target has; a new target has the source's holes."""
    target.touch()
    with source.open("rb") as reader, target.open("r+b") as writer:  # "wb" would free its pages
        _copy_data(reader, writer, source.stat().st_size)


def _copy_data(reader: BinaryIO, writer: BinaryIO, size: int) -> None:
    writer.truncate(size)
    for at, length in data_ranges(reader):
        end = at + length
        while at < end:
            at += os.copy_file_range(reader.fileno(), writer.fileno(), end - at, at, at)


def data_ranges(file: BinaryIO) -> Iterator[tuple[int, int]]:
    """``(offset, length)`` of what is no hole in a file."""
    end = 0
    while True:
        try:
            begin = os.lseek(file.fileno(), end, os.SEEK_DATA)
        except OSError as error:
            if error.errno != errno.ENXIO:  # nothing but a hole up to the end
                raise
            return
        end = os.lseek(file.fileno(), begin, os.SEEK_HOLE)
        yield begin, end - begin
