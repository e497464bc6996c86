"""The module ``nbdkit`` that scripts see."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import pytest

from nbdfleece.nbdkit.calls import Call, Client, current
from nbdfleece.nbdkit.module import Server, make_module

from .conftest import NBDKITS, OURS, need
from .in_process import Inside

SHOW = """
import nbdkit
API_VERSION = 2
def show(value):
    return value if isinstance(value, int) else "function"
def dump_plugin():
    names = {name: show(getattr(nbdkit, name)) for name in dir(nbdkit) if name[0] != "_"}
    print("names=", sorted(names.items()))
def config(key, value): pass
def open(readonly): pass
def get_size(h): pass
def pread(h, buf, offset, flags): pass
"""


def test_module_has_the_names_and_values_of_nbdkit(tmp_path: Path) -> None:
    host = NBDKITS["nbdkit-1.42"]
    need(host, tmp_path)
    script = tmp_path / "show.py"
    script.write_text(SHOW)
    found = [
        subprocess.run(
            each.argv(tmp_path, "--dump-plugin", str(script), "key=value"),
            check=True,
            capture_output=True,
            text=True,
        ).stdout.splitlines()
        for each in (host, OURS)
    ]
    theirs, ours = ([line for line in lines if line.startswith("names=")] for lines in found)
    assert ours == theirs
    assert len(ours) == 1
    for name in ("name", "api_version", "max_thread_model", "thread_model"):
        lines = [[line for line in lines if line.startswith(f"{name}=")] for lines in found]
        assert lines[0] == lines[1] != []


def test_outside_of_a_connection_nothing_is_known() -> None:
    module = make_module(Server())
    for name in ("export_name", "is_tls", "peer_pid", "peer_tls_dn"):
        with pytest.raises(RuntimeError):
            getattr(module, name)()
    module.set_error(5)
    with pytest.raises(OverflowError):
        module.set_error(1 << 40)
    with pytest.raises(TypeError):
        module.parse_size(5)
    with pytest.raises(ValueError, match="size"):
        module.parse_size("many")


def test_what_the_client_is_not_is_an_error() -> None:
    module = make_module(Server())
    token = current.set(Call(Client(disconnect=lambda force: None)))
    try:
        assert module.peer_tls_dn() == module.peer_tls_issuer_dn() == ""
        assert module.is_tls() is False
        with pytest.raises(ValueError, match="Unable to get client pid"):
            module.peer_pid()
        with pytest.raises(RuntimeError, match="no export was asked for"):
            module.export_name()
    finally:
        current.reset(token)


def test_stdin_is_free_until_clients_come() -> None:
    server = Server()
    module = make_module(server)
    assert module.stdio_safe()
    server.is_configured = True
    assert not module.stdio_safe()
    assert not make_module(Server(uses_stdin=True)).stdio_safe()


def test_too_long_a_sleep_is_none(caplog: pytest.LogCaptureFixture) -> None:
    make_module(Server()).nanosleep(-1, 0)
    assert "sleep request is too long" in caplog.text


async def test_script_knows_its_client(inside: Inside) -> None:
    plugin = inside.load(
        """
        import os
        seen = []
        def preconnect(readonly): seen.append(nbdkit.peer_uid())
        def open(readonly):
            seen.append((nbdkit.export_name(), nbdkit.is_tls(), nbdkit.peer_pid() == os.getpid()))
        def default_export(readonly, is_tls): return "main"
        """
    )
    async with inside.serve(plugin):
        await inside.act(("go", ""), opts=True)
    assert plugin.script._module.seen == [os.geteuid(), ("main", False, True)]
