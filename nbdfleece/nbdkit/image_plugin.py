"""A disk image inside a real nbdkit; :mod:`.nbdfleece_plugin` is what nbdkit loads.

**When what happens.** nbdkit says only to a client's ``open`` whether the image may be
written: that depends on its ``-r`` and on its filters.

==============  =====================================================================
get_ready       the image is opened for reading and closed again, so that what is wrong
                with it or with a parameter ends nbdkit at once, with a message; in a
                process of its own, whose threads nbdkit's fork cannot lose
after_fork      the event loop's thread begins; a fork would have left it behind
first open      the image is opened, for writing if this client may write, with the
                locks of QEMU; its bitmaps record from now on
later opens     share it; who may write where it was opened for reading may not
cleanup         the bitmaps are stored and the image is closed
==============  =====================================================================

nbdkit calls from many threads at once; all work on the image is done in the one thread.
"""

from __future__ import annotations

import asyncio
import os
import traceback
from collections.abc import Coroutine
from contextlib import ExitStack
from pathlib import Path
from typing import Any, Final, NamedTuple, TypeVar

from ..block.changes import ChangesNode
from ..block.node import BlockNode, BlockStatus
from ..engine.offline import open_images
from ..errors import NbdfleeceError, StateError
from ..server.loop_thread import LoopThread
from ..standalone.disk import Disk
from .image_parameters import ImageParameters, ParameterReader

T = TypeVar("T")

EXTENTS_MAX: Final = 1 << 16
"""Extents in one answer; nbdkit asks again for the rest."""

_TYPE_MASK: Final = int(BlockStatus.HOLE | BlockStatus.ZERO)
"""nbdkit's EXTENT_HOLE and EXTENT_ZERO, which have the values of ours."""

BLOCK_SIZE_MAX: Final = (1 << 32) - 1
"""Bytes: nbdkit's word for no limit."""


class Handle(NamedTuple):
    """What one client has open."""

    node: BlockNode
    can_write: bool


class ImagePlugin:
    """The state of the plugin, from its parameters to its end."""

    def __init__(self) -> None:
        self.reader = ParameterReader()
        self._parameters: ImageParameters | None = None
        self._threads = ExitStack()
        self._loop = LoopThread()
        self._opening = asyncio.Lock()
        self._node: BlockNode | None = None

    @property
    def parameters(self) -> ImageParameters:
        """All parameters.

        Raises:
            UsageError: They cannot be meant together.
        """
        if self._parameters is None:
            self._parameters = self.reader.finish()
        return self._parameters

    def run(self, work: Coroutine[Any, Any, T]) -> T:
        """Have work done on the image; from any thread but the loop's."""
        return self._loop.run(work)

    def rehearse(self) -> None:
        """See whether the image can be opened at all.

        Raises:
            StateError: It cannot; the text says why.
        """
        reader, writer = os.pipe()
        child = os.fork()
        if not child:
            try:
                os.write(writer, _rehearse(self.parameters).encode())
                os._exit(0)
            finally:
                os._exit(1)
        os.close(writer)
        with os.fdopen(reader) as stream:
            failure = stream.read()
        _, status = os.waitpid(child, 0)
        if failure or status:
            raise StateError(failure or f"opening {self.parameters.image} ended with {status}")

    def start(self) -> None:
        """Begin the loop's thread."""
        self._threads.enter_context(self._loop)

    def open(self, read_only: bool) -> Handle:
        """Let a client in; errors as of :func:`open_image`."""
        return self.run(self._open(read_only))

    async def _open(self, read_only: bool) -> Handle:
        async with self._opening:
            if self._node is None:
                self._node = await open_image(self.parameters, read_only=read_only)
        return Handle(self._node, not (read_only or self._node.read_only))

    def stop(self) -> None:
        """Store the bitmaps and close the image.

        Raises:
            StateError, OSError: They could not be stored, or the last writes not flushed.
        """
        with self._threads.pop_all():
            if self._node is not None:
                self.run(self._node.close())


async def open_image(parameters: ImageParameters, *, read_only: bool) -> BlockNode:
    """Open what is to be shown.

    Raises:
        StateError: There is no such snapshot, bitmap or checkpoint, or it cannot be believed.
        ImageError: The image is damaged, in use, or not supported.
        OSError: A file cannot be opened or read.
    """
    disk = await Disk.open(parameters.disk_options(read_only=read_only))
    try:
        if parameters.bitmap is not None:
            return ChangesNode(disk.node, await disk.bitmap(parameters.bitmap))
        if parameters.checkpoint is not None:
            async with open_images([Path(parameters.image)], read_only=True) as [image]:
                return ChangesNode(disk.node, await image.changes_since(parameters.checkpoint))
    except BaseException:
        await disk.close()
        raise
    return disk.node


def _rehearse(parameters: ImageParameters) -> str:
    """Open the image and close it; why that cannot be done, or nothing."""

    async def rehearse() -> None:
        await (await open_image(parameters, read_only=True)).close()

    try:
        asyncio.run(rehearse())
    except (NbdfleeceError, OSError) as error:
        return str(error)
    except Exception:
        return traceback.format_exc()
    return ""


# What nbdkit's callbacks do, as coroutines.


async def write(node: BlockNode, offset: int, data: memoryview, *, fua: bool) -> None:
    """Write, and with ``fua`` flush."""
    await node.write(offset, data)
    if fua:
        await node.flush()


async def trim(node: BlockNode, offset: int, length: int, *, fua: bool) -> None:
    """Discard, and with ``fua`` flush."""
    await node.trim(offset, length)
    if fua:
        await node.flush()


async def write_zeroes(
    node: BlockNode, offset: int, length: int, *, unmap: bool, fast: bool, fua: bool
) -> None:
    """Write zeroes, and with ``fua`` flush."""
    await node.write_zeroes(offset, length, unmap=unmap, fast=fast)
    if fua:
        await node.flush()


async def describe(
    node: BlockNode, offset: int, length: int, *, only_one: bool
) -> list[tuple[int, int, int]]:
    """Offset, length and nbdkit's type of extents, from ``offset`` on."""
    found = await node.block_status(offset, length, extents_max=1 if only_one else EXTENTS_MAX)
    extents = []
    for extent_length, status in found.pairs():
        extents.append((offset, extent_length, status & _TYPE_MASK))
        offset += extent_length
    return extents


def log_without_tracebacks() -> None:
    """Let nbdkit log one line for what a user did or a disk did (rule 8).

    It logs an exception as the standard library's ``traceback.format_exception`` has it.
    """
    format_in_full = traceback.format_exception

    def format_exception(*given: Any, **options: Any) -> list[str]:
        error = given[1] if len(given) > 1 else given[0]
        is_expected = isinstance(error, NbdfleeceError | OSError)
        return [str(error)] if is_expected else format_in_full(*given, **options)

    traceback.format_exception = format_exception
