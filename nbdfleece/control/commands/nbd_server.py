"""QEMU's commands on the NBD server and its exports.

The server that was started with the disks is there all the time and stays; ``nbd-server-start``
lets it listen at one more place, and ``nbd-server-stop`` ends that and all exports that were
added by these commands.

Spec: QEMU qapi/block-export.json.
"""

from __future__ import annotations

from typing import Annotated, Final, Literal

import msgspec

from ...nbd.constants import DEFAULT_PORT
from ...nbd.uri import TCP_PORT_MAX, VSOCK_PORT_MAX, NbdUri
from ..command import Command
from ..controlled import Controlled
from ..errors import QmpError
from .bitmaps import BitmapReference


class UnixAddress(msgspec.Struct, forbid_unknown_fields=True):
    """QEMU's UnixSocketAddress."""

    path: str


class InetAddress(msgspec.Struct, forbid_unknown_fields=True):
    """QEMU's InetSocketAddress, as far as a listener of ours can be told."""

    host: str
    port: str = str(DEFAULT_PORT)


class VsockAddress(msgspec.Struct, forbid_unknown_fields=True):
    """QEMU's VsockSocketAddress."""

    cid: str
    port: str


class LegacyUnix(msgspec.Struct, forbid_unknown_fields=True, tag_field="type", tag="unix"):
    """A Unix socket, in QEMU's SocketAddressLegacy."""

    data: UnixAddress


class LegacyInet(msgspec.Struct, forbid_unknown_fields=True, tag_field="type", tag="inet"):
    """A TCP address, in QEMU's SocketAddressLegacy."""

    data: InetAddress


class LegacyVsock(msgspec.Struct, forbid_unknown_fields=True, tag_field="type", tag="vsock"):
    """A vsock address, in QEMU's SocketAddressLegacy."""

    data: VsockAddress


class NbdServerStart(Command):
    """Listen for NBD clients at one more place: ``unix``, ``inet`` or ``vsock``.

    ``tls-creds`` and ``tls-authz`` are objects of object-add; without them TLS and its
    authorization are those that the server was started with, which hold for its exports in any
    case. Above ``max-connections`` (0: the server's limit) clients wait.
    """

    addr: LegacyUnix | LegacyInet | LegacyVsock
    tls_creds: str | None = None
    tls_authz: str | None = None
    max_connections: Annotated[int, msgspec.Meta(ge=0, lt=1 << 32)] = 0

    async def run(self, server: Controlled) -> None:
        """Carry it out."""
        server.start_listening(
            _uri(self.addr),
            credentials=self.tls_creds,
            authorization=self.tls_authz,
            connections_max=self.max_connections or None,
        )


class NbdServerStop(Command):
    """Undo nbd-server-start; exports that were added are removed, with their clients."""

    async def run(self, server: Controlled) -> None:
        """Carry it out."""
        server.stop_listening()
        await server.node_exports.remove_added()


class BlockExportAdd(Command):
    """Export a node over NBD.

    ``bitmaps`` are offered as ``qemu:dirty-bitmap:NAME`` and are busy as long as the export is
    there: names are looked for in the node and what is under it; with a node, there.
    """

    type: Literal["nbd"]
    id: str
    node_name: str
    writable: bool = False
    name: str | None = None
    description: str = ""
    bitmaps: list[str | BitmapReference] = []  # noqa: RUF012  # msgspec copies it
    allocation_depth: bool = False

    async def run(self, server: Controlled) -> None:
        """Carry it out."""
        bitmaps = [
            each if isinstance(each, str) else (each.node, each.name) for each in self.bitmaps
        ]
        await server.node_exports.add(
            self.id,
            self.node_name,
            name=self.name,
            description=self.description,
            writable=self.writable,
            bitmaps=bitmaps,
            allocation_depth=self.allocation_depth,
        )


class BlockExportDel(Command):
    """Remove an export; ``hard`` disconnects its clients, without it there must be none.

    BLOCK_EXPORT_DELETED tells that it is gone.
    """

    id: str
    mode: Literal["safe", "hard"] = "safe"

    async def run(self, server: Controlled) -> None:
        """Carry it out."""
        await server.node_exports.remove(self.id, hard=self.mode == "hard")


class NbdServerAdd(Command):
    """Export a node under its own name or another, which is also the export's id."""

    device: str
    name: str | None = None
    description: str = ""
    writable: bool = False
    bitmap: str | None = None

    async def run(self, server: Controlled) -> None:
        """Carry it out."""
        await server.node_exports.add(
            self.device if self.name is None else self.name,
            self.device,
            device=self.device,
            name=self.name,
            description=self.description,
            writable=self.writable,
            bitmaps=() if self.bitmap is None else (self.bitmap,),
        )


class NbdServerRemove(Command):
    """Remove an export by its id."""

    name: str
    mode: Literal["safe", "hard"] = "safe"

    async def run(self, server: Controlled) -> None:
        """Carry it out."""
        await server.node_exports.remove(self.name, hard=self.mode == "hard")


class NbdServerAddBitmap(Command):
    """Offer one more bitmap of an export, to clients that connect from now on.

    ``bitmap-export-name`` is what they call it. QEMU had this command, as a draft, before
    ``bitmap`` of nbd-server-add.
    """

    name: str
    bitmap: str
    bitmap_export_name: str | None = None

    async def run(self, server: Controlled) -> None:
        """Carry it out."""
        await server.node_exports.add_bitmap(self.name, self.bitmap, self.bitmap_export_name)


def _uri(address: LegacyUnix | LegacyInet | LegacyVsock) -> NbdUri:
    if isinstance(address, LegacyUnix):
        return NbdUri(transport="unix", socket=address.data.path)
    if isinstance(address, LegacyInet):
        port = _number("port", address.data.port, TCP_PORT_MAX)
        return NbdUri(transport="tcp", host=address.data.host, port=port)
    cid = _number("cid", address.data.cid, VSOCK_PORT_MAX)
    port = _number("port", address.data.port, VSOCK_PORT_MAX)
    return NbdUri(transport="vsock", cid=cid, port=port)


def _number(name: str, text: str, most: int) -> int:
    if not (text.isascii() and text.isdecimal() and len(text) <= 10 and int(text) <= most):
        raise QmpError(f"Parameter 'addr.data.{name}' expects a number up to {most}")
    return int(text)


COMMANDS: Final = (
    NbdServerStart,
    NbdServerStop,
    BlockExportAdd,
    BlockExportDel,
    NbdServerAdd,
    NbdServerRemove,
    NbdServerAddBitmap,
)
