from __future__ import annotations

import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest


@pytest.fixture
def folder() -> Iterator[Path]:
    """A folder in memory: these tests are about bytes, not about disks."""
    with tempfile.TemporaryDirectory(dir="/dev/shm") as name:
        yield Path(name)
