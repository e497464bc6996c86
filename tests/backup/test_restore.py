"""Restoring to files, exports and devices, verified on the way."""

from __future__ import annotations

import random
import subprocess
from pathlib import Path

import pytest

from nbdfleece.backup import (
    BackupDirectory,
    BackupError,
    ChecksumError,
    DiskUri,
    RateLimit,
    Restored,
    RestoreOptions,
    ServerError,
    full_requests,
    open_target,
    pull,
    restore,
)
from nbdfleece.errors import StateError, UsageError

from .histories import SIZE, History
from .programs import content_of, nbdkit, qemu_io, qemu_nbd, run


@pytest.fixture
async def history(tmp_path: Path) -> History:
    history = History(tmp_path)
    await history.build(4)
    return history


async def restored_to(history: History, point: str, target: str) -> Restored:
    found = history.directory.point(point)
    return await restore(history.directory, found, "vda", await open_target(target, SIZE))


@pytest.mark.parametrize("point", ["p0", "p1", "p3"])
@pytest.mark.parametrize("ending", ["raw", "qcow2"])
async def test_new_file_has_the_content_and_only_what_is_not_zero(
    tmp_path: Path, history: History, point: str, ending: str
) -> None:
    path = tmp_path / f"out.{ending}"
    done = await restored_to(history, point, str(path))
    content = history.contents[point]
    assert content_of(path, ending)[:SIZE] == content
    assert done.zeroed_bytes == 0
    assert done.written_bytes + done.skipped_bytes == SIZE
    assert path.stat().st_blocks * 512 < done.written_bytes + (2 << 20)
    assert sorted(tmp_path.glob("out*")) == [path]


async def test_file_that_exists_is_kept_unless_told_otherwise(
    tmp_path: Path, history: History
) -> None:
    path = tmp_path / "out.raw"
    path.write_bytes(b"old")
    with pytest.raises(StateError, match="--overwrite"):
        await open_target(str(path), SIZE)
    assert path.read_bytes() == b"old"
    target = await open_target(str(path), SIZE, overwrite=True)
    await restore(history.directory, history.directory.point("p2"), "vda", target)
    assert path.read_bytes() == history.contents["p2"]


@pytest.mark.parametrize("fill", ["zero", "data", "mixed"])
async def test_export_gets_the_content_whatever_was_there(
    tmp_path: Path, history: History, fill: str
) -> None:
    image = tmp_path / "target.qcow2"
    run("qemu-img", "create", "-q", "-f", "qcow2", image, str(SIZE))
    if fill != "zero":
        qemu_io(image, f"write -q -P 7 0 {SIZE if fill == 'data' else SIZE // 2}")
    with qemu_nbd(image) as uri:
        done = await restored_to(history, "p3", uri)
    assert content_of(image) == history.contents["p3"]
    assert (done.zeroed_bytes == 0) == (fill == "zero")
    assert done.written_bytes + done.zeroed_bytes + done.skipped_bytes == SIZE


async def test_export_that_cannot_zero_gets_zeroes_written(
    tmp_path: Path, history: History
) -> None:
    raw = tmp_path / "target.raw"
    raw.write_bytes(b"\7" * SIZE)
    with nbdkit(tmp_path, "--filter=nozero", "--filter=noextents", "file", str(raw)) as uri:
        done = await restored_to(history, "p3", uri)
    assert raw.read_bytes() == history.contents["p3"]
    assert done.skipped_bytes == 0


async def test_larger_export_keeps_what_is_past_the_disk(tmp_path: Path, history: History) -> None:
    raw = tmp_path / "target.raw"
    raw.write_bytes(b"\7" * (SIZE + 4096))
    with nbdkit(tmp_path, "file", str(raw)) as uri:
        await restored_to(history, "p1", uri)
    assert raw.read_bytes() == history.contents["p1"] + b"\7" * 4096


async def test_read_only_or_small_export_is_refused(tmp_path: Path, history: History) -> None:
    raw = tmp_path / "target.raw"
    raw.write_bytes(b"\7" * SIZE)
    with nbdkit(tmp_path, "file", str(raw)) as uri, pytest.raises(ServerError, match="bytes, the"):
        await open_target(uri, SIZE + 1)
    with nbdkit(tmp_path, "-r", "file", str(raw)) as uri, pytest.raises(ServerError, match="only"):
        await open_target(uri, SIZE)
    assert raw.read_bytes() == b"\7" * SIZE


async def test_block_device_gets_the_content(tmp_path: Path, history: History) -> None:
    raw = tmp_path / "device.raw"
    raw.write_bytes(b"\7" * (-(-SIZE // 4096) * 4096 + 8192))
    done = subprocess.run(["losetup", "--find", "--show", raw], capture_output=True, text=True)
    if done.returncode:
        pytest.skip(f"no loop device: {done.stderr.strip()}")
    device = done.stdout.strip()
    try:
        await restored_to(history, "p3", device)
        with pytest.raises(UsageError, match="the disk"):
            await open_target(device, SIZE + (1 << 30))
    finally:
        run("losetup", "--detach", device)
    assert raw.read_bytes()[:SIZE] == history.contents["p3"]
    assert raw.read_bytes()[SIZE:].strip(b"\7") == b""


async def test_damage_stops_the_restore_and_leaves_no_file(
    tmp_path: Path, history: History
) -> None:
    history.damage("p0")
    with pytest.raises(ChecksumError, match="not what was pulled"):
        await restored_to(history, "p0", str(tmp_path / "out.raw"))
    assert not list(tmp_path.glob("out*"))


async def test_broken_chain_stops_the_restore_before_anything_is_written(
    tmp_path: Path, history: History
) -> None:
    (history.directory.path / "p1.vda.qcow2").unlink()
    with pytest.raises(BackupError):
        await restored_to(history, "p3", str(tmp_path / "out.raw"))
    assert not list(tmp_path.glob("out*"))


async def test_full_target_is_an_error_and_the_file_is_removed(
    tmp_path: Path, history: History
) -> None:
    raw = tmp_path / "target.raw"
    raw.write_bytes(bytes(SIZE))
    with (
        nbdkit(tmp_path, "--filter=error", "file", str(raw), "error-pwrite=ENOSPC",
               "error-pwrite-rate=100%") as uri,
        pytest.raises(ServerError, match="No space left"),
    ):  # fmt: skip
        await restored_to(history, "p3", uri)


async def test_rate_limit_and_progress(tmp_path: Path, history: History) -> None:
    seen = []
    options = RestoreOptions(limit=RateLimit(1 << 30), progress=seen.append)
    target = await open_target(str(tmp_path / "out.raw"), SIZE)
    point = history.directory.point("p3")
    done = await restore(history.directory, point, "vda", target, options=options)
    assert seen[-1][1:] == (done.written_bytes, done.written_bytes)


async def test_small_disk_of_odd_size_comes_back(tmp_path: Path) -> None:
    raw = tmp_path / "odd.raw"
    raw.write_bytes(random.Random(1).randbytes(70001))
    directory = BackupDirectory(tmp_path / "backup")
    with nbdkit(tmp_path, "file", str(raw)) as uri:
        point = await pull(full_requests([DiskUri("d", uri)]), directory, point="only")
    target = await open_target(str(tmp_path / "out.raw"), 70001)
    await restore(directory, point, "d", target)
    assert (tmp_path / "out.raw").read_bytes() == raw.read_bytes()
