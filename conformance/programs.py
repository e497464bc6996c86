"""Where foreign programs come from: this system, or a Debian tree beside it.

A tree's program runs by chroot in a mount namespace of its own, with the suite's working
folder bound to the same path inside, so that images, certificates and Unix sockets have one
name on both sides. The mounts end with the process: nothing in the tree is changed.
"""

from __future__ import annotations

import os
import shutil
from dataclasses import dataclass
from pathlib import Path

_SCRIPT = """
set -e
tree=$1 folder=$2; shift 2
mount -t tmpfs tmpfs "$tree/tmp"
mkdir -p "$tree$folder"
mount --rbind "$folder" "$tree$folder"
mount -t proc proc "$tree/proc"
mount --rbind /dev "$tree/dev"
exec chroot "$tree" "$@"
"""


@dataclass(frozen=True)
class Programs:
    """Finds programs and makes their command lines.

    Attributes:
        tree: Root of a Debian tree, or None for this system's programs.
        folder: The working folder, under ``/tmp``, shared with the tree's programs.
    """

    tree: Path | None
    folder: Path

    def has(self, name: str) -> bool:
        return self._find(name) is not None

    def argv(self, name: str, *arguments: str) -> list[str]:
        """The command line that runs ``name``.

        Raises:
            FileNotFoundError: The program is not there.
        """
        path = self._find(name)
        if path is None:
            raise FileNotFoundError(
                f"{name} is not installed{f' in {self.tree}' * bool(self.tree)}"
            )
        if self.tree is None:
            return [path, *arguments]
        head = ["unshare", "--mount", "--propagation=private", "sh", "-c", _SCRIPT, "tree"]
        return [*head, str(self.tree), str(self.folder), path, *arguments]

    def _find(self, name: str) -> str | None:
        if self.tree is None:
            return shutil.which(name, path=f"{os.environ.get('PATH', os.defpath)}:/usr/sbin:/sbin")
        for folder in ("usr/bin", "usr/sbin"):
            if (self.tree / folder / name).exists():
                return f"/{folder}/{name}"
        return None
