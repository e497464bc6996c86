"""A regular file or block device as a block node.

Everything that the page cache can answer is done inline in the loop's thread;
what would block goes to a bounded pool of threads, so that one cold read or one
slow disk never stalls another client (rule 5):

* **Reads** ask with ``RWF_NOWAIT`` first. What is cold is fetched by a thread, and what
  follows large cold reads is asked for before they come to it (:mod:`.read_ahead`).
* **Writes** up to :data:`INLINE_BYTES_MAX` are a ``pwrite`` into the page cache.
* **Flushes** are ``fdatasync`` in a thread of a pool of their own, so that they wait for
  nobody's cold reads, with group commit: callers that arrive while one runs share the
  next one. A flush with nothing written since the last one returns at once.
* **fallocate** may wait for write-back of the pages it drops: always a thread.

A failed ``fdatasync`` is final: the kernel forgets the pages that it could not
write, so no later success could be believed (rule 4). Every flush after it
fails alike until the file is opened anew, as in QEMU.
"""

from __future__ import annotations

import asyncio
import errno
import os
import stat
from collections.abc import Sequence
from functools import partial
from typing import Final

import numpy as np

from ..errors import ImageError
from ..extents import Extents
from .host_file import HostFile, Places
from .linux import (
    FALLOC_FL_KEEP_SIZE,
    FALLOC_FL_PUNCH_HOLE,
    FALLOC_FL_ZERO_RANGE,
    fallocate,
    lives_in_memory,
)
from .locks import Access, lock_file
from .node import BlockNode, BlockStatus, block_status_word
from .read_ahead import ReadAhead, will_need
from .stable import StablePlace, open_stable
from .threads import begin_flush, begin_in_thread, finished, in_thread

INLINE_BYTES_MAX: Final = 1 << 20
"""Writes up to this size run in the loop's thread: 1 MiB into the page cache is 0.1 to 0.3 ms."""

STREAM_BYTES_MIN: Final = 64 << 10
"""Cold reads from this size on may begin a stream, of which a thread reads ahead."""

_ZEROES: Final = bytes(1 << 20)
"""What is written where the file system cannot zero a range by itself."""

_OFFSET_MAX: Final = (1 << 63) - 1

_CLUSTER_BITS: Final = 16
_MAP_BITS: Final = 30
"""In what pieces a file is located: any would do."""

_EXTENTS_MAX: Final = 1024
"""Extents sought at most in one call: two system calls each."""

_SEEK_INLINE_BYTES_MAX: Final = 16 << 20
"""Holes are sought inline in ranges up to this: tmpfs looks at every page of the range."""

_DATA: Final = block_status_word(BlockStatus.DATA, 1)
_HOLE: Final = block_status_word(BlockStatus.HOLE | BlockStatus.ZERO, 1)

_UNSUPPORTED: Final = (errno.EOPNOTSUPP, errno.ENOSYS, errno.EINVAL, errno.ENODEV)
"""What fallocate(2) answers where it cannot do a mode at all."""


class FileNode(BlockNode):
    """A file's bytes. Made by :meth:`open`.

    ``size`` is the file's at the time of opening; it grows by :meth:`grow` and by
    writes past it, which a container format does and a raw disk's callers never ask for. Of a
    file that others let grow it is not known, and more than any file has.
    """

    def __init__(
        self,
        fd: int,
        path: str,
        *,
        read_only: bool,
        excludes_writers: bool = False,
        grows_elsewhere: bool = False,
    ) -> None:
        info = os.fstat(fd)
        self._fd = fd
        self._is_in_memory = stat.S_ISREG(info.st_mode) and lives_in_memory(fd)
        self._has_nowait = not self._is_in_memory
        self._flush_running: asyncio.Future[None] | None = None
        self._flush_next: asyncio.Future[None] | None = None
        self._writes_done = 1
        self._writes_durable = 0
        self._flush_error: OSError | None = None
        self.path = path
        self.read_only = read_only
        self.identity = (info.st_dev, info.st_ino)
        """Device and inode: the same for two names of one file."""
        self.size = _OFFSET_MAX if grows_elsewhere else os.lseek(fd, 0, os.SEEK_END)
        self._ahead = ReadAhead(partial(_ask, fd))
        self._stable = None
        if excludes_writers and stat.S_ISREG(info.st_mode):
            self._stable = open_stable(fd, is_in_memory=self._is_in_memory)

    @classmethod
    def open(
        cls,
        path: str | os.PathLike[str],
        *,
        read_only: bool,
        force_share: bool = False,
        locking: bool = True,
    ) -> FileNode:
        """Open an existing file and take QEMU's locks on it.

        Args:
            path: A regular file or a block device.
            read_only: Not to be written.
            force_share: Read even while another program writes.
            locking: False leaves QEMU's locks alone, for files that are no images.

        Raises:
            OSError: The file cannot be opened.
            ImageLockedError: Another program uses it.
            ImageError: It is neither a regular file nor a block device.
        """
        name = os.fspath(path)
        # O_NONBLOCK: opening a FIFO must not hang; it changes nothing for files and devices.
        mode = os.O_RDONLY if read_only else os.O_RDWR
        fd = os.open(name, mode | os.O_CLOEXEC | os.O_NONBLOCK)
        try:
            kind = os.fstat(fd).st_mode
            if not stat.S_ISREG(kind) and not stat.S_ISBLK(kind):
                raise ImageError(name, "neither a regular file nor a block device")
            if locking:
                reading = Access.READ_SHARED if force_share else Access.READ
                lock_file(fd, name, reading if read_only else Access.WRITE)
            excludes_writers = read_only and locking and not force_share
            return cls(fd, name, read_only=read_only, excludes_writers=excludes_writers)
        except BaseException:
            os.close(fd)
            raise

    @property
    def is_closed(self) -> bool:
        """Whether :meth:`close` has been called."""
        return self._fd < 0

    def fileno(self) -> int:
        """The file descriptor."""
        return self._fd

    def allocated_bytes(self) -> int:
        """How much space the file takes, which is less than its size if it has holes."""
        return os.fstat(self._fd).st_blocks * 512

    def stable_places(self, offset: int, length: int) -> list[StablePlace] | None:
        """The range itself, if it is in the file and nobody else can write that."""
        stable = self._stable
        if stable is None or offset + length > stable.size:
            return None
        return [StablePlace(stable, offset, length)]

    def host_file(self) -> HostFile | None:
        """The file itself, in clusters that lie where they are."""
        return HostFile(self._fd, _CLUSTER_BITS, _MAP_BITS)

    async def locate(self, part: int) -> Places:
        """Where the clusters of a part lie."""
        first = part << _MAP_BITS
        return np.arange(first, first + (1 << _MAP_BITS), 1 << _CLUSTER_BITS, dtype=np.uint64)

    async def read_into(self, offset: int, view: memoryview) -> None:
        """Fill ``view`` from ``offset`` on; what lies past the end of the file is zeroes."""
        end = offset + len(view)
        if self._ahead.streams:
            self._ahead.follow(offset, end)
        count = self.read_cached(offset, view)
        if count == len(view):
            return
        if offset + count < self.size:
            if len(view) >= STREAM_BYTES_MIN:
                self._ahead.begin(offset, end)
            await in_thread(_read_fully, self._fd, offset + count, view[count:])
        else:
            _fill_zeroes(view[count:])

    def read_cached(self, offset: int, view: memoryview) -> int:
        """Fill the beginning of ``view``, as far as that needs no waiting for the disk.

        Returns:
            How many bytes were read; the rest is cold, or lies past the end of the file.
        """
        if self._has_nowait:
            try:
                return os.preadv(self._fd, [view], offset, os.RWF_NOWAIT)
            except BlockingIOError:
                return 0
            except OSError as error:
                if error.errno != errno.EOPNOTSUPP:
                    raise
                self._has_nowait = False
                return 0
        return os.preadv(self._fd, [view], offset) if self._is_in_memory else 0

    async def read(self, offset: int, length: int) -> bytearray:
        """The ``length`` bytes from ``offset`` on, zeroes past the end of the file."""
        buffer = bytearray(length)
        await self.read_into(offset, memoryview(buffer))
        return buffer

    def read_at_once(self, offset: int, view: memoryview) -> bool:
        """Fill ``view`` with bytes that are in memory."""
        if self._ahead.streams:
            self._ahead.follow(offset, offset + len(view))
        if self._has_nowait:
            try:
                return os.preadv(self._fd, [view], offset, os.RWF_NOWAIT) == len(view)
            except BlockingIOError:
                return False
        return self._is_in_memory and os.preadv(self._fd, [view], offset) == len(view)

    def read_pieces_at_once(self, pieces: Sequence[tuple[int, memoryview]]) -> bool:
        """Fill several small views with bytes that are in memory, each from its offset on."""
        if not self._has_nowait and not self._is_in_memory:
            return False
        fd, flags = self._fd, os.RWF_NOWAIT if self._has_nowait else 0
        try:
            for offset, view in pieces:
                if os.preadv(fd, [view], offset, flags) < len(view):
                    return False
        except OSError as error:
            if error.errno not in (errno.EAGAIN, errno.EOPNOTSUPP):
                raise
            return False
        return True

    async def read_pieces(self, pieces: Sequence[tuple[int, memoryview]]) -> None:
        """Fill several small views, each from its offset on."""
        if not self.read_pieces_at_once(pieces):
            for offset, view in pieces:
                await self.read_into(offset, view)

    async def write(self, offset: int, data: memoryview) -> None:
        """Write ``data`` at ``offset``; the file grows if it must."""
        if not self.write_at_once(offset, data):
            await in_thread(_write_fully, self._fd, offset, data)
            self._note_write(offset + len(data))

    def write_at_once(self, offset: int, data: memoryview) -> bool:
        """Write what is not too much for the loop's thread into the page cache."""
        length = len(data)
        if length > INLINE_BYTES_MAX:
            return False
        if os.pwrite(self._fd, data, offset) < length:
            _write_fully(self._fd, offset, data)
        self._note_write(offset + length)
        return True

    def _note_write(self, end: int) -> None:
        """The next flush has something to do, and the file may have grown."""
        self._writes_done += 1
        if end > self.size:
            self.size = end

    async def write_zeroes(
        self, offset: int, length: int, *, unmap: bool = True, fast: bool = False
    ) -> None:
        """Zero the range by punching a hole (``unmap``) or in place; by writing if need be."""
        mode = FALLOC_FL_PUNCH_HOLE | FALLOC_FL_KEEP_SIZE if unmap else FALLOC_FL_ZERO_RANGE
        try:
            await in_thread(fallocate, self._fd, mode, offset, length)
        except OSError as error:
            if error.errno not in _UNSUPPORTED:
                raise
            if fast:
                raise OSError(errno.ENOTSUP, os.strerror(errno.ENOTSUP), self.path) from error
            await in_thread(_write_zeroes, self._fd, offset, length)
        self._writes_done += 1
        if offset + length > self.size:
            await self.grow(offset + length)

    async def trim(self, offset: int, length: int) -> None:
        """Punch a hole where the file system can; otherwise the content stays."""
        try:
            mode = FALLOC_FL_PUNCH_HOLE | FALLOC_FL_KEEP_SIZE
            await in_thread(fallocate, self._fd, mode, offset, length)
        except OSError as error:
            if error.errno not in _UNSUPPORTED:
                raise
        self._writes_done += 1

    async def grow(self, size: int) -> None:
        """Make the file at least ``size`` bytes long; what is new reads as zeroes."""
        if size > os.lseek(self._fd, 0, os.SEEK_END):
            os.ftruncate(self._fd, size)
            self._writes_done += 1
        self.size = max(self.size, size)

    async def shrink(self, size: int) -> None:
        """Make the file at most ``size`` bytes long; a block device stays as long as it is."""
        if size < self.size and stat.S_ISREG(os.fstat(self._fd).st_mode):
            os.ftruncate(self._fd, size)
            self._writes_done += 1
            self.size = size

    async def flush(self) -> None:
        """Make durable what was written before this call, together with whoever else asks."""
        if self._writes_durable == self._writes_done or self.read_only:
            return
        loop = asyncio.get_running_loop()
        if self._flush_running is None:
            waiter = self._flush_running = self._start_flush(loop.create_future())
        elif self._flush_next is None:
            waiter = self._flush_next = loop.create_future()
        else:
            waiter = self._flush_next
        await asyncio.shield(waiter)

    def _start_flush(self, waiter: asyncio.Future[None]) -> asyncio.Future[None]:
        """Run fdatasync in a thread; ``waiter``, which is returned, ends with it."""
        writes = self._writes_done
        running = begin_flush(self._datasync)
        running.add_done_callback(lambda done: self._end_flush(done, waiter, writes))
        return waiter

    def _datasync(self) -> None:
        if self._flush_error is not None:
            raise OSError(*self._flush_error.args)
        try:
            os.fdatasync(self._fd)
        except OSError as error:
            self._flush_error = error
            raise

    def _end_flush(
        self, done: asyncio.Future[None], waiter: asyncio.Future[None], writes: int
    ) -> None:
        """Answer the callers of one flush and start the one that others wait for."""
        self._flush_running = None
        error = done.exception()
        if error is None:
            self._writes_durable = max(self._writes_durable, writes)
            waiter.set_result(None)
        else:
            waiter.set_exception(error)
            waiter.exception()  # seen: a caller that was cancelled does not ask for it
        if self._flush_next is not None:
            following, self._flush_next = self._flush_next, None
            self._flush_running = self._start_flush(following)

    async def block_status(
        self, offset: int, length: int, *, extents_max: int = 1 << 20
    ) -> Extents:
        """Holes and data as the file system tells them; all data where it does not."""
        count = min(extents_max, _EXTENTS_MAX)
        if length <= _SEEK_INLINE_BYTES_MAX:
            return _seek_extents(self._fd, offset, offset + length, count)
        return await in_thread(_seek_extents, self._fd, offset, offset + length, count)

    async def cache(self, offset: int, length: int) -> None:
        """Tell the kernel to read ahead."""
        os.posix_fadvise(self._fd, offset, length, os.POSIX_FADV_WILLNEED)

    async def close(self) -> None:
        """Flush and close; the locks go with the descriptor."""
        if self._fd < 0:
            return
        try:
            if self._ahead.asking is not None:
                await finished(self._ahead.asking)
            await self.flush()
        finally:
            os.close(self._fd)
            self._fd = -1
            self._stable = None

    async def discard(self) -> None:
        """Close a file that has no name: its content goes with it, which takes the disk a while."""
        if self._fd < 0:
            return
        if self._ahead.asking is not None:
            await finished(self._ahead.asking)
        fd, self._fd = self._fd, -1
        await in_thread(os.close, fd)


def _ask(fd: int, begin: int, end: int) -> asyncio.Future[None]:
    """Have a thread ask the disk for what will be read."""
    return begin_in_thread(will_need, fd, begin, end)


def _read_fully(fd: int, offset: int, view: memoryview) -> None:
    """Fill ``view``, waiting for the disk; zeroes past the end of the file."""
    while len(view):
        count = os.preadv(fd, [view], offset)
        if count == 0:
            _fill_zeroes(view)
            return
        offset += count
        view = view[count:]


def _fill_zeroes(view: memoryview) -> None:
    view[:] = bytes(len(view))


def _write_fully(fd: int, offset: int, data: memoryview) -> None:
    """Write all of ``data``; a short write is gone on with, so that its error is seen."""
    count = os.pwrite(fd, data, offset)
    while count < len(data):
        written = os.pwrite(fd, data[count:], offset + count)
        if written == 0:
            raise OSError(errno.EIO, "nothing was written")
        count += written


def _write_zeroes(fd: int, offset: int, length: int) -> None:
    for start in range(offset, offset + length, len(_ZEROES)):
        count = min(len(_ZEROES), offset + length - start)
        _write_fully(fd, start, memoryview(_ZEROES)[:count])


def _seek_extents(fd: int, offset: int, end: int, extents_max: int) -> Extents:
    """The range ``[offset, end)`` by SEEK_DATA and SEEK_HOLE, at most ``extents_max`` extents."""
    pairs: list[tuple[int, int]] = []
    while offset < end and len(pairs) < extents_max:
        data = _seek(fd, offset, os.SEEK_DATA, end)
        if data > offset:
            pairs.append((min(data, end) - offset, _HOLE))
            offset = data
            continue
        hole = _seek(fd, offset, os.SEEK_HOLE, end)
        pairs.append((min(hole, end) - offset, _DATA))
        offset = hole
    return Extents.from_pairs(pairs)


def _seek(fd: int, offset: int, whence: int, end: int) -> int:
    """Where the next data or hole begins, ``end`` if there is none in the file."""
    try:
        return os.lseek(fd, offset, whence)
    except OSError as error:
        if error.errno == errno.ENXIO:  # nothing but a hole up to the end of the file
            return end
        if error.errno == errno.EINVAL:  # a block device: all of it is data
            return offset if whence == os.SEEK_DATA else end
        raise
