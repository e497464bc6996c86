"""libnbd's Python binding, which does not come from PyPI.

The binding is a part of libnbd and is installed with it (Debian: python3-libnbd). PyPI has
an unrelated package with the same name, which is told apart here.
"""

from __future__ import annotations

import os
from types import ModuleType

from ..errors import UsageError
from .errors import ServerError

_HINT = "install it with libnbd from your distribution (Debian: python3-libnbd)"


def load_libnbd() -> ModuleType:
    """The binding's module.

    Raises:
        UsageError: It is not installed, or ``nbd`` is something else.
    """
    try:
        import nbd
    except ImportError:
        raise UsageError(f"libnbd's Python binding is missing: {_HINT}") from None
    if not hasattr(nbd, "NBD") or not hasattr(nbd, "Buffer"):
        raise UsageError(f"the Python module 'nbd' is not libnbd's: {_HINT}")
    module: ModuleType = nbd
    return module


def server_error(uri: str, error: Exception) -> ServerError:
    """What libnbd raised, as an error that names the server."""
    text = getattr(error, "string", None) or str(error)
    return ServerError(f"{uri}: {text}")


def command_error(uri: str, what: str, errnum: int) -> ServerError:
    """The error for a command that the server failed with an errno."""
    return ServerError(f"{uri}: {what} failed: {os.strerror(errnum)}")
