"""What a guest boots from: an initramfs with busybox, kernel modules and an init script."""

from __future__ import annotations

import lzma
import re
import stat
import subprocess
from collections.abc import Iterable
from pathlib import Path

_COMPRESSED = ".xz"


def _module_files(tree: Path) -> dict[str, Path]:
    """The modules of an unpacked kernel package by name."""
    found = {}
    for path in tree.rglob("*.ko*"):
        if path.name.endswith((".ko", ".ko" + _COMPRESSED)):
            found[path.name.split(".")[0].replace("-", "_")] = path
    return found


def _content(path: Path) -> bytes:
    data = path.read_bytes()
    return lzma.decompress(data) if path.suffix == _COMPRESSED else data


def modules(tree: Path, names: Iterable[str]) -> dict[str, bytes]:
    """Modules and what they depend on, in the order in which to load them.

    Args:
        tree: An unpacked kernel package.
        names: Which ones; one that is no module is taken to be built in.
    """
    files, loaded = _module_files(tree), dict[str, bytes]()

    def add(name: str) -> None:
        if name in loaded or name not in files:
            return
        content = _content(files[name])
        depends = re.search(rb"\0depends=([^\0]*)\0", content)
        assert depends is not None, f"{files[name]} does not say what it depends on"
        for each in filter(None, depends[1].decode().replace("-", "_").split(",")):
            add(each)
        loaded[name] = content

    for name in names:
        add(name)
    return loaded


def program_files(program: Path) -> dict[str, bytes]:
    """A program and the libraries that it is linked to, each under its own path."""
    linked = subprocess.run(["ldd", program], capture_output=True, text=True, check=False).stdout
    libraries = re.findall(r"(/\S+) \(0x", linked)
    return {path: Path(path).read_bytes() for path in [str(program), *libraries]}


def _entry(number: int, name: str, mode: int, content: bytes, device: tuple[int, int]) -> bytes:
    """One file in cpio's "new ASCII" format, as the kernel's buffer-format.rst describes it."""
    fields = [number, mode, 0, 0, 1, 0, len(content), 0, 0, *device, len(name) + 1, 0]
    header = b"070701" + b"".join(b"%08X" % field for field in fields) + name.encode() + b"\0"
    return header + bytes(-len(header) % 4) + content + bytes(-len(content) % 4)


def pack(files: dict[str, bytes]) -> bytes:
    """An archive of executable files, their folders, and a console for ``/init``."""
    folders = {str(parent) for name in files for parent in Path(name).parents}
    entries = [
        (name.lstrip("/"), stat.S_IFDIR | 0o755, b"", (0, 0))
        for name in sorted(folders | {"/dev", "/mnt", "/proc", "/sys", "/tmp"})
        if name != "/"
    ]
    entries.append(("dev/console", stat.S_IFCHR | 0o600, b"", (5, 1)))
    entries += [
        (name.lstrip("/"), stat.S_IFREG | 0o755, data, (0, 0)) for name, data in files.items()
    ]
    entries.append(("TRAILER!!!", 0, b"", (0, 0)))
    return b"".join(_entry(number, *entry) for number, entry in enumerate(entries, start=1))
