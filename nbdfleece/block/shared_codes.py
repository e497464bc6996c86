"""A snapshot's codes where other processes can look at them.

One process keeps a disk's snapshots still (:mod:`.copy_before_write`); others may read one of them
by themselves, if they see what it has displaced. For this there is an array in memory that
both have, with a code for each granule of the disk: where the *snapshot* finds it, with what newer
snapshots have displaced for it.

What may be trusted (rule 1)
    A code is set after the copy is complete and before the guest's write begins, and changes once
    at most. So a reader notes the codes, reads, and looks at the codes again: what is still
    UNTOUCHED had not been overwritten when it was read. For this the two processes must see
    each other's stores in order, which :func:`are_seen_in_order` tells of the machine.

    Anything but displaced granules (a range was given up, the snapshot is broken or gone)
    *withdraws* the array, for good and before it takes effect: readers then have to ask. So does
    a guest that discards more than :data:`FREE_CODES_MAX` tells of: it would take memory (rule 5).
"""

from __future__ import annotations

import mmap
import os
import platform
from typing import Final

import numpy as np

from .granule_codes import COPIED, UNTOUCHED
from .granule_map import Codes

FREE_CODES_MAX: Final = 16 << 20
"""Codes of granules that were not copied: 64 MiB. Of the others there are no more than copies."""

_HEAD_BYTES: Final = mmap.PAGESIZE
"""Before the codes: one word that says whether they may be used, alone in its page."""

_CODE_BYTES: Final = 4
_PAGE_CODES: Final = mmap.PAGESIZE // _CODE_BYTES
_OPEN: Final = 1
_IN_ORDER: Final = frozenset({"x86_64", "i686", "s390x"})


def are_seen_in_order() -> bool:
    """Whether this machine lets one processor see the stores of another in their order."""
    return platform.machine() in _IN_ORDER


class SharedCodes:
    """The side that sets them. They are closed to readers until :meth:`open`.

    Memory is taken where a code is set: 4 KiB for 1024 granules.

    Args:
        granules: Of the disk.

    Raises:
        OSError: There is no memory, or not enough room for addresses.
    """

    def __init__(self, granules: int) -> None:
        size = _HEAD_BYTES + granules * _CODE_BYTES
        self._fd = os.memfd_create("nbdfleece-codes", os.MFD_CLOEXEC)
        try:
            os.ftruncate(self._fd, size)
            self._memory = mmap.mmap(self._fd, size)
        except BaseException:
            os.close(self._fd)
            raise
        self._words = memoryview(self._memory).cast("I")
        self._codes = self._words[_HEAD_BYTES // _CODE_BYTES :]
        self._is_withdrawn = False
        self._free_codes = 0

    def fileno(self) -> int:
        """The descriptor of the memory."""
        return self._fd

    def open(self) -> None:
        """The codes are complete: readers may use them, unless they were withdrawn."""
        if not self._is_withdrawn:
            self._words[0] = _OPEN

    def withdraw(self) -> None:
        """Readers must not use the codes any more."""
        if not self._is_withdrawn:
            self._is_withdrawn = True
            self._words[0] = 0

    def close(self) -> None:
        """Withdraw them, and give this side's part of the memory up."""
        self.withdraw()
        self._codes.release()
        self._words.release()
        self._memory.close()
        os.close(self._fd)

    def set_one(self, granule: int, code: int) -> None:
        """The code of a granule, unless it has one."""
        if self._is_withdrawn or self._codes[granule] != UNTOUCHED:
            return
        self._codes[granule] = code
        if code < COPIED:
            self._count(1)

    def set(self, first: int, codes: Codes) -> None:
        """The codes of those of ``len(codes)`` granules from ``first`` on that have none.

        Where none is given, no memory is looked at, which would take it.
        """
        end = first + len(codes)
        while first < end and not self._is_withdrawn:
            stop = min(end, (first | _PAGE_CODES - 1) + 1)
            given, codes = codes[: stop - first], codes[stop - first :]
            if given.any():
                own = np.asarray(self._codes[first:stop])
                vacant = (own == UNTOUCHED) & (given != UNTOUCHED)
                own[vacant] = given[vacant]
                self._count(int((vacant & (given < COPIED)).sum()))
            first = stop

    def _count(self, free_codes: int) -> None:
        self._free_codes += free_codes
        if self._free_codes > FREE_CODES_MAX:
            self.withdraw()

    def replace(self, first: int, codes: Codes) -> None:
        """The codes of ``len(codes)`` granules from ``first`` on, before the first :meth:`open`."""
        if not self._is_withdrawn:
            own = np.asarray(self._codes[first : first + len(codes)])
            is_new = (own == UNTOUCHED) & (codes != UNTOUCHED)
            own[:] = codes
            self._count(int((is_new & (codes < COPIED)).sum()))


class SharedCodesReader:
    """The side that looks.

    Args:
        fd: Of the memory; the reader's, once there is one.

    Raises:
        OSError: There is no memory.
    """

    def __init__(self, fd: int) -> None:
        self._fd = fd
        self._head = mmap.mmap(fd, _HEAD_BYTES, prot=mmap.PROT_READ)
        self._words = memoryview(self._head).cast("I")

    @property
    def is_open(self) -> bool:
        """Whether the codes may be used."""
        return self._words[0] == _OPEN

    def read(self, first: int, end: int) -> bytes:
        """The codes of the granules ``[first, end)``, as 32-bit words.

        By a system call, since a look through a mapping would take memory where no code is set.
        """
        size = (end - first) * _CODE_BYTES
        return os.pread(self._fd, size, _HEAD_BYTES + first * _CODE_BYTES)

    def close(self) -> None:
        """Give the memory up."""
        self._words.release()
        self._head.close()
        os.close(self._fd)
