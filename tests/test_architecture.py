"""The direction in which packages may know each other, and other rules of the structure.

Who may import whom is a table; an import that is not in it fails. ``nbd`` is sans-IO, the
engine knows no socket, the wire knows no image, the client side knows no server.
"""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

import nbdfleece

ROOT = Path(nbdfleece.__file__).parent

BASE = {"errors", "extents"}
"""Modules that everything may import."""

MAY_IMPORT: dict[str, set[str]] = {
    "errors": set(),
    "extents": set(),
    "bitmaps": set(),
    "nbd": set(),
    "block": {"bitmaps"},
    "qcow2": {"bitmaps", "block"},
    "export": {"bitmaps", "block"},
    "server": {"nbd", "export", "block"},
    "engine": {"bitmaps", "block", "qcow2", "export"},
    "control": {"engine", "export", "nbd"},
    "backup": {"bitmaps", "block", "qcow2", "nbd"},
    "standalone": {"bitmaps", "block", "qcow2", "export", "server", "nbd"},
    "nbdkit": {"block", "qcow2", "engine", "export", "nbd", "server", "standalone"},
    "testing": {"bitmaps", "block", "export", "nbd", "server", "standalone"},
    "deputies": {"server", "export", "nbd", "qcow2", "block", "bitmaps"},
    "daemon": {"deputies", "server", "engine", "control", "export", "nbd", "block", "standalone"},
    "cli": {"daemon", "control", "backup", "engine", "qcow2", "nbd", "server", "block", "export"}
    | {"standalone", "nbdkit"},
}

NO_SOCKETS = {"bitmaps", "nbd", "block", "qcow2", "export", "engine"}
NO_ASYNCIO = {"bitmaps", "nbd", "errors", "extents"}
FILE_LINES_MAX = 600
FUNCTION_LINES_MAX = 60
"""Lines of a function, docstring included; most have under ten."""


def modules() -> list[Path]:
    return sorted(ROOT.rglob("*.py"))


def package_of(path: Path) -> str:
    relative = path.relative_to(ROOT)
    return relative.parts[0].removesuffix(".py")


def imports(path: Path) -> Iterator[str]:
    """Absolute names of what a module imports, at any depth of its code."""
    here = ("nbdfleece", *path.relative_to(ROOT).with_suffix("").parts)
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = ".".join(here[: len(here) - node.level]) if node.level else ""
            module = ".".join(filter(None, [base, node.module or ""]))
            yield module
            yield from (f"{module}.{alias.name}" for alias in node.names)


@pytest.mark.parametrize("path", modules(), ids=lambda path: str(path.relative_to(ROOT)))
def test_module_imports_only_what_its_package_may(path: Path) -> None:
    package = package_of(path)
    if package == "__init__":
        return
    allowed = MAY_IMPORT[package] | BASE | {package, "__version__"}
    own = {name.split(".")[1] for name in imports(path) if name.startswith("nbdfleece.")}
    assert own <= allowed, f"{path.relative_to(ROOT)} imports {sorted(own - allowed)}"


@pytest.mark.parametrize("path", modules(), ids=lambda path: str(path.relative_to(ROOT)))
def test_sans_io_packages_import_no_sockets_and_no_event_loop(path: Path) -> None:
    package = package_of(path)
    found = {name.split(".")[0] for name in imports(path)}
    if package in NO_SOCKETS:
        assert not found & {"socket", "ssl", "socketserver", "selectors"}
    if package in NO_ASYNCIO:
        assert not found & {"asyncio", "threading", "concurrent", "uvloop"}


@pytest.mark.parametrize("path", modules(), ids=lambda path: str(path.relative_to(ROOT)))
def test_files_and_functions_stay_small(path: Path) -> None:
    text = path.read_text()
    assert len(text.splitlines()) <= FILE_LINES_MAX
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            lines = (node.end_lineno or node.lineno) - node.lineno + 1
            assert lines <= FUNCTION_LINES_MAX, f"{node.name} has {lines} lines"


def test_every_package_is_in_the_table() -> None:
    assert {package_of(path) for path in modules()} - {"__init__"} <= set(MAY_IMPORT)
