"""A sample of each campaign; ``scripts/*-campaign`` and ``scripts/fuzz-images`` run them whole."""

from __future__ import annotations

from pathlib import Path

from tests.qcow2 import crash_campaign, kill_campaign


def test_power_cuts_at_random_leave_sound_images() -> None:
    assert crash_campaign.run_campaign(states=150, seed=20).total() == 150


def test_killed_server_loses_nothing_that_was_flushed_and_no_checkpoint(folder: Path) -> None:
    kill_campaign.run_campaign(folder, kills=6, seed=4)
