"""nbd-server-start with credentials, authorization and a limit, by QEMU's objects."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

import nbd
from qemu.qmp import QMPClient

from nbdfleece.daemon import Daemon
from tests.pki import make_pki

from .oracle import Step, compare, reply, storage_daemon

UNIX: dict[str, Any] = {"type": "unix", "data": {"path": "SOCKET"}}


def add(kind: str, name: str, **more: Any) -> Step:
    return "object-add", {"qom-type": kind, "id": name, **more}


def start(**more: Any) -> Step:
    return "nbd-server-start", {"addr": UNIX, **more}


async def test_replies_are_qemus(qmp: QMPClient, tmp_path: Path) -> None:
    rule = {"match": "CN=x", "policy": "allow"}
    steps: list[Step] = [
        add("nonsense", "c"),
        ("object-add", {"id": "c"}),
        add("authz-simple", "a", identity="CN=x"),
        add("authz-simple", "b", identity="CN=x", bogus=1),
        add("authz-list", "l", policy="deny", rules=[rule]),
        add("tls-creds-x509", "tls", dir=str(make_pki(tmp_path)), endpoint="server"),
        ("object-del", {"id": "nope"}),
        start(**{"tls-creds": "nope"}),
        start(**{"tls-creds": "a"}),
        start(**{"tls-creds": "tls", "tls-authz": "a"}),
        start(),
        ("nbd-server-stop", {}),
        start(**{"max-connections": 1}),
        ("nbd-server-stop", {}),
        ("object-del", {"id": "a"}),
        ("object-del", {"id": "a"}),
    ]
    async with storage_daemon(tmp_path, ["vda"]) as qemu:
        await compare(qmp, qemu, steps, tmp_path)


async def connect(path: Path, pki: Path | None) -> nbd.NBD:
    client = nbd.NBD()
    client.set_export_name("vda")
    if pki is not None:
        client.set_tls(nbd.TLS_REQUIRE)
        client.set_tls_certificates(str(pki))
        client.set_tls_verify_peer(False)
    await asyncio.to_thread(client.connect_unix, str(path))
    return client


async def refusal(path: Path, pki: Path | None) -> str:
    """Why a client is not let in."""
    try:
        await connect(path, pki)
    except nbd.Error as error:
        return str(error)
    raise AssertionError("the client was let in")


async def test_added_listener_asks_for_what_its_objects_say(
    qmp: QMPClient, daemon: Daemon, tmp_path: Path
) -> None:
    """Over TLS only, and only for whom the rule names; the other listener is as before."""
    pki, path = make_pki(tmp_path), tmp_path / "more.sock"
    address = {"type": "unix", "data": {"path": str(path)}}
    await qmp.execute(*add("tls-creds-x509", "tls", dir=str(pki), endpoint="server"))
    await qmp.execute(*add("authz-simple", "other", identity="O=Other,CN=client"))
    await qmp.execute(
        *add(
            "authz-list",
            "ours",
            rules=[{"match": "*CN=client", "policy": "allow", "format": "glob"}],
        )
    )
    given = {"addr": address, "tls-creds": "tls"}
    await qmp.execute("nbd-server-start", {**given, "tls-authz": "other"})
    assert daemon.export_uris("vda")[1].startswith("nbds+unix://")
    assert "TLS" in await refusal(path, None)
    await refusal(path, pki)
    await connect(tmp_path / "nbd.sock", None)
    await qmp.execute("nbd-server-stop")
    await qmp.execute("nbd-server-start", {**given, "tls-authz": "ours"})
    client = await connect(path, pki)
    assert client.can_multi_conn()
    await qmp.execute("nbd-server-stop")
    assert await asyncio.to_thread(client.pread, 512, 0) == bytes(512), "clients stay"


async def test_limit_of_one_connection_is_told_and_kept(
    qmp: QMPClient, daemon: Daemon, tmp_path: Path
) -> None:
    path = tmp_path / "more.sock"
    address = {"type": "unix", "data": {"path": str(path)}}
    await qmp.execute("nbd-server-start", {"addr": address, "max-connections": 1})
    first = await connect(path, None)
    assert not first.can_multi_conn()
    second = asyncio.ensure_future(connect(path, None))
    assert (await connect(tmp_path / "nbd.sock", None)).can_multi_conn()
    assert not second.done()
    await asyncio.to_thread(first.shutdown)
    assert (await second).get_size() == daemon.engine.disk("vda").size


async def test_credentials_that_cannot_be_read_start_nothing(
    qmp: QMPClient, daemon: Daemon, tmp_path: Path
) -> None:
    await qmp.execute(*add("tls-creds-x509", "tls", dir="/nonexistent", endpoint="server"))
    address = {"type": "unix", "data": {"path": str(tmp_path / "more.sock")}}
    refused = await reply(qmp, "nbd-server-start", {"addr": address, "tls-creds": "tls"})
    assert refused[0] == "GenericError"
    assert "/nonexistent" in refused[1]
    assert len(daemon.export_uris("vda")) == 1
