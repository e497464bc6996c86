"""Warm and cold, as the kernel tells."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import pytest

from benchmark.place import make_cold, resident_bytes, warm


@pytest.mark.skipif(shutil.which("fincore") is None, reason="fincore is not installed")
def test_file_is_found_cold_and_warm(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_bytes(os.urandom(4 << 20))
    warm(path)
    assert resident_bytes(path) >= 4 << 20
    if path.stat().st_dev == os.stat("/dev/shm").st_dev:
        pytest.skip("the temporary folder is in memory: nothing there is ever cold")
    make_cold(path)
    assert resident_bytes(path) == 0
