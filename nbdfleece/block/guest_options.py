"""What an operator may say about a guest's writes: discards, zeroes, and how durable they are."""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum
from typing import Final

import numpy as np

from ..errors import UsageError
from ..extents import Extents
from .node import BlockNode


class DetectZeroes(Enum):
    """What becomes of a write whose data are all zeroes."""

    OFF = "off"
    """It is written as any other."""
    ON = "on"
    """It becomes a write of zeroes that keeps the space."""
    UNMAP = "unmap"
    """It becomes a write of zeroes that may give the space up."""


@dataclass(frozen=True, slots=True, kw_only=True)
class GuestPolicy:
    """What becomes of a guest's discards and zeroes on a qcow2 disk.

    Attributes:
        discard: Whether trims have an effect. Writes of zeroes may give space up in any
            case, if the guest allows it: so it is with QEMU's qcow2.
        detect_zeroes: What becomes of zeroes that are written as data.

    Raises:
        UsageError: Detected zeroes are to be unmapped, and discards ignored.
    """

    discard: bool = True
    detect_zeroes: DetectZeroes = DetectZeroes.OFF

    def __post_init__(self) -> None:
        if self.detect_zeroes is DetectZeroes.UNMAP and not self.discard:
            raise UsageError("zeroes cannot be unmapped where discards are ignored")

    def over(self, below: BlockNode) -> BlockNode:
        """A node that keeps to this policy; the same one if it does so itself."""
        if self == DEFAULT_POLICY:
            return below
        return GuestOptions(
            below, discard=self.discard, zeroes_unmap=True, detect_zeroes=self.detect_zeroes
        )


DEFAULT_POLICY: Final = GuestPolicy()


class GuestOptions(BlockNode):
    """Another node, written as its operator says.

    Args:
        below: The other node; closed with this one.
        discard: Whether trims have an effect.
        zeroes_unmap: Whether zeroes may give up space, where the client allows it.
        detect_zeroes: What becomes of zeroes that are written as data.
        writethrough: Whether every write is durable when it is answered.
    """

    def __init__(
        self,
        below: BlockNode,
        *,
        discard: bool,
        zeroes_unmap: bool,
        detect_zeroes: DetectZeroes = DetectZeroes.OFF,
        writethrough: bool = False,
    ) -> None:
        self._below = below
        self._discard = discard
        self._zeroes_unmap = zeroes_unmap
        self._detects = detect_zeroes is not DetectZeroes.OFF
        self._unmaps = detect_zeroes is DetectZeroes.UNMAP and discard
        self._writethrough = writethrough
        self.size = below.size
        self.read_only = below.read_only
        self.preferred_block_size = below.preferred_block_size

    async def read_into(self, offset: int, view: memoryview) -> None:
        """Read the node below."""
        await self._below.read_into(offset, view)

    def read_at_once(self, offset: int, view: memoryview) -> bool:
        """Read the node below."""
        return self._below.read_at_once(offset, view)

    async def block_status(
        self, offset: int, length: int, *, extents_max: int = 1 << 20
    ) -> Extents:
        """Describe the node below."""
        return await self._below.block_status(offset, length, extents_max=extents_max)

    def read_with_status(self, offset: int, view: memoryview) -> int | None:
        """As the node below can."""
        return self._below.read_with_status(offset, view)

    async def write(self, offset: int, data: memoryview) -> None:
        """Write, or write zeroes if that is what the data are."""
        if self._detects and is_zero(data):
            await self._below.write_zeroes(offset, len(data), unmap=self._unmaps)
        else:
            await self._below.write(offset, data)
        if self._writethrough:
            await self._below.flush()

    def write_at_once(self, offset: int, data: memoryview) -> bool:
        """Write, unless the operator has said more about it."""
        if self._detects or self._writethrough:
            return False
        return self._below.write_at_once(offset, data)

    async def write_zeroes(
        self, offset: int, length: int, *, unmap: bool = True, fast: bool = False
    ) -> None:
        """Write zeroes, and perhaps keep the space all the same."""
        unmap = unmap and self._zeroes_unmap
        await self._below.write_zeroes(offset, length, unmap=unmap, fast=fast)
        if self._writethrough:
            await self._below.flush()

    async def trim(self, offset: int, length: int) -> None:
        """Discard, or without discards do nothing, which a trim allows."""
        if not self._discard:
            return
        await self._below.trim(offset, length)
        if self._writethrough:
            await self._below.flush()

    async def flush(self) -> None:
        """Flush the node below."""
        await self._below.flush()

    async def cache(self, offset: int, length: int) -> None:
        """Hint that the range will be read soon."""
        await self._below.cache(offset, length)

    async def close(self) -> None:
        """Close the node below."""
        await self._below.close()


def is_zero(data: memoryview) -> bool:
    """Whether all bytes are zero; the first ones tell it of most data that are not."""
    return not any(data[:16]) and not np.frombuffer(data, dtype=np.uint8).any()
