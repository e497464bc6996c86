"""The commands on bitmaps and checkpoints of images, without a server."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from .conftest import Run, Start, make_image


def as_qemu_sees(image: Path) -> dict[str, tuple[int, list[str]]]:
    """Granularity and flags of bitmaps."""
    printed = subprocess.check_output(["qemu-img", "info", "--output=json", image])
    data: dict[str, Any] = json.loads(printed)["format-specific"]["data"]
    return {each["name"]: (each["granularity"], each["flags"]) for each in data.get("bitmaps", [])}


def qemu_io(image: Path, command: str) -> None:
    subprocess.run(["qemu-io", "-c", command, image], check=True, stdout=subprocess.DEVNULL)


@pytest.fixture
def images(tmp_path: Path) -> list[Path]:
    return [make_image(tmp_path / name) for name in ("a.qcow2", "b.qcow2")]


def done(run: Run, *words: str | Path) -> None:
    outcome = run(*words)
    assert (outcome.status, outcome.output, outcome.errors) == (0, "", "")


def test_bitmaps_are_changed_on_all_images_as_by_qemu_img(run: Run, images: list[Path]) -> None:
    done(run, "bitmap", "add", "x", *images, "-g", "8k")
    done(run, "bitmap", "add", "y", *images, "--disabled")
    for image in images:
        assert as_qemu_sees(image) == {"x": (8192, ["auto"]), "y": (65536, [])}
        qemu_io(image, "write 1M 16k")
    done(run, "bitmap", "merge", "y", *images, "--source", "x")
    done(run, "bitmap", "disable", "x", *images)
    done(run, "bitmap", "enable", "y", *images)
    for image in images:
        assert as_qemu_sees(image) == {"x": (8192, []), "y": (65536, ["auto"])}
        subprocess.run(["qemu-img", "check", "-q", image], check=True)
    listed = run("bitmap", "list", "--json", "--image", images[0], "--image", images[1]).json
    assert [(each["name"], each["count"]) for each in listed] == 2 * [("x", 16384), ("y", 65536)]
    done(run, "bitmap", "clear", "y", *images)
    done(run, "bitmap", "remove", "x", *images)
    lines = run("bitmap", "list", "--image", images[1]).output.splitlines()
    assert [line.split()[1:] for line in lines] == [
        ["BITMAP", "GRANULARITY", "DIRTY", "FLAGS", "PROBLEM"],
        ["y", "64", "KiB", "0", "B", "recording"],
    ]


def test_bitmap_that_one_image_lacks_is_changed_on_none(run: Run, images: list[Path]) -> None:
    done(run, "bitmap", "add", "x", images[0])
    outcome = run("bitmap", "remove", "x", *images)
    assert (outcome.status, outcome.complaint) == (1, f"{images[1]}: there is no bitmap 'x'")
    assert list(as_qemu_sees(images[0])) == ["x"]


@pytest.mark.parametrize(
    "words",
    [
        ["add", "x"],
        ["add", "x", "a.qcow2", "-g", "3k"],
        ["merge", "x", "a.qcow2"],
        ["list", "vda", "--image", "a.qcow2"],
        ["repair"],
    ],
)
def test_command_that_cannot_be_meant_is_status_2(
    run: Run, images: list[Path], words: list[str]
) -> None:
    outcome = run("bitmap", *words)
    assert outcome.status == 2
    assert outcome.complaint


def test_image_of_a_running_server_is_refused(
    run: Run, start: Start, images: list[Path], tmp_path: Path
) -> None:
    start("--disk", "vda=a.qcow2", "--scratch-dir", tmp_path)
    for words in (["bitmap", "add", "x", "b.qcow2", "a.qcow2"], ["check", "a.qcow2"]):
        outcome = run(*words)
        assert outcome.status == 1
        assert outcome.complaint.startswith("a.qcow2: ")
    assert as_qemu_sees(images[1]) == {}


@pytest.fixture
def damaged(run: Run, images: list[Path]) -> Path:
    """An image that QEMU cannot open any more: the second of its bitmaps is of no known type."""
    image = images[0]
    done(run, "bitmap", "add", "good", image)
    done(run, "bitmap", "add", "bad", image)
    data = bytearray(image.read_bytes())
    entry = data.index(b"bad\0") - 24
    data[entry + 16] = 9
    image.write_bytes(data)
    assert subprocess.run(["qemu-img", "info", image], capture_output=True).returncode
    return image


def test_damaged_directory_is_listed(run: Run, damaged: Path) -> None:
    listed = run("bitmap", "list", "--json", "--image", damaged).json
    assert [(each["name"], each["damage"]) for each in listed] == [
        ("good", None),
        ("bad", "is of the unknown type 9"),
    ]
    outcome = run("bitmap", "add", "x", damaged)
    assert outcome.status == 1
    assert "'nbdfleece bitmap repair' drops" in outcome.complaint


@pytest.mark.parametrize("words", [["repair"], ["remove", "bad"]])
def test_damaged_bitmap_is_dropped_without_qemu(run: Run, damaged: Path, words: list[str]) -> None:
    assert run("bitmap", *words, damaged).status == 0
    assert list(as_qemu_sees(damaged)) == ["good"]
    assert run("check", "--repair", "leaks", damaged).status == 0
    subprocess.run(["qemu-img", "check", "-q", damaged], check=True)


def test_checkpoint_of_images_is_made_listed_and_deleted(run: Run, images: list[Path]) -> None:
    """A server that opens them later goes on with it."""
    words = ("--image", images[0], "--image", images[1])
    done(run, "checkpoint", "create", "monday", "--owner", "me", *words)
    qemu_io(images[0], "write 1M 64k")
    done(run, "checkpoint", "create", "tuesday", *words)
    found = run("checkpoint", "list", "--json", *words).json
    assert [(each["name"], each["parent"], each["owner"]) for each in found] == [
        ("monday", None, "me"),
        ("tuesday", "monday", ""),
    ]
    assert {path: link["changed"] for path, link in found[0]["disks"].items()} == {
        str(images[0]): 65536,
        str(images[1]): 0,
    }
    outcome = run("bitmap", "remove", "monday", images[0])
    assert outcome.complaint == f"{images[0]}: bitmap 'monday' belongs to checkpoint 'monday'"
    done(run, "checkpoint", "delete", "monday", *words)
    assert [list(as_qemu_sees(image)) for image in images] == [["tuesday"], ["tuesday"]]


def test_checkpoint_of_images_and_disks_is_status_2(run: Run, images: list[Path]) -> None:
    words = ("--image", images[0], "--disk", "vda")
    assert run("checkpoint", "create", "monday", *words).status == 2


def test_checkpoint_that_one_image_cannot_take_is_made_on_none(
    run: Run, images: list[Path]
) -> None:
    done(run, "bitmap", "add", "monday", images[1])
    words = ("--image", images[0], "--image", images[1])
    outcome = run("checkpoint", "create", "monday", *words)
    assert (outcome.status, len(outcome.errors.splitlines())) == (1, 1)
    assert as_qemu_sees(images[0]) == {}
    assert run("checkpoint", "list", "--json", *words).json == []


def test_changes_after_a_kill_of_the_server_keep_the_checkpoint(
    run: Run, start: Start, images: list[Path], tmp_path: Path
) -> None:
    """What the recording bitmap's log promises holds through a change made offline."""
    server = start("--disk", "vda=a.qcow2", "--scratch-dir", tmp_path)
    done(run, "checkpoint", "create", "monday")
    uri = f"nbd+unix:///vda?socket={tmp_path}/nbdfleece/nbd.sock"
    words = ["qemu-io", "-f", "raw", "-c", "write 1M 64k", "-c", "flush", uri]
    subprocess.run(words, check=True, stdout=subprocess.DEVNULL)
    server.end(signal.SIGKILL)
    done(run, "bitmap", "add", "x", *images)
    [found] = run("checkpoint", "list", "--json", "--image", images[0]).json
    link = found["disks"][str(images[0])]
    assert link["problem"] is None
    assert link["changed"] >= 65536
    start("--disk", "vda=a.qcow2", "--scratch-dir", tmp_path)
    [found] = run("checkpoint", "list", "--json").json
    assert found["disks"]["vda"]["problem"] is None


def test_killed_command_is_settled_by_the_next(run: Run, images: list[Path]) -> None:
    """A real process, ended by SIGKILL at one of its writes."""
    for image in images:
        done(run, "bitmap", "add", "b", image)
    script = (
        "import os, sys\n"
        "from nbdfleece.block.file import FileNode\n"
        "from nbdfleece.cli.main import main\n"
        "left, write = int(sys.argv[1]), FileNode.write\n"
        "async def mortal(*arguments):\n"
        "    global left\n"
        "    left -= 1\n"
        "    if left < 0:\n"
        "        os.kill(os.getpid(), 9)\n"
        "    await write(*arguments)\n"
        "FileNode.write = mortal\n"
        "sys.exit(main(sys.argv[2:]))\n"
    )
    for write in range(1, 60, 14):
        name = f"new{write}"
        words = [sys.executable, "-c", script, str(write), "bitmap", "add", name, *images]
        ended = subprocess.run(words, capture_output=True)
        assert ended.returncode in (0, -signal.SIGKILL)
        assert run("bitmap", "settle", *images).status == 0
        found = [name in as_qemu_sees(image) for image in images]
        assert found[0] == found[1], f"killed at write {write}"
        if ended.returncode == 0:
            assert found[0]
