"""A sparse array of 32-bit codes, one per granule, in pages that exist where something was set.

Snapshots of large disks have a million pages and more. So a page is no object of its own, which the
garbage collector would have to visit, but a part of a slab; where it lies, a directory tells,
which has one entry for each page of a part of the disk. A page whose codes are all alike, as those
of what a guest discards are, takes no place at all: its entry is the code.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Final

import numpy as np
import numpy.typing as npt

Codes = npt.NDArray[np.uint32]

PAGE_SHIFT: Final = 9
PAGE_GRANULES: Final = 1 << PAGE_SHIFT
"""Granules of one page: 2 KiB of memory, 2 MiB of disk at granules of 4 KiB. Random single writes
cost one page each, so pages are small; long ranges pay one step per page, so not too small."""

_DIRECTORY_SHIFT: Final = 10
_DIRECTORY_PAGES: Final = 1 << _DIRECTORY_SHIFT
"""Pages of one directory, 8 KiB of memory."""

_SLAB_SHIFT: Final = PAGE_SHIFT + 9
_SLAB_GRANULES: Final = 1 << _SLAB_SHIFT
"""Codes of one slab: 1 MiB, of which the kernel gives what is used."""


class GranuleMap:
    """Codes by granule number; a granule that was never set has the code 0."""

    __slots__ = ("_directories", "_end", "_slabs", "_vacant")

    def __init__(self) -> None:
        self._directories: dict[int, memoryview] = {}
        """64-bit entries by number of a directory: of each page 0 if it does not exist, the
        position of its first code in the slabs, or if negative the code that all have."""
        self._slabs: list[memoryview] = []
        self._end = PAGE_GRANULES
        """The first position that no page has had; 0 is none."""
        self._vacant: list[int] = []
        """Positions of pages that were given up, with old codes in them."""

    def __len__(self) -> int:
        """How many pages take memory."""
        return (self._end >> PAGE_SHIFT) - 1 - len(self._vacant)

    def code(self, granule: int) -> int:
        """The code of one granule."""
        entry = self._entry(granule >> PAGE_SHIFT)
        if entry <= 0:
            return -entry
        at = entry + (granule & PAGE_GRANULES - 1)
        return self._slabs[at >> _SLAB_SHIFT][at & _SLAB_GRANULES - 1]

    def codes(self, first: int, end: int) -> Codes:
        """A copy of the codes of granules ``[first, end)``, shape (end - first,)."""
        found = np.zeros(end - first, dtype=np.uint32)
        for at, stop in _by_pages(first, end):
            entry = self._entry(at >> PAGE_SHIFT)
            if entry < 0:
                found[at - first : stop - first] = -entry
            elif entry:
                start = at & PAGE_GRANULES - 1
                found[at - first : stop - first] = self._page(entry)[start : start + stop - at]
        return found

    def code_list(self, first: int, end: int) -> list[int]:
        """The codes of granules ``[first, end)``: for few of them sooner than :meth:`codes`."""
        found: list[int] = []
        for at, stop in _by_pages(first, end):
            entry = self._entry(at >> PAGE_SHIFT)
            if entry > 0:
                start = (entry & _SLAB_GRANULES - 1) + (at & PAGE_GRANULES - 1)
                found += self._slabs[entry >> _SLAB_SHIFT][start : start + stop - at].tolist()
            else:
                found += [-entry] * (stop - at)
        return found

    def set(self, first: int, codes: Codes) -> None:
        """Set the codes of ``len(codes)`` granules from ``first`` on."""
        end = first + len(codes)
        for at, stop in _by_pages(first, end):
            number, start = at >> PAGE_SHIFT, at & PAGE_GRANULES - 1
            page = self._page(self._placed(number))
            page[start : start + stop - at] = codes[at - first : stop - first]
            if page[0] == page[-1] and (page == page[0]).all():
                self._give_up(number, int(page[0]))

    def set_one(self, granule: int, code: int) -> None:
        """Set the code of one granule."""
        at = self._placed(granule >> PAGE_SHIFT) + (granule & PAGE_GRANULES - 1)
        self._slabs[at >> _SLAB_SHIFT][at & _SLAB_GRANULES - 1] = code

    def next_page(self, granule: int, end: int) -> int:
        """The first granule of ``[granule, end)`` that lies in an existing page, or ``end``."""
        number, limit = granule >> PAGE_SHIFT, (end - 1 >> PAGE_SHIFT) + 1
        while number < limit:
            directory = self._directories.get(number >> _DIRECTORY_SHIFT)
            if directory is not None:
                existing = np.frombuffer(directory, np.int64)[number & _DIRECTORY_PAGES - 1 :] != 0
                if existing.any():
                    number += int(existing.argmax())
                    return min(end, max(granule, number << PAGE_SHIFT))
            past = number >> _DIRECTORY_SHIFT
            following = min((each for each in self._directories if each > past), default=None)
            if following is None:
                break
            number = following << _DIRECTORY_SHIFT
        return end

    def pages(self) -> list[int]:
        """The numbers of the pages that exist, in no order."""
        return [
            (number << _DIRECTORY_SHIFT) + page
            for number, directory in self._directories.items()
            for page in np.flatnonzero(np.frombuffer(directory, np.int64)).tolist()
        ]

    def drop_page(self, number: int) -> None:
        """Let a page not exist any more."""
        self._give_up(number, 0)

    def _entry(self, number: int) -> int:
        """What the directory has of a page."""
        directory = self._directories.get(number >> _DIRECTORY_SHIFT)
        return 0 if directory is None else directory[number & _DIRECTORY_PAGES - 1]

    def _page(self, position: int) -> Codes:
        """The codes of a page that has a place."""
        slab = self._slabs[position >> _SLAB_SHIFT]
        start = (position & _SLAB_GRANULES - 1) * 4
        return np.frombuffer(slab, np.uint32, PAGE_GRANULES, start)

    def _placed(self, number: int) -> int:
        """The position of a page, which gets one if it has none."""
        directory = self._directories.get(number >> _DIRECTORY_SHIFT)
        if directory is None:
            directory = memoryview(bytearray(8 * _DIRECTORY_PAGES)).cast("q")
            self._directories[number >> _DIRECTORY_SHIFT] = directory
        entry = directory[number & _DIRECTORY_PAGES - 1]
        if entry > 0:
            return entry
        if self._vacant:
            position = self._vacant.pop()
            self._page(position)[:] = -entry
        else:
            position, self._end = self._end, self._end + PAGE_GRANULES
            if position >> _SLAB_SHIFT == len(self._slabs):
                self._slabs.append(memoryview(bytearray(4 * _SLAB_GRANULES)).cast("I"))
            if entry:
                self._page(position)[:] = -entry
        directory[number & _DIRECTORY_PAGES - 1] = position
        return position

    def _give_up(self, number: int, code: int) -> None:
        """Let all codes of a page be alike, without a place; 0 if it is not to exist."""
        directory = self._directories[number >> _DIRECTORY_SHIFT]
        entry = directory[number & _DIRECTORY_PAGES - 1]
        directory[number & _DIRECTORY_PAGES - 1] = -code
        if entry > 0:
            self._vacant.append(entry)
            if not len(self) and len(self._slabs) > 1:
                self._slabs.clear()
                self._vacant.clear()
                self._end = PAGE_GRANULES


def page_end(granule: int) -> int:
    """The first granule of the page after the one that holds ``granule``."""
    return (granule | PAGE_GRANULES - 1) + 1


def _by_pages(first: int, end: int) -> Iterator[tuple[int, int]]:
    """The parts ``(at, stop)`` of granules ``[first, end)`` that lie in one page each."""
    while first < end:
        stop = min(end, page_end(first))
        yield first, stop
        first = stop
