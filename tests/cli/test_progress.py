"""How far something is: bars on a terminal, JSON for programs, nothing on a pipe."""

from __future__ import annotations

import json
import os
import pty
import re
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.backup.conftest import tmp_path as in_memory
from tests.backup.programs import nbdkit

from .conftest import PROGRAM, Run, environment

tmp_path = in_memory
SIZE = 32 << 20


@pytest.fixture
def uri(tmp_path: Path) -> Iterator[str]:
    (tmp_path / "disk.raw").write_bytes(b"some content" * (SIZE // 12) + bytes(SIZE % 12))
    with nbdkit(tmp_path, "file", str(tmp_path / "disk.raw")) as uri:
        yield uri


def test_nothing_but_the_result_on_a_pipe(tmp_path: Path, run: Run, uri: str) -> None:
    done = run("pull", f"vda={uri}", "--to", "backup", "--point", "p")
    assert done.status == 0
    assert done.errors == ""
    assert done.output == f"p: vda: full: read {SIZE} bytes of {SIZE} (100.0%)\n"
    restored = run("restore", "backup", "--to", "out.raw")
    assert restored.errors == ""
    assert len(restored.output.splitlines()) == 1
    assert run("verify", "backup").errors == ""


def test_json_is_one_object_per_line_with_the_result_last(
    tmp_path: Path, run: Run, uri: str
) -> None:
    done = run("pull", f"vda={uri}", "--to", "backup", "--point", "p", "--progress", "json")
    *progress, result = map(json.loads, done.output.splitlines())
    assert [set(each) for each in progress] == [
        {"transferred", "size", "elapsed", "description"}
    ] * len(progress)
    transferred = [each["transferred"] for each in progress]
    assert transferred == sorted(transferred)
    assert (progress[-1]["transferred"], progress[-1]["size"]) == (SIZE, SIZE)
    assert result["name"] == "p"
    restored = run("restore", "backup", "--to", "out.raw", "--progress", "json")
    *progress, result = map(json.loads, restored.output.splitlines())
    assert progress[-1]["transferred"] == SIZE
    assert result["written_bytes"] == SIZE


def test_dry_run_says_how_much_and_reads_nothing(tmp_path: Path, run: Run, uri: str) -> None:
    done = run("pull", f"vda={uri}", "--to", "backup", "--dry-run")
    assert done.output == f"vda: would read {SIZE} bytes of {SIZE} (100.0%), zero 0\n"
    assert not (tmp_path / "backup").exists()


def test_terminal_has_bars_with_rate_and_remaining_time(tmp_path: Path, uri: str) -> None:
    ours, theirs = pty.openpty()
    process = subprocess.Popen(
        [*PROGRAM, "pull", f"vda={uri}", "--to", "backup", "--rate-limit", "24M"],
        stdout=subprocess.PIPE,
        stderr=theirs,
        env={**environment(tmp_path), "TERM": "xterm", "COLUMNS": "100"},
        cwd=tmp_path,
    )
    os.close(theirs)
    shown = b""
    try:
        while part := os.read(ours, 65536):
            shown += part
    except OSError:  # EIO: the other end is closed
        pass
    finally:
        os.close(ours)
    output, _ = process.communicate(timeout=120)
    assert process.returncode == 0
    assert output.startswith(b"20")  # the point's name is the time
    text = re.sub(r"\x1b\[[0-9;?]*[a-zA-Z]", "", shown.decode())
    assert re.search(r"vda\s.*[━╸╺ ]+.*\d/32\.0 MiB", text)
    assert re.search(r"\d [kMG]?i?B/s", text)
    assert re.search(r"\d:\d\d:\d\d", text)
