"""``nbdfleece overlay`` against a server of its own."""

from __future__ import annotations

import subprocess

from .conftest import Run, Server
from .test_commands import succeeded


def test_overlay_is_created_listed_written_and_committed(run: Run, server: Server) -> None:
    uri = succeeded(run("overlay", "create", "o", "vda")).strip()
    subprocess.run(["qemu-io", "-f", "raw", "-c", "write -q -P 7 0 4096", uri], check=True)
    lines = succeeded(run("overlay", "list")).splitlines()
    assert lines[0].split() == ["OVERLAY", "CREATED", "DISK", "SNAPSHOT", "URIS"]
    assert lines[1].split()[-3:] == ["vda", "-", uri]
    assert run("overlay", "commit", "o", "--json").json == {}
    live = uri.replace("///o?", "///vda?")
    subprocess.run(["qemu-io", "-f", "raw", "-c", "read -q -P 7 0 4096", live], check=True)
    assert run("overlay", "list", "--json").json == []


def test_overlay_of_a_snapshot_is_discarded(run: Run, server: Server) -> None:
    succeeded(run("snapshot", "create", "s"))
    created = run("overlay", "create", "o", "vda", "--snapshot", "s", "--json").json
    assert created["snapshot"] == "s"
    assert succeeded(run("overlay", "discard", "o")) == ""
    assert run("overlay", "discard", "o").complaint == "there is no overlay 'o'"
