"""A disk's bitmaps: what is in memory, and what is marked on disk."""

from __future__ import annotations

import asyncio
import errno
from pathlib import Path

import pytest

from nbdfleece.block.guest_options import DetectZeroes, GuestPolicy
from nbdfleece.engine.disk import ScratchOptions
from nbdfleece.engine.engine import Engine
from nbdfleece.engine.info import bitmap_infos, checkpoint_infos
from nbdfleece.export.export import ExportTable
from nbdfleece.testing.memory_node import MemoryNode
from tests.loop_turns import turns_of

from .rig import CLUSTER, SIZE, make_image, open_engine, qemu_img, stored_bitmaps


async def test_only_what_records_is_in_memory_and_in_use(tmp_path: Path) -> None:
    """A frozen bitmap stays clean on disk, and out of memory until it is needed."""
    image = make_image(tmp_path / "vda.qcow2")
    for name in ("old", "older", "live"):
        qemu_img("bitmap", "--add", image, name, *["--disable"] * (name != "live"))
    engine = await open_engine(tmp_path, image)
    disk = engine.disk("vda")
    in_memory = {each.name for each in disk.state.bitmaps.values() if each.bits is not None}
    assert in_memory == {"live"}
    copy = tmp_path / "copy.qcow2"
    copy.write_bytes(image.read_bytes())
    flags = {name: set(found) for name, found in stored_bitmaps(copy, after_kill=True).items()}
    assert flags == {"old": set(), "older": set(), "live": {"auto", "in-use"}}
    assert (await disk.bits("old")).is_empty()
    await engine.close()


async def test_ignored_discards_mark_nothing_and_detected_zeroes_are_changes(
    tmp_path: Path,
) -> None:
    """Rule 2 asks for what changes: a guest's fstrim that does nothing makes no backup larger."""
    image = make_image(tmp_path / "vda.qcow2")
    qemu_img("bitmap", "--add", image, "live")
    engine = Engine(ExportTable(), ScratchOptions(directory=tmp_path))
    policy = GuestPolicy(discard=False, detect_zeroes=DetectZeroes.ON)
    disk = await engine.open_disk("vda", image, policy)
    await disk.node.write(0, memoryview(b"x" * CLUSTER))
    bits = (await disk.bits("live")).copy()
    await disk.node.trim(0, 3 * CLUSTER)
    assert await disk.bits("live") == bits
    await disk.node.write(2 * CLUSTER, memoryview(bytes(CLUSTER)))
    bits.set_range(2 * CLUSTER, CLUSTER)
    assert await disk.bits("live") == bits
    await engine.close()


async def test_checkpoint_of_a_disk_with_its_bytes_elsewhere_is_stored_after_they_are_durable(
    tmp_path: Path,
) -> None:
    """Rule 2: what a power cut takes back is a change, and the new bitmap does not have it."""
    image = make_image(tmp_path / "vda.qcow2")
    engine = Engine(ExportTable(), ScratchOptions(directory=tmp_path))
    data = MemoryNode(SIZE)
    disk = await engine.open_disk("vda", image, data=data)
    await disk.node.write(0, memoryview(b"x" * CLUSTER))

    def fail(operation: str, offset: int) -> None:
        if operation == "flush":
            raise OSError(errno.EIO, "the disk does not flush")

    data.fail = fail
    with pytest.raises(OSError, match="does not flush"):
        await engine.create_checkpoint("one")
    assert disk.state.chain.find("one") is None
    copy = tmp_path / "copy.qcow2"
    copy.write_bytes(image.read_bytes())
    assert stored_bitmaps(copy, after_kill=True) == {}
    data.fail = lambda operation, offset: None
    await engine.create_checkpoint("one")
    assert data.flushes
    assert disk.state.chain.find("one") is not None
    await engine.close()


async def test_bitmaps_are_described_one_in_a_turn_and_may_go_meanwhile(tmp_path: Path) -> None:
    """Rule 5: to count what is dirty in eighty bitmaps of 1 TiB takes 50 ms."""
    image = make_image(tmp_path / "vda.qcow2")
    for number in range(5):
        qemu_img("bitmap", "--add", image, f"b{number}")
    engine = await open_engine(tmp_path, image)
    disk = engine.disk("vda")
    assert await turns_of(bitmap_infos(disk)) >= 5
    describing = asyncio.create_task(bitmap_infos(disk))
    await asyncio.sleep(0)
    left = {name: each for name, each in disk.state.bitmaps.items() if name != "b3"}
    disk.state = disk.state._replace(bitmaps=left)
    assert [each.name for each in await describing] == ["b0", "b1", "b2", "b4"]
    await engine.close()


@pytest.mark.parametrize("victim", [1, 2, 3])
async def test_checkpoints_are_described_at_one_instant_while_others_delete_some(
    tmp_path: Path, victim: int
) -> None:
    """Rule 8: no question is refused, no bitmap called missing, no change told twice or never."""
    engine = await open_engine(tmp_path, make_image(tmp_path / "vda.qcow2"))
    disk = engine.disk("vda")
    for number in range(4):
        await engine.create_checkpoint(f"k{number}")
        await disk.node.write(number << 16, memoryview(b"changed"))
    asking = asyncio.create_task(ask_until_there_are(engine, 3))
    for _ in range(10):
        await asyncio.sleep(0)
    await engine.delete_checkpoint(f"k{victim}")
    answers = await asking
    whole = {f"k{number}": 1 << 16 for number in range(4)}
    left = {name: size for name, size in whole.items() if name != f"k{victim}"}
    left[f"k{victim - 1}"] = 2 << 16
    assert len(answers) > 2
    assert all(answer == whole for answer in answers[:-1])
    assert answers[-1] == left
    await engine.close()


async def ask_until_there_are(engine: Engine, checkpoints: int) -> list[dict[str, int | None]]:
    answers: list[dict[str, int | None]] = [{}]
    async with asyncio.timeout(60):
        while len(answers[-1]) != checkpoints:
            told = await checkpoint_infos(engine)
            assert not any(info.disks["vda"].problem for info in told)
            answers.append({info.name: info.disks["vda"].changed for info in told})
    return answers[1:]


async def test_many_checkpoints_are_described_one_in_a_turn(tmp_path: Path) -> None:
    """Rule 5: to count what has changed on 1 TiB takes a millisecond each."""
    engine = await open_engine(tmp_path, make_image(tmp_path / "vda.qcow2"))
    for number in range(6):
        await engine.create_checkpoint(f"k{number}")
    assert await turns_of(checkpoint_infos(engine)) >= 6
    await engine.close()
