"""QEMU's commands on objects: credentials for TLS, and who may connect.

Spec: QEMU qapi/qom.json.
"""

from __future__ import annotations

from typing import Any, Final, Literal

import msgspec

from ..command import Command
from ..controlled import Controlled


class ObjectAdd(Command):
    """Define an object for nbd-server-start; what is read of files is read then.

    ``tls-creds-x509`` and ``tls-creds-psk`` have ``dir``, ``endpoint``, ``verify-peer`` and
    ``sanity-check``; ``authz-simple`` has ``identity``, ``authz-list`` ``rules`` and ``policy``,
    ``authz-list-file`` ``filename`` and ``refresh``.
    """

    qom_type: Literal[
        "tls-creds-x509", "tls-creds-psk", "authz-simple", "authz-list", "authz-list-file"
    ]
    id: str
    dir: str | None = None
    endpoint: Literal["server", "client"] | None = None
    verify_peer: bool | None = None
    sanity_check: bool | None = None
    username: str | None = None
    identity: str | None = None
    rules: list[dict[str, Any]] | None = None
    policy: Literal["allow", "deny"] | None = None
    filename: str | None = None
    refresh: bool | None = None

    async def run(self, server: Controlled) -> None:
        """Carry it out."""
        given = {
            name: value for name, value in msgspec.to_builtins(self).items() if value is not None
        }
        server.add_object(given)


class ObjectDel(Command):
    """Forget an object; what was started with it keeps it."""

    id: str

    async def run(self, server: Controlled) -> None:
        """Carry it out."""
        server.remove_object(self.id)


COMMANDS: Final = (ObjectAdd, ObjectDel)
