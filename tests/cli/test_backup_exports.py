"""``serve --backup``: restore points for NBD clients, at once."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path

import pytest

from tests.backup.conftest import tmp_path as in_memory
from tests.backup.programs import content_of, qemu_io, qemu_nbd
from tests.backup.programs import run as execute

from .conftest import Run, Start, make_image

tmp_path = in_memory


@pytest.fixture
def contents(tmp_path: Path, run: Run) -> dict[str, bytes]:
    """A backup of two points of a disk, and what they contain."""
    image = make_image(tmp_path / "a.qcow2")
    backup = tmp_path / "backup"
    found = {}
    qemu_io(image, "write -q -P 1 0 5M", "write -q -P 2 9M 64k")
    for name, since in (("monday", None), ("tuesday", "monday")):
        if since is not None:
            qemu_io(image, "write -q -P 3 1M 64k", "write -q -z 9M 64k", "write -q -P 4 12M 128k")
            execute("qemu-img", "bitmap", "--disable", image, since)
        execute("qemu-img", "bitmap", "--add", image, name)
        found[name] = content_of(image)
        with qemu_nbd(image, "-r", *(["-B", since] if since else [])) as uri:
            words = ("--checkpoint", name, *(["--since", since] if since else []))
            assert run("pull", f"vda={uri}", "--to", backup, *words).status == 0
    return found


def uri_of(tmp_path: Path, export: str) -> str:
    return f"nbd+unix:///{export}?socket={tmp_path}/n"


def serve(tmp_path: Path, start: Start, backup: str = "backup") -> None:
    start("--backup", tmp_path / backup, "--listen", f"unix:{tmp_path}/n", "--control", "none")


def test_foreign_clients_see_what_the_disk_was_and_what_has_changed(
    tmp_path: Path, start: Start, contents: dict[str, bytes]
) -> None:
    serve(tmp_path, start)
    listed = json.loads(execute("nbdinfo", "--list", "--json", f"nbd+unix:///?socket={tmp_path}/n"))
    names = {each["export-name"]: each["contexts"] for each in listed["exports"]}
    assert names["monday/vda"] == ["base:allocation", "qemu:allocation-depth"]
    assert names["tuesday/vda"][2:] == ["qemu:dirty-bitmap:monday"]
    for name, content in contents.items():
        uri = uri_of(tmp_path, f"{name}/vda")
        execute("nbdcopy", uri, tmp_path / "copied.raw")
        assert (tmp_path / "copied.raw").read_bytes() == content
        execute("qemu-img", "convert", "-f", "raw", "-O", "raw", uri, tmp_path / "converted.raw")
        assert (tmp_path / "converted.raw").read_bytes() == content
        compared = execute("qemu-img", "compare", "-f", "raw", uri, tmp_path / "copied.raw")
        assert "identical" in compared

    uri = uri_of(tmp_path, "tuesday/vda")
    mib = 1 << 20
    found = json.loads(execute("nbdinfo", "--map", "--json", uri))
    assert [(each["offset"], each["type"]) for each in found] == [
        (0, 0), (5 * mib, 3), (12 * mib, 0), (12 * mib + 131072, 3),
    ]  # fmt: skip
    found = json.loads(execute("nbdinfo", "--map=qemu:dirty-bitmap:monday", "--json", uri))
    dirty = [(each["offset"], each["length"]) for each in found if each["type"]]
    assert dirty == [(mib, 65536), (9 * mib, 65536), (12 * mib, 131072)]


def test_overlay_over_a_point_is_written_and_the_point_is_not(
    tmp_path: Path, start: Start, contents: dict[str, bytes]
) -> None:
    """Instant recovery: QEMU runs on an overlay whose backing file is the export."""
    serve(tmp_path, start, "backup@monday")
    uri = uri_of(tmp_path, "monday/vda")
    overlay = tmp_path / "overlay.qcow2"
    execute("qemu-img", "create", "-q", "-f", "qcow2", "-F", "raw", "-b", uri, overlay)
    qemu_io(overlay, "read -q -P 1 0 5M", "write -q -P 9 1M 64k", "read -q -P 9 1M 64k")
    expected = bytearray(contents["monday"])
    expected[1 << 20 : (1 << 20) + 65536] = b"\x09" * 65536
    assert content_of(overlay) == expected
    execute("nbdcopy", uri, tmp_path / "copied.raw")
    assert (tmp_path / "copied.raw").read_bytes() == contents["monday"]
    refused = subprocess.run(
        ["qemu-io", "-f", "raw", "-c", "write 0 512", uri], capture_output=True, text=True
    )
    assert "Permission denied" in refused.stderr


def test_point_is_an_increment_for_the_client(
    tmp_path: Path, start: Start, run: Run, contents: dict[str, bytes]
) -> None:
    """A backup is pulled from a backup: first all, then what differs."""
    serve(tmp_path, start)
    copy = tmp_path / "copy"
    for name, words in (("monday", ()), ("tuesday", ("--since", "monday"))):
        uri = uri_of(tmp_path, f"{name}/vda")
        words = ("pull", f"vda={uri}", "--to", copy, "--checkpoint", name, *words)
        assert run(*words).status == 0
        assert content_of(copy / f"{name}.vda.qcow2") == contents[name]
    shown = run("show", f"{copy}@tuesday", "--json").json
    assert shown["disks"][0]["read-bytes"] == 65536 + 131072


def test_nothing_to_serve_is_a_mistake(tmp_path: Path, run: Run) -> None:
    nothing = run("serve", "--control", "none")
    assert (nothing.status, "--disk, --read-only or --backup" in nothing.complaint) == (2, True)
    missing = run("serve", "--backup", tmp_path / "none", "--control", "none")
    assert (missing.status, "no such backup directory" in missing.complaint) == (1, True)
