"""What the commands work on."""

from __future__ import annotations

from typing import TYPE_CHECKING, Protocol

from ..engine.engine import Engine
from ..engine.overlays import Overlays

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
    def commands(self) -> Registry:
        """What it can be told."""

    def export_uris(self, export: str) -> list[str]:
        """How clients name an export: one NBD URI per listener."""

    def request_stop(self, reason: str) -> None:
        """Have the server shut down soon.

        Args:
            reason: One of QEMU's shutdown causes; the event SHUTDOWN tells it.
        """
