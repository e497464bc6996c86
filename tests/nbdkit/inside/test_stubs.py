"""The types of the module ``nbdkit`` are those of the real one."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

from .real import Nbdkit, find_nbdkit

ROOT = Path(__file__).resolve().parents[3]
STUB = ROOT / "nbdkit-stubs" / "__init__.pyi"

SCRIPT = """
import nbdkit
API_VERSION = 2
def dump_plugin():
    for name in dir(nbdkit):
        if not name.startswith("_"):
            value = getattr(nbdkit, name)
            print("has", name, "()" if callable(value) else value, flush=True)
def open(readonly): pass
def get_size(h): pass
def pread(h, buf, offset, flags): pass
"""


def declared(*, since_after_132: bool) -> dict[str, str]:
    """Names in the stub, with the values of constants."""
    found = {}
    for node in ast.parse(STUB.read_text()).body:
        if isinstance(node, ast.AnnAssign):
            assert isinstance(node.target, ast.Name)
            assert isinstance(node.value, ast.Constant)
            found[node.target.id] = str(node.value.value)
        elif isinstance(node, ast.FunctionDef):
            is_late = "Since after 1.32." in (ast.get_docstring(node) or "")
            if since_after_132 or not is_late:
                found[node.name] = "()"
    return found


def real(nbdkit: Nbdkit, folder: Path) -> dict[str, str]:
    script = folder / "script.py"
    script.write_text(SCRIPT)
    words = [line.split() for line in nbdkit.dump(script).splitlines() if line.startswith("has ")]
    return {name: value for _, name, value in words}


def test_stub_is_nbdkit_1_42(tmp_path: Path) -> None:
    assert real(find_nbdkit("tree", tmp_path), tmp_path) == declared(since_after_132=True)


def test_what_is_not_marked_as_later_is_in_nbdkit_1_32(tmp_path: Path) -> None:
    nbdkit = find_nbdkit("system", tmp_path)
    version = subprocess.check_output(nbdkit.argv("--version"), text=True)
    is_later = not version.startswith("nbdkit 1.32.")
    assert real(nbdkit, tmp_path) == declared(since_after_132=is_later)


def mypy(*files: Path) -> subprocess.CompletedProcess[str]:
    words = [sys.executable, "-m", "mypy", "--strict", *map(str, files)]
    return subprocess.run(words, cwd=ROOT, capture_output=True, text=True)


def test_examples_and_fixtures_pass_the_strict_type_check(tmp_path: Path) -> None:
    test = tmp_path / "test_user.py"
    test.write_text(
        "from nbdfleece.testing import Command, Fail, LiveServer\n"
        "def test_it() -> None:\n"
        "    with LiveServer(b'x', faults=[Fail(command=Command.READ, error=5)]) as server:\n"
        "        uri: str = server.uri\n"
    )
    done = mypy(*sorted((ROOT / "examples").glob("*.py")), test)
    assert done.returncode == 0, done.stdout


def test_wrong_use_of_the_module_is_found(tmp_path: Path) -> None:
    script = tmp_path / "wrong.py"
    script.write_text("import nbdkit\nnbdkit.set_error('EIO')\nnbdkit.parse_sizes('1M')\n")
    done = mypy(script)
    assert done.returncode == 1
    assert 'expected "int"' in done.stdout
    assert "parse_sizes" in done.stdout
