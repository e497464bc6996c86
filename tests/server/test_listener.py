"""Sockets to listen on: whose they are, what is in the way, what is left behind."""

from __future__ import annotations

import errno
import fcntl
import os
import socket
import stat
import subprocess
import sys
from pathlib import Path

import pytest

from nbdfleece.errors import UsageError
from nbdfleece.nbd.uri import parse_uri
from nbdfleece.server import listener as listener_module
from nbdfleece.server.listener import (
    Listener,
    listen_systemd,
    listen_tcp,
    listen_unix,
    listen_uri,
    listen_vsock,
)


def connects(path: str) -> bool:
    with socket.socket(socket.AF_UNIX) as client:
        try:
            client.connect(path)
        except ConnectionRefusedError:
            return False
    return True


def test_unix_socket_has_the_mode_that_was_asked_for(tmp_path: Path) -> None:
    path = str(tmp_path / "s")
    listener = listen_unix(path, mode=0o660, uid=os.getuid(), gid=os.getgid())
    assert stat.S_IMODE(os.stat(path).st_mode) == 0o660
    assert connects(path)
    listener.close()
    assert not os.path.exists(path)


def test_live_socket_is_not_taken_over(tmp_path: Path) -> None:
    path = str(tmp_path / "s")
    listener = listen_unix(path)
    with pytest.raises(UsageError, match="another server listens there"):
        listen_unix(path)
    assert connects(path)
    listener.close()


def test_stale_socket_is_replaced(tmp_path: Path) -> None:
    path = str(tmp_path / "s")
    listen_unix(path).sock.close()
    assert not connects(path)
    listener = listen_unix(path)
    assert connects(path)
    listener.close()


def test_other_file_is_never_removed(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_text("precious")
    with pytest.raises(UsageError, match="not a socket"):
        listen_unix(str(path))
    assert path.read_text() == "precious"


def test_missing_folder_and_long_path_are_refused_by_name(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"cannot listen on '.*/missing/s': No such file"):
        listen_unix(str(tmp_path / "missing" / "s"))
    with pytest.raises(UsageError, match="too long"):
        listen_unix(str(tmp_path / ("s" * 200)))


def test_socket_of_a_successor_is_not_removed(tmp_path: Path) -> None:
    path = str(tmp_path / "s")
    first = listen_unix(path)
    os.rename(path, path + ".old")
    second = listen_unix(path)
    first.close()
    assert connects(path)
    second.close()


def test_abstract_socket_listens(tmp_path: Path) -> None:
    path = f"\0nbdfleece-test-{os.getpid()}"
    listener = listen_unix(path)
    assert connects(path)
    with pytest.raises(UsageError, match="another server"):
        listen_unix(path)
    listener.close()


def test_tcp_listens_on_ipv4_and_ipv6_with_one_port() -> None:
    listeners = listen_tcp("localhost", 0)
    ports = {listener.sock.getsockname()[1] for listener in listeners}
    assert len(ports) == 1
    for listener in listeners:
        host, port = listener.sock.getsockname()[:2]
        socket.create_connection((host, port)).close()
        assert str(port) in str(listener.uri("x"))
        listener.close()


def test_tcp_port_that_is_free_at_one_address_only_is_not_chosen(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    listen = listener_module._listen_address
    taken: list[int] = []

    def listen_unless_taken(family: int, address: tuple[str, int]) -> Listener:
        if address[1] and not taken:
            taken.append(address[1])
            raise OSError(errno.EADDRINUSE, "in use")
        return listen(family, address)

    monkeypatch.setattr(listener_module, "_listen_address", listen_unless_taken)
    monkeypatch.setattr(
        listener_module,
        "_resolve",
        lambda *_: [
            (socket.AF_INET, 1, 6, "", ("127.0.0.1", 0)),
            (socket.AF_INET, 1, 6, "", ("127.0.0.2", 0)),
        ],
    )
    listeners = listen_tcp("localhost", 0)
    assert len(taken) == 1
    assert len({listener.sock.getsockname()[1] for listener in listeners}) == 1
    for listener in listeners:
        listener.close()


def test_tcp_port_in_use_is_refused() -> None:
    (listener,) = listen_tcp("127.0.0.1", 0)
    port = listener.sock.getsockname()[1]
    with pytest.raises(UsageError, match=f"127.0.0.1:{port}.*in use"):
        listen_tcp("127.0.0.1", port)
    listener.close()


def test_tcp_name_that_does_not_exist_is_refused() -> None:
    with pytest.raises(UsageError, match=r"cannot listen on 'no\.such\.host\.invalid:"):
        listen_tcp("no.such.host.invalid")


@pytest.mark.skipif(not os.path.exists("/dev/vsock"), reason="the kernel has no vsock")
def test_vsock_listens() -> None:
    listener = listen_vsock(port=51234)
    assert str(listener.uri("x")).startswith("nbd+vsock://")
    listener.close()


def test_uri_says_where_to_listen(tmp_path: Path) -> None:
    (unix,) = listen_uri(parse_uri(f"nbd+unix:///ignored?socket={tmp_path}/s"))
    assert str(unix.uri("a b")) == f"nbd+unix:///a%20b?socket={tmp_path}/s"
    unix.close()
    (tcp,) = listen_uri(parse_uri("nbd://127.0.0.1:0/"))
    tcp.close()


def test_systemd_sockets_are_adopted(tmp_path: Path) -> None:
    """The protocol of sd_listen_fds(3), in a process of its own."""
    script = (
        "import os, sys\n"
        "for target, source in enumerate(sys.argv[1:], 3):\n"
        "    os.dup2(int(source), target)\n"
        "from nbdfleece.server.listener import listen_systemd\n"
        "for listener in listen_systemd({**os.environ, 'LISTEN_PID': str(os.getpid())}):\n"
        "    print(listener.name, listener.uri('x'), os.get_inheritable(listener.sock.fileno()))\n"
    )
    with socket.socket(socket.AF_UNIX) as first, socket.create_server(("127.0.0.1", 0)) as second:
        first.bind(str(tmp_path / "s"))
        first.listen()
        saved = [fcntl.fcntl(sock.fileno(), fcntl.F_DUPFD, 10) for sock in (first, second)]
        found = subprocess.run(
            [sys.executable, "-c", script, *map(str, saved)],
            env={**os.environ, "LISTEN_FDS": "2", "LISTEN_FDNAMES": "disk:net"},
            pass_fds=saved,
            capture_output=True,
            text=True,
            check=False,
        )
        for fd in saved:
            os.close(fd)
        port = second.getsockname()[1]
    assert found.stdout.splitlines() == [
        f"disk nbd+unix:///x?socket={tmp_path}/s False",
        f"net nbd://127.0.0.1:{port}/x False",
    ], found.stderr


def test_sockets_for_another_process_are_left_alone() -> None:
    assert listen_systemd({"LISTEN_PID": "1", "LISTEN_FDS": "1"}) == []
    assert listen_systemd({}) == []
