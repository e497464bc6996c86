"""An image that another program has open."""

from __future__ import annotations

import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def held_by_qemu(path: Path, *options: str) -> Iterator[None]:
    """The image, open in a qemu-io that waits for commands."""
    program = subprocess.Popen(
        ["qemu-io", *options, "-f", "qcow2", str(path)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    assert program.stdin is not None
    assert program.stdout is not None
    try:
        program.stdin.write("length\n")
        program.stdin.flush()
        while "MiB" not in program.stdout.readline():
            assert program.poll() is None
        yield
    finally:
        program.communicate("quit\n")
