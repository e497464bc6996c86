"""Instant recovery: a guest runs from a backup, with nothing restored first."""

from __future__ import annotations

import hashlib
import subprocess
from pathlib import Path

import pytest

from tests.backup.programs import content_of, qemu_nbd
from tests.cli.conftest import Run, Start

from .conftest import FROM_HOST, Boot

pytestmark = [pytest.mark.guest, pytest.mark.timeout(1200)]


def test_guest_runs_from_a_restore_point_and_writes_beside_it(
    tmp_path: Path, image: Path, start: Start, run: Run, boot: Boot
) -> None:
    """The export is read-only, so QEMU writes to an overlay of its own."""
    before = content_of(image)
    with qemu_nbd(image, "-r") as uri:
        words = ("--to", tmp_path / "backup", "--point", "monday", "--compress", "zstd")
        assert run("pull", f"vda={uri}", *words).status == 0
    image.unlink()
    point = f"nbd+unix:///monday/vda?socket={tmp_path}/n"
    start("--backup", tmp_path / "backup", "--listen", f"unix:{tmp_path}/n", "--control", "none")
    overlay = tmp_path / "overlay.qcow2"
    make = ["qemu-img", "create", "-q", "-f", "qcow2", "-F", "raw", "-b", point, overlay]
    subprocess.run(make, check=True)
    guest = boot({"disk": "virtio"}, "-drive", f"file={overlay},format=qcow2,if=virtio")
    assert guest.wait_for("mounted ").split()[0] == hashlib.md5(FROM_HOST).hexdigest()
    guest.wait_for("synced 2$")
    guest.send("stop")
    digest = guest.wait_for("ended ").split()[0]
    guest.wait_end()
    assert hashlib.md5(content_of(overlay)).hexdigest() == digest
    subprocess.run(["nbdcopy", point, tmp_path / "point.raw"], check=True)
    assert (tmp_path / "point.raw").read_bytes() == before
