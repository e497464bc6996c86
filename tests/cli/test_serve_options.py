"""Options of ``nbdfleece serve`` about TLS, sockets, exports and limits, by foreign clients."""

from __future__ import annotations

import json
import os
import socket
import stat
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import pytest

from tests.pki import make_pki

from .conftest import PROGRAM, SECONDS_MAX, Run, Start, environment, make_image

MIB = 1 << 20
OLD_PYTHON = sys.version_info < (3, 13)


@pytest.fixture
def nbd() -> Any:
    return pytest.importorskip("nbd", reason="libnbd's Python binding is not installed")


@pytest.fixture(scope="module")
def pki(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_pki(tmp_path_factory.mktemp("pki"))


@pytest.fixture
def image(tmp_path: Path) -> Path:
    path = make_image(tmp_path / "a.qcow2")
    write = f"write -P 7 0 {MIB}"
    subprocess.run(["qemu-io", "-f", "qcow2", "-c", write, path], check=True, capture_output=True)
    return path


def program(*words: str | Path, status: int = 0) -> str:
    done = subprocess.run(list(map(str, words)), capture_output=True, text=True, timeout=120)
    assert bool(done.returncode) == bool(status), done.stderr
    return done.stdout + done.stderr


def listing(uri: str) -> dict[str, Any]:
    return json.loads(program("nbdinfo", "--json", "--no-content", uri))["exports"][0]


def secure(uri: str, pki: Path) -> str:
    """The URI with what a client must know to trust the server, and to be trusted."""
    joint = "&" if "?" in uri else "?"
    return f"{uri}{joint}tls-certificates={pki}&tls-hostname=localhost"


# -- TLS ------------------------------------------------------------------------------


@pytest.mark.parametrize("listen", ["unix:n", "tcp:127.0.0.1:0", "tcp:[::1]:0"])
def test_foreign_clients_copy_over_tls(
    tmp_path: Path, image: Path, pki: Path, start: Start, listen: str
) -> None:
    """nbds:// and nbds+unix:// with nbdinfo, nbdcopy and qemu-img."""
    words = ("--listen", listen, "--tls-certificates", pki, "--tls-verify-peer", "--print-uri")
    uri = start("--disk", f"vda={image}", *words).ready.strip()
    assert uri.startswith("nbds")
    assert "with TLS" in program("nbdinfo", secure(uri, pki))
    program("nbdcopy", secure(uri, pki), tmp_path / "out")
    assert (tmp_path / "out").read_bytes() == b"\7" * MIB + bytes(15 * MIB)
    (tmp_path / "in").write_bytes(os.urandom(MIB))
    os.truncate(tmp_path / "in", 16 * MIB)
    program("nbdcopy", "--flush", tmp_path / "in", secure(uri, pki))
    credentials = f"tls-creds-x509,id=t,endpoint=client,dir={pki}"
    target = f"driver=nbd,{qemu_address(uri)},export=vda,tls-creds=t,tls-hostname=localhost"
    program(
        *("qemu-img", "convert", "--object", credentials, "--image-opts", target),
        *("-O", "raw", tmp_path / "out2"),
    )
    assert (tmp_path / "out2").read_bytes() == (tmp_path / "in").read_bytes()


def qemu_address(uri: str) -> str:
    if "+unix" in uri:
        return f"server.type=unix,server.path={uri.partition('socket=')[2]}"
    host, _, port = uri.removeprefix("nbds://").partition("/")[0].rpartition(":")
    return f"server.type=inet,server.host={host.strip('[]')},server.port={port}"


def test_required_tls_refuses_plaintext(image: Path, pki: Path, start: Start) -> None:
    server = start("--disk", f"vda={image}", "--listen", "unix:n", "--tls-certificates", pki)
    plain = server.ready.split()[-1].replace("nbds", "nbd")
    assert "TLS" in program("nbdinfo", plain, status=1)


def test_client_without_certificate_is_refused(
    tmp_path: Path, image: Path, pki: Path, start: Start
) -> None:
    words = ("--listen", "unix:n", "--tls-certificates", pki, "--tls-verify-peer")
    server = start("--disk", f"vda={image}", *words)
    (tmp_path / "ca-cert.pem").write_bytes((pki / "ca-cert.pem").read_bytes())
    program("nbdinfo", secure(server.ready.split()[-1], tmp_path), status=1)
    assert "TLS handshake failed" not in server.ready
    program("nbdinfo", secure(server.ready.split()[-1], pki))


def test_selective_tls_hides_exports_that_need_it(
    tmp_path: Path, image: Path, pki: Path, start: Start
) -> None:
    other = make_image(tmp_path / "b.qcow2")
    words = ("--tls", "on", "--tls-certificates", pki, "--export", "sec*:tls-only=on", "--json")
    server = start(
        "--disk", f"vda={image}", "--disk", f"secret={other}", "--listen", "unix:n", *words
    )
    vda, secret = (export["uris"][0] for export in json.loads(server.ready)["exports"])
    assert vda.startswith("nbd+unix:")
    assert secret.startswith("nbds+unix:")
    program("nbdinfo", vda)
    program("nbdinfo", secret.replace("nbds", "nbd"), status=1)
    program("nbdinfo", secure(secret, pki))
    assert "secret" not in program("nbdinfo", "--list", vda)
    assert "secret" in program("nbdinfo", "--list", secure(secret, pki))


def test_distinguished_name_decides_about_exports(
    tmp_path: Path, image: Path, pki: Path, start: Start
) -> None:
    other = make_image(tmp_path / "b.qcow2")
    server = start(
        *("--disk", f"vda={image}", "--disk", f"vdb={other}", "--listen", "unix:n", "--json"),
        *("--tls-certificates", pki, "--tls-verify-peer"),
        *("--authorize", "vda", "CN=client,*,O=Example\\, Inc.", "--authorize", "vdb", "CN=root"),
    )
    vda, vdb = (export["uris"][0] for export in json.loads(server.ready)["exports"])
    program("nbdinfo", secure(vda, pki))
    program("nbdinfo", secure(vdb, pki), status=1)
    assert "vdb" not in program("nbdinfo", "--list", secure(vda, pki))
    assert "may not use export 'vdb'" in server.end().errors


@pytest.mark.skipif(OLD_PYTHON, reason="TLS-PSK needs Python 3.13")
def test_foreign_clients_connect_with_a_key(tmp_path: Path, image: Path, start: Start) -> None:
    keys = tmp_path / "keys.psk"
    program("psktool", "-u", "alice", "-p", keys)
    server = start(
        *("--disk", f"vda={image}", "--listen", "unix:n", "--tls-psk", keys),
        *("--authorize", "*", "alice"),
    )
    uri = server.ready.split()[-1].replace("://", "://alice@") + f"&tls-psk-file={keys}"
    program("nbdcopy", uri, tmp_path / "out")
    assert (tmp_path / "out").read_bytes()[:MIB] == b"\7" * MIB
    credentials = f"tls-creds-psk,id=t,endpoint=client,dir={tmp_path},username=alice"
    target = f"driver=nbd,server.type=unix,server.path={tmp_path}/n,export=vda,tls-creds=t"
    program("qemu-img", "info", "--object", credentials, "--image-opts", target)


@pytest.mark.skipif(not OLD_PYTHON, reason="this Python has TLS-PSK")
def test_keys_are_refused_with_a_reason_before_python_3_13(image: Path, run: Run) -> None:
    outcome = run("serve", "--disk", f"vda={image}", "--tls-psk", "keys.psk")
    assert outcome.status == 2
    assert "needs Python 3.13" in outcome.complaint


# -- sockets --------------------------------------------------------------------------


def test_unix_socket_has_the_mode_and_owner_that_were_asked_for(
    tmp_path: Path, image: Path, start: Start
) -> None:
    uid, gid = (65534, 65533) if os.geteuid() == 0 else (os.getuid(), os.getgid())
    words = ("--socket-mode", "0640", "--socket-owner", f"{uid}:{gid}")
    start("--disk", f"vda={image}", "--listen", "unix:n", *words)
    info = (tmp_path / "n").stat()
    assert (stat.S_IMODE(info.st_mode), info.st_uid, info.st_gid) == (0o640, uid, gid)


def test_client_that_starts_the_server_on_stdin_is_served(
    tmp_path: Path, image: Path, nbd: Any
) -> None:
    handle = nbd.NBD()
    handle.set_export_name("vda")
    words = ["serve", "--disk", f"vda={image}", "--stdio", "--control", "none"]
    handle.connect_command([*PROGRAM, *words])
    assert handle.pread(512, 0) == b"\7" * 512
    handle.pwrite(b"8" * 512, 0)
    handle.shutdown()
    del handle  # waits for the server's end
    subprocess.run(["qemu-img", "check", "-q", image], check=True)


def test_inetd_gives_its_socket_thrice_and_gets_no_log_in_it(tmp_path: Path, image: Path) -> None:
    ours, theirs = socket.socketpair()
    words = ["serve", "--disk", f"vda={image}", "--stdio", "--control", "none", "-vv"]
    process = subprocess.Popen(
        [*PROGRAM, *words], stdin=theirs, stdout=theirs, stderr=theirs, env=environment(tmp_path)
    )
    theirs.close()
    ours.settimeout(120)
    assert ours.recv(18, socket.MSG_WAITALL)[:8] == b"NBDMAGIC"
    ours.sendall(b"\0\0\0\3IHAVEOPT\0\0\0\2\0\0\0\0")
    reply = ours.recv(1 << 16, socket.MSG_WAITALL)
    assert reply == b"\0\3\xe8\x89\4\x55\x65\xa9\0\0\0\2\0\0\0\1\0\0\0\0"
    assert process.wait(120) == 0
    ours.close()


def test_systemd_opens_the_socket(image: Path, nbd: Any) -> None:
    handle = nbd.NBD()
    handle.set_export_name("vda")
    words = ["serve", "--disk", f"vda={image}", "--control", "none"]
    handle.connect_systemd_socket_activation([*PROGRAM, *words])
    assert handle.pread(512, 0) == b"\7" * 512
    handle.shutdown()


def test_vsock_is_listened_on_where_the_kernel_has_it(image: Path, start: Start, run: Run) -> None:
    try:
        socket.socket(socket.AF_VSOCK, socket.SOCK_STREAM).close()
    except OSError:
        outcome = run("serve", "--disk", f"vda={image}", "--listen", "vsock:any:10809")
        assert outcome.status == 1
        assert "the kernel has none" in outcome.complaint
        return
    words = ("--listen", "vsock:any:20809", "--listen", "unix:n")
    assert "nbd+vsock://" in start("--disk", f"vda={image}", *words).ready


# -- exports and limits ---------------------------------------------------------------


def test_export_settings_reach_clients_and_are_enforced(
    image: Path, start: Start, nbd: Any
) -> None:
    rule = "minimum-block-size=4k,preferred-block-size=64k,maximum-payload=1M,rotational=on"
    words = ("--export", f"vd*:{rule},allocation-depth=off,multi-conn=off")
    uri = start("--disk", f"vda={image}", "--listen", "unix:n", *words).ready.split()[-1]
    found = listing(uri)
    sizes = [found[f"block_size_{name}"] for name in ("minimum", "preferred", "maximum")]
    assert sizes == [4096, 65536, MIB]
    assert found["is_rotational"]
    assert not found["can_multi_conn"]
    assert list(found["contexts"]) == ["base:allocation"]
    handle = nbd.NBD()
    handle.set_strict_mode(0)
    handle.connect_uri(uri)
    for offset, length in ((512, 4096), (0, 512)):
        with pytest.raises(nbd.Error, match="Invalid argument"):
            handle.pread(length, offset)
    with pytest.raises(nbd.Error, match="Invalid argument"):
        handle.pwrite(bytes(2 * MIB), 0)
    assert handle.pread(2 * MIB, 0)[: MIB + 1] == b"\7" * MIB + b"\0"
    handle.shutdown()


def test_rules_hold_for_exports_of_snapshots_too(image: Path, start: Start, run: Run) -> None:
    start("--disk", f"vda={image}", "--listen", "unix:n", "--export", "s/*:minimum-block-size=512")
    assert run("snapshot", "create", "s").status == 0
    (uri,) = run("export", "add", "s", "vda").output.split()
    assert listing(uri)["block_size_minimum"] == 512


def test_clients_that_ask_no_sizes_are_turned_away_where_it_is_wished(
    tmp_path: Path, image: Path, start: Start
) -> None:
    rule = "vda:minimum-block-size=4k,require-block-size=on"
    start("--disk", f"vda={image}", "--listen", "unix:n", "--export", rule)
    with socket.socket(socket.AF_UNIX) as client:
        client.connect(str(tmp_path / "n"))
        client.recv(18, socket.MSG_WAITALL)
        client.sendall(b"\0\0\0\3IHAVEOPT\0\0\0\7\0\0\0\x09\0\0\0\3vda\0\0")
        header = client.recv(20, socket.MSG_WAITALL)
        assert header[12:16] == b"\0\0\0\3", "NBD_REP_INFO with the sizes comes first"
        client.recv(int.from_bytes(header[16:], "big"), socket.MSG_WAITALL)
        assert client.recv(20, socket.MSG_WAITALL)[12:16] == b"\x80\0\0\x08"


@contextmanager
def clients_of(path: Path, count: int) -> Iterator[list[socket.socket]]:
    """Connected, the first one first."""
    with ExitStack() as stack:
        clients = [stack.enter_context(socket.socket(socket.AF_UNIX)) for _ in range(count)]
        for client in clients:
            client.settimeout(SECONDS_MAX)
            client.connect(str(path))
        yield clients


def connect_late(nbd: Any, uri: str) -> Any:
    """A client that is let in as soon as the server has seen that others have left."""
    deadline = time.monotonic() + SECONDS_MAX
    while True:
        handle = nbd.NBD()
        try:
            handle.connect_uri(uri)
        except nbd.Error:
            assert time.monotonic() < deadline
        else:
            return handle


def test_limits_that_are_hit_are_logged(
    tmp_path: Path, image: Path, start: Start, nbd: Any
) -> None:
    limits = ("connections-max=2", "idle-seconds=0.2", "options-max=3")
    words = [word for limit in limits for word in ("--limit", limit)]
    server = start("--disk", f"vda={image}", "--listen", "unix:n", *words)
    with clients_of(tmp_path / "n", 3) as (first, second, third):
        assert third.recv(1) == b"", "one too many"
        second.recv(18, socket.MSG_WAITALL)
        first.recv(18, socket.MSG_WAITALL)
        first.sendall(b"\0\0\0\3" + b"IHAVEOPT\0\0\0\x63\0\0\0\0" * 4)
        while first.recv(4096):
            pass
    late = connect_late(nbd, server.ready.split()[-1])
    while late.poll(1000) >= 0 and not late.aio_is_dead() and not late.aio_is_closed():
        pass
    log = server.end().errors
    for text in ("2 are open", "more than 3 options", "idle for 0.2 s"):
        assert text in log


def test_handshake_that_is_too_slow_is_logged(tmp_path: Path, image: Path, start: Start) -> None:
    words = ("--listen", "unix:n", "--limit", "handshake-seconds=0.2")
    server = start("--disk", f"vda={image}", *words)
    with clients_of(tmp_path / "n", 1) as (client,):
        client.recv(18, socket.MSG_WAITALL)
        assert client.recv(1) == b""
    assert "handshake not done after 0.2 s" in server.end().errors


@pytest.mark.parametrize(
    "words",
    [
        ["--tls", "on"],
        ["--tls-verify-peer"],
        ["--tls-certificates", "."],
        ["--tls-certificates", ".", "--tls-psk", "x"],
        ["--authorize", "vda", "CN=x"],
        ["--export", "vda"],
        ["--export", "vda:colour=red"],
        ["--export", "vda:tls-only=maybe"],
        ["--export", "vda:tls-only=on"],
        ["--export", "vda:minimum-block-size=3"],
        ["--export", "vda:minimum-block-size=128k"],
        ["--export", "vda:maximum-payload=4k"],
        ["--export", "vda:connections-max=0"],
        ["--limit", "requests=1"],
        ["--limit", "idle_seconds=1"],
        ["--limit", "idle-seconds=-1"],
        ["--limit", "idle-seconds=nan"],
        ["--limit", "connections-max=0"],
        ["--limit", "bytes-in-flight-max=1M"],
        ["--limit", "payload-advertised-max=1k"],
        ["--limit", "wire=1"],
        ["--socket-mode", "rw"],
        ["--socket-owner", "nobody-of-that-name"],
        ["--stdio", "--json"],
    ],
)
def test_options_that_cannot_be_meant_are_status_2(image: Path, run: Run, words: list[str]) -> None:
    before = image.read_bytes()
    outcome = run("serve", "--disk", f"vda={image}", *words)
    assert outcome.status == 2
    assert outcome.complaint
    assert image.read_bytes() == before
