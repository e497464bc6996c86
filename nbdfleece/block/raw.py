"""The raw format: another node's bytes, or a window of them.

Where there is neither an offset nor a size the bytes below are the disk as they are, and
nothing need lie between; so this node is for windows, and for disks of which nobody has
said that they are raw.

**Guessed formats.** A file without a known magic number is taken for raw. Its guest could
write a qcow2 header into the first sector, naming a backing file, and read that file once
the image is guessed at again (CVE-2008-2004). So, as in QEMU, a write that would make the
first sector look like an image is refused with EPERM unless the operator named the format.
"""

from __future__ import annotations

import asyncio
import errno
from typing import Final

from ..errors import UsageError
from ..extents import Extents
from .node import BlockNode
from .stable import StablePlace

SECTOR: Final = 512

_MAGICS: Final = (
    (0, b"QFI\xfb"),  # qcow, qcow2
    (0, b"QED\0"),
    (0, b"KDMV"),  # vmdk
    (0, b"COWD"),  # vmdk
    (0, b"# Disk DescriptorFile"),  # vmdk
    (0, b"vhdxfile"),
    (0, b"conectix"),  # vpc
    (0, b"LUKS\xba\xbe"),
    (0, b"WithoutFreeSpace"),  # parallels
    (0, b"WithouFreSpacExt"),  # parallels
    (0, b"Bochs Virtual HD Image"),
    (64, b"\x7f\x10\xda\xbe"),  # vdi
)
"""Where in the first sector QEMU's formats have their magic numbers, and what these are."""


class RawNode(BlockNode):
    """A window of another node.

    Args:
        below: The other node; closed with this one.
        offset: Where the window begins, in bytes.
        size: Its length in bytes; None reaches to the end of ``below``.
        is_guessed: Nobody has said that the format is raw: what looks like another format's
            header is not written.

    Raises:
        UsageError: The window is not inside ``below``.
    """

    def __init__(
        self,
        below: BlockNode,
        offset: int = 0,
        size: int | None = None,
        *,
        is_guessed: bool = False,
    ) -> None:
        if not 0 <= offset <= below.size:
            raise UsageError(f"offset {offset} is past the end, which is at {below.size}")
        self.size = below.size - offset if size is None else size
        if not 0 <= self.size <= below.size - offset:
            raise UsageError(
                f"offset {offset} and size {self.size} reach past the end, which is at {below.size}"
            )
        self.below = below
        self.read_only = below.read_only
        self.preferred_block_size = below.preferred_block_size
        self._offset = offset
        self._is_guessed = is_guessed
        self._first_sector = asyncio.Lock()
        """Held from the look at the first sector to its being written: two writes must not
        make together what neither may make alone."""

    async def read_into(self, offset: int, view: memoryview) -> None:
        """Read the window."""
        await self.below.read_into(self._offset + offset, view)

    def read_at_once(self, offset: int, view: memoryview) -> bool:
        """Read the window."""
        return self.below.read_at_once(self._offset + offset, view)

    async def block_status(
        self, offset: int, length: int, *, extents_max: int = 1 << 20
    ) -> Extents:
        """Describe the window as the node below does."""
        return await self.below.block_status(self._offset + offset, length, extents_max=extents_max)

    def read_with_status(self, offset: int, view: memoryview) -> int | None:
        """As the node below can."""
        return self.below.read_with_status(self._offset + offset, view)

    def stable_places(self, offset: int, length: int) -> list[StablePlace] | None:
        """As the node below knows them."""
        return self.below.stable_places(self._offset + offset, length)

    async def write(self, offset: int, data: memoryview) -> None:
        """Write into the window; EPERM for another format's header where raw was guessed."""
        if self._is_guessed and offset < SECTOR:
            async with self._first_sector:
                await self._check_first_sector(offset, data)
                await self.below.write(self._offset + offset, data)
        else:
            await self.below.write(self._offset + offset, data)

    def write_at_once(self, offset: int, data: memoryview) -> bool:
        """Write into the window what needs no look at the first sector."""
        if self._is_guessed and offset < SECTOR:
            return False
        return self.below.write_at_once(self._offset + offset, data)

    async def _check_first_sector(self, offset: int, data: memoryview) -> None:
        sector = bytearray(min(SECTOR, self.size))
        await self.read_into(0, memoryview(sector))
        length = min(len(data), len(sector) - offset)
        sector[offset : offset + length] = data[:length]
        if has_magic(sector):
            raise PermissionError(
                errno.EPERM,
                "the write would make the first sector look like an image, and nobody has said"
                " that this disk is raw: name the format",
            )

    async def write_zeroes(
        self, offset: int, length: int, *, unmap: bool = True, fast: bool = False
    ) -> None:
        """Write zeroes into the window."""
        await self.below.write_zeroes(self._offset + offset, length, unmap=unmap, fast=fast)

    async def trim(self, offset: int, length: int) -> None:
        """Discard in the window."""
        await self.below.trim(self._offset + offset, length)

    async def flush(self) -> None:
        """Flush the node below."""
        await self.below.flush()

    async def cache(self, offset: int, length: int) -> None:
        """Hint that the range will be read soon."""
        await self.below.cache(self._offset + offset, length)

    async def close(self) -> None:
        """Close the node below."""
        await self.below.close()


def has_magic(sector: bytes | bytearray) -> bool:
    """Whether a disk that begins with this sector would be guessed to be no raw disk."""
    return any(sector[place : place + len(magic)] == magic for place, magic in _MAGICS)
