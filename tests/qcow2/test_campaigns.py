"""A sample of each campaign; ``scripts/*-campaign`` and ``scripts/fuzz-images`` run them whole."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

from tests.qcow2 import crash_campaign, kill_campaign, turns_campaign
from tests.tree import debian_13


def test_power_cuts_at_random_leave_sound_images() -> None:
    assert crash_campaign.run_campaign(states=150, seed=20).total() == 150


def test_images_that_qemu_and_we_write_in_turns_are_the_same_to_both() -> None:
    seen = turns_campaign.run_campaign(images=4, turns=4, operations=40, seed=5)
    assert seen["version 3"] > 1


def test_images_that_a_newer_qemu_and_we_write_in_turns_are_the_same_to_both() -> None:
    turns_campaign.run_campaign(images=2, turns=4, operations=40, seed=6, tree=debian_13())


def test_killed_server_loses_nothing_that_was_flushed_and_no_checkpoint(folder: Path) -> None:
    kill_campaign.run_campaign(folder, kills=6, seed=4)


def test_damaged_images_neither_hang_nor_mislead_nor_harm_us() -> None:
    """In a process of its own, which may not take more than the stated memory."""
    command = [sys.executable, "-m", "tests.qcow2.fuzz_images", "--images", "60", "--seed", "8"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
