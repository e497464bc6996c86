"""What is checked of an image when it is opened, beyond its header."""

from __future__ import annotations

import logging

from ..block.file import FileNode
from ..errors import ImageError, UnsupportedImageError
from .check import Repair, examine, read_header
from .check_repair import repair_image
from .compressed import ZSTD
from .header import Header, Incompatible
from .zstd import HAS_ZSTD

_log = logging.getLogger(__name__)


def check_supported(header: Header, file: FileNode) -> None:
    """Refuse what we cannot read rightly, and what must not be written.

    Raises:
        ImageError: The image contradicts itself, or is marked corrupt and is to be written.
    """
    if header.has_data_file and header.snapshot_count:
        raise ImageError(file.path, "an image with an external data file cannot have snapshots")
    if header.compression_type == ZSTD and not HAS_ZSTD:
        raise UnsupportedImageError(
            file.path, "is compressed with zstd: install the Python package backports.zstd"
        )
    if file.read_only:
        return
    if header.incompatible_features & Incompatible.CORRUPT:
        raise ImageError(
            file.path,
            "marked corrupt: open it read-only, or repair it with 'qemu-img check -r all'",
        )


async def repair_refcounts(header: Header, file: FileNode) -> Header:
    """Before an image is written, put right the refcounts that another program was lazy with.

    The dirty bit says that it did not close the image; it stays until they are durable. We
    are never lazy ourselves.

    Returns:
        The header as it is then.

    Raises:
        OSError: The file could not be read or written.
        ImageError: There is more wrong than refcounts: the image must not be written.
    """
    if file.read_only or not header.incompatible_features & Incompatible.DIRTY:
        return header
    first, findings = await examine(file)
    result = await repair_image(file, first, findings, Repair.ALL)
    if result.corruptions or result.check_errors:
        found = next((text for text in result.messages if text.startswith("ERROR")), "too much")
        raise ImageError(file.path, f"not closed cleanly, and beyond repair: {found}")
    _log.warning(
        "%s: not closed cleanly: %d refcounts repaired",
        file.path,
        result.corruptions_fixed + result.leaks_fixed,
    )
    return await read_header(file)


def check_refcount_table(blocks: list[int], header: Header, file: FileNode) -> None:
    """Every refcount block is aligned, inside the file, and there once only.

    Raises:
        ImageError: One is not: the image must not be written.
    """
    end = -(-file.size // header.cluster_size) * header.cluster_size
    seen: set[int] = set()
    for index, offset in enumerate(blocks):
        if not offset:
            continue
        if offset % header.cluster_size or offset >= end or offset in seen:
            raise ImageError(
                file.path,
                f"refcount table entry {index} leads to {offset:#x}, where no block can be",
                offset=header.refcount_table_offset + 8 * index,
            )
        seen.add(offset)
