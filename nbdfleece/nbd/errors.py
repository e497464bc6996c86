"""Errors that have a place on the wire, and where an errno becomes one of them."""

from __future__ import annotations

import errno
from typing import Final

from ..errors import NbdfleeceError
from .constants import CommandFlag, Error, OptionReply

ERROR_TEXT_BYTES_MAX: Final = 900
"""QEMU's client drops a connection on any chunk but read data above 1000 bytes."""


class OptionError(NbdfleeceError):
    """An option is refused: answer it with an error reply and keep haggling.

    Args:
        reply: The error reply's type.
        text: For the person at the other end.
    """

    def __init__(self, reply: OptionReply, text: str) -> None:
        super().__init__(text)
        self.reply = reply
        self.text = text


class RequestError(NbdfleeceError):
    """A request is refused or has failed: answer it with an error and keep serving.

    Args:
        error: The error on the wire.
        text: For the person at the other end.
    """

    def __init__(self, error: Error, text: str) -> None:
        super().__init__(text)
        self.error = error
        self.text = text


_BY_ERRNO: Final = {
    errno.EPERM: Error.EPERM,
    errno.EACCES: Error.EPERM,
    errno.EROFS: Error.EPERM,
    errno.EIO: Error.EIO,
    errno.ENOMEM: Error.ENOMEM,
    errno.EINVAL: Error.EINVAL,
    errno.E2BIG: Error.EINVAL,
    errno.EOVERFLOW: Error.EINVAL,
    errno.EOPNOTSUPP: Error.EINVAL,
    errno.ENOSPC: Error.ENOSPC,
    errno.EDQUOT: Error.ENOSPC,
    errno.EFBIG: Error.ENOSPC,
    errno.ESHUTDOWN: Error.ESHUTDOWN,
}


def error_from_errno(number: int | None, command_flags: int = 0) -> Error:
    """Translate an errno of the block layer; the only place where that happens.

    Args:
        number: ``OSError.errno``; what the table does not know is an I/O error.
        command_flags: The request's flags: ENOTSUP is for FAST_ZERO alone, EOVERFLOW for DF
            alone; elsewhere clients are not prepared for them and get EINVAL.

    Spec: proto.md, "Error values".
    """
    if number == errno.EOPNOTSUPP and command_flags & CommandFlag.FAST_ZERO:
        return Error.ENOTSUP
    if number == errno.EOVERFLOW and command_flags & CommandFlag.DF:
        return Error.EOVERFLOW
    return _BY_ERRNO.get(number, Error.EIO) if number is not None else Error.EIO


def encode_error_text(text: str) -> bytes:
    """A message as it goes on the wire: UTF-8, no NUL, cut between characters where too long."""
    data = text.replace("\0", "").encode("utf-8", "replace")
    if len(data) <= ERROR_TEXT_BYTES_MAX:
        return data
    return data[:ERROR_TEXT_BYTES_MAX].decode("utf-8", "ignore").encode()
