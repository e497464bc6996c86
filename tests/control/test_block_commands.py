"""QEMU's queries: the same shapes as qemu-storage-daemon's of the same image."""

from __future__ import annotations

import subprocess
from pathlib import Path
from typing import Any

import pytest
from qemu.qmp import QMPClient

from nbdfleece.daemon import Daemon

from .conftest import SIZE, make_image
from .oracle import daemon_of


def shape(value: Any) -> Any:
    """Names and types of all that is in it."""
    if isinstance(value, dict):
        return {name: shape(inner) for name, inner in value.items()}
    if isinstance(value, list):
        return [shape(inner) for inner in value[:1]]
    return type(value).__name__


@pytest.fixture
async def qemus_node(tmp_path: Path) -> dict[str, Any]:
    """What QEMU tells of an image with one bitmap."""
    image = make_image(tmp_path / "qemu.qcow2")
    subprocess.run(["qemu-img", "bitmap", "--add", image, "b"], check=True)
    async with daemon_of(tmp_path, {"q": image}) as client:
        nodes = await client.execute("query-named-block-nodes", {"flat": True})
    assert isinstance(nodes, list)
    return next(dict(node) for node in nodes if node["node-name"] == "q")


async def test_named_block_node_has_qemus_shape(qmp: QMPClient, qemus_node: dict[str, Any]) -> None:
    await qmp.execute("checkpoint-create", {"name": "monday"})
    ours = (await qmp.execute("query-named-block-nodes", {"flat": True}))[0]
    del qemus_node["image"]["format-specific"]  # optional
    assert shape(ours) == shape(qemus_node)


async def test_disk_node_tells_image_and_bitmaps(qmp: QMPClient, daemon: Daemon) -> None:
    await qmp.execute("checkpoint-create", {"name": "monday", "disks": ["vda"]})
    first, second = await qmp.execute("query-named-block-nodes")
    assert (first["node-name"], second["node-name"]) == ("vda", "vdb")
    assert first["image"]["virtual-size"] == SIZE
    assert first["dirty-bitmaps"] == [
        {
            "name": "monday",
            "count": 0,
            "granularity": 65536,
            "recording": True,
            "busy": False,
            "persistent": True,
        }
    ]
    assert second["dirty-bitmaps"] == []


async def test_snapshot_is_a_node_of_its_own(qmp: QMPClient) -> None:
    await qmp.execute("snapshot-create", {"name": "s", "disks": ["vdb"]})
    node = (await qmp.execute("query-named-block-nodes"))[-1]
    assert (node["node-name"], node["drv"], node["ro"]) == ("s/vdb", "snapshot-access", True)


async def test_query_block_has_a_device_per_disk(qmp: QMPClient) -> None:
    devices = await qmp.execute("query-block")
    assert [device["device"] for device in devices] == ["vda", "vdb"]
    assert devices[0]["inserted"]["node-name"] == "vda"


async def test_query_block_exports_names_the_node_behind_each(qmp: QMPClient) -> None:
    await qmp.execute("snapshot-create", {"name": "s", "disks": ["vda"]})
    await qmp.execute("snapshot-export-add", {"snapshot": "s", "disk": "vda", "name": "e"})
    exports = await qmp.execute("query-block-exports")
    assert exports == [
        {"id": name, "type": "nbd", "node-name": node, "shutting-down": False}
        for name, node in (("vda", "vda"), ("vdb", "vdb"), ("e", "s/vda"))
    ]
