"""Listeners and exports by QEMU's commands, as QEMU's storage daemon has them."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

import nbd
import pytest
from qemu.qmp import ExecuteError, QMPClient

from nbdfleece.daemon import Daemon

from .conftest import GRANULE, SIZE
from .oracle import (
    Step,
    bitmaps_of,
    compare,
    content,
    dirty_map,
    export_uri,
    qemu_io,
    reply,
    storage_daemon,
)

START: Step = ("nbd-server-start", {"addr": {"type": "unix", "data": {"path": "SOCKET"}}})


def export(identity: str = "e", node: str = "vda", **more: Any) -> Step:
    return "block-export-add", {"type": "nbd", "id": identity, "node-name": node, **more}


def bitmap(operation: str, name: str = "b", node: str = "vda", **more: Any) -> Step:
    return f"block-dirty-bitmap-{operation}", {"node": node, "name": name, **more}


BUSY: list[Step] = [
    bitmap("remove"),
    bitmap("clear"),
    bitmap("enable"),
    bitmap("disable"),
    (
        "block-dirty-bitmap-merge",
        {"node": "vdb", "target": "b", "bitmaps": [{"node": "vda", "name": "b"}]},
    ),
    (
        "block-dirty-bitmap-merge",
        {"node": "vda", "target": "b", "bitmaps": [{"node": "vdb", "name": "b"}]},
    ),
    export("other", writable=True, name="f2", bitmaps=["b"]),
]


async def test_replies_are_qemus(qmp: QMPClient, tmp_path: Path) -> None:
    steps: list[Step] = [
        ("nbd-server-stop", {}),
        bitmap("add"),
        bitmap("add", node="vdb"),
        bitmap("add", node="none"),
        bitmap("clear", node="none"),
        START,
        START,
        export(node="nope"),
        ("block-export-add", {"type": "foo", "id": "e", "node-name": "vda"}),
        export(name="n", bitmaps=["b"]),
        export(name="n", bitmaps=["none"]),
        export(name="n", bitmaps=[{"node": "vda", "name": "none"}]),
        export(name="n", bitmaps=[{"node": "none", "name": "b"}]),
        export(name="n", writable=True, bitmaps=["b"]),
        export(name="f"),
        export("e2", name="n"),
        *BUSY,
        ("block-export-del", {"id": "nope"}),
        ("block-export-del", {"id": "e", "mode": "soft"}),
        ("block-export-del", {"id": "e", "mode": "hard"}),
        bitmap("disable"),
        ("nbd-server-add", {"device": "vda", "name": "x", "bitmap": "b", "description": "hi"}),
        ("nbd-server-add", {"device": "vda", "name": "x"}),
        ("nbd-server-add", {"device": "nope", "name": "y"}),
        ("nbd-server-remove", {"name": "x"}),
        ("nbd-server-remove", {"name": "x"}),
        ("nbd-server-stop", {}),
        ("nbd-server-stop", {}),
    ]
    async with storage_daemon(tmp_path, ["vda", "vdb"]) as qemu:
        await compare(qmp, qemu, steps, tmp_path)


async def test_exported_bitmap_is_qemus_and_busy(qmp: QMPClient, tmp_path: Path) -> None:
    """A recording bitmap of a writable export moves while it is read; the content is the same."""
    setup = [START, bitmap("add"), export(name="n", writable=True, bitmaps=["b"])]
    maps = {}
    async with storage_daemon(tmp_path, ["vda", "vdb"]) as qemu:
        await compare(qmp, qemu, setup, tmp_path)
        for side in ("ours", "qemus"):
            uri = export_uri(tmp_path, side, "n")
            await qemu_io(uri, "write -P 1 0 4096", f"write -P 2 {5 * GRANULE} 1")
            maps[side] = (await dirty_map(uri, "qemu:dirty-bitmap:b"), await content(uri))
        assert await bitmaps_of(qmp, "vda") == await bitmaps_of(qemu, "vda")
    assert maps["ours"] == maps["qemus"]
    (found,) = await bitmaps_of(qmp, "vda")
    assert found["busy"] is True


async def test_frozen_persistent_bitmap_is_exported_and_let_go(
    qmp: QMPClient, daemon: Daemon, tmp_path: Path
) -> None:
    await qmp.execute(*bitmap("add", persistent=True))
    await daemon.engine.disks["vda"].node.write(0, memoryview(b"x"))
    await qmp.execute(*bitmap("disable"))
    with qmp.listener("BLOCK_EXPORT_DELETED") as events:
        await qmp.execute(*export(name="n", bitmaps=["b"], **{"allocation-depth": True}))
        found = daemon.exports.find("n")
        assert found is not None
        assert [context.name for context in found.contexts] == [
            "base:allocation",
            "qemu:allocation-depth",
            "qemu:dirty-bitmap:b",
        ]
        (uri,) = daemon.export_uris("n")
        dirty = await dirty_map(uri, "qemu:dirty-bitmap:b")
        assert dirty == [(0, GRANULE, 1), (GRANULE, SIZE - GRANULE, 0)]
        await qmp.execute("block-export-del", {"id": "e"})
        assert (await events.get())["data"] == {"id": "e"}
    await qmp.execute(*bitmap("remove"))


async def test_export_with_clients_is_removed_only_hard(qmp: QMPClient, daemon: Daemon) -> None:
    await qmp.execute(*export(name="n"))
    (uri,) = daemon.export_uris("n")
    client = nbd.NBD()
    await asyncio.to_thread(client.connect_uri, uri)
    refused = await reply(qmp, "block-export-del", {"id": "e"})
    assert refused[1].startswith("export 'e' still in use")
    assert await reply(qmp, "block-export-del", {"id": "e", "mode": "hard"}) == {}
    assert not daemon.exports.has("n")
    del client


async def test_stop_removes_what_was_added_and_leaves_our_own(
    qmp: QMPClient, daemon: Daemon, tmp_path: Path
) -> None:
    path = tmp_path / "more.sock"
    await qmp.execute("nbd-server-start", {"addr": {"type": "unix", "data": {"path": str(path)}}})
    await qmp.execute("nbd-server-add", {"device": "vda", "name": "x"})
    assert len(daemon.export_uris("x")) == 2
    await qmp.execute("nbd-server-stop")
    assert not path.exists()
    assert [each["id"] for each in await qmp.execute("query-block-exports")] == ["vda", "vdb"]


async def test_inet_address_is_listened_on(qmp: QMPClient, daemon: Daemon) -> None:
    data = {"host": "127.0.0.1", "port": "0"}
    address = {"type": "inet", "data": data}
    await qmp.execute("nbd-server-start", {"addr": address})
    await qemu_io(daemon.export_uris("vda")[1], "read -P 0 0 512")
    data["port"] = "http"
    with pytest.raises(ExecuteError, match="expects a number"):
        await qmp.execute("nbd-server-start", {"addr": address})


async def test_scratch_file_and_frozen_nodes_cannot_be_exported_for_writing(
    qmp: QMPClient, tmp_path: Path
) -> None:
    await qmp.execute("snapshot-create", {"name": "s"})
    refused = await reply(qmp, *export(node="s/vda", name="n", writable=True))
    assert refused == ("GenericError", "Cannot export read-only node as writable")
    assert await reply(qmp, *export(node="s/vda", name="n")) == {}
    refused = await reply(qmp, "snapshot-delete", {"name": "s"})
    assert refused == ("GenericError", "export 'e' stands on snapshot 's'")
