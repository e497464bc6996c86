"""What a server can be told over its control socket."""

from __future__ import annotations

from ..registry import Registry
from . import (
    backups,
    bitmaps,
    block,
    checkpoints,
    disks,
    exports,
    general,
    graph,
    nbd_server,
    objects,
    overlays,
    snapshots,
    transactions,
)


def all_commands() -> Registry:
    """Every command that there is."""
    modules = (
        general,
        block,
        bitmaps,
        transactions,
        graph,
        objects,
        nbd_server,
        disks,
        snapshots,
        exports,
        checkpoints,
        backups,
        overlays,
    )
    return Registry(command for module in modules for command in module.COMMANDS)
