"""Images and their chains are opened as the operator says, and no further."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path

import pytest

from nbdfleece.block.file import FileNode
from nbdfleece.block.raw import RawNode
from nbdfleece.errors import (
    ImageError,
    ImageLockedError,
    NbdfleeceError,
    StateError,
    UnsupportedImageError,
    UsageError,
)
from nbdfleece.qcow2.backing import BackingPolicy
from nbdfleece.qcow2.image import Qcow2Image
from nbdfleece.standalone.disk import Disk, DiskOptions

MIB = 1 << 20


def qemu_img(*words: str | Path) -> None:
    subprocess.run(["qemu-img", *map(str, words)], check=True, capture_output=True)


def create(path: Path, *words: str, size: int = MIB) -> Path:
    qemu_img("create", "-q", "-f", "qcow2", *words, path, str(size))
    return path


async def content(options: DiskOptions, offset: int = 0, length: int = 4) -> bytes:
    disk = await Disk.open(options)
    try:
        buffer = bytearray(length)
        await disk.node.read_into(offset, memoryview(buffer))
        return bytes(buffer)
    finally:
        await disk.close()


@pytest.fixture
def raw(tmp_path: Path) -> Path:
    path = tmp_path / "disk.raw"
    path.write_bytes(b"raw!" + bytes(65532))
    return path


@pytest.fixture
def elsewhere(tmp_path: Path, raw: Path) -> Path:
    """An image in a folder of its own, whose backing file is outside."""
    (tmp_path / "sub").mkdir()
    return create(tmp_path / "sub" / "disk.qcow2", "-b", str(raw), "-F", "raw")


async def test_backing_file_outside_the_folder_needs_leave(elsewhere: Path) -> None:
    with pytest.raises(ImageError, match="outside its folder"):
        await Disk.open(DiskOptions(name=str(elsewhere)))
    trusting = DiskOptions(name=str(elsewhere), policy=BackingPolicy.ANY)
    assert await content(trusting) == b"raw!"
    with pytest.raises(ImageError, match="not to be opened"):
        await Disk.open(DiskOptions(name=str(elsewhere), policy=BackingPolicy.REFUSE))


async def test_backing_file_that_the_operator_names_is_opened_in_any_case(
    elsewhere: Path, raw: Path
) -> None:
    options = {
        "driver": "qcow2",
        "file.filename": str(elsewhere),
        "backing": {"driver": "raw", "file.filename": str(raw)},
    }
    named = DiskOptions(name=f"json:{json.dumps(options)}", policy=BackingPolicy.REFUSE)
    assert await content(named) == b"raw!"
    options["backing"] = None  # type: ignore[assignment]  # JSON has all kinds
    named = DiskOptions(name=f"json:{json.dumps(options)}", policy=BackingPolicy.REFUSE)
    assert await content(named) == bytes(4)


async def test_json_backing_file_of_an_image_needs_trust(tmp_path: Path, raw: Path) -> None:
    backing = {"driver": "raw", "file": {"driver": "file", "filename": str(raw)}}
    image = create(tmp_path / "disk.qcow2")
    qemu_img("rebase", "-u", "-b", f"json:{json.dumps(backing)}", "-F", "raw", image)
    with pytest.raises(UnsupportedImageError, match="only if you trust the image"):
        await Disk.open(DiskOptions(name=str(image)))
    assert await content(DiskOptions(name=str(image), policy=BackingPolicy.ANY)) == b"raw!"


async def test_protocol_as_a_backing_file_is_refused(tmp_path: Path) -> None:
    image = create(tmp_path / "disk.qcow2")
    qemu_img("rebase", "-u", "-b", "nbd://localhost/x", "-F", "raw", image)
    with pytest.raises(UnsupportedImageError, match="nbd://localhost/x"):
        await Disk.open(DiskOptions(name=str(image), policy=BackingPolicy.ANY))


@pytest.mark.parametrize("policy", [BackingPolicy.SAME_FOLDER, BackingPolicy.ANY])
async def test_chain_that_comes_back_to_itself_is_refused(
    tmp_path: Path, policy: BackingPolicy
) -> None:
    first, second = create(tmp_path / "a.qcow2"), create(tmp_path / "b.qcow2")
    qemu_img("rebase", "-u", "-b", "b.qcow2", "-F", "qcow2", first)
    qemu_img("rebase", "-u", "-b", "a.qcow2", "-F", "qcow2", second)
    with pytest.raises(ImageError, match="comes back to"):
        await Disk.open(DiskOptions(name=str(first), policy=policy))


async def test_format_is_guessed_and_raw_disks_are_guarded(tmp_path: Path, raw: Path) -> None:
    disk = await Disk.open(DiskOptions(name=str(create(tmp_path / "disk.qcow2")), read_only=True))
    assert isinstance(disk.node, Qcow2Image)
    await disk.close()
    disk = await Disk.open(DiskOptions(name=str(raw)))
    with pytest.raises(PermissionError, match="name the format"):
        await disk.node.write(0, memoryview(b"QFI\xfb"))
    await disk.close()
    disk = await Disk.open(DiskOptions(name=str(raw), format="raw"))
    await disk.node.write(0, memoryview(b"QFI\xfb"))
    await disk.close()
    assert raw.read_bytes()[:4] == b"QFI\xfb"


async def test_other_format_is_never_taken_for_raw(tmp_path: Path) -> None:
    path = tmp_path / "disk.vmdk"
    qemu_img("create", "-q", "-f", "vmdk", path, "1M")
    with pytest.raises(UsageError, match="format that is not supported"):
        await Disk.open(DiskOptions(name=str(path)))
    disk = await Disk.open(DiskOptions(name=str(path), format="raw", read_only=True))
    assert isinstance(disk.node, FileNode)
    await disk.close()


async def test_window_is_served_over_any_node(tmp_path: Path, raw: Path) -> None:
    name = f"driver=raw,offset=2,size=512,file.filename={raw}"
    assert await content(DiskOptions(name=name, is_options=True)) == b"w!\0\0"
    disk = await Disk.open(DiskOptions(name=str(raw), format="raw", offset=2, read_only=True))
    assert isinstance(disk.node, RawNode)
    assert disk.node.size == 65534
    await disk.close()


async def test_locks_are_taken_and_can_be_left_alone(tmp_path: Path) -> None:
    path = create(tmp_path / "disk.qcow2")
    disk = await Disk.open(DiskOptions(name=str(path)))
    with pytest.raises(ImageLockedError):
        await Disk.open(DiskOptions(name=str(path), read_only=True))
    name = f"driver=qcow2,force-share=on,read-only=on,file.filename={path}"
    shared = await Disk.open(DiskOptions(name=name, is_options=True, read_only=True))
    await shared.close()
    await disk.close()


async def test_image_that_its_options_call_read_only_needs_a_read_only_export(raw: Path) -> None:
    name = f"driver=raw,read-only=on,file.filename={raw}"
    with pytest.raises(UsageError, match="--read-only"):
        await Disk.open(DiskOptions(name=name, is_options=True))


@pytest.mark.parametrize(
    ("options", "refusal"),
    [
        ("driver=nbd,host=x", "driver 'nbd' is not supported"),
        ("driver=qcow2", "needs the option 'file'"),
        ("driver=qcow2,file=node0", "node's own options"),
        ("driver=file", "'filename' is missing"),
        ("driver=raw,file.driver=file", r"'file\.filename' is missing"),
        ("driver=raw,file.filename=nbd://x", "protocol 'nbd' is not supported"),
        ("driver=raw,file.filename={raw},zz=1", "does not support the option 'zz'"),
        ("driver=raw,file.filename={raw},file.zz=1", r"does not support the option 'file\.zz'"),
        ("driver=raw,file.filename={raw},encrypt.format=luks", "option 'encrypt'"),
        ("driver=raw,file.filename={raw},file.detect-zeroes=on", r"'file\.detect-zeroes'"),
        ("driver=raw,file.filename={raw},discard=maybe", "one of ignore"),
        ("driver=raw,file.filename={raw},offset=1G", "past the end"),
        ("driver=qcow2,file.driver=raw,file.offset=1,file.file.filename={raw}", "of its own"),
        ("driver=qcow2,file.filename={raw},data-file.filename=x", "names its data file"),
    ],
)
async def test_options_that_cannot_be_meant_are_refused(
    raw: Path, options: str, refusal: str
) -> None:
    with pytest.raises(NbdfleeceError, match=refusal):
        await Disk.open(DiskOptions(name=options.format(raw=raw), is_options=True))


async def test_ignored_options_are_said(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    path = create(tmp_path / "disk.qcow2")
    name = (
        f"driver=qcow2,l2-cache-size=1M,cache.direct=on,file.filename={path},file.aio=native,"
        "overlap-check.template=all,node-name=x"
    )
    await content(DiskOptions(name=name, is_options=True, read_only=True))
    said = caplog.text
    for option in ("l2-cache-size", "cache", "file.aio", "overlap-check"):
        assert f"option '{option}' is ignored" in said


@pytest.mark.parametrize(
    ("top", "file", "expected"),
    [("", "", True), ("discard=ignore,", "", False), ("", "file.discard=ignore,", False)],
)
async def test_discards_go_where_every_node_lets_them(
    tmp_path: Path, top: str, file: str, expected: bool
) -> None:
    path = tmp_path / "disk.raw"
    path.write_bytes(b"x" * MIB)
    name = f"driver=raw,{top}{file}file.filename={path}"
    disk = await Disk.open(DiskOptions(name=name, is_options=True, discard=True))
    await disk.node.trim(0, MIB)
    await disk.close()
    assert (path.read_bytes() == bytes(MIB)) is expected


async def test_format_that_contradicts_the_options_is_refused(raw: Path) -> None:
    name = f'json:{{"driver": "raw", "file.filename": "{raw}"}}'
    with pytest.raises(UsageError, match="contradicts"):
        await Disk.open(DiskOptions(name=name, format="qcow2"))


async def test_damaged_bitmap_directory_is_served_read_only(tmp_path: Path) -> None:
    path = create(tmp_path / "disk.qcow2")
    qemu_img("bitmap", "--add", path, "b0")
    data = bytearray(path.read_bytes())
    extension = data.index(0x23852875.to_bytes(4, "big"))
    directory = int.from_bytes(data[extension + 24 : extension + 32], "big")
    data[directory : directory + 8] = (1 << 50).to_bytes(8, "big")  # where the table is
    path.write_bytes(data)
    with pytest.raises(StateError, match="directory is damaged"):
        await Disk.open(DiskOptions(name=str(path)))
    assert path.read_bytes() == data
    disk = await Disk.open(DiskOptions(name=str(path), read_only=True))
    with pytest.raises(StateError, match="'b0' is damaged"):
        await disk.bitmap("b0")
    await disk.close()
