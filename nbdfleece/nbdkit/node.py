"""A script's handle as a block node, and its metadata contexts."""

from __future__ import annotations

import errno
import os
from collections.abc import Callable
from typing import Final, TypeVar

from ..block.node import BlockNode, block_status_word
from ..block.node import BlockStatus as Flags
from ..extents import Extents
from .calls import Client
from .errors import CallbackError
from .gate import Gate
from .handle import Handle

T = TypeVar("T")

_KNOWN_ERRORS: Final = frozenset(
    {
        errno.EPERM,
        errno.EROFS,
        errno.EIO,
        errno.ENOMEM,
        errno.EDQUOT,
        errno.EFBIG,
        errno.ENOSPC,
        errno.ESHUTDOWN,
        errno.EOPNOTSUPP,
        errno.EOVERFLOW,
        errno.EINVAL,
    }
)
"""What nbdkit tells clients as it is; all else that a script sets becomes EINVAL."""


class PluginNode(BlockNode):
    """A handle, for one client.

    What a script reads and writes lies in memory of its own: a call goes on when its client
    has left, and must then not touch the buffers of another one.

    Args:
        handle: Open; closed by whoever has opened it.
        gate: Where its calls run.
        client: For whom.
    """

    reads_as_asked = True

    def __init__(self, handle: Handle, gate: Gate, client: Client | None) -> None:
        self.size = handle.facts.size
        self.read_only = not handle.facts.can_write
        self._handle = handle
        self._gate = gate
        self._client = client

    async def run(self, job: Callable[[], T]) -> T:
        """Run calls of the handle.

        Raises:
            OSError: The script has failed; its errno is what ``set_error`` has set, else EIO.
        """
        try:
            return await self._call(job)
        except CallbackError as error:
            number = error.number or errno.EIO
            number = number if number in _KNOWN_ERRORS else errno.EINVAL
            raise OSError(number, f"{error.callback} failed: {os.strerror(number)}") from error

    async def _call(self, job: Callable[[], T]) -> T:
        return await self._gate.run(self._client, job)

    async def read_into(self, offset: int, view: memoryview) -> None:
        """Call ``pread``."""
        length = len(view)
        view[:] = await self.run(lambda: self._handle.pread(length, offset))

    async def write(self, offset: int, data: memoryview) -> None:
        """Call ``pwrite``."""
        await self._write(offset, data, fua=False)

    async def write_fua(self, offset: int, data: memoryview) -> None:
        """Call ``pwrite`` with FLAG_FUA, or ``flush`` after it."""
        await self._write(offset, data, fua=True)

    async def _write(self, offset: int, data: memoryview, *, fua: bool) -> None:
        own = bytes(data)
        await self.run(lambda: self._handle.pwrite(own, offset, fua=fua))

    async def write_zeroes(
        self, offset: int, length: int, *, unmap: bool = True, fast: bool = False
    ) -> None:
        """Call ``zero``, or ``pwrite``."""
        await self._zero(offset, length, unmap, fast, fua=False)

    async def write_zeroes_fua(
        self, offset: int, length: int, *, unmap: bool = True, fast: bool = False
    ) -> None:
        """Call ``zero`` or ``pwrite`` with FLAG_FUA, or ``flush`` after it."""
        await self._zero(offset, length, unmap, fast, fua=True)

    async def _zero(self, offset: int, length: int, unmap: bool, fast: bool, *, fua: bool) -> None:
        await self.run(
            lambda: self._handle.zero(length, offset, may_trim=unmap, fua=fua, fast=fast)
        )

    async def trim(self, offset: int, length: int) -> None:
        """Call ``trim``."""
        await self.run(lambda: self._handle.trim(length, offset, fua=False))

    async def trim_fua(self, offset: int, length: int) -> None:
        """Call ``trim`` with FLAG_FUA, or ``flush`` after it."""
        await self.run(lambda: self._handle.trim(length, offset, fua=True))

    async def flush(self) -> None:
        """Call ``flush``."""
        await self.run(self._handle.flush)

    async def cache(self, offset: int, length: int) -> None:
        """Call ``cache``, or ``pread``."""
        await self.run(lambda: self._handle.cache(length, offset))

    async def block_status(
        self, offset: int, length: int, *, extents_max: int = 1 << 20
    ) -> Extents:
        """Call ``extents``; the allocation depth is 1 where there is anything."""
        only_one = extents_max == 1
        pairs = await self.run(lambda: self._handle.extents(length, offset, only_one=only_one))
        words = [(piece, _status_word(flags)) for piece, flags in pairs]
        return Extents.from_pairs(words).limited(extents_max)

    async def close(self) -> None:
        """Close the handle."""
        await self.run(self._handle.close)


def _status_word(flags: int) -> int:
    return block_status_word(Flags(flags), 0 if flags & Flags.HOLE else 1)


class ScriptContext:
    """A metadata context of the script's own.

    Args:
        name: ``namespace:leaf``.
        node: The handle that it is of.
        handle: The same.
    """

    def __init__(self, name: str, node: PluginNode, handle: Handle) -> None:
        self.name = name
        self._node = node
        self._handle = handle

    async def extents(self, offset: int, length: int, *, extents_max: int) -> Extents:
        """Call ``block_status``."""
        only_one = extents_max == 1
        pairs = await self._node.run(
            lambda: self._handle.block_status(self.name, length, offset, only_one=only_one)
        )
        return Extents.from_pairs(pairs).limited(extents_max)
