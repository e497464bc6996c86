"""What a guest's write is about to displace, brought into safety: into a scratch, or as a code."""

from __future__ import annotations

import numpy as np

from .granule_codes import COPIED, FORGOTTEN, UNTOUCHED, code_of_status, free_copies, true_runs
from .granule_map import Codes
from .node import BlockNode
from .scratch import Scratch


class OldData:
    """The old content of granules of a disk.

    Args:
        source: The disk.
        shift: Bits of an offset within a granule.
    """

    def __init__(self, source: BlockNode, shift: int) -> None:
        self._source = source
        self._shift = shift
        self._granule = memoryview(bytearray(1 << shift))
        """For copies that are made without waiting."""

    def copy_at_once(self, scratch: Scratch, granule: int) -> int:
        """As :meth:`copy`, of one granule, if nothing need be waited for.

        Returns:
            Its code; UNTOUCHED if :meth:`copy` is to be asked, which will say what is wrong.
        """
        offset = granule << self._shift
        try:
            status = self._source.read_with_status(
                offset, self._granule[: self._source.size - offset]
            )
            if status is None:
                return UNTOUCHED
            return code_of_status(status) or COPIED + scratch.append(self._granule)
        except OSError:
            return UNTOUCHED

    async def copy(self, scratch: Scratch, first: int, end: int) -> Codes:
        """Bring the old content of the granules ``[first, end)`` into safety.

        Returns:
            Their codes, to be recorded, shape (end - first,).

        Raises:
            OSError: It cannot be read, or not be kept; nothing of it is.
        """
        codes = await self.zero_codes(first, end)
        try:
            for start, stop in true_runs(codes == UNTOUCHED):
                place = await self._copy_data(scratch, first + start, stop - start)
                codes[start:stop] = np.arange(place, place + stop - start) + COPIED
        except BaseException:
            free_copies(scratch, codes)
            raise
        return codes

    async def _copy_data(self, scratch: Scratch, first: int, count: int) -> int:
        """Copy granules to the scratch; returns the number of the first one there."""
        offset = first << self._shift
        buffer = memoryview(bytearray(count << self._shift))
        await self._source.read_into(offset, buffer[: self._source.size - offset])
        place = scratch.allocate(count)
        try:
            await scratch.write(place, buffer)
        except BaseException:
            scratch.free(place, count)
            raise
        return place

    async def zero_codes(self, first: int, end: int) -> Codes:
        """Codes for granules that read as zeroes, UNTOUCHED for those that hold data."""
        codes = np.full(end - first, FORGOTTEN, dtype=np.uint32)
        offset, limit = first << self._shift, min(end << self._shift, self._source.size)
        while offset < limit:
            extents = await self._source.block_status(offset, limit - offset)
            for length, status in extents.pairs():
                low = (offset >> self._shift) - first
                high = (offset + length - 1 >> self._shift) + 1 - first
                part = codes[low:high]
                code = code_of_status(status)
                # A granule of several kinds is data if any part of it is.
                part[part != FORGOTTEN] = UNTOUCHED
                part[part == FORGOTTEN] = code
                offset += length
        return codes
