"""From the options of a node to the node: files, raw windows, qcow2 images and their chains.

What the operator names is opened as named. What an image names (its backing file, its data
file) is opened only as far as the operator's :class:`BackingPolicy` allows.
"""

from __future__ import annotations

import logging
import os
from contextlib import AsyncExitStack
from typing import Any, Final, NamedTuple

from ..block.file import FileNode
from ..block.node import BlockNode
from ..block.raw import SECTOR, RawNode, has_magic
from ..errors import StateError, UnsupportedImageError, UsageError
from ..qcow2.backing import BackingPolicy, Chain, check_chain, resolve_name
from ..qcow2.header import HEADER_BYTES_MAX, MAGIC, Header, unpack_header
from ..qcow2.image import Qcow2Image
from ..qcow2.snapshots import InternalSnapshot, read_snapshots
from .node_options import JSON_PREFIX, Options, parse_name, split_protocol
from .recording_node import RecordingNode

_FILE_DRIVERS: Final = ("file", "host_device")
_FORMATS: Final = ("raw", "qcow2")
_DISCARD: Final = {"ignore": False, "off": False, "unmap": True, "on": True}
_TUNING: Final = (
    "cache-clean-interval",
    "cache-size",
    "discard-no-unref",
    "l2-cache-entry-size",
    "l2-cache-size",
    "lazy-refcounts",
    "overlap-check",
    "pass-discard-other",
    "pass-discard-request",
    "pass-discard-snapshot",
    "refcount-cache-size",
)
"""Options of QEMU's qcow2 driver that tune it and change nothing that a client sees."""

_log = logging.getLogger(__name__)


class SnapshotChoice(NamedTuple):
    """An internal snapshot: what is not None must fit, or ``either`` be its id or its name."""

    either: str | None = None
    snapshot_id: str | None = None
    name: str | None = None

    def fits(self, snapshot: InternalSnapshot) -> bool:
        """Whether a snapshot has what is asked for besides ``either``."""
        has_id = self.snapshot_id in (None, snapshot.snapshot_id)
        return has_id and self.name in (None, snapshot.name)

    def __str__(self) -> str:
        asked = {"id": self.snapshot_id, "name": self.name}
        return " and ".join(f"{what} '{it}'" for what, it in asked.items() if it is not None)


class Place(NamedTuple):
    """What holds for a node because of where it is.

    Attributes:
        read_only: It is not to be written.
        force_share: It is read even while another program writes it.
        chain: The files above it, for which it is in the backing chain.
        snapshot: What to read of a qcow2 image instead of its disk.
    """

    read_only: bool
    force_share: bool = False
    chain: Chain = frozenset()
    snapshot: SnapshotChoice | None = None


class NodeOpener:
    """Opens one disk.

    Args:
        policy: What images may name.

    Attributes:
        discard: Whether the outermost node's options let discards through; None if they say
            nothing.
        discard_refused: Another node's options hold discards back.
        detect_zeroes: What the outermost node's options say; None if they say nothing.
    """

    def __init__(self, policy: BackingPolicy) -> None:
        self._policy = policy
        self.discard: bool | None = None
        self.discard_refused = False
        self.detect_zeroes: str | None = None

    async def open(self, options: Options, place: Place) -> BlockNode:
        """Open a node and all below it.

        Args:
            options: Used up.
            place: Where it is.

        Raises:
            UsageError: The options cannot be meant, or name what is not supported.
            StateError: There is no such snapshot.
            ImageError: An image is damaged, in use, of a kind that is not supported, or names
                what must not be opened.
            OSError: A file cannot be opened or read.
        """
        driver = options.take_text("driver")
        place = self._take_common(options, place)
        if driver in _FILE_DRIVERS or (driver is None and "file" not in options):
            return _open_file(options, driver, place)
        if driver is not None and driver not in _FORMATS:
            raise UsageError(
                f"driver '{driver}' is not supported; these are: raw, qcow2, file, host_device"
            )
        child = options.take_child("file")
        if child is None:
            raise UsageError(f"driver '{driver}' needs the option '{options.where}file'")
        async with AsyncExitStack() as opened:
            below = await self.open(child, place)
            opened.push_async_callback(below.close)
            if driver == "qcow2" or (driver is None and await _looks_like_qcow2(below)):
                node = await self._open_qcow2(below, options, place)
            else:
                node = _open_raw(below, options, place, is_guessed=driver is None)
            opened.pop_all()
        return node

    def _take_common(self, options: Options, place: Place) -> Place:
        """Take what any node may have."""
        is_outermost = not options.where
        discard = options.take_text("discard", *_DISCARD)
        if is_outermost and discard is not None:
            self.discard = _DISCARD[discard]
        elif discard is not None and not _DISCARD[discard]:
            self.discard_refused = True
        if is_outermost:
            self.detect_zeroes = options.take_text("detect-zeroes", "off", "on", "unmap")
        options.take_text("node-name")
        options.take_switch("auto-read-only")
        cache = options.take_child("cache")
        if cache is not None:
            if any([cache.take_switch("direct"), cache.take_switch("no-flush")]):
                _log.warning("option '%scache' is ignored: the page cache is used", options.where)
            cache.finish("cache")
        read_only, force_share = (
            options.take_switch("read-only"),
            options.take_switch("force-share"),
        )
        return place._replace(
            read_only=place.read_only or bool(read_only),
            force_share=place.force_share or bool(force_share),
        )

    async def _open_qcow2(self, below: BlockNode, options: Options, place: Place) -> BlockNode:
        if not isinstance(below, FileNode):
            raise UsageError("driver 'qcow2' needs a file of its own: 'raw' cannot be below it")
        if options.take_any("data-file"):
            raise UsageError(f"option '{options.where}data-file': the image names its data file")
        has_backing = not options.take_nothing("backing")
        backing = options.take_child("backing") or Options({}, f"{options.where}backing.")
        for name in _TUNING:
            if options.take_any(name):
                _log.warning("option '%s%s' is ignored: it tunes QEMU", options.where, name)
        options.finish("qcow2")

        async def open_backing(file: FileNode, header: Header, chain: Chain) -> BlockNode | None:
            if has_backing:
                return await self._open_backing(backing, file.path, header, chain, place)
            return None

        image = await Qcow2Image.from_file(
            below,
            force_share=place.force_share,
            backing_policy=self._policy,
            snapshot=await _snapshot_id(below, place.snapshot),
            chain=place.chain,
            open_backing=open_backing,
        )
        return image if image.read_only else await RecordingNode.begin(image)

    async def _open_backing(
        self, options: Options, image_path: str, header: Header, chain: Chain, above: Place
    ) -> BlockNode | None:
        """Open what is behind an image: what the options name, or else the image's header."""
        if "file" not in options and "filename" not in options:
            if header.backing_file is None:
                return None
            named = self._named_by_image(image_path, os.fsdecode(header.backing_file))
            if header.backing_format is not None:
                named.setdefault("driver", header.backing_format)
            options.add_defaults(named)
        place = Place(read_only=True, force_share=above.force_share, chain=chain)
        return await self.open(options, place)

    def _named_by_image(self, image_path: str, name: str) -> dict[str, Any]:
        """The options of a node that an image's header names."""
        if name.startswith(JSON_PREFIX):
            if self._policy is not BackingPolicy.ANY:
                raise UnsupportedImageError(
                    image_path, f"refers to {name!r}; allow it only if you trust the image"
                )
            return parse_name(name).values
        name = name.removeprefix("file:")
        return {
            "file": {"driver": "file", "filename": resolve_name(image_path, name, self._policy)}
        }


def _open_file(options: Options, driver: str | None, place: Place) -> FileNode:
    name = options.take_text("filename")
    if name is None:
        raise UsageError(f"option '{options.where}filename' is missing")
    if driver is None:
        _, name = split_protocol(name)
    locking = options.take_text("locking", "auto", "on", "off")
    aio = options.take_text("aio", "threads", "native", "io_uring")
    if aio in ("native", "io_uring"):
        _log.warning("option '%saio' is ignored: files are read by threads", options.where)
    options.finish(driver or "file")
    if place.chain:
        check_chain(name, name, place.chain)
    return FileNode.open(
        name,
        read_only=place.read_only,
        force_share=place.force_share,
        locking=locking != "off",
    )


def _open_raw(below: BlockNode, options: Options, place: Place, *, is_guessed: bool) -> BlockNode:
    offset, size = options.take_size("offset"), options.take_size("size")
    options.finish("raw")
    if place.snapshot is not None:
        raise UsageError("a raw disk has no internal snapshots")
    if is_guessed and not below.read_only:
        _log.warning(
            "the format was not named and raw is guessed: writes to the first sector that would"
            " make it look like another format are refused; name the format to allow them"
        )
    if offset is None and size is None and (below.read_only or not is_guessed):
        return below
    return RawNode(below, offset or 0, size, is_guessed=is_guessed)


async def _looks_like_qcow2(below: BlockNode) -> bool:
    """Whether a disk of which nobody has said what it is, is a qcow2 image; else it is raw.

    Raises:
        UsageError: It is neither, as far as can be told.
    """
    sector = bytearray(min(SECTOR, below.size))
    await below.read_into(0, memoryview(sector))
    if sector[:4] == MAGIC.to_bytes(4, "big"):
        return True
    if has_magic(sector):
        raise UsageError(
            "the image looks like one of a format that is not supported;"
            " if it is a raw disk all the same, name the format 'raw'"
        )
    return False


async def _snapshot_id(file: FileNode, choice: SnapshotChoice | None) -> str | None:
    """What to call the chosen snapshot when the image is opened.

    Raises:
        StateError: There is none.
    """
    if choice is None or choice.either is not None:
        return choice and choice.either
    raw = await file.read(0, min(file.size, HEADER_BYTES_MAX))
    header = unpack_header(raw, file.path, file.size)
    snapshots, _ = await read_snapshots(file, header)
    for snapshot in snapshots:
        if choice.fits(snapshot):
            return snapshot.snapshot_id
    raise StateError(f"{file.path}: no internal snapshot has {choice}")
