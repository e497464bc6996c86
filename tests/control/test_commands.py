"""Our own commands, over the socket, against real images."""

from __future__ import annotations

import os
from typing import Any

import pytest
from qemu.qmp import ExecuteError, QMPClient

from nbdfleece.daemon import Daemon

from .conftest import GRANULE, SCRATCH_QUOTA, SIZE


async def guest_write(daemon: Daemon, disk: str, offset: int) -> None:
    await daemon.engine.disks[disk].node.write(offset, memoryview(b"x" * 4096))


async def refusal(qmp: QMPClient, command: str, **arguments: Any) -> tuple[str, str]:
    with pytest.raises(ExecuteError) as caught:
        await qmp.execute(command, arguments)
    return caught.value.error_class, str(caught.value)


async def test_query_commands_lists_what_can_be_executed(qmp: QMPClient) -> None:
    names = {each["name"] for each in await qmp.execute("query-commands")}
    assert {"query-version", "snapshot-create", "backup-begin", "quit"} <= names


async def test_query_schema_describes_every_command(qmp: QMPClient) -> None:
    schema = await qmp.execute("query-nbdfleece-schema")
    commands = await qmp.execute("query-commands")
    assert [c["name"] for c in schema["commands"]] == [c["name"] for c in commands]


async def test_query_status_tells_the_process(qmp: QMPClient) -> None:
    assert await qmp.execute("query-status") == {
        "status": "running",
        "running": True,
        "pid": os.getpid(),
    }


async def test_query_disks_describes_images(qmp: QMPClient, daemon: Daemon) -> None:
    disks = await qmp.execute("query-disks")
    assert [disk["name"] for disk in disks] == ["vda", "vdb"]
    assert disks[0] == {
        "name": "vda",
        "file": str(daemon.options.disks["vda"]),
        "size": SIZE,
        "cluster-size": 65536,
        "bitmaps": [],
        "checkpoints": [],
        "chain-problem": None,
        "scratch-bytes": 0,
    }


async def test_live_exports_have_a_uri_per_listener(qmp: QMPClient, daemon: Daemon) -> None:
    exports = await qmp.execute("query-nbd-exports")
    socket = daemon.options.listen[0].socket
    assert exports[0]["uris"] == [f"nbd+unix:///vda?socket={socket}"]
    assert exports[0]["read-only"] is False


async def test_snapshot_lives_from_create_to_delete(qmp: QMPClient) -> None:
    created = await qmp.execute("snapshot-create", {"name": "s", "disks": ["vdb"]})
    assert created["disks"] == ["vdb"]
    assert created["checkpoint"] is None
    assert await qmp.execute("query-snapshots") == [created]
    assert await qmp.execute("snapshot-delete", {"name": "s"}) == {}
    assert await qmp.execute("query-snapshots") == []


async def test_snapshot_with_a_checkpoint_keeps_the_checkpoint(qmp: QMPClient) -> None:
    await qmp.execute("snapshot-create", {"name": "s", "checkpoint": "monday", "owner": "me"})
    await qmp.execute("snapshot-delete", {"name": "s"})
    (checkpoint,) = await qmp.execute("query-checkpoints")
    assert (checkpoint["name"], checkpoint["owner"]) == ("monday", "me")
    assert checkpoint["state"] == "committed"
    assert set(checkpoint["disks"]) == {"vda", "vdb"}


async def test_unknown_disk_has_its_error_class(qmp: QMPClient) -> None:
    expected = ("DeviceNotFound", "there is no disk 'sda'")
    for command in ("snapshot-create", "checkpoint-create", "backup-begin"):
        assert await refusal(qmp, command, name="n", disks=["sda"]) == expected
    assert await refusal(qmp, "query-bitmaps", disk="sda") == expected


async def test_taken_and_unknown_names_are_refused_by_name(qmp: QMPClient) -> None:
    await qmp.execute("snapshot-create", {"name": "s", "checkpoint": "monday"})
    taken = [
        ("snapshot-create", {"name": "s"}, "snapshot 's' exists already"),
        ("backup-begin", {"name": "s"}, "snapshot 's' exists already"),
        ("checkpoint-create", {"name": "monday"}, "checkpoint 'monday' exists already"),
    ]
    unknown = [
        ("snapshot-delete", {"name": "x"}, "there is no snapshot 'x'"),
        ("checkpoint-delete", {"name": "x"}, "there is no checkpoint 'x'"),
        ("backup-begin", {"name": "b", "since": "x"}, "there is no checkpoint 'x'"),
        ("backup-commit", {"name": "s"}, "there is no backup 's'"),
        ("backup-abort", {"name": "x"}, "there is no backup 'x'"),
        ("snapshot-export-remove", {"name": "vda"}, "there is no export 'vda' of a snapshot"),
    ]
    for command, arguments, description in taken + unknown:
        assert await refusal(qmp, command, **arguments) == ("GenericError", description)


async def test_snapshot_export_shows_the_chosen_changes(qmp: QMPClient, daemon: Daemon) -> None:
    await qmp.execute("checkpoint-create", {"name": "monday"})
    await guest_write(daemon, "vda", 0)
    await qmp.execute("snapshot-create", {"name": "s"})
    export = await qmp.execute(
        "snapshot-export-add",
        {"snapshot": "s", "disk": "vda", "name": "e", "since": {"monday": "mine"}},
    )
    assert export["read-only"] is True
    assert "qemu:dirty-bitmap:mine" in export["contexts"]
    found = daemon.exports.find("e")
    assert found is not None
    context = found.context("qemu:dirty-bitmap:mine")
    assert context is not None
    extents = await context.extents(0, SIZE, extents_max=10)
    assert extents.lengths.tolist() == [GRANULE, SIZE - GRANULE]
    assert extents.status.tolist() == [1, 0]
    await qmp.execute("snapshot-export-remove", {"name": "e"})
    assert not daemon.exports.has("e")


async def test_backup_is_full_first_and_incremental_then(qmp: QMPClient, daemon: Daemon) -> None:
    first = await qmp.execute("backup-begin", {"name": "b1", "checkpoint": "monday"})
    assert [disk["mode"] for disk in first["disks"]] == ["full", "full"]
    assert first["disks"][0]["reason"] is None
    await qmp.execute("backup-commit", {"name": "b1"})
    second = await qmp.execute(
        "backup-begin", {"name": "b2", "checkpoint": "tuesday", "since": "monday"}
    )
    assert second["disks"][0] == {
        "disk": "vda",
        "export": "b2/vda",
        "uris": [f"nbd+unix:///b2/vda?socket={daemon.options.listen[0].socket}"],
        "mode": "incremental",
        "context": "qemu:dirty-bitmap:monday",
        "reason": None,
    }
    assert await qmp.execute("query-backups") == [second]


async def test_disk_without_the_chain_is_full_with_a_reason(qmp: QMPClient) -> None:
    await qmp.execute("checkpoint-create", {"name": "monday", "disks": ["vda"]})
    backup = await qmp.execute("backup-begin", {"name": "b", "since": "monday"})
    assert [disk["mode"] for disk in backup["disks"]] == ["incremental", "full"]
    assert backup["disks"][1]["reason"] == "there is no checkpoint 'monday'"


async def test_aborted_backup_leaves_no_checkpoint(qmp: QMPClient) -> None:
    await qmp.execute("backup-begin", {"name": "b", "checkpoint": "monday"})
    with qmp.listener("BACKUP_ABORTED") as events:
        await qmp.execute("backup-abort", {"name": "b"})
        assert (await events.get())["data"]["checkpoint"] == "monday"
    assert await qmp.execute("query-checkpoints") == []
    assert await qmp.execute("query-backups") == []


async def test_parts_of_a_running_backup_cannot_be_taken_from_it(qmp: QMPClient) -> None:
    await qmp.execute("backup-begin", {"name": "b", "checkpoint": "monday"})
    refused = [
        ("snapshot-delete", "b", "backup 'b' is not finished: commit or abort it"),
        ("snapshot-export-remove", "b/vda", "export 'b/vda' belongs to backup 'b'"),
        ("checkpoint-delete", "monday", "checkpoint 'monday' belongs to backup 'b'"),
    ]
    for command, name, description in refused:
        assert await refusal(qmp, command, name=name) == ("GenericError", description)


async def test_broken_snapshot_is_told_and_cannot_be_committed(
    qmp: QMPClient, daemon: Daemon
) -> None:
    more_than_the_quota = memoryview(bytes([7]) * (SCRATCH_QUOTA + GRANULE))
    disk = daemon.engine.disks["vda"]
    await disk.node.write(0, more_than_the_quota)
    await qmp.execute("backup-begin", {"name": "b", "checkpoint": "monday"})
    with qmp.listener("SNAPSHOT_BROKEN") as events:
        await disk.node.write(0, more_than_the_quota)
        event = await events.get()
    assert (event["data"]["snapshot"], event["data"]["disk"]) == ("b", "vda")
    (backup,) = await qmp.execute("query-backups")
    assert backup["error"].startswith("disk 'vda': ")
    _, description = await refusal(qmp, "backup-commit", name="b")
    assert description.startswith("backup 'b' cannot be committed: disk 'vda'")


async def test_query_bitmaps_tells_dirty_bytes(qmp: QMPClient, daemon: Daemon) -> None:
    await qmp.execute("checkpoint-create", {"name": "monday"})
    await guest_write(daemon, "vdb", SIZE - 4096)
    (bitmap,) = await qmp.execute("query-bitmaps", {"disk": "vdb"})
    assert bitmap == {
        "disk": "vdb",
        "name": "monday",
        "granularity": GRANULE,
        "recording": True,
        "busy": False,
        "persistent": True,
        "inconsistent": False,
        "count": GRANULE,
    }
    assert len(await qmp.execute("query-bitmaps")) == 2


async def test_failure_of_the_file_system_is_told_with_the_file(
    qmp: QMPClient, daemon: Daemon, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def fail(*arguments: object, **more: object) -> None:
        raise OSError(28, "No space left on device", "/somewhere/vda.qcow2")

    monkeypatch.setattr(daemon.engine, "create_checkpoint", fail)
    assert await refusal(qmp, "checkpoint-create", name="n") == (
        "GenericError",
        "/somewhere/vda.qcow2: No space left on device",
    )


async def test_defect_of_ours_is_an_error_of_the_command_and_is_logged(
    qmp: QMPClient,
    daemon: Daemon,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    async def fail(*arguments: object, **more: object) -> None:
        raise KeyError("oops")

    monkeypatch.setattr(daemon.engine, "create_checkpoint", fail)
    _, description = await refusal(qmp, "checkpoint-create", name="n")
    assert description == "internal error: KeyError: 'oops'"
    assert "command 'checkpoint-create' failed" in caplog.text
