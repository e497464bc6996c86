"""Disks that are added and removed while the server runs, as QEMU's storage daemon has them."""

from __future__ import annotations

import json
import os
import subprocess
from pathlib import Path
from typing import Any

import pytest
from qemu.qmp import QMPClient

from nbdfleece.daemon import Daemon, DaemonOptions

from .conftest import GRANULE, SIZE, make_image
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
from .test_graph_commands import node, run
from .test_nbd_server_commands import START, bitmap, export

ADD: list[Step] = [
    node("file", "f", filename="FILE"),
    node("qcow2", "vdc", file="f"),
    node("qcow2", "vdc", file="f"),
    bitmap("add", node="vdc", persistent=True),
    bitmap("add", node="vdc", name="off", persistent=True, disabled=True),
    export("e", "vdc", name="c", writable=True),
]
REMOVE: list[Step] = [
    ("blockdev-del", {"node-name": "f"}),
    ("blockdev-del", {"node-name": "vdc"}),
    ("block-export-del", {"id": "e"}),
    ("blockdev-del", {"node-name": "vdc"}),
    ("blockdev-del", {"node-name": "vdc"}),
    ("blockdev-del", {"node-name": "f"}),
]
READ_ONLY: list[Step] = [
    node("file", "f", filename="FILE", **{"read-only": True}),
    node("qcow2", "vdc", file="f"),
    node("qcow2", "vdc", file="f", **{"read-only": True}),
    export("e", "vdc", name="c", writable=True),
    export("e", "vdc", name="c", bitmaps=["b"]),
]


def stored_bitmaps(path: Path) -> list[dict[str, Any]]:
    done = subprocess.run(
        ["qemu-img", "info", "--output=json", path], capture_output=True, check=True
    )
    return sorted(
        json.loads(done.stdout)["format-specific"]["data"].get("bitmaps", []),
        key=lambda each: each["name"],
    )


@pytest.mark.parametrize("driver", ["qcow2", "raw"])
async def test_discards_and_zeroes_are_done_as_the_node_says(
    qmp: QMPClient, tmp_path: Path, driver: str
) -> None:
    """``discard`` and ``detect-zeroes`` mean what they mean to QEMU."""
    path = tmp_path / "disk"
    subprocess.run(["qemu-img", "create", "-q", "-f", driver, path, str(SIZE)], check=True)
    address = {"type": "unix", "data": {"path": str(tmp_path / "ours.sock")}}
    await run(
        qmp,
        ("nbd-server-start", {"addr": address}),
        node("file", "f", filename=str(path)),
        node(driver, "vdc", file="f", **{"discard": "ignore", "detect-zeroes": "on"}),
        export("e", "vdc", name="c", writable=True),
    )
    uri = export_uri(tmp_path, "ours", "c")
    await qemu_io(uri, "write -P 1 0 1M", "discard 0 64k", "write -P 0 512k 64k", "flush")
    seen = await content(uri)
    assert seen[:65536] == b"\1" * 65536, "a discard had an effect"
    assert seen[524288:589824] == bytes(65536)
    await run(qmp, *REMOVE[2:4])
    if driver == "qcow2":
        mapped = subprocess.run(
            ["qemu-img", "map", "--output=json", path], capture_output=True, check=True
        )
        zeroes = [each["start"] for each in json.loads(mapped.stdout) if each["zero"]]
        assert 524288 in zeroes, "zeroes were written as data"
    words = {"discard": "ignore", "detect-zeroes": "unmap"}
    refused = await reply(qmp, *node(driver, "vdc", file="f", **words))
    assert refused[1] == "zeroes cannot be unmapped where discards are ignored"


async def test_added_disk_is_written_and_tracked_as_in_qemu(qmp: QMPClient, tmp_path: Path) -> None:
    """Replies, content, bitmaps while it runs, and what is left in the image."""
    paths = {side: make_image(tmp_path / f"{side}.qcow2") for side in ("ours", "qemus")}
    seen = {}
    async with storage_daemon(tmp_path, ["vda"]) as qemu:
        await compare(qmp, qemu, [START, *ADD], tmp_path)
        for side in paths:
            uri = export_uri(tmp_path, side, "c")
            await qemu_io(
                uri, "write -P 1 0 4096", "write -z 1M 64k", f"write -P 2 {SIZE - 512} 512"
            )
            seen[side] = await content(uri)
        assert await bitmaps_of(qmp, "vdc") == await bitmaps_of(qemu, "vdc")
        await compare(qmp, qemu, REMOVE, tmp_path)
        assert stored_bitmaps(paths["ours"]) == stored_bitmaps(paths["qemus"])
        await compare(qmp, qemu, READ_ONLY, tmp_path)
        # QEMU says yes, and cannot store it in the end.
        refused = await reply(qmp, *bitmap("add", node="vdc", name="new", persistent=True))
        assert refused[1] == "node 'vdc' has no image for a persistent bitmap"
        for side in paths:
            uri = export_uri(tmp_path, side, "c")
            assert await content(uri) == seen[side]
            seen[f"{side} map"] = await dirty_map(uri, "qemu:dirty-bitmap:b")
        await compare(qmp, qemu, REMOVE, tmp_path)
    assert seen["ours"] == seen["qemus"]
    assert seen["ours map"] == seen["qemus map"]
    assert [each[2] for each in seen["ours map"]].count(1) == 3
    subprocess.run(["qemu-img", "check", "-q", paths["ours"]], check=True)


async def test_image_over_a_disk_of_the_server_is_refused_by_its_name(
    qmp: QMPClient, tmp_path: Path
) -> None:
    """Rule 8: it is this server that writes the file, and not another program."""
    (tmp_path / "raw").write_bytes(bytes(1 << 20))
    words = ["-f", "qcow2", "-b", "raw", "-F", "raw", "overlay"]
    subprocess.run(["qemu-img", "create", "-q", *words], cwd=tmp_path, check=True)
    await run(qmp, node("file", "f", filename=str(tmp_path / "raw")), node("raw", "r", file="f"))
    await run(qmp, node("file", "o", filename=str(tmp_path / "overlay")))
    shown = node("qcow2", "shown", file="o", **{"read-only": True})
    refused = await reply(qmp, *shown)
    assert f"{tmp_path}/raw: being written by this server itself, as disk 'r'" in str(refused[1])
    await run(qmp, ("blockdev-del", {"node-name": "r"}), shown)


async def test_raw_disk_has_transient_bitmaps_as_in_qemu(qmp: QMPClient, tmp_path: Path) -> None:
    for side in ("ours", "qemus"):
        os.truncate(os.open(tmp_path / f"{side}.qcow2", os.O_CREAT | os.O_RDWR), 1 << 20)
    steps = [
        node("file", "f", filename="FILE"),
        node("raw", "r", file="f"),
        bitmap("add", node="r"),
        export("e", "r", name="c", writable=True),
    ]
    seen = []
    async with storage_daemon(tmp_path, ["vda"]) as qemu:
        await compare(qmp, qemu, [START, *steps], tmp_path)
        for side in ("ours", "qemus"):
            await qemu_io(export_uri(tmp_path, side, "c"), "write -P 1 70000 512")
            seen.append(await content(export_uri(tmp_path, side, "c")))
        assert await bitmaps_of(qmp, "r") == await bitmaps_of(qemu, "r")
        names = {"f": "f", "vdc": "r"}
        ends = [
            (command, {key: names.get(value, value) for key, value in given.items()})
            for command, given in REMOVE
        ]
        await compare(qmp, qemu, ends, tmp_path)
    assert seen[0] == seen[1] == (tmp_path / "ours.qcow2").read_bytes()
    refused = await reply(qmp, *bitmap("add", node="r", persistent=True))
    assert refused[0] == "GenericError"


async def test_added_disk_is_backed_up_with_the_others(
    qmp: QMPClient, daemon: Daemon, tmp_path: Path
) -> None:
    """It gets a checkpoint, a full backup of its own the first time, and cannot go meanwhile."""
    await run(qmp, ("checkpoint-create", {"name": "first"}))
    path = make_image(tmp_path / "new.qcow2")
    await run(qmp, node("file", "f", filename=str(path)), node("qcow2", "vdc", file="f"))
    begun = await qmp.execute("backup-begin", {"name": "b", "checkpoint": "c2", "since": "first"})
    reasons = {each["disk"]: each["reason"] for each in begun["disks"]}  # type: ignore
    assert reasons == {"vda": None, "vdb": None, "vdc": "there is no checkpoint 'first'"}
    refused = await reply(qmp, "blockdev-del", {"node-name": "vdc"})
    assert refused == ("GenericError", "snapshot 'b' stands on disk 'vdc'")
    await run(qmp, ("backup-commit", {"name": "b"}))
    await daemon.engine.disks["vdc"].node.write(GRANULE, memoryview(b"x" * 512))
    await run(qmp, ("blockdev-del", {"node-name": "vdc"}), node("qcow2", "vdc", file="f"))
    begun = await qmp.execute("backup-begin", {"name": "b", "checkpoint": "c3", "since": "c2"})
    assert all(each["reason"] is None for each in begun["disks"])  # type: ignore
    (uri,) = daemon.export_uris("b/vdc")
    dirty = await dirty_map(uri, "qemu:dirty-bitmap:c2")
    assert dirty == [(0, GRANULE, 0), (GRANULE, GRANULE, 1), (2 * GRANULE, SIZE - 2 * GRANULE, 0)]


async def test_crash_is_settled_when_a_disk_is_added(
    options: DaemonOptions, tmp_path: Path
) -> None:
    """What was pending on it is taken back; a backup that runs meanwhile is not touched."""
    path, copy = make_image(tmp_path / "new.qcow2"), tmp_path / "copy.qcow2"
    added = [node("file", "f", filename=str(path)), node("qcow2", "vdc", file="f")]
    async with Daemon(options):
        client = QMPClient()
        await client.connect(str(options.control))
        await run(client, *added)
        begin = {"disks": ["vdc"], "checkpoint": "left"}
        await client.execute("backup-begin", {"name": "b", **begin})
        copy.write_bytes(path.read_bytes())
        await client.execute("backup-abort", {"name": "b"})
        killed = [node("file", "k", filename=str(copy)), node("qcow2", "vdd", file="k")]
        running = {"disks": ["vda"], "checkpoint": "left"}
        await client.execute("backup-begin", {"name": "b", **running})
        refused = await reply(client, *killed[0]), await reply(client, *killed[1])
        text = "has a checkpoint 'left', which backup 'b' makes: commit or abort that first"
        assert refused == ({}, ("GenericError", f"'{copy}' {text}"))
        await client.execute("backup-abort", {"name": "b"})
        running = {"disks": ["vda"], "checkpoint": "other"}
        await client.execute("backup-begin", {"name": "b", **running})
        await run(client, killed[1])
        await client.execute("backup-commit", {"name": "b"})
        found = await client.execute("query-checkpoints")
        assert [(each["name"], list(each["disks"])) for each in found] == [  # type: ignore
            ("other", ["vda"])
        ]
        await client.disconnect()


async def test_target_of_copy_before_write_is_no_disk_meanwhile(
    qmp: QMPClient, daemon: Daemon, tmp_path: Path
) -> None:
    path = make_image(tmp_path / "t.qcow2")
    await run(qmp, node("file", "tf", filename=str(path)), node("qcow2", "t", file="tf"))
    assert set(daemon.engine.disks) == {"vda", "vdb", "t"}
    await run(qmp, node("copy-before-write", "cbw", file="vda", target="t"))
    assert set(daemon.engine.disks) == {"vda", "vdb"}
    again = await reply(qmp, *node("copy-before-write", "again", file="vdb", target="t"))
    assert again == ("GenericError", "Block device t is in use")
    taken = await reply(qmp, *node("copy-before-write", "cbw", file="vdb", target="t"))
    assert taken == ("GenericError", "Duplicate nodes with node-name='cbw'")
    await run(qmp, ("blockdev-del", {"node-name": "cbw"}))
    assert set(daemon.engine.disks) == {"vda", "vdb", "t"}
    await run(qmp, ("blockdev-del", {"node-name": "t"}))


@pytest.mark.parametrize("kind", ["missing", "no qcow2", "locked"])
async def test_image_that_cannot_be_opened_leaves_no_node(
    qmp: QMPClient, tmp_path: Path, kind: str
) -> None:
    path = make_image(tmp_path / "x.qcow2")
    if kind == "no qcow2":
        path.write_bytes(bytes(1 << 16))
    await run(qmp, node("file", "f", filename=str(path)))
    if kind == "missing":
        path.unlink()
    if kind == "locked":
        await run(qmp, node("qcow2", "other", file="f"))
    names = {each["node-name"] for each in await qmp.execute("query-named-block-nodes")}  # type: ignore
    refused = await reply(qmp, *node("qcow2", "x", file="f"))
    assert refused[0] == "GenericError"
    assert str(path) in refused[1]
    left = {each["node-name"] for each in await qmp.execute("query-named-block-nodes")}  # type: ignore
    assert left == names


async def test_overlay_keeps_an_added_disk(qmp: QMPClient, tmp_path: Path) -> None:
    path = make_image(tmp_path / "x.qcow2")
    await run(qmp, node("file", "f", filename=str(path)), node("qcow2", "x", file="f"))
    await qmp.execute("overlay-create", {"name": "o", "disk": "x"})
    refused = await reply(qmp, "blockdev-del", {"node-name": "x"})
    assert refused == ("GenericError", "overlay 'o' stands on node x")
    await qmp.execute("overlay-discard", {"name": "o"})
    await run(qmp, ("blockdev-del", {"node-name": "x"}))
