from __future__ import annotations

import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from benchmark.images import Images
from benchmark.place import Place


@pytest.fixture(scope="module")
def images() -> Iterator[Images]:
    """Small images in memory, made once."""
    with (
        tempfile.TemporaryDirectory(dir="/dev/shm") as memory,
        tempfile.TemporaryDirectory(dir="/var/tmp") as disk,
    ):
        yield Images(Place(Path(memory), Path(disk), None, 128 << 20, 0.5))
