"""Errors of the client side: the class says what the user can do next."""

from __future__ import annotations

from ..errors import DiffersError, NbdfleeceError, TemporaryError


class ServerError(NbdfleeceError):
    """The NBD server refuses, fails, or tells what cannot be true; nothing of it was believed."""


class InterruptedPullError(TemporaryError):
    """A pull was cut short; what it has done is kept and the same pull can go on later."""


class BackupError(NbdfleeceError):
    """A backup directory cannot be used as it is: damaged, incomplete, of another version."""


class ChecksumError(BackupError, DiffersError):
    """Bytes of a backup are not the ones that were pulled."""
