"""The error tree: the class of an error is its consequence.

``OSError`` crosses the block layer as itself (its ``errno`` is what the NBD
layer translates); every other error that a user or a client can cause is one of
the classes below. ``assert`` is for our own bugs only.
"""

from __future__ import annotations

import os


class NbdfleeceError(Exception):
    """Base of all errors that this package raises on purpose.

    The text is one line, says what happened, to whom, and what to do about it;
    the command line prints it as it is.
    """


class ProtocolError(NbdfleeceError):
    """The peer broke the NBD protocol beyond repair: drop the connection."""


class ImageError(NbdfleeceError):
    """An image cannot be trusted or is not supported: refuse to open it, never guess.

    Args:
        path: The image's file name.
        message: What is wrong, in a few words.
        offset: Where in the file the trouble is, in bytes, if it is at a place.
        expected: What should have been there.
        found: What was there.
    """

    def __init__(
        self,
        path: str | os.PathLike[str],
        message: str,
        *,
        offset: int | None = None,
        expected: object = None,
        found: object = None,
    ) -> None:
        self.path = os.fspath(path)
        self.offset = offset
        self.expected = expected
        self.found = found
        text = f"{self.path}: {message}"
        if offset is not None:
            text += f" at offset {offset:#x}"
        if expected is not None:
            text += f": expected {expected}, found {found}"
        super().__init__(text)


class ImageLockedError(ImageError):
    """Another program holds the image in a way that excludes what was asked for."""


class UnsupportedImageError(ImageError):
    """The image is sound as far as we can tell, but uses a feature that is refused by name."""


class SnapshotError(NbdfleeceError):
    """A snapshot is broken: its view is dead, the guest is not."""


class StateError(NbdfleeceError):
    """An operation does not fit the state: a name that is taken or unknown, a busy bitmap.

    Nothing was changed.
    """


class DiffersError(NbdfleeceError):
    """Data is not what it should be; it was looked at, not changed."""


class TemporaryError(NbdfleeceError):
    """It may well succeed later, or go on where it was; nothing is lost."""


class UsageError(NbdfleeceError):
    """The user asked for something that cannot be meant: wrong argument, wrong configuration."""
