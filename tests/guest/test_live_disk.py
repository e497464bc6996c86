"""A real kernel's file system on a live export, backed up while the kernel writes to it.

The guest has the disk once from QEMU, over a Unix socket, and once from its own NBD client,
over TCP. What it had synced before a backup's instant must be in the backup, whole, and the
file system must be as good as after a power cut.
"""

from __future__ import annotations

import hashlib
import json
import subprocess
from pathlib import Path

import pytest

from tests.cli.conftest import Outcome, Run, Server, Start

from .conftest import FROM_HOST, RING_BYTES, Boot
from .machine import Machine

pytestmark = [pytest.mark.guest, pytest.mark.timeout(1200)]

KEPT_BYTES = 50_000
DROPPED_BYTES = 300_000
ROUNDS_BETWEEN = 2
INCREMENTS = 2
ROUNDS_AHEAD_MAX = 1
"""How far the disk may be ahead of what the guest has said: the round that it is in."""


def content(number: int, length: int) -> bytes:
    """What the guest writes in a round."""
    line = b"round %d\n" % number
    return (line * (length // len(line) + 1))[:length]


def boot_on(transport: str, uris: list[str], boot: Boot) -> Machine:
    """A guest with the disk from QEMU, or from its own NBD client."""
    if transport == "virtio":
        socket = uris[0].partition("socket=")[2]
        server = f"file.driver=nbd,file.server.type=unix,file.server.path={socket}"
        drive = f"driver=raw,{server},file.export=vda,if=virtio,discard=unmap"
        return boot({"disk": "virtio"}, "-drive", drive)
    port = uris[1].split("/")[2].rpartition(":")[2]
    card = ("-netdev", "user,id=net", "-device", "virtio-net-pci,netdev=net,romfile=")
    return boot({"disk": "nbd", "port": port}, *card)


def checked(outcome: Outcome) -> Outcome:
    assert outcome.status == 0, outcome.errors
    return outcome


class Backups:
    """Restore points of the running disk, and the rounds between which each instant was."""

    def __init__(self, folder: Path, run: Run, guest: Machine) -> None:
        self.folder = folder
        self.run = run
        self.guest = guest
        self.rounds: dict[str, tuple[int, int]] = {}

    def _synced(self) -> int:
        return len(self.guest.said("synced "))

    def _wait_rounds(self) -> None:
        self.guest.wait_for(f"synced {self._synced() + ROUNDS_BETWEEN}$")

    def make(self, name: str, *mode: str) -> None:
        """Begin, pull while the guest writes on for some rounds more, and commit."""
        self._wait_rounds()
        first = self._synced()
        parent = ("--since", mode[1]) if len(mode) > 1 else ()
        words = ("backup", "begin", name, "--checkpoint", name, *parent, "--json")
        begun = checked(self.run(*words, "--control", "c")).json
        self.guest.send(name)  # answered behind whatever was on its way to us
        self.guest.wait_for(f"asked {name}$")
        self.rounds[name] = (first, self._synced() + ROUNDS_AHEAD_MAX)
        self._wait_rounds()
        uri = "vda=" + begun["disks"][0]["uris"][0]
        checked(self.run("pull", uri, "--to", self.folder, "--checkpoint", name, *mode))
        checked(self.run("backup", "commit", name, "--control", "c"))


def file_system_of(raw: Path, folder: Path) -> Path:
    """All files of an image, after the journal was replayed and nothing else found wrong."""
    replayed = subprocess.run(["e2fsck", "-p", raw], capture_output=True, text=True, check=False)
    assert replayed.returncode in (0, 1), replayed.stdout + replayed.stderr
    found = subprocess.run(["e2fsck", "-fn", raw], capture_output=True, text=True, check=False)
    assert found.returncode == 0, found.stdout + found.stderr
    folder.mkdir()
    subprocess.run(["debugfs", "-R", f"rdump / {folder}", raw], capture_output=True, check=True)
    return folder


def check_files(folder: Path, first: int, last: int) -> None:
    """All of round ``first`` is there, and nothing that is newer than round ``last``."""
    assert (folder / "from-host").read_bytes() == FROM_HOST
    for number in range(1, first + 1):
        assert (folder / f"kept-{number}").read_bytes() == content(number, KEPT_BYTES)
    newest = int((folder / "last").read_text())
    assert first <= newest <= last
    assert not (folder / f"kept-{last + 1}").exists()
    for number in range(last - 2, first + 1):
        assert (folder / f"dropped-{number}").read_bytes() == content(number, DROPPED_BYTES)
    assert not (folder / f"dropped-{first - 3}").exists()
    check_ring((folder / "ring").read_bytes(), first, last)


def check_ring(ring: bytes, first: int, last: int) -> None:
    """Each round writes somewhere else in an old file; 50 rounds later there again."""
    assert len(ring) == RING_BYTES
    for number in range(max(1, last - 49), first + 1):
        at = number % 50 * 4096
        assert ring[at : at + 4096] == content(number, 4096)


@pytest.mark.parametrize("transport", ["virtio", "nbd"])
def test_backups_of_a_disk_in_use_hold_all_that_the_guest_had_synced(
    transport: str, tmp_path: Path, image: Path, start: Start, run: Run, boot: Boot
) -> None:
    server = serve(start, image)
    guest = boot_on(transport, json.loads(server.ready)["exports"][0]["uris"], boot)
    assert guest.wait_for("mounted ").split()[0] == hashlib.md5(FROM_HOST).hexdigest()

    backups = Backups(tmp_path / "backup", run, guest)
    backups.make("p0", "--full")
    for number in range(1, INCREMENTS + 1):
        backups.make(f"p{number}", "--since", f"p{number - 1}")
    guest.send("stop")
    digest = guest.wait_for("ended ").split()[0]
    guest.wait_end()
    ended = server.end()
    assert (ended.status, ended.errors) == (0, "")

    checked(run("verify", backups.folder))
    for name, rounds in backups.rounds.items():
        raw = tmp_path / f"{name}.raw"
        checked(run("restore", f"{backups.folder}@{name}", "--to", raw))
        check_files(file_system_of(raw, tmp_path / name), *rounds)
    compare_with_guest(image, tmp_path / "last.raw", digest)


def serve(start: Start, image: Path) -> Server:
    listen = ("--listen", "unix:n", "--listen", "tcp:127.0.0.1:0")
    return start("--disk", f"vda={image}", *listen, "--control", "c", "--json")


def compare_with_guest(image: Path, raw: Path, digest: str) -> None:
    """Every byte that QEMU finds in the image is the one that the guest has read last."""
    subprocess.run(["qemu-img", "check", "-q", image], check=True)
    subprocess.run(["qemu-img", "convert", "-f", "qcow2", "-O", "raw", image, raw], check=True)
    assert hashlib.md5(raw.read_bytes()).hexdigest() == digest
    subprocess.run(["e2fsck", "-fn", raw], check=True, capture_output=True)
