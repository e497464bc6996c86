"""The pull backup of 2018, on the draft commands of its day: begun, pulled, compared."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from qemu.qmp import QMPClient

from nbdfleece.control.drafts import final_form
from nbdfleece.daemon import Daemon

from .conftest import GRANULE, SIZE, make_image
from .oracle import Step, content, dirty_map, qemu_io, reply
from .test_nbd_server_commands import bitmap
from .test_transaction_commands import action, transaction


@pytest.mark.parametrize("prefix", ["", "x-", "x-vz-"])
def test_draft_names_and_arguments_become_the_final_ones(prefix: str) -> None:
    merge = {"node": "n", "src_name": "a", "dst_name": "b"}
    assert final_form(f"{prefix}block-dirty-bitmap-merge", merge) == (
        "block-dirty-bitmap-merge",
        {"node": "n", "target": "b", "bitmaps": ["a"]},
    )
    assert final_form(
        f"{prefix}block-dirty-bitmap-add", {"x-disabled": True, "autoload": True}
    ) == (
        "block-dirty-bitmap-add",
        {"disabled": True},
    )


def test_names_of_today_are_left_alone() -> None:
    for name in ("x-debug-block-dirty-bitmap-sha256", "x-quit", "backup-begin"):
        assert final_form(name, {"a": 1}) == (name, {"a": 1})


def stream(prefix: str, file: Path) -> list[Step]:
    """A second backup: freeze, go on to the next checkpoint's bitmap, show what changed since."""
    named = f"{prefix}block-dirty-bitmap"
    return [
        ("blockdev-add", {"driver": "file", "node-name": "f", "filename": str(file)}),
        (
            "blockdev-add",
            {"driver": "qcow2", "node-name": "snapshot", "file": "f", "backing": "vda"},
        ),
        transaction(
            action("blockdev-backup", device="vda", target="snapshot", sync="none"),
            action(f"{named}-add", node="vda", name="second", persistent=True, autoload=True),
            action(f"{named}-disable", node="vda", name="first"),
        ),
        (f"{named}-add", {"node": "vda", "name": "export", "persistent": False}),
        (f"{named}-disable", {"node": "vda", "name": "export"}),
        (f"{named}-merge", {"node": "vda", "src_name": "first", "dst_name": "export"}),
        ("nbd-server-add", {"device": "snapshot", "name": "sda"}),
        (
            f"{prefix}nbd-server-add-bitmap",
            {"name": "sda", "bitmap": "export", "bitmap-export-name": "first"},
        ),
    ]


END: list[Step] = [
    ("nbd-server-remove", {"name": "sda"}),
    ("block-job-cancel", {"device": "vda"}),
    ("blockdev-del", {"node-name": "snapshot"}),
    ("blockdev-del", {"node-name": "f"}),
    bitmap("remove", "export"),
]


@pytest.mark.parametrize("prefix", ["", "x-", "x-vz-"])
async def test_pull_backup_of_2018_is_frozen_and_shows_what_changed(
    qmp: QMPClient, daemon: Daemon, tmp_path: Path, prefix: str
) -> None:
    (live,) = daemon.export_uris("vda")
    await _run(qmp, [bitmap("add", "first", persistent=True)])
    await qemu_io(live, "write -P 1 0 4096", "write -P 2 1M 64k")
    frozen = await content(live)
    await _run(qmp, stream(prefix, make_image(tmp_path / "snapshot.qcow2")))
    await qemu_io(live, "write -P 3 0 64k", "write -z 1M 64k", "write -P 4 8M 512")
    (uri,) = daemon.export_uris("sda")
    assert await content(uri) == frozen
    assert await dirty_map(uri, "qemu:dirty-bitmap:first") == [
        (0, GRANULE, 1),
        (GRANULE, (1 << 20) - GRANULE, 0),
        (1 << 20, GRANULE, 1),
        ((1 << 20) + GRANULE, SIZE - (1 << 20) - GRANULE, 0),
    ]
    second = await daemon.engine.disks["vda"].bits("second")
    expected = [(0, GRANULE), (1 << 20, GRANULE), (8 << 20, GRANULE)]
    assert list(second.dirty_ranges()) == expected
    await _run(qmp, END)


async def test_bitmap_is_added_only_to_exports_that_were_added(qmp: QMPClient) -> None:
    arguments: dict[str, Any] = {"name": "vda", "bitmap": "b"}
    refused = await reply(qmp, "nbd-server-add-bitmap", arguments)
    assert refused == ("GenericError", "Export 'vda' is not found")


async def _run(qmp: QMPClient, steps: list[Step]) -> None:
    for step in steps:
        assert await reply(qmp, *step) == {}, step
