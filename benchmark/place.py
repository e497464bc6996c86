"""Where a run works: folders, foreign programs, and a look at what is in the page cache."""

from __future__ import annotations

import itertools
import json
import os
import shutil
import subprocess
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final

from .copies import Copies

SYSTEM: Final = "system"
"""The programs of this machine, as opposed to a Debian tree's."""

_IN_TREE: Final = """
set -e
tree=$1 folder=$2; shift 2
mount --rbind /dev "$tree/dev"
mount -t proc proc "$tree/proc"
mount -t tmpfs tmpfs "$tree/var/tmp"
mkdir -p "$tree$folder"
mount --bind "$folder" "$tree$folder"
exec chroot "$tree" "$@"
"""
"""Runs a tree's program with both working folders at the same paths; the mounts are in a
namespace of their own and end with the process, which keeps the process id."""


class NotWarm(Exception):
    """A file that a run relies on is not, or not wholly, in the page cache."""


@dataclass
class Place:
    """Two working folders, one in memory and one on a disk.

    Attributes:
        memory: On a tmpfs: what is there is never cold.
        disk: Under /var/tmp, on a disk: for cold reads.
        tree: A Debian tree with newer programs, or None.
        image_bytes: Bytes of a disk in the rows that do not say another size.
        seconds: How long a timed run of a load generator lasts.
        copies: Of images, for servers that write.
    """

    memory: Path
    disk: Path
    tree: Path | None
    image_bytes: int
    seconds: float
    copies: Copies = field(default_factory=Copies)
    _numbers: itertools.count[int] = field(default_factory=itertools.count)

    def path(self, ending: str) -> Path:
        """A new path in memory; short, because Unix socket paths must be."""
        return self.memory / f"{next(self._numbers)}{ending}"

    def argv(self, system: str, program: str, *arguments: str) -> list[str]:
        """The command line that runs a program of this system or of the tree.

        Raises:
            FileNotFoundError: It is not installed there.
        """
        path = find_program(program, None if system == SYSTEM else self.tree)
        if path is None:
            raise FileNotFoundError(f"{program} is not installed ({system})")
        if system == SYSTEM:
            return [path, *arguments]
        head = ["unshare", "--mount", "--propagation=private", "sh", "-c", _IN_TREE, "tree"]
        return [*head, str(self.tree), str(self.disk), path, *arguments]

    def has(self, system: str, program: str) -> bool:
        """Whether a program is installed."""
        tree = None if system == SYSTEM else self.tree
        return (system == SYSTEM or tree is not None) and find_program(program, tree) is not None


def find_program(name: str, tree: Path | None) -> str | None:
    """Its path, as seen from inside the tree if there is one."""
    if tree is None:
        return shutil.which(name, path=f"{os.environ.get('PATH', os.defpath)}:/usr/sbin:/sbin")
    for folder in ("usr/bin", "usr/sbin"):
        if (tree / folder / name).exists():
            return f"/{folder}/{name}"
    return None


def resident_bytes(path: Path) -> int:
    """How much of a file is in the page cache, as fincore(1) tells."""
    argv = ["fincore", "--bytes", "--json", "--output", "RES", str(path)]
    found = json.loads(subprocess.run(argv, capture_output=True, check=True).stdout)
    return int(found["fincore"][0]["res"])


def make_hole(path: Path, size: int) -> None:
    """Make a file that has so many bytes, and none that takes room."""
    with path.open("wb") as file:
        file.truncate(size)


def warm(path: Path) -> None:
    """Have a file in the page cache: look, read it if it is not all there, and look again.

    Raises:
        NotWarm: Some of it is not; there is not enough memory.
    """
    if is_warm(path):
        return
    with path.open("rb", buffering=0) as file:
        buffer = bytearray(1 << 20)
        while file.readinto(buffer):
            pass
    if not is_warm(path):
        raise NotWarm(f"{path}: only {resident_bytes(path)} bytes are in the page cache")


def is_warm(path: Path) -> bool:
    """Whether what a file has is in the page cache."""
    wanted = min(path.stat().st_size, path.stat().st_blocks * 512)
    # Holes may be resident too, and file systems allocate in larger units than pages.
    return not wanted or resident_bytes(path) >= wanted * 0.98


def make_cold(path: Path) -> None:
    """Drop a file from the page cache, and look that it is gone.

    Raises:
        NotWarm: Some of it is still there, which is wrong the other way round.
    """
    with path.open("rb") as file:
        os.fsync(file.fileno())
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
    left = resident_bytes(path)
    if left > path.stat().st_size // 100:
        raise NotWarm(f"{path}: {left} bytes are still in the page cache")
