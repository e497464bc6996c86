"""The package's place in the architecture: no I/O, and nothing above or beside it."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

import nbdfleece.nbd

FILES = sorted(Path(next(iter(nbdfleece.nbd.__path__))).glob("*.py"))
OUTSIDE_ALLOWED = {"nbdfleece", "nbdfleece.errors", "nbdfleece.extents"}
FORBIDDEN = {"asyncio", "socket", "ssl", "select", "selectors", "threading", "subprocess", "uvloop"}


def imported(path: Path) -> set[str]:
    """The modules that a file imports, by their full names."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            package = ["", "nbdfleece.nbd.", "nbdfleece."][node.level]
            found.add(package + (node.module or ""))
    return found


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.name)
def test_wire_does_no_io_and_knows_only_errors_and_extents(path: Path) -> None:
    names = imported(path)
    assert not {name.split(".")[0] for name in names} & FORBIDDEN
    ours = {name for name in names if name.startswith("nbdfleece")}
    assert all(name in OUTSIDE_ALLOWED or name.startswith("nbdfleece.nbd.") for name in ours)
