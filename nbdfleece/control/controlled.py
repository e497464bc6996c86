"""What the commands work on."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Protocol

from ..engine.engine import Engine
from ..engine.graph import Graph
from ..engine.jobs import Jobs
from ..engine.node_exports import NodeExports
from ..engine.overlays import Overlays
from ..nbd.uri import NbdUri

if TYPE_CHECKING:
    from .registry import Registry


class Controlled(Protocol):
    """A running server, as far as its control socket needs it."""

    @property
    def engine(self) -> Engine:
        """Its disks, snapshots and checkpoints."""

    @property
    def overlays(self) -> Overlays:
        """The writable overlays over its disks and snapshots."""

    @property
    def graph(self) -> Graph:
        """The nodes of QEMU's commands."""

    @property
    def node_exports(self) -> NodeExports:
        """Exports that were added to its own."""

    @property
    def jobs(self) -> Jobs:
        """Backup jobs of QEMU's commands."""

    @property
    def commands(self) -> Registry:
        """What it can be told."""

    def export_uris(self, export: str) -> list[str]:
        """How clients name an export: one NBD URI per listener."""

    def add_object(self, values: dict[str, Any]) -> None:
        """Define credentials or an authorization, by QEMU's properties.

        Raises:
            UsageError: It cannot be meant, or its id is taken.
        """

    def remove_object(self, identity: str) -> None:
        """Forget credentials or an authorization.

        Raises:
            UsageError: There is none of that id.
        """

    def start_listening(
        self,
        uri: NbdUri,
        *,
        credentials: str | None = None,
        authorization: str | None = None,
        connections_max: int | None = None,
    ) -> None:
        """Accept NBD clients at one more place.

        Args:
            uri: Where.
            credentials: The object for TLS; None for what the server was started with.
            authorization: The object that says which clients may connect.
            connections_max: Clients at a time, the others wait; None for the server's limit.

        Raises:
            StateError: There is one more place already, or it cannot be listened on.
            UsageError: There is no such object.
        """

    def stop_listening(self) -> None:
        """Undo :meth:`start_listening`; clients stay.

        Raises:
            StateError: There is no such place.
        """

    def request_stop(self, reason: str) -> None:
        """Have the server shut down soon.

        Args:
            reason: One of QEMU's shutdown causes; the event SHUTDOWN tells it.
        """
