"""Warm and cold, as the kernel tells."""

from __future__ import annotations

import os
import shutil
import tempfile
from pathlib import Path

import pytest

from benchmark.place import make_cold, resident_bytes, warm


@pytest.mark.skipif(shutil.which("fincore") is None, reason="fincore is not installed")
def test_file_is_found_cold_and_warm() -> None:
    with tempfile.TemporaryDirectory(dir="/var/tmp") as folder:  # /tmp may be memory
        path = Path(folder) / "file"
        path.write_bytes(os.urandom(4 << 20))
        warm(path)
        assert resident_bytes(path) >= 4 << 20
        make_cold(path)
        assert resident_bytes(path) == 0
