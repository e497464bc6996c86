"""``pull --to -``, ``import`` and ``restore -``, as they are run in pipes."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path

import pytest

from tests.backup.conftest import tmp_path as in_memory
from tests.backup.programs import content_of, qemu_io, qemu_nbd

from . import filled
from .conftest import PROGRAM, SECONDS_MAX, SIZE, Run, Server, environment

tmp_path = in_memory
image = filled.image
server = filled.server


def shell(tmp_path: Path, line: str) -> subprocess.CompletedProcess[str]:
    """A line for the shell, in which ``N`` is the program."""
    return subprocess.run(
        ["bash", "-o", "pipefail", "-c", line.replace("N ", f"{PROGRAM[0]} ")],
        capture_output=True,
        text=True,
        timeout=SECONDS_MAX,
        cwd=tmp_path,
        env={**environment(tmp_path), "NBDFLEECE_CONTROL": str(tmp_path / "c")},
    )


def test_backups_of_our_server_go_through_a_pipe(tmp_path: Path, server: Server, run: Run) -> None:
    live = f"nbd+unix:///vda?socket={tmp_path}/n"
    first = shell(tmp_path, "N pull --to - --point monday --compress zstd | N import backup")
    assert first.returncode == 0, first.stderr
    share = 5 * (1 << 20) + 65536
    said = f"monday: vda: full: read {share} bytes of {SIZE}"
    assert first.stderr == f"{said}\n"
    assert said in first.stdout
    qemu_io(live, "write -q -P 3 1M 64k", "write -q -z 9M 64k", image_format="raw")
    second = shell(
        tmp_path, "N pull --to - --point tuesday --since monday | N import --compress zlib backup"
    )
    assert "tuesday: vda: since monday: read 65536 bytes" in second.stderr, second.stderr
    assert run("verify", tmp_path / "backup").status == 0
    assert run("verify", f"{tmp_path}/backup@tuesday", "--against", live).status == 0
    control = ("--control", tmp_path / "c", "--json")
    assert [each["name"] for each in run("checkpoint", "list", *control).json] == [
        "monday",
        "tuesday",
    ]
    # What was imported is gone on with: the checkpoints are known by when they were made.
    third = run("pull", "--to", tmp_path / "backup", "--point", "wednesday", *control).json
    assert third["disks"][0]["parent"] == "tuesday"


def test_reader_that_goes_away_aborts_the_backup(tmp_path: Path, server: Server, run: Run) -> None:
    live = f"nbd+unix:///vda?socket={tmp_path}/n"
    qemu_io(live, "write -q -P 9 0 16M", image_format="raw")
    cut = shell(tmp_path, "N pull --to - --point p --rate-limit 4M | head -c 100000 > cut")
    assert cut.returncode == 1
    assert "the stream of 'p' was cut, and cannot go on" in cut.stderr
    control = ("--control", tmp_path / "c", "--json")
    assert run("backup", "list", *control).json == []
    assert run("checkpoint", "list", *control).json == []
    for words in ("import backup", "restore - --to out.raw"):
        failed = shell(tmp_path, f"N {words} < cut")
        assert failed.returncode == 1
        assert "cut" in failed.stderr
        assert len(failed.stderr.splitlines()) == 1
    assert not list(tmp_path.glob("out.raw*"))
    assert run("list", tmp_path / "backup", "--json").json == []


def test_stream_of_a_foreign_server_is_restored(tmp_path: Path, run: Run, image: Path) -> None:
    subprocess.run(["qemu-img", "bitmap", "--add", image, "b"], check=True)
    line = "N pull 'vda={uri}' --to - --point {point} --progress json {words} > {point}.stream"
    with qemu_nbd(image, "-r") as uri:
        done = shell(tmp_path, line.format(uri=uri, point="p0", words="--full"))
    lines = [json.loads(each) for each in done.stderr.splitlines()]
    assert lines[-2]["transferred"] == lines[-2]["size"]
    assert lines[-1]["disks"][0]["size"] == SIZE
    qemu_io(image, "write -q -P 7 3M 1M", "discard -q 0 1M")
    with qemu_nbd(image, "-r", "-B", "b") as uri:
        words = "--since p0 --bitmap b --compress zlib"
        done = shell(tmp_path, line.format(uri=uri, point="p1", words=words))
        assert done.returncode == 0, done.stderr
    restored = shell(tmp_path, "cat p0.stream p1.stream | N restore - --to out.qcow2 --json")
    assert json.loads(restored.stdout)["point"] == "p1"
    assert content_of(tmp_path / "out.qcow2") == content_of(image)
    alone = shell(tmp_path, "N restore - --to other.raw < p1.stream")
    assert "must come before it" in alone.stderr


@pytest.mark.parametrize(
    ("words", "complaint"),
    [
        (["pull", "nbd://x", "--to", "-", "--resume"], "--resume is not for streams"),
        (["pull", "nbd://x", "--to", "-", "--dry-run"], "--dry-run is not for streams"),
        (["pull", "nbd://x", "--to", "-", "--auto"], "--auto needs a backup directory"),
        (["pull", "nbd://x", "--to", "-", "--disk", "vda"], "our own server"),
    ],
)
def test_mistake_is_one_line_and_status_2(run: Run, words: list[str], complaint: str) -> None:
    done = run(*words)
    assert done.status == 2
    assert complaint in done.complaint
