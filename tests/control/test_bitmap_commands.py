"""QEMU's commands on dirty bitmaps, and QEMU's word on what they left in the image."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path
from typing import Any

import pytest
from qemu.qmp import ExecuteError, QMPClient

from nbdfleece.daemon import Daemon, DaemonOptions

from .conftest import GRANULE, SIZE, make_image
from .oracle import daemon_of


async def bitmap(qmp: QMPClient, name: str, node: str = "vda") -> dict[str, Any] | None:
    found = await qmp.execute("query-bitmaps", {"disk": node})
    return next((each for each in found if each["name"] == name), None)


async def execute(qmp: QMPClient, operation: str, name: str = "b", **more: Any) -> None:
    arguments = {"node": "vda", "name": name, **more}
    assert await qmp.execute(f"block-dirty-bitmap-{operation}", arguments) == {}


async def refusal(qmp: QMPClient, operation: str, **arguments: Any) -> str:
    with pytest.raises(ExecuteError) as caught:
        await qmp.execute(f"block-dirty-bitmap-{operation}", arguments)
    return str(caught.value)


async def write(daemon: Daemon, offset: int, disk: str = "vda") -> None:
    await daemon.engine.disks[disk].node.write(offset, memoryview(b"x" * 4096))


def stored(path: Path) -> list[dict[str, Any]]:
    """The bitmaps of an image, as QEMU lists them."""
    text = subprocess.check_output(["qemu-img", "info", "--output=json", path])
    return list(json.loads(text)["format-specific"]["data"].get("bitmaps", []))


async def test_added_bitmap_records_and_is_transient_unless_told(
    qmp: QMPClient, daemon: Daemon
) -> None:
    await execute(qmp, "add", granularity=4096)
    await write(daemon, 8192)
    assert await bitmap(qmp, "b") == {
        "disk": "vda",
        "name": "b",
        "granularity": 4096,
        "recording": True,
        "busy": False,
        "persistent": False,
        "inconsistent": False,
        "count": 4096,
    }


async def test_only_persistent_bitmaps_are_in_the_image_after_the_end(
    options: DaemonOptions,
) -> None:
    async with Daemon(options):
        client = QMPClient()
        await client.connect(str(options.control))
        await execute(client, "add", "transient")
        await execute(client, "add", "kept", persistent=True)
        await execute(client, "add", "frozen", persistent=True, disabled=True)
        await client.disconnect()
    assert stored(options.disks["vda"]) == [
        {"flags": ["auto"], "name": "kept", "granularity": GRANULE},
        {"flags": [], "name": "frozen", "granularity": GRANULE},
    ]
    subprocess.run(["qemu-img", "check", "-q", options.disks["vda"]], check=True)


@pytest.mark.parametrize("persistent", [False, True])
@pytest.mark.parametrize("has_chain", [False, True])
async def test_disabled_bitmap_keeps_its_bits_and_enabled_records_again(
    qmp: QMPClient, daemon: Daemon, persistent: bool, has_chain: bool
) -> None:
    if has_chain:
        await qmp.execute("checkpoint-create", {"name": "monday"})
    await execute(qmp, "add", persistent=persistent)
    await write(daemon, 0)
    await execute(qmp, "disable")
    await write(daemon, GRANULE)
    found = await bitmap(qmp, "b")
    assert found is not None
    assert (found["recording"], found["count"]) == (False, GRANULE)
    await execute(qmp, "enable")
    await write(daemon, 2 * GRANULE)
    found = await bitmap(qmp, "b")
    assert found is not None
    assert (found["recording"], found["count"]) == (True, 2 * GRANULE)


@pytest.mark.parametrize("disabled", [False, True])
@pytest.mark.parametrize("persistent", [False, True])
async def test_cleared_bitmap_marks_nothing_and_goes_on(
    qmp: QMPClient, daemon: Daemon, persistent: bool, disabled: bool
) -> None:
    await execute(qmp, "add", persistent=persistent)
    await write(daemon, 0)
    if disabled:
        await execute(qmp, "disable")
    await execute(qmp, "clear")
    await write(daemon, GRANULE)
    found = await bitmap(qmp, "b")
    assert found is not None
    assert found["count"] == (0 if disabled else GRANULE)


async def test_merge_joins_bitmaps_of_checkpoints_and_other_disks(
    qmp: QMPClient, daemon: Daemon
) -> None:
    await qmp.execute("checkpoint-create", {"name": "monday"})
    await qmp.execute(
        "block-dirty-bitmap-add", {"node": "vdb", "name": "other", "granularity": 512}
    )
    await write(daemon, 0)
    await write(daemon, SIZE - 4096, "vdb")
    await execute(qmp, "add", disabled=True)
    await qmp.execute(
        "block-dirty-bitmap-merge",
        {"node": "vda", "target": "b", "bitmaps": ["monday", {"node": "vdb", "name": "other"}]},
    )
    bits = await daemon.engine.disks["vda"].bits("b")
    assert list(bits.dirty_ranges()) == [(0, GRANULE), (SIZE - GRANULE, GRANULE)]


async def test_merge_with_one_bad_source_changes_nothing(qmp: QMPClient, daemon: Daemon) -> None:
    await execute(qmp, "add", "source")
    await execute(qmp, "add", "target", disabled=True)
    await write(daemon, 0)
    refused = await refusal(qmp, "merge", node="vda", target="target", bitmaps=["source", "none"])
    assert refused == "Dirty bitmap 'none' not found"
    found = await bitmap(qmp, "target")
    assert found is not None
    assert found["count"] == 0


async def test_removed_bitmap_is_gone_from_the_image_at_once(
    qmp: QMPClient, daemon: Daemon
) -> None:
    await execute(qmp, "add", persistent=True)
    await execute(qmp, "remove")
    assert await bitmap(qmp, "b") is None
    assert daemon.engine.disks["vda"]._store.entries == []


async def test_bitmap_of_a_checkpoint_is_refused(qmp: QMPClient) -> None:
    await qmp.execute("checkpoint-create", {"name": "monday"})
    for operation in ("remove", "clear", "enable", "disable"):
        assert await refusal(qmp, operation, node="vda", name="monday") == (
            "bitmap 'monday' belongs to checkpoint 'monday'"
        )
    refused = await refusal(qmp, "merge", node="vda", target="monday", bitmaps=[])
    assert refused == "bitmap 'monday' belongs to checkpoint 'monday'"


async def test_inconsistent_bitmap_can_only_be_removed(options: DaemonOptions) -> None:
    image = options.disks["vda"]
    subprocess.run(["qemu-img", "bitmap", "--add", image, "b"], check=True)
    data = bytearray(image.read_bytes())
    data[_flags_offset(data)] |= 1
    image.write_bytes(data)
    client = QMPClient()
    async with Daemon(options):
        await client.connect(str(options.control))
        for operation in ("clear", "enable", "disable"):
            assert "is inconsistent" in await refusal(client, operation, node="vda", name="b")
        await execute(client, "remove")
        await client.disconnect()
    assert stored(image) == []


def _flags_offset(image: bytearray) -> int:
    """Where the last byte of the only bitmap's flags is; its directory follows its name."""
    extension = image.index((0x23852875).to_bytes(4, "big"))
    directory = int.from_bytes(image[extension + 24 : extension + 32], "big")
    return directory + 15


async def test_refusals_are_in_qemus_words(qmp: QMPClient) -> None:
    await execute(qmp, "add")
    cases = [
        ("add", {"node": "vda", "name": "b"}, "Bitmap already exists: b"),
        (
            "add",
            {"node": "vda", "name": "c", "granularity": 3},
            "Granularity must be power of 2 and at least 512",
        ),
        (
            "add",
            {"node": "sda", "name": "c"},
            "Cannot find device='sda' nor node-name='sda'",
        ),
        ("remove", {"node": "vda", "name": "c"}, "Dirty bitmap 'c' not found"),
        ("clear", {"node": "vda", "name": "c"}, "Dirty bitmap 'c' not found"),
        ("merge", {"node": "vda", "target": "c", "bitmaps": ["b"]}, "Dirty bitmap 'c' not found"),
    ]
    for operation, arguments, description in cases:
        assert await refusal(qmp, operation, **arguments) == description


async def test_hash_is_qemus(tmp_path: Path, qmp: QMPClient, daemon: Daemon) -> None:
    await execute(qmp, "add")
    offsets = (0, 5 * GRANULE, SIZE - GRANULE)
    for offset in offsets:
        await write(daemon, offset)
    question = ("x-debug-block-dirty-bitmap-sha256", {"node": "vda", "name": "b"})
    ours = await qmp.execute(*question)
    image = make_image(tmp_path / "qemu.qcow2")
    subprocess.run(["qemu-img", "bitmap", "--add", image, "b"], check=True)
    commands = [word for offset in offsets for word in ("-c", f"write -q {offset} 4096")]
    subprocess.run(["qemu-io", "-f", "qcow2", *commands, image], check=True)
    async with daemon_of(tmp_path, {"vda": image}) as qemus:
        theirs = await qemus.execute(*question)
    assert ours == theirs


async def test_every_change_leaves_an_image_without_leaks(options: DaemonOptions) -> None:
    client = QMPClient()
    async with Daemon(options) as daemon:
        await client.connect(str(options.control))
        await client.execute("checkpoint-create", {"name": "monday"})
        await execute(client, "add", persistent=True)
        await execute(client, "add", "target", persistent=True)
        for operation in ("clear", "disable", "clear", "enable", "clear", "disable", "enable"):
            await write(daemon, 0)
            await execute(client, operation)
        for source in ("b", "monday"):
            arguments = {"node": "vda", "target": "target", "bitmaps": [source]}
            assert await client.execute("block-dirty-bitmap-merge", arguments) == {}
        await execute(client, "remove")
        await client.disconnect()
    subprocess.run(["qemu-img", "check", "-q", options.disks["vda"]], check=True)
    assert [each["name"] for each in stored(options.disks["vda"])] == ["monday", "target"]
