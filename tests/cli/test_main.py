"""The executable as a whole: help, version, errors, what it imports."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from click import UsageError as ClickUsageError

import nbdfleece
from nbdfleece.cli import main as main_module
from nbdfleece.cli.exit_status import MEANINGS, ExitStatus
from nbdfleece.cli.main import SUBCOMMANDS, cli, main

from .conftest import PROGRAM, Run, Server


def test_version_is_one_line(run: Run) -> None:
    outcome = run("--version")
    assert (outcome.status, outcome.output) == (0, f"nbdfleece {nbdfleece.__version__}\n")


def test_script_for_nbdkit_is_named(run: Run) -> None:
    outcome = run("--nbdkit-plugin")
    assert outcome.status == 0
    assert Path(outcome.output.rstrip("\n")).is_file()


@pytest.mark.parametrize(
    "words", [["--version"], ["--nbdkit-plugin"], ["info", "--help"], ["serve", "--help"]]
)
def test_version_and_help_import_nothing_heavy(words: list[str]) -> None:
    code = (
        "import sys\nfrom nbdfleece.cli.main import main\nmain(sys.argv[1:])\n"
        "heavy = {'numpy', 'rich', 'uvloop', 'nbd'} & set(sys.modules)\nassert not heavy, heavy"
    )
    subprocess.run([sys.executable, "-c", code, *words], check=True, stdout=subprocess.DEVNULL)


def test_help_lists_every_command_and_exit_status(run: Run) -> None:
    text = run("--help").output
    for name in SUBCOMMANDS:
        assert f"  {name} " in text
    for status, meaning in MEANINGS.items():
        assert f"{status:3d}  {meaning}" in text


def test_every_exit_status_has_a_meaning() -> None:
    assert set(MEANINGS) == set(ExitStatus)


@pytest.mark.parametrize("name", SUBCOMMANDS)
def test_every_command_has_help(run: Run, name: str) -> None:
    outcome = run(name, "--help")
    assert outcome.status == 0
    assert outcome.output.startswith(f"Usage: nbdfleece {name} ")


@pytest.mark.parametrize("words", [[], ["frob"], ["snapshot"], ["--frob"], ["info", "one", "two"]])
def test_wrong_command_is_one_line_and_status_2(run: Run, words: list[str]) -> None:
    outcome = run(*words)
    assert outcome.status == 2
    assert "--help'" in outcome.complaint


def test_reader_that_goes_away_gets_no_complaint(server: Server, tmp_path: object) -> None:
    reading, writing = os.pipe()
    os.close(reading)
    done = subprocess.run(
        [*PROGRAM, "info", "--control", f"{tmp_path}/nbdfleece/control.sock"],
        stdout=writing,
        stderr=subprocess.PIPE,
    )
    os.close(writing)
    assert (done.returncode, done.stderr) == (1, b"")


def _defect(*arguments: object, **more: object) -> None:
    raise KeyError("oops")


def test_defect_of_ours_is_one_line(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(cli, "invoke", _defect)
    assert main([]) == 1
    assert capsys.readouterr().err == (
        "nbdfleece: error: internal error: KeyError: 'oops' (with -v: where)\n"
    )


def test_error_of_several_lines_becomes_one(capsys: pytest.CaptureFixture[str]) -> None:
    assert main_module._fail(ClickUsageError("one\ntwo.")) == ExitStatus.USAGE
    assert capsys.readouterr().err == "nbdfleece: error: one two\n"


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_completion_prints_a_script(run: Run, shell: str) -> None:
    outcome = run("completion", shell)
    assert outcome.status == 0
    assert "_NBDFLEECE_COMPLETE" in outcome.output


@pytest.mark.parametrize(
    ("words", "found"),
    [
        ("nbdfleece ba", "backup"),
        ("nbdfleece backup be", "begin"),
        ("nbdfleece map --js", "--json"),
    ],
)
def test_shell_completes_commands_and_options(
    run: Run, monkeypatch: pytest.MonkeyPatch, words: str, found: str
) -> None:
    """What the script asks for when somebody presses the tab key."""
    monkeypatch.setenv("_NBDFLEECE_COMPLETE", "bash_complete")
    monkeypatch.setenv("COMP_WORDS", words)
    monkeypatch.setenv("COMP_CWORD", str(words.count(" ")))
    outcome = run()
    assert (outcome.status, outcome.output) == (0, f"plain,{found}\n")
