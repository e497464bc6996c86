"""``nbdfleece resize``, with ``qemu-img resize`` beside it, and what becomes of the checkpoints."""

from __future__ import annotations

import json
import signal
import subprocess
from pathlib import Path

import pytest

from tests.backup.conftest import tmp_path as in_memory
from tests.backup.programs import content_of, qemu_io
from tests.held import held_by_qemu

from .conftest import Run, Start, make_image

tmp_path = in_memory
MIB = 1 << 20


def virtual_size(image: Path) -> int:
    words = ["qemu-img", "info", "--output=json", image]
    return int(json.loads(subprocess.check_output(words))["virtual-size"])


def make_disk(folder: Path, *options: str) -> Path:
    """An image of 4 MiB, as QEMU makes it."""
    words = ["qemu-img", "create", "-q", "-f", "qcow2", *options, "a.qcow2", "4M"]
    subprocess.run(words, cwd=folder, check=True)
    return folder / "a.qcow2"


@pytest.mark.parametrize(
    "size",
    ["8M", "4194304", "+1G", "-1M", "+0", "-3584k", "512", "1048576b"]
    + ["0", "-4M", "-5M", "1000", "+1", "1x", "", "+", "--1M", "+-1M"],
)
def test_size_is_what_qemu_img_makes_of_it(run: Run, tmp_path: Path, size: str) -> None:
    ours, theirs = (make_image(tmp_path / name, 4 * MIB) for name in ("ours", "theirs"))
    words = ["qemu-img", "resize", "-q", "--shrink", theirs, size]
    expected = subprocess.run(words, capture_output=True)
    outcome = run("resize", "--shrink", ours, size)
    assert outcome.status == (2 if expected.returncode else 0)
    assert virtual_size(ours) == virtual_size(theirs)
    if outcome.status:
        assert outcome.complaint
    else:
        assert outcome.output.startswith(f"{ours}: resized from 4 MiB to ")
    subprocess.run(["qemu-img", "check", "-q", ours], check=True)


def test_negative_size_may_stand_anywhere(run: Run, tmp_path: Path) -> None:
    image = make_image(tmp_path / "a.qcow2", 4 * MIB)
    for number, words in enumerate(
        ([image, "-512k", "--shrink"], ["-512k", "--shrink"], ["--shrink", "--", image, "-512k"])
    ):
        assert run("resize", *words).status == (2 if number == 1 else 0)
    assert virtual_size(image) == 3 * MIB
    assert "No such option '--shrnk'" in run("resize", "--shrnk", image, "-512k").complaint


@pytest.mark.parametrize("size", ["1M", "-3M"])
def test_smaller_needs_shrink(run: Run, tmp_path: Path, size: str) -> None:
    image = make_disk(tmp_path)
    before = image.read_bytes()
    outcome = run("resize", "a.qcow2", size)
    assert outcome.status == 2
    assert outcome.complaint == (
        "a.qcow2: the disk has 4194304 bytes: with 1048576 all data past its new end would be"
        " lost; --shrink allows that"
    )
    assert image.read_bytes() == before
    outcome = run("resize", "--shrink", "a.qcow2", size)
    assert outcome.output == "a.qcow2: resized from 4 MiB to 1 MiB (1048576 bytes)\n"


def test_image_in_use_or_of_another_format_is_refused(
    run: Run, start: Start, tmp_path: Path
) -> None:
    image = make_disk(tmp_path)
    with held_by_qemu(image):
        outcome = run("resize", "a.qcow2", "8M")
    assert (outcome.status, outcome.complaint.startswith("a.qcow2: ")) == (1, True)
    start("--disk", "vda=a.qcow2", "--scratch-dir", tmp_path)
    assert run("resize", "a.qcow2", "8M").status == 1
    assert virtual_size(make_image(tmp_path / "b.qcow2", 4 * MIB)) == 4 * MIB
    (tmp_path / "raw").write_bytes(bytes(4096))
    assert run("resize", "raw", "8M").complaint == "raw: not a qcow2 image"


@pytest.mark.parametrize("version", ["0.10", "1.1"])
def test_internal_snapshots_are_kept_as_by_qemu_img(run: Run, tmp_path: Path, version: str) -> None:
    """Which refuses them in version 2, where they have no size of their own."""
    image = make_disk(tmp_path, "-o", f"compat={version}")
    qemu_io(image, "write -q -P 5 0 4M")
    subprocess.run(["qemu-img", "snapshot", "-c", "before", image], check=True)
    if version == "0.10":
        expected = subprocess.run(["qemu-img", "resize", "-q", image, "8M"], capture_output=True)
        outcome = run("resize", image, "8M")
        assert (expected.returncode, outcome.status) == (1, 1)
        assert "version 2 cannot be resized while there are snapshots" in outcome.complaint
        return
    assert run("resize", image, "8M").status == 0
    assert run("resize", "--shrink", image, "1M").status == 0
    subprocess.run(["qemu-img", "check", "-q", image], check=True)
    subprocess.run(["qemu-img", "snapshot", "-a", "before", image], check=True)
    assert content_of(image) == b"\5" * (4 * MIB)


def test_inconsistent_bitmap_of_a_checkpoint_goes_with_it(run: Run, tmp_path: Path) -> None:
    """Somebody else wrote after a crash, so the log is void: neither we nor QEMU resize."""
    image = make_disk(tmp_path)
    assert run("checkpoint", "create", "monday", "--image", image).status == 0
    crash = ["qemu-io", "-c", "write -q 0 64k", "-c", "sigraise 9", image]
    assert subprocess.run(crash, capture_output=True).returncode == -signal.SIGKILL
    outcome = run("resize", image, "8M")
    assert outcome.status == 1
    assert outcome.complaint == (
        f"{image}: bitmap 'monday' is inconsistent: remove it, or the checkpoint that it belongs"
        " to, before the disk is resized"
    )
    assert run("checkpoint", "delete", "monday", "--image", image).status == 0
    assert run("resize", image, "8M").status == 0
    assert virtual_size(image) == 8 * MIB


@pytest.mark.parametrize(
    ("options", "end"),
    [
        ([], signal.SIGTERM),
        ([], signal.SIGKILL),
        (["-o", "extended_l2=on,cluster_size=16k"], signal.SIGTERM),
        (["-o", "data_file=data.raw,data_file_raw=on"], signal.SIGKILL),
        (["-o", "data_file=data.raw"], signal.SIGTERM),
        (["-b", "base.raw", "-F", "raw"], signal.SIGTERM),
    ],
)
def test_increments_go_on_after_a_resize(
    run: Run,
    start: Start,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    options: list[str],
    end: int,
) -> None:
    """Rule 2: what is new has changed since every checkpoint; the bytes are the disk's."""
    monkeypatch.chdir(tmp_path)  # where QEMU looks for data files
    (tmp_path / "base.raw").write_bytes(b"\7" * (6 * MIB))
    image = make_disk(tmp_path, *options)
    expected = bytearray(content_of(image))
    uri = f"nbd+unix:///vda?socket={tmp_path}/nbdfleece/nbd.sock"

    def serve(point: str, number: int) -> int:
        """A pull amid guest writes, the last of them at the disk's end; bytes that changed."""
        server = start("--disk", "vda=a.qcow2", "--scratch-dir", tmp_path)
        offset = len(expected) - MIB // 2
        command = f"write -q -P {number} {offset} 64k"
        qemu_io(uri, command, image_format="raw")
        expected[offset : offset + 65536] = bytes([number]) * 65536
        pulled = run("pull", "--to", "backup", "--point", point, "--json").json
        restored = tmp_path / f"{point}.raw"
        assert run("restore", f"backup@{point}", "--to", restored).status == 0
        assert restored.read_bytes() == expected
        server.end(end)
        return int(pulled["disks"][0]["changed-bytes"])

    def resize(size: int) -> None:
        outcome = run("resize", "--shrink", "a.qcow2", str(size))
        assert (outcome.status, outcome.errors) == (0, "")
        expected[size:] = bytes(max(0, size - len(expected)))
        check = ["qemu-img", "check", "-q", image]
        assert subprocess.run(check).returncode in ((0, 3) if end == signal.SIGKILL else (0,))
        assert content_of(image) == expected
        if "data" in str(options):
            assert (tmp_path / "data.raw").read_bytes() == expected

    serve("monday", 1)
    resize(8 * MIB)
    assert serve("tuesday", 2) >= 4 * MIB
    resize(2 * MIB + 512)
    resize(6 * MIB)
    assert serve("wednesday", 3) >= 4 * MIB - 512
    resize(3 * MIB)
    changed = serve("thursday", 4)
    assert changed == 65536 or end == signal.SIGKILL
    found = run("checkpoint", "list", "--json", "--image", image).json
    links = [each["disks"][str(image)] for each in found]
    assert [link["problem"] for link in links] == [None] * 4
    resize(5 * MIB)
    start("--disk", "vda=a.qcow2", "--scratch-dir", tmp_path)
    for number, since in enumerate(("monday", "tuesday", "wednesday", "thursday")):
        assert run("backup", "begin", f"b{number}", "--since", since).status == 0
        exported = f"nbd+unix:///b{number}/vda?socket={tmp_path}/nbdfleece/nbd.sock"
        [*_, last] = run("map", "--json", "--context", f"qemu:dirty-bitmap:{since}", exported).json
        assert last["offset"] + last["length"] == 5 * MIB
        assert last["offset"] <= 3 * MIB
        assert last["type"] == 1
