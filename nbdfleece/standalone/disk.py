"""An image opened as an operator says, and the bitmaps that can be shown with it."""

from __future__ import annotations

import os
import tempfile
from contextlib import AsyncExitStack
from dataclasses import dataclass
from pathlib import Path

from ..bitmaps.bitmap import Bitmap
from ..block.file import FileNode
from ..block.guest_options import DetectZeroes, GuestOptions
from ..block.node import BlockNode
from ..block.raw import RawNode
from ..errors import StateError, UsageError
from ..qcow2.backing import BackingPolicy, Chain
from ..qcow2.bitmap_store import BitmapStore
from ..qcow2.create import create_image
from ..qcow2.header import Header
from ..qcow2.image import Qcow2Image
from .node_options import Options, parse_image_opts, parse_name
from .opening import NodeOpener, Place, SnapshotChoice
from .recording_node import RecordingNode


@dataclass(frozen=True, slots=True, kw_only=True)
class DiskOptions:
    """What to open, and how.

    Attributes:
        name: A file name, ``json:{...}``, or node options if ``is_options``.
        is_options: See ``name``.
        format: The format; None for what the options say, or else a guess.
        read_only: Not to be written.
        offset: Where in the disk the export begins, in bytes.
        snapshot: An internal snapshot to read instead of the disk.
        is_temporary: Writes go to a temporary file and are lost at the end.
        discard: Whether discards have an effect, unless the node's options say.
        detect_zeroes: What becomes of zeroes written as data, unless the node's options say.
        writethrough: Whether every write is durable when it is answered.
        policy: Which files the image may name.
    """

    name: str
    is_options: bool = False
    format: str | None = None
    read_only: bool = False
    offset: int = 0
    snapshot: SnapshotChoice | None = None
    is_temporary: bool = False
    discard: bool = False
    detect_zeroes: DetectZeroes = DetectZeroes.OFF
    writethrough: bool = False
    policy: BackingPolicy = BackingPolicy.SAME_FOLDER

    def node_options(self) -> Options:
        """The options of the outermost node.

        Raises:
            UsageError: They cannot be read, or name another format than ``format``.
        """
        found = parse_image_opts(self.name) if self.is_options else parse_name(self.name)
        if self.format is not None:
            if found.values.get("driver", self.format) != self.format:
                raise UsageError(f"format '{self.format}' contradicts the options of the image")
            found.add_defaults({"driver": self.format})
        return found


class Disk:
    """An open image. Made by :meth:`open`.

    Attributes:
        node: What is served.
    """

    def __init__(self, inner: BlockNode, node: BlockNode) -> None:
        self._inner = inner
        self.node = node
        self._stores: dict[Qcow2Image, BitmapStore] = {}
        """The bitmaps of images that are only read, so far as they have been asked for."""

    @classmethod
    async def open(cls, options: DiskOptions) -> Disk:
        """Open an image.

        Raises:
            UsageError: The options cannot be meant.
            StateError: There is no such snapshot, or the bitmaps are damaged.
            ImageError: The image is damaged, in use, or not supported.
            OSError: A file cannot be opened or read.
        """
        opener = NodeOpener(options.policy)
        async with AsyncExitStack() as opened:
            place = Place(options.read_only or options.is_temporary, snapshot=options.snapshot)
            inner = await opener.open(options.node_options(), place)
            opened.push_async_callback(inner.close)
            if options.is_temporary:
                inner = await RecordingNode.begin(await _open_overlay(inner))
                opened.pop_all()  # the overlay closes what is behind it
                opened.push_async_callback(inner.close)
            if options.offset:
                inner = RawNode(inner, options.offset)
            if inner.read_only and not options.read_only:
                raise UsageError(f"'{options.name}' is read-only: export it with -r/--read-only")
            node = inner if inner.read_only else _guest_options(inner, options, opener)
            opened.pop_all()
        return cls(inner, node)

    async def bitmap(self, name: str) -> Bitmap:
        """A bitmap of the image, or else of an image in its backing chain.

        Raises:
            StateError: There is none, or it is inconsistent or damaged.
            OSError, ImageError: It could not be read.
        """
        node: BlockNode | None = self._inner
        while isinstance(node, RecordingNode | Qcow2Image):
            if isinstance(node, RecordingNode):
                image, found = node.image, node.record.bitmaps.get(name)
                found = found or await _stored_bitmap(node.store, name)
            else:
                image, found = node, await _stored_bitmap(await self._store(node), name)
            if found is not None:
                return found if found.size == self.node.size else found.resized(self.node.size)
            node = image.backing
        raise StateError(f"Bitmap '{name}' is not found")

    async def _store(self, image: Qcow2Image) -> BitmapStore:
        """The bitmaps of an image that is only read; loaded once."""
        if image not in self._stores:
            self._stores[image] = await BitmapStore.load(image)
        return self._stores[image]

    async def close(self) -> None:
        """Store the bitmaps and close the files."""
        await self.node.close()


def _guest_options(below: BlockNode, options: DiskOptions, opener: NodeOpener) -> GuestOptions:
    discard = options.discard if opener.discard is None else opener.discard
    discard = discard and not opener.discard_refused
    detect_zeroes = options.detect_zeroes
    if opener.detect_zeroes is not None:
        detect_zeroes = DetectZeroes(opener.detect_zeroes)
    return GuestOptions(
        below,
        discard=discard,
        # QEMU's qcow2 unmaps zeroes whatever is said of discards; its files do not.
        zeroes_unmap=discard or isinstance(below, RecordingNode),
        detect_zeroes=detect_zeroes,
        writethrough=options.writethrough,
    )


async def _stored_bitmap(store: BitmapStore, name: str) -> Bitmap | None:
    """A bitmap of an image; None if the image has none of the name."""
    for damaged in store.damaged:
        if damaged.name == name:
            raise StateError(f"Bitmap '{name}' is damaged and cannot be used: {damaged.reason}")
    for entry in store.entries:
        if entry.name == name and entry.inconsistent:
            raise StateError(
                f"Bitmap '{name}' is inconsistent and cannot be used;"
                " remove it from the image, and make a full backup next"
            )
        if entry.name == name:
            return await store.load_bits(name)
    return None


async def _open_overlay(base: BlockNode) -> Qcow2Image:
    """A new image without a name, behind which another node is; it closes that node."""

    async def open_backing(file: FileNode, header: Header, chain: Chain) -> BlockNode:
        return base

    with tempfile.TemporaryDirectory(
        prefix="nbdfleece-", dir=os.environ.get("TMPDIR", "/var/tmp")
    ) as folder:
        path = Path(folder, "overlay.qcow2")
        await create_image(path, base.size)
        file = FileNode.open(path, read_only=False)
    return await Qcow2Image.from_file(file, open_backing=open_backing)
