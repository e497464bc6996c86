"""The fixture as docs/testing.md has it: by ``pytest_plugins``, in a project that is not ours."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

TEST = """
import nbd
from nbdfleece.testing import Command, Fail

def read(uri, length):
    client = nbd.NBD()
    client.connect_uri(uri)
    return client.pread(length, 0)

def test_plain_function(nbd_server):
    one, two = nbd_server(b"one"), nbd_server(b"two")
    assert read(one.uri, 3) + read(two.uri, 3) == b"onetwo"

def test_server_is_gone_with_its_test(nbd_server):
    server = nbd_server(b"x", faults=[Fail(command=Command.READ)])
    try:
        read(server.uri, 1)
    except nbd.Error:
        assert [seen.command for seen in server.seen] == [Command.READ]
    else:
        raise AssertionError("the fault did not befall")
"""


def test_fixture_is_there_by_pytest_plugins(tmp_path: Path) -> None:
    (tmp_path / "conftest.py").write_text('pytest_plugins = ["nbdfleece.testing"]\n')
    (tmp_path / "test_it.py").write_text(TEST)
    options = ["-q", "-W", "error", "-p", "no:asyncio"]
    words = [sys.executable, "-m", "pytest", *options, str(tmp_path)]
    done = subprocess.run(words, cwd=tmp_path, capture_output=True, text=True)
    assert "2 passed" in done.stdout, done.stdout + done.stderr
