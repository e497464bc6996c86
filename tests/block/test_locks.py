"""QEMU's programs are the other side: they must refuse what we hold, and we what they hold."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest

from nbdfleece.block.file import FileNode
from nbdfleece.errors import ImageLockedError
from tests.held import held_by_qemu


@pytest.fixture
def image(tmp_path: Path) -> Path:
    path = tmp_path / "disk.qcow2"
    subprocess.run(["qemu-img", "create", "-q", "-f", "qcow2", path, "1M"], check=True)
    return path


def qemu_reads(path: Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(["qemu-img", "info", path], capture_output=True, text=True)


def qemu_writes(path: Path) -> subprocess.CompletedProcess[str]:
    command = ["qemu-io", "-f", "qcow2", "-c", "write 0 512", str(path)]
    return subprocess.run(command, capture_output=True, text=True)


async def test_qemu_reads_and_writes_while_we_write_are_refused(image: Path) -> None:
    node = FileNode.open(image, read_only=False)
    assert "lock" in qemu_reads(image).stderr
    assert "lock" in qemu_writes(image).stderr
    await node.close()
    assert qemu_writes(image).returncode == 0


async def test_qemu_writes_while_we_read_are_refused_and_its_reads_are_not(image: Path) -> None:
    node = FileNode.open(image, read_only=True)
    assert qemu_reads(image).returncode == 0
    assert "lock" in qemu_writes(image).stderr
    await node.close()


async def test_qemu_writes_while_we_read_with_force_share(image: Path) -> None:
    node = FileNode.open(image, read_only=True, force_share=True)
    assert qemu_writes(image).returncode == 0
    await node.close()


async def test_open_while_qemu_writes_is_refused_but_by_force_share(image: Path) -> None:
    with held_by_qemu(image):
        for read_only in (True, False):
            with pytest.raises(ImageLockedError, match=r"disk\.qcow2: .*another program"):
                FileNode.open(image, read_only=read_only)
        await FileNode.open(image, read_only=True, force_share=True).close()
    await FileNode.open(image, read_only=False).close()


async def test_open_while_qemu_reads_is_refused_for_writing_only(image: Path) -> None:
    with held_by_qemu(image, "-r"):
        with pytest.raises(ImageLockedError):
            FileNode.open(image, read_only=False)
        await FileNode.open(image, read_only=True).close()


async def test_second_writer_in_the_same_process_is_refused(image: Path) -> None:
    node = FileNode.open(image, read_only=False)
    with pytest.raises(ImageLockedError, match="stop it before"):
        FileNode.open(image, read_only=False)
    await node.close()


async def test_refused_open_leaves_no_lock_behind(image: Path) -> None:
    with held_by_qemu(image, "-r"):
        with pytest.raises(ImageLockedError):
            FileNode.open(image, read_only=False)
        with held_by_qemu(image, "-r"):
            pass
