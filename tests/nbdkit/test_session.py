"""One connection to a script: what of its client the script knows, and who is let in."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

import pytest

from nbdfleece.server.tls import Authorization, TlsSettings, load_certificates
from tests.pki import make_pki
from tests.waiting import until

from .in_process import Inside, value_of
from .observe import nbd

KNOWN = """
    seen = []
    def open(readonly):
        seen.append((nbdkit.export_name(), nbdkit.is_tls(), nbdkit.peer_tls_dn(),
                     nbdkit.peer_tls_issuer_dn()))
    def list_exports(readonly, is_tls):
        return [("tls" if is_tls else "plain", "")]
"""


def connect(inside: Inside, pki: Path, export: str) -> str:
    """Open an export over TLS; what came of it."""
    client: Any = nbd.NBD()
    client.set_tls(nbd.TLS_REQUIRE)
    client.set_tls_certificates(str(pki))
    client.set_tls_verify_peer(False)
    client.set_export_name(export)
    try:
        client.connect_unix(str(inside.socket))
    except nbd.Error as error:
        return str(error.errno)
    return "open"


async def test_script_knows_the_certificate_of_its_client(inside: Inside, tmp_path: Path) -> None:
    pki = make_pki(tmp_path)
    tls = TlsSettings(credentials=load_certificates(pki, verify_clients=True))
    plugin = inside.load(KNOWN)
    async with inside.serve(plugin, tls=tls):
        assert await asyncio.to_thread(connect, inside, pki, "disk") == "open"
    ((name, is_tls, subject, issuer),) = value_of(plugin, "seen")
    assert (name, is_tls) == ("disk", True)
    assert subject.startswith("CN=client,")
    assert subject.endswith(",O=Example\\, Inc.")
    assert "O=trustme" in issuer


async def test_who_may_not_have_an_export_does_not_open_it(inside: Inside, tmp_path: Path) -> None:
    pki = make_pki(tmp_path)
    plugin = inside.load(KNOWN)
    options: dict[str, Any] = {
        "tls": TlsSettings(credentials=load_certificates(pki, verify_clients=True)),
        "authorizer": Authorization(identities={"mine": ["CN=client,*"]}, otherwise=()),
    }
    async with inside.serve(plugin, **options):
        assert await asyncio.to_thread(connect, inside, pki, "other") != "open"
        assert await asyncio.to_thread(connect, inside, pki, "mine") == "open"
    assert [name for name, *_ in value_of(plugin, "seen")] == ["mine"]


async def test_handle_that_is_opened_for_a_client_that_left_is_closed(inside: Inside) -> None:
    plugin = inside.load(
        """
        calls = []
        def thread_model(): return nbdkit.THREAD_MODEL_PARALLEL
        def open(readonly):
            begun.set()
            go.wait()
            calls.append("open")
        def close(h): calls.append("close")
        """
    )
    async with inside.serve(plugin) as server:
        reader, writer = await asyncio.open_unix_connection(str(inside.socket))
        await reader.readexactly(18)
        writer.write(bytes.fromhex("00000001 49484156454f5054 00000001 00000001") + b"x")
        await until(value_of(plugin, "begun").is_set)
        writer.close()
        for connection in list(server._server.connections):
            connection.abort("the client left")
        value_of(plugin, "go").set()
        await until(lambda: value_of(plugin, "calls") == ["open", "close"])


@pytest.mark.parametrize("options", [1, 3])
async def test_options_after_one_that_waits_are_answered_in_order(
    inside: Inside, options: int
) -> None:
    """What a client sends while the script thinks is kept, and answered afterwards."""
    plugin = inside.load(
        """
        def list_exports(readonly, is_tls):
            begun.set()
            go.wait()
            return ["a"]
        """
    )
    list_option = bytes.fromhex("49484156454f5054 00000003 00000000")
    async with inside.serve(plugin):
        reader, writer = await asyncio.open_unix_connection(str(inside.socket))
        await reader.readexactly(18)
        writer.write(bytes.fromhex("00000003") + list_option * options)
        await until(value_of(plugin, "begun").is_set)
        value_of(plugin, "go").set()
        for _ in range(options):
            reply = await reader.readexactly(20 + 5 + 20)
            assert reply[8:16] == bytes.fromhex("00000003 00000002")
            assert reply[-12:] == bytes.fromhex("00000003 00000001 00000000")
        writer.close()
        await writer.wait_closed()
