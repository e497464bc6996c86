"""Fixtures: a real nbdkit in both versions that Debian has."""

from __future__ import annotations

from pathlib import Path

import pytest

from .real import Nbdkit, find_nbdkit


@pytest.fixture(params=["system", "tree"])
def nbdkit(request: pytest.FixtureRequest, tmp_path: Path) -> Nbdkit:
    """One installation after the other."""
    return find_nbdkit(request.param, tmp_path)


@pytest.fixture
def system_nbdkit(tmp_path: Path) -> Nbdkit:
    """Where the version does not matter."""
    return find_nbdkit("system", tmp_path)
