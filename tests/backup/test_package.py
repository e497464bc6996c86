"""``nbdfleece.backup`` as it is imported: every public name is documented and typed."""

from __future__ import annotations

import ast
import inspect
import typing
from pathlib import Path

import pytest

import nbdfleece
from nbdfleece import backup
from nbdfleece.backup import BackupDirectory, DiskUri, auto_requests, pull, verify

from .programs import nbdkit

NAMES = backup.__all__


@pytest.mark.parametrize("name", NAMES)
def test_public_name_is_documented(name: str) -> None:
    thing = getattr(backup, name)
    assert inspect.getdoc(thing)
    if inspect.isclass(thing):
        methods = [each for key, each in vars(thing).items() if not key.startswith("_")]
        for each in methods:
            function = getattr(each, "__func__", each)
            if inspect.isfunction(function):
                assert inspect.getdoc(function), f"{name}.{function.__name__}"


@pytest.mark.parametrize("name", NAMES)
def test_public_function_has_a_type_for_each_argument_and_its_result(name: str) -> None:
    thing = getattr(backup, name)
    if not inspect.isfunction(thing):
        return
    hints = typing.get_type_hints(thing)
    assert set(hints) == {*inspect.signature(thing).parameters, "return"}
    text = inspect.getdoc(thing) or ""
    for argument in inspect.signature(thing).parameters:
        assert "Args:" not in text or f"{argument}:" in text, argument


def test_package_is_marked_as_typed() -> None:
    assert (Path(nbdfleece.__file__).parent / "py.typed").exists()


def test_names_are_sorted_and_all_that_is_imported() -> None:
    tree = ast.parse(Path(backup.__file__).read_text())
    imported = {
        alias.name for node in tree.body if isinstance(node, ast.ImportFrom) and node.level
        for alias in node.names
    }  # fmt: skip
    assert set(NAMES) == imported
    assert len(set(NAMES)) == len(NAMES)


async def test_example_of_the_documentation_works(tmp_path: Path) -> None:
    """What the package's docstring shows, on a disk that is there."""
    with nbdkit(tmp_path, "pattern", "4M") as uri:
        directory = BackupDirectory(tmp_path / "backup")
        requests = await auto_requests(directory, [DiskUri("vda", uri)])
        await pull(requests, directory, point="monday", checkpoint="monday")
        assert not (await verify(directory)).problems
