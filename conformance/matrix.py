"""Placeholder to be written."""

from pathlib import Path


def write(path: Path | None = None) -> None: ...
