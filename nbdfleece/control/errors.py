"""Errors as QMP tells them, and how this package's other errors become such."""

from __future__ import annotations

from typing import Literal

from ..errors import NbdfleeceError

ErrorClass = Literal["GenericError", "CommandNotFound", "DeviceNotActive", "DeviceNotFound"]


class QmpError(NbdfleeceError):
    """A command failed; its client is told so, and the session goes on.

    Args:
        description: For people, one line.
        error_class: For programs; QEMU's classes.
    """

    def __init__(self, description: str, error_class: ErrorClass = "GenericError") -> None:
        super().__init__(description)
        self.error_class: ErrorClass = error_class


class SessionError(NbdfleeceError):
    """A client sent what cannot be gone on from: it is told so, and its session ends."""


def describe_os_error(error: OSError) -> str:
    """The error in one line, with the file that it is about."""
    text = error.strerror or str(error) or type(error).__name__
    return text if error.filename is None else f"{error.filename}: {text}"
