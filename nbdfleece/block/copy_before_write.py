"""Copy-before-write: what keeps snapshots of a disk still while the guest writes on.

Theory of operation
    Every snapshot of a disk is a :class:`Layer`; the layers stand in the order in
    which the snapshots were taken. A layer's map says, granule by granule, what the
    guest's *first* write since that snapshot displaced:

    ===================  ====================================================
    code                 the granule, as it was before that write
    ===================  ====================================================
    ``UNTOUCHED``        no write since: look in the next newer layer, and
                         after the newest in the disk itself
    ``ZERO...HOLE``      read as zeroes; nothing was copied
    ``FORGOTTEN``        nobody needed it; nobody may read it
    ``COPIED + n``       granule ``n`` of the scratch
    ===================  ====================================================

    A guest write looks only at the newest layer: where its code is UNTOUCHED and
    some snapshot still sees the disk there, the old data is copied into the scratch
    and the code is set, and only then is the write let through. One copy serves all
    older snapshots (ten snapshots cost the guest one copy). When a layer goes, its
    codes move to the next older layer where that has none.

Transitions
    ``add_layer`` (with no guest write in flight), ``protect`` (a guest write is
    about to happen), ``release`` (a reader is done with a range), ``remove_layer``,
    and a failure to copy, which by default breaks the snapshots that needed the
    copy and lets the guest write on (rule 5).

What may be trusted
    Codes change only between awaits, and a code other than UNTOUCHED is set only
    after the copy is complete and before the guest's write begins. So a snapshot
    reader never locks the guest out: it notes the codes, reads, and looks at the
    codes again; what moved meanwhile, and only that, it reads again (rule 1). A granule
    moves a few times at most, so no guest, however busy, keeps a reader waiting for ever.
"""

from __future__ import annotations

import asyncio
import errno
import os
from collections.abc import Callable, Iterator
from itertools import chain
from typing import Final

import numpy as np

from ..bitmaps.bitmap import Bitmap
from ..extents import Extents
from .copy_failure import USUAL, CopyFailure, OnCbwError, shortest_timeout
from .granule_codes import (
    FORGOTTEN,
    UNTOUCHED,
    free_copies,
    true_runs,
    with_displaced,
)
from .granule_map import PAGE_SHIFT, Codes, page_end
from .granule_reads import read_granules, read_granules_at_once
from .layer import Layer
from .layer_chain import LayerChain
from .node import BlockNode
from .old_data import OldData
from .range_lock import RangeLock
from .scratch import Scratch
from .shared_codes import SharedCodes
from .threads import to_its_end

DEFAULT_GRANULARITY: Final = 4096
"""Bytes. Small: a random 4 KiB guest write copies 4 KiB, where QEMU copies 64."""

ACCESS_GRANULARITY: Final = 65536
"""Bytes per bit of what a snapshot may read: TRIM and limiting bitmaps work in clusters."""

STATUS_GRANULES_MAX: Final = 1 << 15
"""Granules that one block status looks at, not counting what the guest has left alone: 128 MiB
at granules of 4 KiB, as much as nbdcopy asks for at a time. It takes 0.3 to 1 ms."""

PAGES_AT_ONCE: Final = 32
"""Pages of codes that are moved, forgotten or told to other processes before others have turns:
0.3 to 1 ms."""

COPY_BYTES_MAX: Final = 1 << 20
"""Bytes copied at once: a bound on memory, not on what a guest write may touch."""

ZERO_GRANULES: Final = 1 << 15
"""Granules of which it is found out at once which read as zeroes."""


class CopyBeforeWrite:
    """The snapshots of one disk and the copies that they share.

    Args:
        source: The disk as the guest's writes will find it.
        scratch_directory: Where copies go; a file is made there while snapshots stand.
        granularity: Bytes of a granule, a power of two.
        quota: Bytes of scratch that may be in use at once; None for no limit of our own.
        failure: When a copy has failed and what that breaks, unless a snapshot has its own.
        on_broken: Called with a layer that has just been broken.

    Attributes:
        source, failure: As given.
    """

    def __init__(
        self,
        source: BlockNode,
        scratch_directory: str | os.PathLike[str],
        *,
        granularity: int = DEFAULT_GRANULARITY,
        quota: int | None = None,
        failure: CopyFailure = USUAL,
        on_broken: Callable[[Layer], None] = lambda layer: None,
    ) -> None:
        self.source = source
        self._scratch_directory = scratch_directory
        self._shift = granularity.bit_length() - 1
        self._quota = quota
        self.failure = failure
        self._timeout_seconds: float | None = None
        """The shortest of the snapshots that stand."""
        self._on_broken = on_broken
        self._scratch: Scratch | None = None
        self._layers = LayerChain(self._shift)
        self._shared: list[SharedCodes] = []
        """Of those layers that other processes read."""
        self._freeing: set[asyncio.Task[int]] = set()
        self._without_room: set[asyncio.Task[Codes]] = set()
        """Copies that wait for it."""
        self._copying = RangeLock()
        self._old_data = OldData(source, self._shift)
        self._version = 0
        """Counts changes of codes, layers and access: a reader must look again after one."""

    @property
    def granularity(self) -> int:
        """Bytes of a granule."""
        return 1 << self._shift

    @property
    def has_layers(self) -> bool:
        """Whether guest writes must be announced by :meth:`protect`."""
        return self._layers.newest is not None

    @property
    def scratch_bytes(self) -> int:
        """Bytes of copies held now."""
        return self._scratch.bytes_in_use if self._scratch is not None else 0

    def add_layer(self, access: Bitmap | None = None, failure: CopyFailure | None = None) -> Layer:
        """Freeze the disk as it is now. No guest write may be in flight.

        Args:
            access: If given, only what it marks is kept and may be read.
            failure: When a copy has failed and what that breaks, if not as usual.

        Raises:
            OSError: The scratch file cannot be made.
        """
        if self._scratch is None:
            self._scratch = Scratch(self._scratch_directory, self.granularity, self._quota)
        wide = None if access is None else self._wide(access)
        layer = Layer(wide, failure or self.failure)
        self._layers.add(layer)
        self._note_timeout()
        self._version += 1
        return layer

    async def limit(self, layer: Layer, access: Bitmap) -> None:
        """Keep from now on only what ``access`` marks; reading the rest is refused."""
        layer.withdraw()
        layer.access = self._wide(access)
        self._version += 1
        await self._free_unneeded(0, access.size)

    def _wide(self, access: Bitmap) -> Bitmap:
        """The same ranges or more, in whole access granules."""
        wide = Bitmap(access.size, max(ACCESS_GRANULARITY, self.granularity))
        wide.merge(access)
        return wide

    async def remove_layer(self, layer: Layer) -> None:
        """Give a snapshot up; copies that only it needed are freed.

        It stays among the layers until the older ones have what they need of it.
        """
        layer.is_removed = True
        if layer.shared is not None:
            self._shared.remove(layer.shared)
            layer.shared.close()
        self._version += 1
        await to_its_end(self._remove(layer))

    async def _remove(self, layer: Layer) -> None:
        at_once = PAGES_AT_ONCE
        while await self._free_in_turns(self._layers.hand_down(layer), at_once):
            at_once *= 2  # once more, for what was displaced meanwhile, and a busy guest is outrun
        self._layers.remove(layer)
        self._note_timeout()
        if not self.has_layers and self._scratch is not None:
            scratch, self._scratch = self._scratch, None
            await scratch.close()

    def _note_timeout(self) -> None:
        self._timeout_seconds = shortest_timeout(each.failure for each in self._layers)

    async def _free_in_turns(self, given_up: Iterator[Codes], at_once: int) -> int:
        """Give back the scratch granules of what is given up step by step; how many steps."""
        steps = 0
        for steps, codes in enumerate(given_up, 1):
            self._free(codes)
            if steps % at_once == 0:
                await asyncio.sleep(0)
        return steps

    def _free(self, codes: Codes) -> None:
        """Give back the scratch granules among ``codes``."""
        if self._scratch is not None:
            free_copies(self._scratch, codes)

    # -- the guest's side ---------------------------------------------------------

    def protect_at_once(self, offset: int, length: int) -> bool:
        """As :meth:`protect`, in the most frequent cases, which need no waiting.

        These are a small write where the guest has written before, and one where all is well
        and the old content is at hand; and any where there is no snapshot.

        Returns:
            Whether the range may be written; if not, :meth:`protect` is to be asked.
        """
        granule = offset >> self._shift
        if offset + length - 1 >> self._shift != granule:
            return False
        newest = self._layers.newest
        return (
            newest is None
            or newest.map.code(granule) != UNTOUCHED
            or self._copy_at_once(newest, granule)
        )

    def _copy_at_once(self, newest: Layer, granule: int) -> bool:
        """Bring the old content of one granule into safety and record where; whether it was done.

        Whatever is not as usual is left to the long way.
        """
        scratch = self._scratch
        if (
            scratch is None
            or newest.access is not None
            or not newest.is_good
            or self._timeout_seconds is not None
            or not self._copying.is_free(granule, granule + 1)
        ):
            return False
        code = self._old_data.copy_at_once(scratch, granule)
        if code == UNTOUCHED:
            return False
        newest.map.set_one(granule, code)
        for shared in self._shared:
            shared.set_one(granule, code)
        self._version += 1
        return True

    async def protect(self, offset: int, length: int) -> None:
        """Keep the old content of a range for the snapshots that see it; then it may be written.

        Raises:
            OSError: The old content could not be kept, and the guest's write is to fail
                for it (``break-guest-write``).
        """
        first = offset >> self._shift
        end = (offset + length - 1 >> self._shift) + 1
        newest = self._layers.newest
        if newest is not None and not newest.map.codes(first, end).all():
            async with self._copying.hold(first, end):
                await self._copy_untouched(first, end)

    async def _copy_untouched(self, first: int, end: int) -> None:
        step = max(1, COPY_BYTES_MAX >> self._shift)
        if end - first > step and self._timeout_seconds is None:
            await self._record_zeroes(first, end)
        for at in range(first, end, step):
            if at > first:
                await asyncio.sleep(0)  # of 4 GiB others must not wait for the end
            stop = min(end, at + step)
            newest = self._layers.newest
            if newest is None:
                return
            if newest.map.codes(at, stop).all():
                continue
            needed = self._layers.needed(at, stop)
            if not needed.all():
                self._record(at, np.where(needed, UNTOUCHED, FORGOTTEN).astype(np.uint32))
            for start, run_end in true_runs(needed):
                if self.has_layers:  # the last snapshot may be dropped while another run is copied
                    await self._copy_or_break(at + start, at + run_end)

    async def _record_zeroes(self, first: int, end: int) -> None:
        """Record what reads as zeroes, much of it at a time: guests discard whole disks."""
        for at in range(first, end, ZERO_GRANULES):
            stop = min(end, at + ZERO_GRANULES)
            try:
                codes = await self._old_data.zero_codes(at, stop)
            except OSError:  # of one place, which copying will come to
                continue
            codes[~self._layers.needed(at, stop)] = UNTOUCHED
            if codes.any():
                self._record(at, codes)
            await asyncio.sleep(0)

    async def _copy_or_break(self, first: int, end: int) -> None:
        """Copy granules that are needed; on failure do what ``on_error`` says."""
        try:
            self._record(first, await self._copy_in_time(first, end))
        except OSError as error:
            self._break(self._layers.needing(first, end), error)
            self._record(first, np.full(end - first, FORGOTTEN, dtype=np.uint32))
            self._free_broken()

    async def _copy_in_time(self, first: int, end: int) -> Codes:
        scratch = self._scratch
        assert scratch is not None, "layers have a scratch"
        if self._timeout_seconds is None:
            return await self._copy(scratch, first, end)
        loop = asyncio.get_running_loop()
        copy = loop.create_task(self._copy(scratch, first, end))
        begun = loop.time()
        error = OSError(errno.ETIMEDOUT, "copying old data took too long")
        try:
            while needing := self._layers.needing(first, end):
                limit = shortest_timeout(layer.failure for layer in needing)
                rest = None if limit is None else begun + limit - loop.time()
                if (await asyncio.wait({copy}, timeout=rest))[0]:
                    return copy.result()
                self._break(
                    [each for each in needing if each.failure.timeout_seconds == limit], error
                )
            raise error
        except BaseException:
            # The guest's write goes on now or never, so what arrives late must not be recorded.
            copy.add_done_callback(lambda late: _drop_late_copy(scratch, late))
            if copy in self._without_room:
                copy.cancel()
            raise

    async def _copy(self, scratch: Scratch, first: int, end: int) -> Codes:
        """Copy granules; if there is no room, once more when what was given up has made some."""
        try:
            return await self._old_data.copy(scratch, first, end)
        except OSError as error:
            if error.errno != errno.ENOSPC or not (self._freeing or scratch.is_punching):
                raise
        task = asyncio.current_task()
        assert task is not None, "a coroutine runs in one"
        self._without_room.add(task)
        try:
            if self._freeing:
                await asyncio.wait(self._freeing)
            await scratch.punched()
        finally:
            self._without_room.discard(task)
        return await self._old_data.copy(scratch, first, end)

    def _record(self, first: int, codes: Codes) -> None:
        """Set codes in the newest layer where it has none; copies that come too late are freed."""
        newest = self._layers.newest
        if newest is None:
            self._free(codes)
            return
        present = newest.map.codes(first, first + len(codes))
        vacant = present == UNTOUCHED
        codes_now = np.where(vacant, codes, present)
        newest.map.set(first, codes_now)
        for shared in self._shared:
            shared.set(first, codes_now)
        self._free(codes[~vacant])
        self._version += 1

    def _break(self, layers: list[Layer], error: OSError) -> None:
        """Break the snapshots, or for one that wants it so the guest's write.

        Raises:
            OSError: ``error``, which is to be the guest's; no snapshot was broken.
        """
        good = [layer for layer in layers if layer.is_good]
        if any(layer.failure.on_error is OnCbwError.BREAK_GUEST_WRITE for layer in good):
            raise error
        for layer in good:
            layer.error = (
                f"its old data could not be kept ({error.strerror});"
                " drop the snapshot and take a new one"
            )
            layer.withdraw()
            self._on_broken(layer)

    def _free_broken(self) -> None:
        """Once no good snapshot is left, no copy is needed any more; the guest need not wait."""
        if not any(layer.is_good for layer in self._layers):
            freeing = asyncio.create_task(
                self._free_in_turns(self._layers.forget_all(), PAGES_AT_ONCE)
            )
            self._freeing.add(freeing)
            freeing.add_done_callback(self._freeing.discard)

    # -- the snapshots' side ------------------------------------------------------

    async def read_into(self, layer: Layer, offset: int, view: memoryview) -> None:
        """Fill ``view`` with what the snapshot has at ``offset``.

        Raises:
            SnapshotError: The snapshot is broken or gone.
            OSError: EACCES, the range is not protected by this snapshot or was released;
                or what reading the disk or the scratch raised.
        """
        first = offset >> self._shift
        end = (offset + len(view) - 1 >> self._shift) + 1
        self._check_access(layer, offset, len(view))
        version = self._version
        codes = self._layers.resolve_few(layer, first, end)
        await self._read_codes(codes, first, offset, view)
        while version != self._version:
            self._check_access(layer, offset, len(view))
            version, noted = self._version, codes
            codes = self._layers.resolve_few(layer, first, end)
            for index, code in enumerate(codes):
                if code != noted[index]:
                    await self._read_codes([code], first + index, offset, view)

    def read_at_once(self, layer: Layer, offset: int, view: memoryview) -> bool:
        """As :meth:`read_into`, if that needs no waiting; no code can change meanwhile.

        Returns:
            Whether ``view`` is filled; if not it holds anything, and :meth:`read_into` will do.
        """
        first = offset >> self._shift
        end = (offset + len(view) - 1 >> self._shift) + 1
        self._check_access(layer, offset, len(view))
        codes = self._layers.resolve_few(layer, first, end)
        if not any(codes):
            return self.source.read_at_once(offset, view)
        scratch = self._scratch
        return scratch is not None and read_granules_at_once(
            self.source, scratch, codes, self._shift, offset, view
        )

    async def _read_codes(
        self, codes: list[int], first: int, offset: int, view: memoryview
    ) -> None:
        """Read the granules from ``first`` on into the view of the range at ``offset``."""
        begin = max(offset, first << self._shift)
        stop = min(offset + len(view), first + len(codes) << self._shift)
        part, scratch = view[begin - offset : stop - offset], self._scratch
        if scratch is None or not any(codes):
            await self.source.read_into(begin, part)
        else:
            await read_granules(self.source, scratch, codes, self._shift, begin, part)

    def _check_access(self, layer: Layer, offset: int, length: int) -> None:
        layer.check()
        access = layer.access
        if access is not None and access.extents(offset, length).status.min() == 0:
            raise OSError(
                errno.EACCES, "the range is outside what this snapshot keeps, or was released"
            )

    async def block_status(
        self, layer: Layer, offset: int, length: int, extents_max: int
    ) -> Extents:
        """Describe a range of the snapshot by status words, as of the instant it was taken."""
        parts: list[Extents] = []
        at, limit, found, looked = offset, offset + length, 0, 0
        while at < limit and found <= extents_max and looked < STATUS_GRANULES_MAX:
            part, granules = await self._status_part(layer, at, limit, extents_max)
            parts.append(part)
            found += len(part.lengths)
            looked += granules
            at += part.total()
        return Extents.concatenate(parts).limited(extents_max)

    async def _status_part(
        self, layer: Layer, offset: int, limit: int, extents_max: int
    ) -> tuple[Extents, int]:
        """The status up to the next page that the guest touched, or from one on.

        The codes are looked at after the disk was: what is untouched then has not changed.

        Returns:
            It, and how many granules had to be looked at for it.
        """
        first = offset >> self._shift
        untouched_end = self._untouched_end(layer, offset, limit)
        stop = untouched_end
        if stop == offset:
            stop = min(limit, page_end(first + STATUS_GRANULES_MAX) << self._shift)
        base = await self.source.block_status(offset, stop - offset, extents_max=extents_max)
        stop = self._untouched_end(layer, offset, offset + base.total())
        if stop > offset:
            return base.clipped(stop - offset), 0
        if untouched_end > offset:  # touched meanwhile, and all of it may be much
            base = base.clipped((page_end(first) << self._shift) - offset)
        end = (offset + base.total() - 1 >> self._shift) + 1
        codes = self._layers.resolve(layer, first, end)
        lead = offset - (first << self._shift)
        return with_displaced(base, codes, lead, self._shift), end - first

    def _untouched_end(self, layer: Layer, offset: int, limit: int) -> int:
        """Where the first page begins that the guest has touched, ``limit`` if there is none."""
        layer.check()
        first, end = offset >> self._shift, (limit - 1 >> self._shift) + 1
        touched = self._layers.next_page(layer, first, end)
        return min(limit, max(offset, touched << self._shift))

    # -- other processes ----------------------------------------------------------

    async def share(self, layer: Layer) -> tuple[Scratch, SharedCodes]:
        """Let other processes see what a snapshot of all of the disk has displaced, and read it.

        Raises:
            SnapshotError: The snapshot is broken or gone.
            OSError: There is no memory for it.
        """
        layer.check()
        if layer.shared is None:
            granules = (self.source.size - 1 >> self._shift) + 1
            layer.shared = SharedCodes(granules)
            self._shared.append(layer.shared)
            await self._share_old(layer, layer.shared, granules)
            layer.check()
            layer.shared.open()
        assert self._scratch is not None, "layers have a scratch"
        return self._scratch, layer.shared

    async def _share_old(self, layer: Layer, shared: SharedCodes, end: int) -> None:
        """Tell what was displaced before; what is displaced meanwhile is told as always."""
        pages = [each.map.pages() for each in self._layers.since(layer)]  # codes move among them
        for count, number in enumerate(chain.from_iterable(pages)):
            if count % PAGES_AT_ONCE == 0:
                await asyncio.sleep(0)
                if layer.is_removed:
                    return
            first = number << PAGE_SHIFT
            shared.replace(first, self._layers.resolve(layer, first, min(end, page_end(first))))

    # -- giving up ranges ---------------------------------------------------------

    async def release(self, layer: Layer, offset: int, length: int) -> None:
        """The reader of a snapshot is done with a range: stop protecting it, free its copies.

        Only whole access granules inside the range are released; reading them is refused
        from now on.
        """
        layer.withdraw()
        if layer.access is None:
            layer.access = Bitmap(self.source.size, max(ACCESS_GRANULARITY, self.granularity))
            layer.access.set_all()
        each = layer.access.granularity
        begin = -(-offset // each) * each
        end = offset + length
        if end != self.source.size:
            end = end // each * each
        if begin < end:
            layer.access.clear_range(begin, end - begin)
            self._version += 1
            await self._free_unneeded(begin, end - begin)

    async def _free_unneeded(self, offset: int, length: int) -> None:
        """Forget the copies of a range that no snapshot may read any more."""
        if length:
            first, end = offset >> self._shift, (offset + length - 1 >> self._shift) + 1
            given_up = self._layers.forget_unneeded(first, end)
            await to_its_end(self._free_in_turns(given_up, PAGES_AT_ONCE))


def _drop_late_copy(scratch: Scratch, copy: asyncio.Task[Codes]) -> None:
    if not copy.cancelled() and copy.exception() is None:
        free_copies(scratch, copy.result())
