"""Transactions: all or nothing, and as QEMU's storage daemon does them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from qemu.qmp import ExecuteError, QMPClient

from nbdfleece.daemon import Daemon

from .conftest import GRANULE
from .oracle import Step, bitmaps_of, reply, storage_daemon


def action(kind: str, **data: Any) -> dict[str, Any]:
    return {"type": kind, "data": data}


def add(node: str, name: str, **more: Any) -> dict[str, Any]:
    return action("block-dirty-bitmap-add", node=node, name=name, **more)


def transaction(*actions: dict[str, Any]) -> Step:
    return "transaction", {"actions": list(actions)}


STREAM: list[Step] = [
    transaction(),
    transaction(add("vda", "b"), action("abort")),
    transaction(action("nonsense")),
    ("transaction", {"actions": [{"type": "block-dirty-bitmap-add"}]}),
    transaction(action("block-dirty-bitmap-add", node="vda")),
    transaction(add("vda", "c", foo=1)),
    transaction(
        add("vda", "b"),
        add("vdb", "b"),
        action("block-dirty-bitmap-merge", node="vdb", target="b", bitmaps=["nope"]),
    ),
    (
        "transaction",
        {"actions": [add("vda", "b")], "properties": {"completion-mode": "grouped"}},
    ),
    transaction(add("vda", "b"), add("vdb", "b", disabled=True, granularity=4096)),
    transaction(
        add("vda", "sum", disabled=True),
        action(
            "block-dirty-bitmap-merge",
            node="vda",
            target="sum",
            bitmaps=["b", {"node": "vdb", "name": "b"}],
        ),
        action("block-dirty-bitmap-disable", node="vda", name="b"),
        action("block-dirty-bitmap-enable", node="vdb", name="b"),
    ),
    transaction(
        action("block-dirty-bitmap-clear", node="vda", name="sum"),
        action("block-dirty-bitmap-remove", node="vda", name="b"),
        action("abort"),
    ),
    transaction(
        action("block-dirty-bitmap-remove", node="vdb", name="b"),
        add("vda", "kept", persistent=True),
        add("vdb", "other"),
    ),
]


async def test_replies_and_bitmaps_are_qemus(qmp: QMPClient, tmp_path: Path) -> None:
    async with storage_daemon(tmp_path, ["vda", "vdb"]) as qemu:
        for step in STREAM:
            assert await reply(qmp, *step) == await reply(qemu, *step), step
            for node in ("vda", "vdb"):
                assert await bitmaps_of(qmp, node) == await bitmaps_of(qemu, node), step


async def write(daemon: Daemon, disk: str, offset: int) -> None:
    await daemon.engine.disks[disk].node.write(offset, memoryview(b"x" * 4096))


async def dirty(daemon: Daemon, disk: str, name: str) -> list[tuple[int, int]]:
    return list((await daemon.engine.disks[disk].bits(name)).dirty_ranges())


async def test_change_of_bitmaps_has_one_instant_on_all_disks(
    qmp: QMPClient, daemon: Daemon
) -> None:
    """Rule 3: what is written afterwards is in the new bitmaps and in none of the old ones."""
    for disk in ("vda", "vdb"):
        await qmp.execute(*transaction(add(disk, "old")))
        await write(daemon, disk, 0)
    await qmp.execute(
        *transaction(
            *(
                action("block-dirty-bitmap-disable", node=disk, name="old")
                for disk in ("vda", "vdb")
            ),
            *(add(disk, "new") for disk in ("vda", "vdb")),
            action("snapshot-create", name="s"),
        )
    )
    for disk in ("vda", "vdb"):
        await write(daemon, disk, GRANULE)
        assert await dirty(daemon, disk, "old") == [(0, GRANULE)]
        assert await dirty(daemon, disk, "new") == [(GRANULE, GRANULE)]
    assert set(daemon.engine.snapshot("s").disks) == {"vda", "vdb"}


async def test_persistent_bitmaps_of_two_disks_change_together(
    qmp: QMPClient, daemon: Daemon
) -> None:
    both = ("vda", "vdb")
    await qmp.execute(*transaction(*(add(disk, "old", persistent=True) for disk in both)))
    for disk in both:
        await write(daemon, disk, 0)
    await qmp.execute(
        *transaction(
            *(add(disk, "new", persistent=True) for disk in both),
            *(action("block-dirty-bitmap-disable", node=disk, name="old") for disk in both),
        )
    )
    for disk in both:
        await write(daemon, disk, GRANULE)
        assert await dirty(daemon, disk, "old") == [(0, GRANULE)]
        assert await dirty(daemon, disk, "new") == [(GRANULE, GRANULE)]
        found = await bitmaps_of(qmp, disk)
        assert [each["name"] for each in found] == ["new", "old"]


async def test_failing_image_leaves_everything_as_it_was(
    qmp: QMPClient, daemon: Daemon, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Rule 6: the transient bitmap of the other disk and the snapshot are taken back, too."""
    await qmp.execute(*transaction(add("vda", "b", persistent=True), add("vdb", "c")))
    await write(daemon, "vda", 0)

    async def fail(*arguments: object) -> None:
        raise OSError(28, "No space left on device", "vda.qcow2")

    with monkeypatch.context() as patch:
        patch.setattr(daemon.engine.disks["vda"]._store, "replace", fail)
        with pytest.raises(ExecuteError, match=r"vda\.qcow2: No space left on device"):
            await qmp.execute(
                *transaction(
                    action("block-dirty-bitmap-clear", node="vda", name="b"),
                    action("block-dirty-bitmap-clear", node="vdb", name="c"),
                    add("vdb", "d"),
                    action("snapshot-create", name="s"),
                )
            )
    assert daemon.engine.snapshots == {}
    assert not daemon.engine.disks["vda"].copies.has_layers
    await write(daemon, "vda", GRANULE)
    await write(daemon, "vdb", GRANULE)
    assert await dirty(daemon, "vda", "b") == [(0, 2 * GRANULE)]
    assert await dirty(daemon, "vdb", "c") == [(GRANULE, GRANULE)]
    assert set(daemon.engine.disks["vdb"].state.bitmaps) == {"c"}


async def test_refused_action_takes_back_the_snapshot_before_it(
    qmp: QMPClient, daemon: Daemon
) -> None:
    with pytest.raises(ExecuteError, match="aborted"):
        await qmp.execute(*transaction(action("snapshot-create", name="s"), action("abort")))
    assert daemon.engine.snapshots == {}
    assert not any(disk.copies.has_layers for disk in daemon.engine.disks.values())
    await qmp.execute("snapshot-create", {"name": "s"})


@pytest.mark.parametrize(
    ("wrong", "description"),
    [
        ({"data": {}}, "Parameter 'actions[0].type' is missing"),
        ({"type": "abort", "data": 1}, "Invalid parameter type for 'actions[0].data', expected"),
        ({"type": "abort", "data": {}, "x": 1}, "Parameter 'actions[0].x' is unexpected"),
        ({"type": "quit", "data": {}}, "Parameter 'type' does not accept value 'quit'"),
        (
            {"type": "snapshot-create", "data": {"name": "s", "disks": ["vda", "vda"]}},
            "name each disk once",
        ),
    ],
)
async def test_what_is_no_action_is_refused(
    qmp: QMPClient, wrong: dict[str, Any], description: str
) -> None:
    with pytest.raises(ExecuteError) as caught:
        await qmp.execute("transaction", {"actions": [wrong]})
    assert str(caught.value).startswith(description)
