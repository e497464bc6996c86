"""Adapters: how to start each known server in each configuration."""

from __future__ import annotations

from conformance.servers.base import Adapter, Place, Plan, Running, StartError, Unsupported
from conformance.servers.nbd_server import NbdServer
from conformance.servers.nbdfleece import Nbdfleece
from conformance.servers.nbdkit import Nbdkit
from conformance.servers.qemu import QemuNbd, QemuStorageDaemon

ADAPTERS: dict[str, type[Adapter]] = {
    "qemu-nbd": QemuNbd,
    "qemu-storage-daemon": QemuStorageDaemon,
    "nbdkit": Nbdkit,
    "nbd-server": NbdServer,
    "nbdfleece": Nbdfleece,
}

__all__ = ["ADAPTERS", "Adapter", "Place", "Plan", "Running", "StartError", "Unsupported"]
