"""A server of one disk that has something in it; for modules that take these as their fixtures."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.backup.programs import qemu_io

from .conftest import Server, Start, make_image


@pytest.fixture
def image(tmp_path: Path) -> Path:
    path = make_image(tmp_path / "a.qcow2")
    qemu_io(path, "write -q -P 1 0 5M", "write -q -P 2 9M 64k")
    return path


@pytest.fixture
def server(tmp_path: Path, image: Path, start: Start) -> Server:
    return start(
        "--disk", f"vda={image}", "--listen", f"unix:{tmp_path}/n", "--control", tmp_path / "c"
    )
