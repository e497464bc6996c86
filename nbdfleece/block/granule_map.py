"""A sparse array of 32-bit codes, one per granule, in pages that exist where something was set."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Iterator
from typing import Final

import numpy as np
import numpy.typing as npt

Codes = npt.NDArray[np.uint32]

PAGE_SHIFT: Final = 9
PAGE_GRANULES: Final = 1 << PAGE_SHIFT
"""Granules of one page: 2 KiB of memory, 2 MiB of disk at granules of 4 KiB. Random single writes
cost one page each, so pages are small; long ranges pay one step per page, so not too small."""


class GranuleMap:
    """Codes by granule number; a granule that was never set has the code 0."""

    __slots__ = ("_order", "_pages")

    def __init__(self) -> None:
        self._pages: dict[int, memoryview] = {}
        self._order: list[int] | None = None

    def __len__(self) -> int:
        """How many pages exist."""
        return len(self._pages)

    def code(self, granule: int) -> int:
        """The code of one granule."""
        page = self._pages.get(granule >> PAGE_SHIFT)
        return page[granule & PAGE_GRANULES - 1] if page is not None else 0

    def codes(self, first: int, end: int) -> Codes:
        """A copy of the codes of granules ``[first, end)``, shape (end - first,)."""
        found = np.zeros(end - first, dtype=np.uint32)
        for at, stop, page in self._touched(first, end):
            start = at & PAGE_GRANULES - 1
            found[at - first : stop - first] = page[start : start + stop - at]
        return found

    def code_list(self, first: int, end: int) -> list[int]:
        """The codes of granules ``[first, end)``: for few of them sooner than :meth:`codes`."""
        found: list[int] = []
        at = first
        while at < end:
            stop = min(end, page_end(at))
            page = self._pages.get(at >> PAGE_SHIFT)
            start = at & PAGE_GRANULES - 1
            found += page[start : start + stop - at].tolist() if page else [0] * (stop - at)
            at = stop
        return found

    def set(self, first: int, codes: Codes) -> None:
        """Set the codes of ``len(codes)`` granules from ``first`` on."""
        end = first + len(codes)
        at = first
        while at < end:
            stop = min(end, page_end(at))
            start = at & PAGE_GRANULES - 1
            self._page(at >> PAGE_SHIFT)[start : start + stop - at] = codes[
                at - first : stop - first
            ]
            at = stop

    def set_one(self, granule: int, code: int) -> None:
        """Set the code of one granule."""
        page = self._pages.get(granule >> PAGE_SHIFT) or self._new_page(granule >> PAGE_SHIFT)
        page[granule & PAGE_GRANULES - 1] = code

    def next_page(self, granule: int, end: int) -> int:
        """The first granule of ``[granule, end)`` that lies in an existing page, or ``end``."""
        if self._order is None:
            self._order = sorted(self._pages)
        at = bisect_left(self._order, granule >> PAGE_SHIFT)
        if at == len(self._order):
            return end
        return min(end, max(granule, self._order[at] << PAGE_SHIFT))

    def pages(self) -> list[int]:
        """The numbers of the pages that exist, in no order."""
        return list(self._pages)

    def take_pages(self) -> Iterator[tuple[int, Codes]]:
        """Empty the map: ``(first granule, codes)`` of each page, codes of shape (512,)."""
        self._order = None
        while self._pages:
            number, page = self._pages.popitem()
            yield number << PAGE_SHIFT, np.frombuffer(page, dtype=np.uint32)

    def _page(self, number: int) -> Codes:
        return np.frombuffer(self._pages.get(number) or self._new_page(number), dtype=np.uint32)

    def _new_page(self, number: int) -> memoryview:
        page = memoryview(bytearray(4 * PAGE_GRANULES)).cast("I")
        self._pages[number] = page
        self._order = None
        return page

    def _touched(self, first: int, end: int) -> Iterator[tuple[int, int, Codes]]:
        """The existing parts of ``[first, end)`` as ``(at, stop, codes of the whole page)``."""
        at = first
        while at < end:
            stop = min(end, page_end(at))
            page = self._pages.get(at >> PAGE_SHIFT)
            if page is not None:
                yield at, stop, np.frombuffer(page, dtype=np.uint32)
            at = stop


def page_end(granule: int) -> int:
    """The first granule of the page after the one that holds ``granule``."""
    return (granule | PAGE_GRANULES - 1) + 1
