"""What a script's ``open`` has returned, with nbdkit's defaults and emulation around it.

All methods call the script and may take any time: they are for threads, inside a
:class:`~.calls.Call`. One method is one request of a client, with all that is emulated of it,
so that a thread model that serialises requests serialises whole ones.

Raises, all of them: ``CallbackError``.
"""

from __future__ import annotations

import errno
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Final

from .calls import current
from .errors import CallbackError
from .module import (
    CACHE_EMULATE,
    CACHE_NATIVE,
    CACHE_NONE,
    FLAG_FAST_ZERO,
    FLAG_FUA,
    FLAG_MAY_TRIM,
    FLAG_REQ_ONE,
    FUA_EMULATE,
    FUA_NATIVE,
    FUA_NONE,
    log,
)
from .script import Script
from .values import (
    Pairs,
    allocation,
    check_block_size,
    check_extents,
    check_level,
    check_names,
    check_size,
    check_text,
    check_true,
    fits_the_wire,
)

PIECE_BYTES_MAX: Final = 64 << 20
"""What emulation reads or writes at a time: nbdkit's largest request."""

_UNSUPPORTED: Final = (errno.EOPNOTSUPP, errno.ENOTSUP)


@dataclass(frozen=True, slots=True, kw_only=True)
class Facts:
    """What the script says of a handle when it is opened.

    Attributes:
        size: Bytes.
        can_zero: Whether ``zero`` is tried before zeroes are written.
        can_fua: One of FUA_NONE, FUA_EMULATE, FUA_NATIVE.
        can_cache: One of CACHE_NONE, CACHE_EMULATE, CACHE_NATIVE.
    """

    size: int
    can_write: bool
    can_zero: bool
    can_fast_zero: bool
    can_trim: bool
    can_fua: int
    can_flush: bool
    is_rotational: bool
    can_multi_conn: bool
    can_cache: int
    can_extents: bool


class Handle:
    """An open handle.

    Args:
        script: The script.
        read_only: What ``open`` is told, and that nothing is asked about writing.

    Attributes:
        facts: What the script has said of it.
    """

    def __init__(self, script: Script, *, read_only: bool) -> None:
        self._script = script
        self._is_v1 = script.api_version == 1
        self._handle = script.call("open", read_only)
        try:
            self.facts = self._ask_facts(read_only)
        except CallbackError:
            self.close()
            raise

    def _ask_facts(self, read_only: bool) -> Facts:
        """Ask in the order in which nbdkit asks."""
        size = self._script.ask("get_size", check_size, self._handle)
        can_write = not read_only and self._can("can_write", "pwrite")
        can_zero = can_write and self._can("can_zero", "zero")
        return Facts(
            size=size,
            can_write=can_write,
            can_zero=can_zero,
            can_fast_zero=can_write and self._can_fast_zero(can_zero),
            can_trim=can_write and self._can("can_trim", "trim"),
            can_fua=self._level("can_fua", "flush", FUA_EMULATE) if can_write else FUA_NONE,
            can_flush=self._can("can_flush", "flush"),
            is_rotational=self._can("is_rotational"),
            can_multi_conn=self._can("can_multi_conn"),
            can_cache=self._level("can_cache", "cache", CACHE_NATIVE),
            can_extents=self._can("can_extents", "extents"),
        )

    def _can(self, question: str, callback: str = "") -> bool:
        if self._script.has(question):
            return self._script.ask(question, check_true, self._handle)
        return bool(callback) and self._script.has(callback)

    def _can_fast_zero(self, can_zero: bool) -> bool:
        """Where ``zero`` is not tried, a request for fast zeroes fails fast: that is support."""
        if self._script.has("can_fast_zero"):
            return self._can("can_fast_zero")
        return not can_zero

    def _level(self, question: str, callback: str, if_there: int) -> int:
        if self._script.has(question):
            return self._script.ask(question, check_level, self._handle)
        return if_there if self._script.has(callback) else FUA_NONE

    # Asked for on request only.

    def description(self) -> str:
        """For people; "" for none."""
        if not self._script.has("export_description"):
            return ""
        text = self._script.ask("export_description", check_text, self._handle)
        return text if fits_the_wire(text) else ""

    def block_size(self) -> tuple[int, int, int] | None:
        """Minimum, preferred, maximum; None if the script does not say."""
        if not self._script.has("block_size"):
            return None
        return self._script.ask("block_size", check_block_size, self._handle)

    def contexts(self) -> list[str]:
        """The metadata contexts that the script offers beside ``base:allocation``."""
        if not self._script.has("contexts"):
            return []
        return self._script.ask("contexts", check_names, self._handle)

    # Data.

    def pread(self, count: int, offset: int) -> memoryview:
        """Read ``count`` bytes."""
        if self._is_v1:
            found = self._script.call("pread", self._handle, count, offset)
            return self._check_buffer(found, count)
        data = memoryview(bytearray(count))
        self._script.call("pread", self._handle, data, offset, 0)
        return data

    def _check_buffer(self, found: Any, count: int) -> memoryview:
        try:
            view = memoryview(found).cast("B")
        except TypeError:
            raise self._script.failure(
                "pread", "value returned from pread does not support the buffer protocol"
            ) from None
        if len(view) < count:
            raise self._script.failure("pread", "buffer returned from pread is too small")
        return view[:count]

    def pwrite(self, data: bytes, offset: int, *, fua: bool) -> None:
        """Write."""
        flags, flushes = self._fua(fua)
        self._pwrite(memoryview(data), offset, flags)
        if flushes:
            self.flush()

    def _fua(self, fua: bool) -> tuple[int, bool]:
        """The flag for the callback, and whether to flush after it."""
        if not fua:
            return 0, False
        return (FLAG_FUA, False) if self.facts.can_fua == FUA_NATIVE else (0, True)

    def _pwrite(self, view: memoryview, offset: int, flags: int) -> None:
        if self._is_v1:
            self._call("pwrite", view, offset)
        else:
            self._call("pwrite", view, offset, flags)

    def flush(self) -> None:
        """Make all that was written durable."""
        self._call("flush", *(() if self._is_v1 else (0,)))

    def trim(self, count: int, offset: int, *, fua: bool) -> None:
        """Give a range up."""
        flags, flushes = self._fua(fua)
        self._call("trim", count, offset, *(() if self._is_v1 else (flags,)))
        if flushes:
            self.flush()

    def zero(self, count: int, offset: int, *, may_trim: bool, fua: bool, fast: bool) -> None:
        """Write zeroes; by ``pwrite`` where the script has nothing better, unless ``fast``."""
        flags, flushes = self._fua(fua)
        if not self._zero_natively(count, offset, flags, may_trim=may_trim, fast=fast):
            if fast:
                raise CallbackError("zero", errno.EOPNOTSUPP, "zeroes are not fast here")
            for position, length in _pieces(count):
                self._pwrite(memoryview(bytes(length)), offset + position, flags)
        if flushes:
            self.flush()

    def _zero_natively(
        self, count: int, offset: int, flags: int, *, may_trim: bool, fast: bool
    ) -> bool:
        """Call ``zero``, if there is one; whether it has done it."""
        if not self.facts.can_zero or not self._script.has("zero"):
            return False
        call = current.get()
        assert call is not None, "data is asked for inside a call"
        call.error = 0
        flags |= FLAG_MAY_TRIM * may_trim | FLAG_FAST_ZERO * fast
        how = may_trim if self._is_v1 else flags
        try:
            self._script.call("zero", self._handle, count, offset, how, unlogged=_UNSUPPORTED)
        except CallbackError as error:
            if error.number not in _UNSUPPORTED:
                raise
        is_done = call.error not in _UNSUPPORTED
        if not is_done:
            log.debug("zero requested falling back to pwrite")
            call.error = 0
        return is_done

    def cache(self, count: int, offset: int) -> None:
        """Prepare for reading a range."""
        if self.facts.can_cache == CACHE_NONE:
            return
        if self.facts.can_cache == CACHE_EMULATE:
            for position, length in _pieces(count):
                self.pread(length, offset + position)
            return
        self._call("cache", count, offset, 0)

    def extents(self, count: int, offset: int, *, only_one: bool) -> Pairs:
        """What lies where: lengths and types, from ``offset`` on."""
        if not self.facts.can_extents or not self._script.has("extents"):
            return [(count, 0)]
        found = self._ask_extents("extents", count, offset, only_one=only_one)
        return allocation(found)

    def block_status(self, context: str, count: int, offset: int, *, only_one: bool) -> Pairs:
        """The status of a range in one of the script's own metadata contexts."""
        return self._ask_extents("block_status", context, count, offset, only_one=only_one)

    def _ask_extents(self, name: str, *args: Any, only_one: bool) -> Pairs:
        if not self._script.has(name):
            raise self._missing(name)
        *_, count, offset = args
        end = offset + count
        return self._script.ask(
            name,
            lambda value: check_extents(name, value, offset, end),
            self._handle,
            *args,
            FLAG_REQ_ONE * only_one,
        )

    def _call(self, name: str, *args: Any) -> None:
        if not self._script.has(name):
            raise self._missing(name)
        self._script.call(name, self._handle, *args)

    def _missing(self, name: str) -> CallbackError:
        return self._script.failure(name, f"{name} not implemented")

    def close(self) -> None:
        """Give the handle up; an error is only logged."""
        if self._script.has("close"):
            try:
                self._script.call("close", self._handle)
            except CallbackError:
                return  # it was logged


def _pieces(count: int) -> Iterator[tuple[int, int]]:
    """Positions and lengths that a range is worked on in."""
    for position in range(0, count, PIECE_BYTES_MAX):
        yield position, min(PIECE_BYTES_MAX, count - position)
