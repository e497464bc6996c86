"""The Debian 13 tree with newer programs, where a test wants them."""

from __future__ import annotations

import os
from pathlib import Path

import pytest


def debian_13() -> Path:
    """The tree that NBDFLEECE_TEST_TREE names; scripts/test makes one, scripts/trixie-tree too."""
    name = os.environ.get("NBDFLEECE_TEST_TREE")
    if not name or os.geteuid() != 0:
        pytest.skip("needs a Debian 13 tree, named by NBDFLEECE_TEST_TREE, and to be root")
    return Path(name)
