"""The commands on images, without a server: check, create, info, map."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path
from typing import Any

import pytest

from tests.held import held_by_qemu

from .conftest import Run, make_image


def qemu_json(verb: str, image: Path) -> Any:
    """In the image's folder, because QEMU looks for data files in its own."""
    words = ["qemu-img", verb, "--output=json", image]
    return json.loads(subprocess.check_output(words, cwd=image.parent))


def qemu_io(image: Path, *commands: str) -> None:
    words = [word for command in commands for word in ("-c", command)]
    program = ["qemu-io", *words, image]
    subprocess.run(program, check=True, stdout=subprocess.DEVNULL, cwd=image.parent)


def set_refcount(image: Path, cluster: int, count: int) -> None:
    """Of an image with 16-bit refcounts and its first block in use."""
    data = bytearray(image.read_bytes())
    table = int.from_bytes(data[48:56], "big")
    block = int.from_bytes(data[table : table + 8], "big")
    data[block + 2 * cluster : block + 2 * cluster + 2] = count.to_bytes(2, "big")
    image.write_bytes(data)


@pytest.fixture
def image(tmp_path: Path) -> Path:
    made = make_image(tmp_path / "image.qcow2")
    qemu_io(made, "write 0 1M")
    return made


@pytest.mark.parametrize(("count", "status"), [(1, 0), (0, 2), (2, 2)])
def test_check_has_status_and_json_of_qemu_img(
    run: Run, image: Path, count: int, status: int
) -> None:
    set_refcount(image, 6, count)
    outcome = run("check", "--json", image)
    theirs = subprocess.run(["qemu-img", "check", "--output=json", image], capture_output=True)
    assert outcome.status == theirs.returncode == status
    assert json.loads(outcome.output) == json.loads(theirs.stdout)


def test_check_of_leaks_is_status_3_and_repairs_them(run: Run, image: Path) -> None:
    set_refcount(image, 60, 1)
    image.write_bytes(image.read_bytes().ljust(61 * 65536, b"\0"))
    outcome = run("check", image)
    assert outcome.status == 3
    assert "1 leaked clusters" in outcome.output
    assert outcome.errors.splitlines() == ["Leaked cluster 60 refcount=1 reference=0"]
    repaired = run("check", "--repair", "leaks", image)
    assert (repaired.status, repaired.errors) == (0, "")
    assert repaired.output.startswith("Repaired: 1 leaked clusters.\nNo errors were found.\n")
    assert run("check", image).status == 0


def test_check_that_cannot_be_is_status_1(run: Run, tmp_path: Path) -> None:
    (tmp_path / "none").write_bytes(bytes(4096))
    outcome = run("check", "none")
    assert (outcome.status, outcome.complaint) == (1, "none: not a qcow2 image")
    assert run("check", "absent").status == 1
    assert run("check", "-U", "-r", "all", "none").status == 2


@pytest.mark.parametrize(
    "options",
    [
        "cluster_size=512,refcount_bits=1",
        "compat=0.10",
        "extended_l2=on,cluster_size=32k,lazy_refcounts=on",
        "compression_type=zstd",
        "preallocation=metadata",
        "preallocation=metadata,extended_l2=on",
        "preallocation=falloc,refcount_bits=64",
        "preallocation=full,cluster_size=4k",
        "data_file=data.raw",
        "data_file=data.raw,data_file_raw=on",
        "data_file=data.raw,preallocation=falloc",
    ],
)
def test_created_image_is_qemus_own(run: Run, tmp_path: Path, options: str) -> None:
    """The same properties, findings and map as of an image that qemu-img made."""
    ours, folder = tmp_path / "disk.qcow2", tmp_path / "theirs"
    folder.mkdir()
    theirs = folder / "disk.qcow2"
    assert run("create", "-o", options, ours, "3M").status == 0
    subprocess.run(
        ["qemu-img", "create", "-q", "-f", "qcow2", "-o", options, "disk.qcow2", "3M"],
        cwd=folder,
        check=True,
    )
    assert _info(ours) == _info(theirs)
    assert _map(ours) == _map(theirs)
    expected, found = qemu_json("check", theirs), qemu_json("check", ours)
    assert found["check-errors"] == 0
    assert not {"corruptions", "leaks"} & set(found)
    assert found.get("allocated-clusters") == expected.get("allocated-clusters")
    qemu_io(ours, "write -P 7 1M 64k", "read -P 7 1M 64k", "read -P 0 0 1M")
    assert run("check", ours).status == 0


def _info(image: Path) -> Any:
    shown = qemu_json("info", image)
    return {name: shown[name] for name in ("virtual-size", "cluster-size", "format-specific")}


def _map(image: Path) -> Any:
    """Without where in the file: that is the program's choice."""
    return [each | {"offset": None} for each in qemu_json("map", image)]


def test_created_overlay_has_its_backing_files_size(run: Run, image: Path) -> None:
    assert run("create", "-b", image.name, "-F", "qcow2", "top.qcow2").status == 0
    shown = run("info", "--json", "top.qcow2").json
    assert shown == qemu_json("info", image.with_name("top.qcow2")) | {
        "filename": "top.qcow2",
        "full-backing-filename": "image.qcow2",
    }


def test_create_takes_an_existing_raw_disk_as_it_is(run: Run, tmp_path: Path) -> None:
    """A raw disk gets bitmaps by an image beside it."""
    disk = tmp_path / "disk.raw"
    disk.write_bytes(b"\7" * (1 << 20))
    options = "data_file=disk.raw,data_file_raw=on"
    assert run("create", "-o", options, "disk.qcow2", "1M").status == 0
    assert disk.read_bytes() == b"\7" * (1 << 20)
    qemu_io(tmp_path / "disk.qcow2", "read -P 7 0 1M")
    outcome = run("create", "-o", options, "other.qcow2", "2M")
    assert outcome.status == 1
    assert "exists with 1048576 bytes" in outcome.complaint
    assert not (tmp_path / "other.qcow2").exists()


@pytest.mark.parametrize(
    "words",
    [
        ["new.qcow2"],
        ["new.qcow2", "1x"],
        ["new.qcow2", "1M", "-o", "frob=1"],
        ["new.qcow2", "1M", "-o", "cluster_size=3k"],
        ["new.qcow2", "1M", "-o", "compat=0.10,lazy_refcounts=on"],
        ["new.qcow2", "1M", "-o", "data_file_raw=on"],
        ["new.qcow2", "1M", "-o", "preallocation=some"],
        ["new.qcow2", "1M", "-o", "preallocation=full", "-b", "image.qcow2", "-F", "qcow2"],
        ["new.qcow2", "1M", "-b", "image.qcow2"],
    ],
)
def test_create_of_what_cannot_be_is_one_line_and_status_2(
    run: Run, image: Path, words: list[str]
) -> None:
    outcome = run("create", *words)
    assert outcome.status == 2
    assert outcome.complaint
    assert not image.with_name("new.qcow2").exists()


def test_create_never_writes_over_a_file(run: Run, image: Path) -> None:
    before = image.read_bytes()
    assert run("create", image, "1M").status == 1
    assert image.read_bytes() == before


def test_info_and_map_of_a_file_ask_no_server(run: Run, image: Path) -> None:
    shown = run("info", "--json", image).json
    assert shown == qemu_json("info", image)
    assert "virtual-size" in run("info", image).output
    entries = run("map", "--json", image).json
    assert [each | {"compressed": False} for each in qemu_json("map", image)] == entries
    assert len(run("map", image).output.splitlines()) == 1 + len(entries)
    assert run("map", "--totals", image).status == 2
    missing = run("map", f"{image}.not")
    assert missing.status == 1
    assert "START" not in missing.output


def test_info_of_an_image_in_use_needs_force_share(run: Run, image: Path) -> None:
    with held_by_qemu(image):
        assert run("info", image).status == 1
        assert run("info", "-U", "--json", image).json["format"] == "qcow2"
