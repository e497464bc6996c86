"""``scripts/soak``, a few rounds of it."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.backup.conftest import tmp_path as in_memory

tmp_path = in_memory
SCRIPT = Path(__file__).parents[1] / "scripts" / "soak.py"


@pytest.mark.timeout(900)
def test_three_rounds_with_a_kill_account_for_every_byte(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, SCRIPT, "--rounds", "3", "--seed", "2"],
        env={**os.environ, "TMPDIR": str(tmp_path)},
        capture_output=True,
        text=True,
        timeout=850,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "every byte accounted for" in done.stdout
    assert " 1 kills," in done.stdout
