"""What is checked of an image when it is opened, beyond its header."""

from __future__ import annotations

from ..block.file import FileNode
from ..errors import ImageError, UnsupportedImageError
from .header import Header, Incompatible


def check_supported(header: Header, file: FileNode) -> None:
    """Refuse what we cannot read rightly, and what must not be written.

    Raises:
        UnsupportedImageError: A feature that we do not have, by its name.
        ImageError: The image is marked corrupt and is to be written.
    """
    if header.has_data_file and header.snapshot_count:
        raise ImageError(file.path, "an image with an external data file cannot have snapshots")
    if file.read_only:
        return
    if header.incompatible_features & Incompatible.CORRUPT:
        raise ImageError(
            file.path,
            "marked corrupt: open it read-only, or repair it with 'qemu-img check -r all'",
        )
    if header.incompatible_features & Incompatible.DIRTY:
        raise UnsupportedImageError(
            file.path,
            "not closed cleanly, and its refcounts are lazy:"
            " open it read-only, or repair it with 'qemu-img check -r all'",
        )


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
