"""Overlays over the socket, written to and read by QEMU's and libnbd's clients."""

from __future__ import annotations

import asyncio
import subprocess
from typing import Any

import pytest
from qemu.qmp import ExecuteError, QMPClient

from nbdfleece.daemon import Daemon, DaemonOptions


async def qemu_io(uri: str, *commands: str) -> None:
    """Carry out commands on an export."""
    words = [word for command in commands for word in ("-c", command)]
    process = await asyncio.create_subprocess_exec(
        "qemu-io", "-f", "raw", *words, uri, stdout=subprocess.PIPE
    )
    output, _ = await process.communicate()
    assert process.returncode == 0, output
    assert b"failed" not in output, output


async def refusal(qmp: QMPClient, command: str, **arguments: Any) -> tuple[str, str]:
    with pytest.raises(ExecuteError) as caught:
        await qmp.execute(command, arguments)
    return caught.value.error_class, str(caught.value)


async def test_committed_overlay_is_in_the_disk_and_gone(qmp: QMPClient, daemon: Daemon) -> None:
    created = await qmp.execute("overlay-create", {"name": "restore", "disk": "vda"})
    assert await qmp.execute("query-overlays") == [created]
    assert (created["disk"], created["snapshot"]) == ("vda", None)
    (live,) = daemon.export_uris("vda")
    await qemu_io(created["uris"][0], "write -P 5 65536 4096", "read -P 5 65536 4096")
    await qemu_io(live, "read -P 0 65536 4096")
    assert await qmp.execute("overlay-commit", {"name": "restore"}) == {}
    await qemu_io(live, "read -P 5 65536 4096")
    assert await qmp.execute("query-overlays") == []
    assert not daemon.exports.has("restore")


async def test_discarded_overlay_of_a_snapshot_changes_nothing(
    qmp: QMPClient, daemon: Daemon
) -> None:
    (live,) = daemon.export_uris("vda")
    await qemu_io(live, "write -P 1 0 4096")
    await qmp.execute("snapshot-create", {"name": "s"})
    await qemu_io(live, "write -P 2 0 4096")
    created = await qmp.execute("overlay-create", {"name": "o", "disk": "vda", "snapshot": "s"})
    await qemu_io(created["uris"][0], "read -P 1 0 4096", "write -P 3 0 512", "read -P 3 0 512")
    stands = "overlay 'o' stands on snapshot 's'"
    assert await refusal(qmp, "snapshot-delete", name="s") == ("GenericError", stands)
    await qmp.execute("overlay-discard", {"name": "o"})
    await qmp.execute("snapshot-delete", {"name": "s"})
    await qemu_io(live, "read -P 2 0 4096")


async def test_unknown_and_taken_names_are_refused_by_name(qmp: QMPClient) -> None:
    await qmp.execute("snapshot-create", {"name": "s", "disks": ["vdb"]})
    cases = [
        ("overlay-create", {"name": "o", "disk": "sda"}, "there is no disk 'sda'"),
        ("overlay-create", {"name": "vda", "disk": "vda"}, "export 'vda' exists already"),
        (
            "overlay-create",
            {"name": "o", "disk": "vda", "snapshot": "s"},
            "snapshot 's' has no disk 'vda'",
        ),
        ("overlay-commit", {"name": "o"}, "there is no overlay 'o'"),
        ("overlay-discard", {"name": "o"}, "there is no overlay 'o'"),
    ]
    for command, arguments, description in cases:
        assert (await refusal(qmp, command, **arguments))[1] == description


async def test_server_ends_in_good_order_under_overlays(options: DaemonOptions) -> None:
    async with Daemon(options) as daemon:
        await daemon.engine.create_snapshot("s")
        daemon.overlays.create("over-disk", "vda")
        daemon.overlays.create("over-snapshot", "vdb", "s")
    for image in options.disks.values():
        subprocess.run(["qemu-img", "check", "-q", image], check=True)
