"""Which files an image may make us open, and finding them.

The names of backing and data files come out of the image: whoever made it chose
them, and a name like ``/etc/shadow`` with format ``raw`` would let a guest read
the host (CVE-2024-4467 and its kin). What may be opened is the operator's choice.
"""

from __future__ import annotations

import os
import re
from collections.abc import Awaitable, Callable
from enum import Enum
from typing import Final

from ..block.file import FileNode
from ..block.node import BlockNode
from ..errors import ImageError, UnsupportedImageError
from .header import MAGIC, Header

_PROTOCOL = re.compile(r"[A-Za-z0-9+.-]+:")
"""A name that begins so is a protocol's (``nbd://``, ``json:``) to QEMU, not a file's."""

CHAIN_FILES_MAX: Final = 200
"""Files in a backing chain: enough for any, and it ends."""

Chain = frozenset[tuple[int, int]]
"""Device and inode of the files from the top image down to the one at hand."""

OpenBacking = Callable[[FileNode, Header, Chain], Awaitable[BlockNode | None]]
"""Opens what is behind an image, given its file, its header and the chain down to it."""


class BackingPolicy(Enum):
    """Which backing and data files named by images are opened."""

    REFUSE = "refuse"
    """None: an image that names one is refused."""
    SAME_FOLDER = "same-folder"
    """Those in the folder of the image that names them, or below it."""
    ANY = "any"
    """All: the images are trusted."""


def resolve_name(image_path: str, name: str, policy: BackingPolicy) -> str:
    """The path of the file that an image names.

    Args:
        image_path: The image.
        name: As in its header; relative names are relative to the image's folder.
        policy: What may be opened.

    Raises:
        UnsupportedImageError: The name is a protocol's.
        ImageError: The policy does not allow the file.
    """
    if not name or "\0" in name:
        raise ImageError(image_path, f"refers to {name!r}, which cannot be a file's name")
    if _PROTOCOL.match(name):
        raise UnsupportedImageError(
            image_path, f"refers to {name!r}: only plain file names are supported"
        )
    if policy is BackingPolicy.REFUSE:
        raise ImageError(image_path, f"refers to {name!r}, which is not to be opened")
    folder = os.path.dirname(image_path)
    path = os.path.join(folder, name)
    if policy is BackingPolicy.SAME_FOLDER:
        inside = os.path.realpath(folder or ".")
        if os.path.commonpath([inside, os.path.realpath(path)]) != inside:
            raise ImageError(
                image_path,
                f"refers to {name!r} outside its folder; allow it only if you trust the image",
            )
    return path


def check_chain(image_path: str, path: str, chain: Chain) -> None:
    """Insist that a chain of backing files ends.

    Args:
        image_path: The image, for messages.
        path: Its backing file, not opened yet.
        chain: The files from the top down to the image.

    Raises:
        ImageError: The backing file is one of them, or they are too many.
        OSError: There is no such file.
    """
    info = os.stat(path)
    if (info.st_dev, info.st_ino) in chain:
        raise ImageError(image_path, f"the chain of backing files comes back to {path!r}")
    if len(chain) >= CHAIN_FILES_MAX:
        raise ImageError(image_path, f"there are {CHAIN_FILES_MAX} files above in the chain")


async def backing_format(image_path: str, header: Header, below: FileNode) -> str:
    """The backing file's format: as the image says, or found out as QEMU does.

    Args:
        image_path: The image, for messages.
        header: Its header.
        below: The backing file.

    Returns:
        ``"qcow2"`` or ``"raw"``.

    Raises:
        UnsupportedImageError: The image names another format.
    """
    named = header.backing_format
    if named in ("qcow2", "raw"):
        return named
    if named is not None:
        raise UnsupportedImageError(image_path, f"backing format {named!r} is not supported")
    start = await below.read(0, 4)
    return "qcow2" if start == MAGIC.to_bytes(4, "big") else "raw"


def open_data_file(
    file: FileNode, header: Header, policy: BackingPolicy, force_share: bool
) -> FileNode:
    """Open the external data file that a header names; the image file itself if it needs none.

    Raises:
        OSError: It cannot be opened.
        ImageError: It is not named, must not be opened, is in use, or is the image itself.
    """
    if not header.has_data_file:
        return file
    if header.data_file is None:
        raise ImageError(file.path, "needs an external data file, but does not name it")
    path = resolve_name(file.path, header.data_file, policy)
    if os.path.samefile(path, file.path):
        raise ImageError(file.path, "names itself as its external data file")
    return FileNode.open(path, read_only=file.read_only, force_share=force_share)
