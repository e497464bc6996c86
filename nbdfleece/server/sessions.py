"""Sessions: connections of which each sees exports of its own.

Usually all connections see one table of exports. Where what is served is worked out for each
client (a plugin opens a handle per connection, and may take its time), the server is given a
function that makes a :class:`Session` for each connection.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Protocol

from ..nbd.export_info import Catalogue, Lookup

if TYPE_CHECKING:
    from .connection import Connection


class Session(Catalogue, Protocol):
    """One connection's exports: a catalogue whose answers may have to be waited for."""

    async def admit(self) -> None:
        """Wait until the client may be greeted.

        Raises:
            Exception: It may not; the connection is closed. The text is for the log.
        """

    async def look_up(self, lookup: Lookup) -> None:
        """Find out what the catalogue did not know; on return it knows it."""

    def end(self) -> None:
        """The connection is over, and nothing of it uses an export any more."""


SessionFactory = Callable[["Connection"], Session]
