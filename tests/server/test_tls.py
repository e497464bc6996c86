"""TLS with foreign clients (GnuTLS, by libnbd) and with Python's own, byte by byte."""

from __future__ import annotations

import asyncio
import contextlib
import os
import socket
import ssl
import struct
import subprocess
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest

from nbdfleece.errors import UsageError
from nbdfleece.nbd.constants import Command, Option, OptionReply
from nbdfleece.nbd.outcomes import TlsMode
from nbdfleece.server.limits import Limits
from nbdfleece.server.tls import (
    Authorization,
    TlsSettings,
    distinguished_name,
    load_certificates,
    load_keys,
)
from nbdfleece.testing.memory_node import MemoryNode
from tests.pki import make_pki

from .harness import SECONDS_MAX, Client, Serve, Served, export_of, pack_request

MIB = 1 << 20
HELLO = struct.pack(">I", 3)
OLD_PYTHON = sys.version_info < (3, 13)


@pytest.fixture(scope="session")
def pki(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_pki(tmp_path_factory.mktemp("pki"))


def settings(pki: Path, mode: TlsMode = TlsMode.FORCEDTLS, **more: bool) -> TlsSettings:
    return TlsSettings(credentials=load_certificates(pki, **more), mode=mode)


class TlsClient(Client):
    """A client that has done STARTTLS, with Python's own TLS over memory buffers."""

    async def start_tls(self, context: ssl.SSLContext) -> None:
        self.incoming, self.outgoing = ssl.MemoryBIO(), ssl.MemoryBIO()
        self.tls = context.wrap_bio(self.incoming, self.outgoing, server_hostname="localhost")
        await self._until(self.tls.do_handshake)

    async def _until(self, step: Callable[[], object]) -> object:
        while True:
            try:
                return step()
            except ssl.SSLWantReadError:
                await self._exchange()
            finally:
                if self.outgoing.pending:
                    await super().send(self.outgoing.read())

    async def _exchange(self) -> None:
        if self.outgoing.pending:
            await super().send(self.outgoing.read())
        data = await self.loop.sock_recv(self.sock, 65536)
        if data:
            self.incoming.write(data)
        else:
            self.incoming.write_eof()

    async def send(self, data: bytes) -> None:
        if not hasattr(self, "tls"):
            await super().send(data)
            return
        for begin in range(0, len(data), 65536):
            view = memoryview(data)[begin : begin + 65536]
            while view:
                view = view[self.tls.write(view) :]
            await super().send(self.outgoing.read())

    async def receive(self, length: int) -> bytes:
        if not hasattr(self, "tls"):
            return await super().receive(length)
        data = bytearray()
        while len(data) < length:
            missing = length - len(data)
            part = await self._until(partial(self.tls.read, missing))
            if not part:
                raise EOFError
            data += part
        return bytes(data)


def context_for(pki: Path, *, certificate: bool = False) -> ssl.SSLContext:
    context = ssl.create_default_context(cafile=str(pki / "ca-cert.pem"))
    if certificate:
        context.load_cert_chain(pki / "client-cert.pem", pki / "client-key.pem")
    return context


async def connect(served: Served) -> TlsClient:
    sock = socket.socket(socket.AF_UNIX)
    sock.setblocking(False)
    await asyncio.get_running_loop().sock_connect(sock, served.path)
    client = TlsClient(sock)
    served.clients.append(client)
    await client.receive(18)
    await client.send(HELLO)
    return client


async def secure(served: Served, context: ssl.SSLContext) -> TlsClient:
    """A client inside TLS, haggling."""
    client = await connect(served)
    await client.option(Option.STARTTLS)
    assert await client.option_reply() == (OptionReply.ACK, b"")
    await client.start_tls(context)
    return client


async def go(client: Client, export: bytes = b"x") -> int:
    data = struct.pack(">I", len(export)) + export + b"\0\0"
    await client.option(Option.GO, data)
    while (reply := await client.option_reply())[0] == OptionReply.INFO:
        pass
    return reply[0]


async def run(*command: str, **environment: str) -> tuple[int, str]:
    process = await asyncio.create_subprocess_exec(
        *command,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        env={**os.environ, **environment},
    )
    output, _ = await process.communicate()
    return process.returncode, output.decode()


def tls_uri(served: Served, pki: Path, export: str = "x") -> str:
    return (
        f"nbds+unix://localhost/{export}?socket={served.path}"
        f"&tls-certificates={pki}&tls-hostname=localhost"
    )


async def test_data_passes_through_tls_both_ways(serve: Serve, pki: Path) -> None:
    node = MemoryNode(4 * MIB)
    served = serve(node, tls=settings(pki))
    client = await secure(served, context_for(pki))
    assert await go(client) == OptionReply.ACK
    data = os.urandom(3 * MIB)
    assert (await client.perform(Command.WRITE, 512, payload=data)).error == 0
    assert node.content[512 : 512 + len(data)] == data
    assert await client.read(512, len(data)) == data
    assert await client.read(512, len(data)) == data


async def test_many_small_requests_in_one_record_are_answered(serve: Serve, pki: Path) -> None:
    """What OpenSSL holds back must not wait for the socket."""
    client = await secure(serve(MemoryNode(MIB), tls=settings(pki)), context_for(pki))
    assert await go(client) == OptionReply.ACK
    await client.send(pack_request(Command.READ, 0, 512) * 1000)
    for _ in range(1000):
        assert (await client.reply(512)).payload == bytes(512)


async def test_client_that_never_reads_over_tls_is_paused(serve: Serve, pki: Path) -> None:
    limits = Limits(queued_bytes_max=MIB)
    served = serve(MemoryNode(MIB), tls=settings(pki), limits=limits)
    client = await secure(served, context_for(pki))
    assert await go(client) == OptionReply.ACK
    flood = asyncio.ensure_future(client.send(pack_request(Command.READ, 0, 65536) * 20_000))
    await asyncio.sleep(0.3)
    assert not flood.done()
    assert served.server.pool.taken_bytes <= 6 * MIB
    flood.cancel()
    await asyncio.gather(flood, return_exceptions=True)


async def test_close_notify_is_sent_after_disconnect(serve: Serve, pki: Path) -> None:
    client = await secure(serve(MemoryNode(MIB), tls=settings(pki)), context_for(pki))
    assert await go(client) == OptionReply.ACK
    await client.request(Command.DISC)
    # A stream that ends without close_notify would raise ssl.SSLEOFError.
    assert await client._until(partial(client.tls.read, 1)) == b""


@pytest.mark.parametrize("length", [4096, 128 << 10])
async def test_close_notify_behind_a_write_is_noticed(serve: Serve, pki: Path, length: int) -> None:
    """Of a client that then waits for the server's, its socket still open."""
    node = MemoryNode(MIB)
    served = serve(node, tls=settings(pki))
    client = await secure(served, context_for(pki))
    assert await go(client) == OptionReply.ACK
    client.tls.write(pack_request(Command.WRITE, 0, length) + b"w" * length)
    with contextlib.suppress(ssl.SSLWantReadError):
        client.tls.unwrap()
    await Client.send(client, client.outgoing.read())
    async with asyncio.timeout(SECONDS_MAX):
        await served.server.wait_idle()
    assert node.content[:length] == b"w" * length


async def test_forced_tls_refuses_everything_before_tls(serve: Serve, pki: Path) -> None:
    client = await connect(serve(MemoryNode(MIB), tls=settings(pki)))
    assert await go(client) == OptionReply.ERR_TLS_REQD
    await client.option(Option.ABORT)
    assert (await client.option_reply())[0] == OptionReply.ACK


async def test_selective_tls_lets_the_client_choose(serve: Serve, pki: Path) -> None:
    exports = [export_of(MemoryNode(MIB)), export_of(MemoryNode(MIB), "secret", tls_only=True)]
    served = serve(exports, tls=settings(pki, TlsMode.SELECTIVETLS))
    assert await go(await connect(served)) == OptionReply.ACK
    assert await go(await connect(served), b"secret") == OptionReply.ERR_TLS_REQD
    assert await go(await secure(served, context_for(pki)), b"secret") == OptionReply.ACK


async def test_nothing_is_remembered_across_starttls(serve: Serve, pki: Path) -> None:
    """CVE-2021-3716."""
    served = serve(MemoryNode(MIB), tls=settings(pki, TlsMode.SELECTIVETLS))
    client = await connect(served)
    await client.option(Option.STRUCTURED_REPLY)
    await client.option_reply()
    await client.option(Option.STARTTLS)
    await client.option_reply()
    await client.start_tls(context_for(pki))
    assert await go(client) == OptionReply.ACK
    await client.request(Command.READ, 0, 512)
    assert (await client.reply(512)).kind is None, "structured replies were remembered"


async def test_plaintext_behind_starttls_ends_the_connection(serve: Serve, pki: Path) -> None:
    """CVE-2021-3716."""
    client = await connect(serve(MemoryNode(MIB), tls=settings(pki)))
    await client.send(
        b"IHAVEOPT"
        + struct.pack(">II", Option.STARTTLS, 0)
        + b"IHAVEOPT"
        + struct.pack(">II", Option.LIST, 0)
    )
    await client.receive(20)
    assert await client.is_at_end()


@pytest.mark.parametrize("junk", [b"", b"\x16\x03\x01\x00\x05hello", b"GET / HTTP/1.0\r\n\r\n"])
async def test_failed_tls_handshake_ends_the_connection(
    serve: Serve, pki: Path, junk: bytes
) -> None:
    served = serve(MemoryNode(MIB), tls=settings(pki))
    client = await connect(served)
    await client.option(Option.STARTTLS)
    await client.option_reply()
    await client.send(junk)
    client.sock.shutdown(socket.SHUT_WR)
    await served.server.wait_idle()


async def test_tls_handshake_has_a_time_limit(
    serve: Serve, pki: Path, caplog: pytest.LogCaptureFixture
) -> None:
    served = serve(MemoryNode(MIB), tls=settings(pki), limits=Limits(handshake_seconds=0.2))
    with contextlib.suppress(EOFError, ConnectionError):  # it may be over before the reply
        client = await connect(served)
        await client.option(Option.STARTTLS)
        await client.option_reply()
    await served.server.wait_idle()
    assert "handshake not done after 0.2 s" in caplog.text


async def test_tls_1_1_is_refused(serve: Serve, pki: Path) -> None:
    served = serve(MemoryNode(MIB), tls=settings(pki))
    context = context_for(pki)
    context.set_ciphers("DEFAULT@SECLEVEL=0")
    with pytest.warns(DeprecationWarning, match="TLSv1_1"):
        context.minimum_version = ssl.TLSVersion.TLSv1_1
    with pytest.warns(DeprecationWarning, match="TLSv1_1"):
        context.maximum_version = ssl.TLSVersion.TLSv1_1
    with pytest.raises(ssl.SSLError):
        await secure(served, context)


async def test_client_certificate_decides_about_exports(serve: Serve, pki: Path) -> None:
    authorization = Authorization(
        identities={"x": ["CN=client,*,O=Example\\, Inc."], "y": ["CN=somebody"]}, otherwise=[]
    )
    served = serve(
        [export_of(MemoryNode(MIB), name) for name in "xyz"],
        tls=settings(pki, verify_clients=True),
        authorization=authorization,
    )
    client = await secure(served, context_for(pki, certificate=True))
    assert await go(client, b"y") == OptionReply.ERR_POLICY
    assert await go(client, b"z") == OptionReply.ERR_POLICY
    await client.option(Option.LIST)
    assert (await client.option_reply())[1] == b"\0\0\0\1x"
    assert (await client.option_reply())[0] == OptionReply.ACK
    assert await go(client, b"x") == OptionReply.ACK


async def test_client_without_the_certificate_that_is_asked_for_is_refused(
    serve: Serve, pki: Path
) -> None:
    served = serve(MemoryNode(MIB), tls=settings(pki, verify_clients=True))
    with pytest.raises((ssl.SSLError, EOFError, ConnectionError)):
        await go(await secure(served, context_for(pki)))
    await served.server.wait_idle()


async def test_libnbd_copies_over_tls(serve: Serve, pki: Path, tmp_path: Path) -> None:
    node = MemoryNode(os.urandom(5 * MIB))
    served = serve(node, tls=settings(pki, verify_clients=True))
    code, output = await run("nbdcopy", tls_uri(served, pki), str(tmp_path / "out"))
    assert code == 0, output
    assert (tmp_path / "out").read_bytes() == node.content
    code, output = await run("nbdinfo", tls_uri(served, pki))
    assert code == 0, output
    assert "with TLS" in output


def test_missing_and_broken_files_are_named(pki: Path, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"cannot read .*server-cert\.pem: No such file"):
        load_certificates(tmp_path)
    for name in ("server-cert.pem", "server-key.pem"):
        (tmp_path / name).write_text("nonsense")
    with pytest.raises(UsageError, match="cannot be used"):
        load_certificates(tmp_path)
    for name in ("server-cert.pem", "server-key.pem"):
        (tmp_path / name).write_bytes((pki / name).read_bytes())
    load_certificates(tmp_path)
    with pytest.raises(UsageError, match=r"ca-cert\.pem"):
        load_certificates(tmp_path, verify_clients=True)


def test_distinguished_name_is_written_as_rfc_4514_has_it() -> None:
    subject = (
        (("countryName", "GB"),),
        (("organizationName", 'A, "B" <C>'),),
        (("commonName", " x "), ("userId", "1")),
    )
    assert (
        distinguished_name({"subject": subject}) == 'CN=\\ x\\ +UID=1,O=A\\, \\"B\\" \\<C\\>,C=GB'
    )
    assert distinguished_name({}) is None
    assert distinguished_name(None) is None


def test_authorization_compares_whole_names() -> None:
    """CVE-2013-6410: 10.0.0.1 let 10.0.0.100 in, too; there are no lists of addresses here."""
    rules = Authorization(identities={"x": ["CN=a"], "snap/*": ["CN=b"]}, otherwise=())
    assert rules.refusal("x", "CN=a") is None
    for export, identity in (("x", "CN=ab"), ("x", "xCN=a"), ("xy", "CN=a"), ("x", "CN=a,O=b")):
        assert rules.refusal(export, identity) is not None
    assert rules.refusal("snap/vda", "CN=b") is None
    assert rules.refusal("snap", "CN=b") is not None


def test_authorization_without_an_entry_follows_the_default() -> None:
    assert Authorization().refusal("x", None) is None
    closed = Authorization(otherwise=["CN=*"])
    assert closed.refusal("x", "CN=a") is None
    assert "authenticate" in closed.refusal("x", None)
    assert "may not" in closed.refusal("x", "O=a")


@pytest.mark.skipif(not OLD_PYTHON, reason="this Python has TLS-PSK")
def test_keys_are_refused_with_a_reason_before_python_3_13(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"needs Python 3\.13"):
        load_keys(tmp_path / "keys")


@pytest.mark.skipif(OLD_PYTHON, reason="TLS-PSK needs Python 3.13")
async def test_libnbd_connects_with_a_key(
    serve: Serve, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    keys = tmp_path / "keys.psk"
    keys.write_text(f"alice:{os.urandom(32).hex()}\nbob:{os.urandom(32).hex()}\n")
    served = serve(
        MemoryNode(MIB),
        tls=TlsSettings(credentials=load_keys(keys)),
        authorization=Authorization(identities={"x": ["alice"]}),
    )
    uri = f"nbds+unix://{{}}@/x?socket={served.path}&tls-psk-file={keys}"
    code, output = await run("nbdinfo", uri.format("alice"))
    assert code == 0, output
    code, _ = await run("nbdinfo", uri.format("bob"))
    assert code != 0
    assert "'bob' may not use export 'x'" in caplog.text
    keys.write_text("alice:" + "00" * 32 + "\n")
    code, _ = await run("nbdinfo", uri.format("alice"))
    assert code != 0


@pytest.mark.skipif(OLD_PYTHON, reason="TLS-PSK needs Python 3.13")
@pytest.mark.parametrize("text", ["", "alice", "alice:xyz", "alice:abc", ":ab"])
def test_bad_file_of_keys_is_refused_by_line(tmp_path: Path, text: str) -> None:
    (tmp_path / "keys").write_text(text)
    with pytest.raises(UsageError, match="keys"):
        load_keys(tmp_path / "keys")
