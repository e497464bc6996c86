"""The fixture, as a user's conftest would have it by ``pytest_plugins``."""

from nbdfleece.testing import nbd_server

__all__ = ["nbd_server"]
