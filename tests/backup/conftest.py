"""A folder in memory: these tests make things durable all the time."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

_MEMORY = Path("/dev/shm")


@pytest.fixture
def tmp_path() -> Iterator[Path]:
    """As pytest's, but in memory where there is such a place; with a short name for sockets."""
    folder = Path(tempfile.mkdtemp(prefix="nbdfleece-", dir=_MEMORY if _MEMORY.is_dir() else None))
    yield folder
    try:
        shutil.rmtree(folder)
    except FileNotFoundError:  # a server that ends removed its socket meanwhile
        shutil.rmtree(folder)
