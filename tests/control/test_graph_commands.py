"""QEMU's two fleecing schemes: the same streams here and in QEMU, and the same result."""

from __future__ import annotations

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
    settled_reply,
    storage_daemon,
)
from .test_nbd_server_commands import START, bitmap, export
from .test_transaction_commands import action, add, transaction

GUEST = export("guest", writable=True, name="guest")
BEFORE = ["write -P 1 0 196608", "write -P 2 1M 64k"]
AFTER = ["write -P 9 4096 512", "write -P 8 8M 4096"]
ZEROES = ["write -z 64k 64k", "write -z -u 128k 64k"]
"""Not for snapshot-access of QEMU 7.2: nbdcopy then reads zeroes from it, too."""
TOP = {"driver": "raw", "node-name": "top", "discard": "unmap"}
DIRTY = ["write -P 3 1M 512"]


def node(driver: str, name: str, **options: Any) -> Step:
    return "blockdev-add", {"driver": driver, "node-name": name, **options}


def merge(target: str, source: str) -> dict[str, Any]:
    bitmaps = [{"node": "vda", "name": source}]
    return action("block-dirty-bitmap-merge", node="t", target=target, bitmaps=bitmaps)


def backup(**more: Any) -> dict[str, Any]:
    return action("blockdev-backup", device="vda", target="t", sync="none", **more)


def job(command: str, **arguments: Any) -> Step:
    return command, arguments


OLD_SCHEME: list[Step] = [
    node("file", "tf", filename="FILE"),
    node("file", "none", filename="/nonexistent/file"),
    node("file", "vda", filename="FILE"),
    node("nonsense", "x", filename="FILE"),
    node("qcow2", "t", file="tf", backing="none"),
    node("qcow2", "t", file="tf", backing="vda"),
    job("blockdev-backup", device="nope", target="t", sync="none", **{"job-id": "j"}),
    job("blockdev-backup", device="vda", target="nope", sync="none", **{"job-id": "j"}),
    transaction(backup(**{"job-id": "j"}), action("abort")),
    transaction(
        add("t", "tmp", disabled=True),
        merge("tmp", "b"),
        add("vda", "next"),
        action("block-dirty-bitmap-disable", node="vda", name="b"),
        backup(**{"job-id": "j", "auto-dismiss": False}),
    ),
    export("e", "t", name="fleece", bitmaps=["tmp"]),
    ("query-jobs", {}),
    ("query-block-jobs", {}),
    ("blockdev-backup", {"device": "vda", "target": "t", "sync": "none", "job-id": "k"}),
    ("blockdev-del", {"node-name": "t"}),
    ("job-dismiss", {"id": "j"}),
    ("block-job-cancel", {"device": "nope"}),
    ("job-cancel", {"id": "nope"}),
]
OLD_END: list[Step] = [
    ("block-export-del", {"id": "e"}),
    ("blockdev-del", {"node-name": "tf"}),
    ("block-job-cancel", {"device": "j"}),
    ("job-dismiss", {"id": "j"}),
    ("job-dismiss", {"id": "j"}),
    ("query-jobs", {}),
    ("blockdev-del", {"node-name": "t"}),
    ("blockdev-del", {"node-name": "tf"}),
    ("blockdev-del", {"node-name": "tf"}),
]
NEW_SCHEME: list[Step] = [
    node("file", "tf", filename="FILE"),
    node("qcow2", "t", file="tf"),
    node(
        "copy-before-write",
        "cbw",
        file="vda",
        target="t",
        **{"on-cbw-error": "break-snapshot"},
    ),
    ("blockdev-reopen", {"options": [TOP | {"file": "cbw"}]}),
    node("snapshot-access", "snap", file="cbw", discard="unmap"),
    transaction(
        action("block-dirty-bitmap-disable", node="vda", name="b"),
        add("vda", "next"),
    ),
    export("e", "snap", name="fleece", bitmaps=["b"]),
    export("e", "snap", name="fleece", bitmaps=[{"node": "vda", "name": "b"}]),
    ("blockdev-del", {"node-name": "snap"}),
]
NEW_END: list[Step] = [
    ("block-export-del", {"id": "e"}),
    ("blockdev-del", {"node-name": "cbw"}),
    ("blockdev-del", {"node-name": "snap"}),
    ("blockdev-reopen", {"options": [TOP | {"file": "vda"}]}),
    ("blockdev-del", {"node-name": "cbw"}),
    ("blockdev-del", {"node-name": "t"}),
    ("blockdev-del", {"node-name": "nope"}),
]


@pytest.mark.parametrize(
    ("setup", "stream", "end", "shown", "after"),
    [
        ([GUEST], OLD_SCHEME, OLD_END, "tmp", [*AFTER, *ZEROES]),
        (
            [
                node("raw", "top", file="vda", discard="unmap"),
                export("guest", "top", writable=True, name="guest"),
            ],
            NEW_SCHEME,
            NEW_END,
            "b",
            AFTER,
        ),
    ],
    ids=["backup job", "copy-before-write"],
)
async def test_scheme_has_qemus_replies_and_qemus_result(
    qmp: QMPClient,
    tmp_path: Path,
    setup: list[Step],
    stream: list[Step],
    end: list[Step],
    shown: str,
    after: list[str],
) -> None:
    """What is frozen, which changes are shown, and what the next bitmap records: all as QEMU's."""
    results = {}
    for side in ("ours", "qemus"):
        make_image(tmp_path / f"{side}.qcow2")
    async with storage_daemon(tmp_path, ["vda"]) as qemu:
        await compare(qmp, qemu, [START, *setup], tmp_path)
        await _write_both(tmp_path, BEFORE)
        await compare(qmp, qemu, [bitmap("add")], tmp_path)
        await _write_both(tmp_path, DIRTY)
        await compare(qmp, qemu, stream, tmp_path)
        await _write_both(tmp_path, after)
        for side in ("ours", "qemus"):
            uri = export_uri(tmp_path, side, "fleece")
            dirty = await dirty_map(uri, f"qemu:dirty-bitmap:{shown}")
            live = await content(export_uri(tmp_path, side, "guest"))
            results[side] = (await content(uri), dirty, live)
        assert await bitmaps_of(qmp, "vda") == await bitmaps_of(qemu, "vda")
        await compare(qmp, qemu, end, tmp_path)
    for ours, qemus in zip(results["ours"], results["qemus"], strict=True):
        assert ours == qemus
    frozen = bytearray(SIZE)
    frozen[:196608] = b"\1" * 196608
    frozen[1 << 20 : (1 << 20) + GRANULE] = b"\3" * 512 + b"\2" * (GRANULE - 512)
    assert results["ours"][0] == frozen


async def _write_both(folder: Path, commands: list[str]) -> None:
    for side in ("ours", "qemus"):
        await qemu_io(export_uri(folder, side, "guest"), *commands)


async def run(qmp: QMPClient, *steps: Step) -> None:
    for step in steps:
        assert await settled_reply(qmp, *step) == {}, step


async def events_of(qmp: QMPClient, *steps: Step) -> list[tuple[str, Any]]:
    with qmp.listener() as events:
        await run(qmp, *steps)
        await qmp.execute("query-status")  # what was told before it has been received with it
        return [(each["event"], each["data"]) for each in events.clear()]


async def test_job_tells_its_life_by_events(qmp: QMPClient, tmp_path: Path) -> None:
    file = make_image(tmp_path / "t.qcow2")
    await run(qmp, node("file", "tf", filename=str(file)))
    await run(qmp, node("qcow2", "t", file="tf", backing="vda"))
    begun = await events_of(qmp, transaction(backup()))
    changes = [(name, data["status"]) for name, data in begun]
    assert changes == [("JOB_STATUS_CHANGE", "created"), ("JOB_STATUS_CHANGE", "running")]
    await run(qmp, export("e", "t", name="fleece"))
    ended = await events_of(qmp, ("block-job-cancel", {"device": "vda"}))
    assert ended == [
        ("JOB_STATUS_CHANGE", {"id": "vda", "status": "aborting"}),
        ("BLOCK_EXPORT_DELETED", {"id": "e"}),
        (
            "BLOCK_JOB_CANCELLED",
            {"type": "backup", "device": "vda", "len": SIZE, "offset": 0, "speed": 0},
        ),
        ("JOB_STATUS_CHANGE", {"id": "vda", "status": "concluded"}),
        ("JOB_STATUS_CHANGE", {"id": "vda", "status": "null"}),
    ]
    assert await qmp.execute("query-jobs") == []


async def test_grouped_jobs_end_together_as_in_qemu(qmp: QMPClient, tmp_path: Path) -> None:
    grouped = {"properties": {"completion-mode": "grouped"}}
    other = str(make_image(tmp_path / "other.qcow2"))
    steps = [node("file", "f-vda", filename="FILE"), node("file", "f-vdb", filename=other)]
    steps += [node("qcow2", f"t-{name}", file=f"f-{name}", backing=name) for name in ("vda", "vdb")]
    backups = [
        action(
            "blockdev-backup",
            device=name,
            target=f"t-{name}",
            sync="none",
            **{"job-id": f"j-{name}", "auto-dismiss": False},
        )
        for name in ("vda", "vdb")
    ]
    both = ("transaction", {"actions": backups, **grouped})
    mixed = ("transaction", {"actions": [add("vda", "b"), *backups], **grouped})
    for side in ("ours", "qemus"):
        make_image(tmp_path / f"{side}.qcow2")
    async with storage_daemon(tmp_path, ["vda", "vdb"]) as qemu:
        await compare(qmp, qemu, [*steps, mixed, both], tmp_path)
        for client in (qmp, qemu):
            with client.listener("BLOCK_JOB_CANCELLED") as events:
                await client.execute("block-job-cancel", {"device": "j-vda"})
                ended = {(await events.get())["data"]["device"] for _ in backups}
                assert ended == {"j-vda", "j-vdb"}
        await compare(qmp, qemu, [("job-dismiss", {"id": "j-vdb"})], tmp_path)


async def test_limiting_bitmap_refuses_what_it_does_not_mark(
    qmp: QMPClient, daemon: Daemon, tmp_path: Path
) -> None:
    await run(qmp, bitmap("add"))
    await daemon.engine.disks["vda"].node.write(0, memoryview(b"x" * 512))
    await run(qmp, node("file", "t", filename=str(make_image(tmp_path / "t.qcow2"))))
    limit = {"node": "vda", "name": "b"}
    await run(qmp, node("copy-before-write", "cbw", file="vda", target="t", bitmap=limit))
    await run(qmp, node("snapshot-access", "snap", file="cbw"), export("e", "snap", name="n"))
    (uri,) = daemon.export_uris("n")
    await qemu_io(uri, "read -P 120 0 512", read_only=True)
    with pytest.raises(AssertionError, match="read failed"):
        await qemu_io(uri, "read 1M 512", read_only=True)


async def test_copy_before_write_node_has_its_own_error_options(
    qmp: QMPClient, daemon: Daemon, tmp_path: Path
) -> None:
    """Of two nodes over a full scratch one lets the guest's write fail; without it the other
    breaks."""
    await daemon.engine.disks["vda"].node.write(0, memoryview(b"x" * (2 << 20)))
    for name in ("t", "t2"):
        await run(qmp, node("file", name, filename=str(make_image(tmp_path / f"{name}.qcow2"))))
    options = {"on-cbw-error": "break-guest-write", "cbw-timeout": 45}
    await run(
        qmp,
        node("copy-before-write", "usual", file="vda", target="t"),
        node("copy-before-write", "guarded", file="vda", target="t2", **options),
    )
    with pytest.raises(OSError, match="quota"):
        await daemon.engine.disks["vda"].node.write(0, memoryview(b"y" * (2 << 20)))
    await run(qmp, ("blockdev-del", {"node-name": "guarded"}))
    await daemon.engine.disks["vda"].node.write(0, memoryview(b"y" * (2 << 20)))
    assert "quota" in (daemon.engine.snapshot("usual").error or "")


async def test_what_cannot_be_meant_is_refused_by_name(qmp: QMPClient, tmp_path: Path) -> None:
    file = str(make_image(tmp_path / "t.qcow2"))
    await run(qmp, node("file", "tf", filename=file), node("qcow2", "t", file="tf"))
    await run(qmp, node("raw", "top", file="vda"))
    cases: list[tuple[Step, str]] = [
        (node("file", "f", filename=file, target="t"), "Parameter 'target' is unexpected"),
        (node("qcow2", "q"), "Parameter 'file' is missing"),
        (node("copy-before-write", "c", file="vda"), "Parameter 'target' is missing"),
        (node("copy-before-write", "c", file="tf", target="t"), "node 'tf' is no disk"),
        (node("copy-before-write", "c", file="t", target="t"), "Block device t is in use"),
        (node("snapshot-access", "s", file="vda"), "node 'vda' is no copy-before-write node"),
        (
            export("e", "tf", name="n"),
            "node 'tf' is a mere file: export a raw or qcow2 node over it",
        ),
        (
            job("blockdev-backup", device="vda", target="t", sync="none"),
            "target 't' is no scratch image with 'vda' as its backing",
        ),
        (
            job("blockdev-backup", device="vda", target="t", sync="full"),
            "sync 'full' is not supported, only 'none': pull the disk from an export",
        ),
        (
            (
                "blockdev-reopen",
                {"options": [{"driver": "raw", "node-name": "top", "file": "vdb"}]},
            ),
            "node 'top' cannot be put over 'vdb': only a raw node of a disk over a"
            " copy-before-write node of that disk, or back",
        ),
        (("blockdev-del", {"node-name": "vda"}), "Node vda is not owned by the monitor"),
    ]
    for step, description in cases:
        assert await reply(qmp, *step) == ("GenericError", description)


async def test_server_ends_in_good_order_with_jobs_and_nodes(
    options: DaemonOptions, tmp_path: Path
) -> None:
    file = str(make_image(tmp_path / "t.qcow2"))
    async with Daemon(options):
        client = QMPClient()
        await client.connect(str(options.control))
        await run(
            client,
            node("file", "tf", filename=file),
            node("qcow2", "t", file="tf", backing="vda"),
            job("blockdev-backup", device="vda", target="t", sync="none"),
            export("e", "t", name="fleece"),
            node("copy-before-write", "cbw", file="vdb", target="tf"),
            node("snapshot-access", "snap", file="cbw"),
            export("e2", "snap", name="fleece2"),
        )
        await client.disconnect()
    for image in options.disks.values():
        subprocess.run(["qemu-img", "check", "-q", image], check=True)
