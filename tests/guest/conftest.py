"""A kernel to boot, the disk for it, and machines that end with the test."""

from __future__ import annotations

import contextlib
import os
import shutil
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.backup.conftest import tmp_path as in_memory
from tests.cli.conftest import run as run_nbdfleece
from tests.cli.conftest import start as start_server

from . import initramfs
from .machine import Machine

tmp_path = in_memory
run = run_nbdfleece
start = start_server

KERNEL_TREE = Path(__file__).parents[2] / "build" / "guest-kernel"
PROGRAMS = {
    "qemu-system-x86_64": "qemu-system-x86",
    "busybox": "busybox-static",
    "nbd-client": "nbd-client",
    "debugfs": "e2fsprogs",
}
MODULES = ["virtio_pci", "virtio_blk", "virtio_net", "nbd", "ext4", "crc32c_generic"]

DISK_SIZE = "64M"
RING_BYTES = 50 * 4096
FROM_HOST = b"made before the guest was\n" * 40_000

Boot = Callable[..., Machine]


def _program(name: str) -> Path | None:
    found = shutil.which(name, path=os.environ.get("PATH", "") + ":/usr/sbin:/sbin")
    return Path(found) if found is not None else None


@pytest.fixture(scope="session")
def kernel() -> Path:
    """The kernel; without what a guest needs, a skip, or a failure where all must be there."""
    missing = [package for name, package in PROGRAMS.items() if _program(name) is None]
    kernels = list(KERNEL_TREE.glob("boot/vmlinuz-*"))
    reasons = [f"install {package}" for package in missing]
    if not kernels:
        reasons.append("run scripts/guest-kernel")
    if reasons:
        complain = pytest.fail if os.environ.get("NBDFLEECE_REQUIRE_ALL") == "1" else pytest.skip
        complain(f"for a guest, {', '.join(reasons)}")
    return kernels[0]


@pytest.fixture(scope="session")
def ramdisk(kernel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The initramfs with :file:`init.sh`."""
    busybox, nbd_client = _program("busybox"), _program("nbd-client")
    assert busybox is not None
    assert nbd_client is not None
    modules = initramfs.modules(KERNEL_TREE, MODULES)
    files = {
        "/init": (Path(__file__).parent / "init.sh").read_bytes(),
        "/bin/busybox": busybox.read_bytes(),
        "/modules/order": "".join(f"{name}\n" for name in modules).encode(),
        **{f"/modules/{name}": content for name, content in modules.items()},
        **initramfs.program_files(nbd_client),
    }
    path = tmp_path_factory.mktemp("guest") / "initramfs"
    path.write_bytes(initramfs.pack(files))
    return path


@pytest.fixture
def boot(kernel: Path, ramdisk: Path) -> Iterator[Boot]:
    """Start guests that end with the test at the latest."""
    with contextlib.ExitStack() as stack:

        def call(parameters: dict[str, str], *options: str) -> Machine:
            machine = Machine(kernel, ramdisk, parameters, *options)
            stack.callback(machine.kill)
            return machine

        yield call


@pytest.fixture
def image(tmp_path: Path) -> Path:
    """A qcow2 disk with an ext4 file system with one file, ``from-host``."""
    folder, raw = tmp_path / "files", tmp_path / "made.raw"
    folder.mkdir()
    (folder / "from-host").write_bytes(FROM_HOST)
    (folder / "ring").write_bytes(bytes(RING_BYTES))
    subprocess.run(
        ["mke2fs", "-q", "-t", "ext4", "-d", folder, raw, DISK_SIZE],
        check=True,
        capture_output=True,
    )
    path = tmp_path / "vda.qcow2"
    subprocess.run(["qemu-img", "convert", "-f", "raw", "-O", "qcow2", raw, path], check=True)
    raw.unlink()
    return path
