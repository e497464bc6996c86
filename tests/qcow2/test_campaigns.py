"""A sample of each campaign; ``scripts/*-campaign`` and ``scripts/fuzz-images`` run them whole."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

from tests.qcow2 import crash_campaign, kill_campaign


def test_power_cuts_at_random_leave_sound_images() -> None:
    assert crash_campaign.run_campaign(states=150, seed=20).total() == 150


def test_killed_server_loses_nothing_that_was_flushed_and_no_checkpoint(folder: Path) -> None:
    kill_campaign.run_campaign(folder, kills=6, seed=4)


def test_damaged_images_neither_hang_nor_mislead_nor_harm_us() -> None:
    """In a process of its own, which may not take more than the stated memory."""
    command = [sys.executable, "-m", "tests.qcow2.fuzz_images", "--images", "60", "--seed", "8"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
