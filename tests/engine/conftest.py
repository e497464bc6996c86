"""A folder in memory for all of these tests: engines make things durable all the time."""

from __future__ import annotations

from tests.backup.conftest import tmp_path

__all__ = ["tmp_path"]
