"""``pull``, ``restore``, ``verify``, ``list``, ``show``, ``prune`` and ``map``, as they are run."""

from __future__ import annotations

import json
import os
import random
import signal
import socket
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from nbdfleece.cli.main import cli
from tests.backup.conftest import tmp_path as in_memory
from tests.backup.programs import content_of, nbdkit, qemu_io, qemu_nbd

from . import filled
from .conftest import PROGRAM, SECONDS_MAX, SIZE, Run, Server, Start, environment

tmp_path = in_memory
image = filled.image
server = filled.server


@pytest.fixture
def live(tmp_path: Path) -> str:
    return f"nbd+unix:///vda?socket={tmp_path}/n"


def pull(run: Run, tmp_path: Path, *words: str | Path) -> Any:
    return run("pull", "--to", tmp_path / "backup", "--control", tmp_path / "c", *words)


def test_whole_backups_from_our_own_server(
    tmp_path: Path, server: Server, run: Run, live: str
) -> None:
    first = pull(run, tmp_path, "--point", "monday")
    assert first.status == 0
    share = 5 * (1 << 20) + 65536
    assert f"monday: vda: full: read {share} bytes of {SIZE}" in first.output
    qemu_io(live, "write -q -P 3 1M 64k", "write -q -z 9M 64k", image_format="raw")
    second = pull(run, tmp_path, "--point", "tuesday", "--json").json
    disk = second["disks"][0]
    assert (disk["parent"], disk["read-bytes"], disk["changed-bytes"]) == ("monday", 65536, 131072)
    third = pull(run, tmp_path, "--point", "wednesday", "--since", "monday")
    assert "since monday: read 65536 bytes" in third.output
    checkpoints = run("checkpoint", "list", "--control", tmp_path / "c", "--json").json
    assert [each["name"] for each in checkpoints] == ["monday", "tuesday", "wednesday"]
    assert run("backup", "list", "--control", tmp_path / "c", "--json").json == []
    restored = tmp_path / "restored.raw"
    assert run("restore", f"{tmp_path}/backup@tuesday", "--to", restored).status == 0
    assert run("verify", f"{tmp_path}/backup@tuesday", "--against", live).status == 0
    assert restored.read_bytes() == content_of(tmp_path / "backup" / "wednesday.vda.qcow2")


def test_pull_of_an_unknown_export_names_it(tmp_path: Path, server: Server, run: Run) -> None:
    uri = f"nbd+unix:///nope?socket={tmp_path}/n"
    done = run("pull", uri, "--to", tmp_path / "backup")
    assert done.status == 1
    assert "no export named 'nope'" in done.complaint
    assert not (tmp_path / "backup").exists()


def test_restore_to_a_live_export_while_it_is_tracked(
    tmp_path: Path, server: Server, run: Run, live: str
) -> None:
    """What a restore writes is a change like any other: the next increment has it."""
    pull(run, tmp_path, "--point", "monday")
    before = content_of(tmp_path / "backup" / "monday.vda.qcow2")
    qemu_io(live, "write -q -P 7 0 1M", "write -q -P 8 12M 1M", image_format="raw")
    pull(run, tmp_path, "--point", "tuesday")
    done = run("restore", f"{tmp_path}/backup@monday", "--to", live)
    assert "5308416 bytes of" in done.output
    assert f"zeroed {1 << 20}," in done.output
    pull(run, tmp_path, "--point", "wednesday")
    assert content_of(tmp_path / "backup" / "wednesday.vda.qcow2") == before
    assert run("verify", f"{tmp_path}/backup@monday", "--against", live).status == 0


def test_checkpoint_of_another_time_is_not_built_on(
    tmp_path: Path, server: Server, run: Run
) -> None:
    pull(run, tmp_path, "--point", "monday")
    run("checkpoint", "delete", "monday", "--control", tmp_path / "c")
    run("checkpoint", "create", "monday", "--control", tmp_path / "c")
    failed = pull(run, tmp_path, "--point", "tuesday", "--since", "monday")
    assert "was made at another time" in failed.complaint
    assert pull(run, tmp_path, "--point", "tuesday").status == 4


def test_increment_that_the_server_cannot_give_is_an_error_or_full_with_a_reason(
    tmp_path: Path, server: Server, run: Run
) -> None:
    pull(run, tmp_path, "--point", "monday")
    run("checkpoint", "delete", "monday", "--control", tmp_path / "c")
    done = pull(run, tmp_path, "--point", "tuesday", "--since", "monday")
    assert (done.status, done.complaint) == (1, "there is no checkpoint 'monday'")
    automatic = pull(run, tmp_path, "--point", "tuesday")
    assert automatic.status == 4
    assert "full: the server has no checkpoint that the backup has: read" in automatic.output


def test_dry_run_leaves_nothing(tmp_path: Path, server: Server, run: Run) -> None:
    done = pull(run, tmp_path, "--point", "monday", "--dry-run", "--json").json
    assert done[0]["read_bytes"] == 5 * (1 << 20) + 65536
    assert not (tmp_path / "backup").exists()
    assert run("backup", "list", "--control", tmp_path / "c", "--json").json == []
    assert run("checkpoint", "list", "--control", tmp_path / "c", "--json").json == []


@pytest.fixture
def large(tmp_path: Path) -> Iterator[tuple[str, bytes]]:
    """A slow server with much to pull, and what."""
    content = random.Random(3).randbytes(1 << 20) * 48
    raw = tmp_path / "large.raw"
    raw.write_bytes(content)
    with nbdkit(tmp_path, "file", str(raw)) as uri:
        yield uri, content


def begin_slow_pull(folder: Path, *words: str | Path) -> subprocess.Popen[str]:
    """A pull that takes so long that it is not over before a test has ended it."""
    slow = ["--rate-limit", "1M", "--save-every", "0.05"]
    return subprocess.Popen(
        # SIGINT may be ignored here, as in whatever a shell runs in the background.
        ["env", "--default-signal=INT", *PROGRAM, "pull", *map(str, words), *slow],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=environment(folder),
    )


def wait_for(condition: Callable[[], bool], process: subprocess.Popen[str]) -> None:
    """Wait for what a running process does."""
    deadline = time.monotonic() + SECONDS_MAX
    while not condition():
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < deadline
        time.sleep(0.01)


def blocks_in(journal: Path) -> int:
    """How many blocks are done and durable; the first line is the head."""
    return max(journal.read_text().count("\n") - 1, 0) if journal.exists() else 0


def test_pull_killed_again_and_again_goes_on_to_the_end(
    tmp_path: Path, run: Run, large: tuple[str, bytes]
) -> None:
    """SIGKILL once something is in the journal; nothing is taken for a restore point meanwhile."""
    uri, content = large
    backup = tmp_path / "backup"
    journal = backup / "p.journal"
    words = ["pull", uri, "--to", backup, "--point", "p"]
    for number in range(4):
        before = blocks_in(journal)
        process = begin_slow_pull(tmp_path, *words[1:], *(["--resume"] if number else []))
        wait_for(lambda before=before: blocks_in(journal) > before, process)
        process.kill()
        process.communicate(timeout=120)
        assert not (backup / "p.json").exists()
        assert not (backup / "p.disk.qcow2").exists()
        listed = run("list", backup)
        assert "p: incomplete" in listed.output
    refused = run(*words)
    assert refused.status == 1
    assert "--resume" in refused.complaint
    done = run(*words, "--resume")
    assert done.status == 0
    assert content_of(backup / "p.disk.qcow2") == content
    assert run("verify", backup).status == 0
    assert sorted(path.name for path in backup.iterdir()) == [".lock", "p.disk.qcow2", "p.json"]


def test_pull_from_our_server_killed_goes_on_with_its_snapshot(
    tmp_path: Path, server: Server, run: Run, live: str
) -> None:
    qemu_io(live, "write -q -P 9 0 16M", image_format="raw")
    journal = tmp_path / "backup" / "p.journal"
    process = begin_slow_pull(
        tmp_path, "--to", tmp_path / "backup", "--control", tmp_path / "c", "--point", "p"
    )
    wait_for(lambda: blocks_in(journal) > 0, process)
    process.kill()
    process.communicate(timeout=120)
    assert journal.exists()
    qemu_io(live, "write -q -P 10 0 16M", image_format="raw")
    done = pull(run, tmp_path)
    assert done.status == 0, done.errors
    assert set(content_of(tmp_path / "backup" / "p.vda.qcow2")) == {9}


def test_pull_from_our_server_that_was_killed_says_why_it_cannot_go_on(
    tmp_path: Path, server: Server, run: Run, live: str, image: Path, start: Start
) -> None:
    """A snapshot ends with its server; what was pulled of it is of no more use."""
    qemu_io(live, "write -q -P 9 0 16M", image_format="raw")
    words = ["pull", "--to", tmp_path / "backup", "--control", tmp_path / "c", "--point", "p"]
    journal = tmp_path / "backup" / "p.journal"
    process = begin_slow_pull(tmp_path, *words[1:], "--keep")
    wait_for(lambda: blocks_in(journal) > 0, process)
    server.process.kill()
    _, errors = process.communicate(timeout=120)
    assert process.returncode == 75, errors
    assert "was cut and can go on" in errors
    (tmp_path / "n").unlink()
    (tmp_path / "c").unlink()
    start("--disk", f"vda={image}", "--listen", f"unix:{tmp_path}/n", "--control", tmp_path / "c")
    refused = run(*words, "--keep")
    assert "is another snapshot than before" in refused.complaint
    assert run("list", tmp_path / "backup", "--json").json == []
    assert run(*words, "--restart").status == 0
    assert content_of(tmp_path / "backup" / "p.vda.qcow2") == content_of(image)
    assert run("verify", tmp_path / "backup").status == 0


def test_backup_of_other_changes_that_is_there_is_not_gone_on_with(
    tmp_path: Path, server: Server, run: Run
) -> None:
    pull(run, tmp_path, "--point", "monday")
    pull(run, tmp_path, "--point", "tuesday")
    control = ("--control", tmp_path / "c")
    run("backup", "begin", "p", "--since", "monday", "--checkpoint", "p", *control)
    failed = pull(run, tmp_path, "--point", "p", "--since", "tuesday", "--keep")
    assert "--restart begins it anew" in failed.complaint
    assert pull(run, tmp_path, "--point", "p", "--since", "tuesday", "--restart").status == 0


@pytest.mark.parametrize("again", [["--point", "p"], []])
def test_pull_killed_between_completion_and_commit_is_committed_by_the_next(
    tmp_path: Path, server: Server, run: Run, monkeypatch: pytest.MonkeyPatch, again: list[str]
) -> None:
    def killed(client: object, name: str) -> None:
        raise SystemExit("killed")

    with monkeypatch.context() as patch:
        patch.setattr("nbdfleece.cli.server_pull._commit", killed)
        words = ["pull", "--to", f"{tmp_path}/backup", "--control", f"{tmp_path}/c", "--point", "p"]
        with pytest.raises(SystemExit):
            cli.main(words, prog_name="nbdfleece", standalone_mode=False)
    control = ("--control", tmp_path / "c")
    assert len(run("backup", "list", "--json", *control).json) == 1
    done = pull(run, tmp_path, *again)
    assert done.status == 0, done.errors
    assert run("backup", "list", "--json", *control).json == []
    names = [each["name"] for each in run("checkpoint", "list", "--json", *control).json]
    assert names[0] == "p"
    points = run("list", tmp_path / "backup", "--json").json
    assert [point["name"] for point in points] == names
    assert points[-1]["parent"] == (None if again else "p")


def test_failed_pull_from_our_server_is_undone(
    tmp_path: Path, server: Server, run: Run, live: str
) -> None:
    """A file size limit stands for a full disk."""
    qemu_io(live, "write -q -P 9 0 16M", image_format="raw")
    words = ["pull", "--to", str(tmp_path / "backup"), "--control", str(tmp_path / "c")]
    for keep in (False, True):
        done = subprocess.run(
            ["prlimit", "--fsize=6000000", *PROGRAM, *words, "--point", "p"]
            + (["--keep"] if keep else []),
            capture_output=True,
            text=True,
            timeout=120,
            env=environment(tmp_path),
        )
        assert done.returncode == (75 if keep else 1)
        assert ("was cut and can go on" if keep else "failed and was undone") in done.stderr
        backups = run("backup", "list", "--control", tmp_path / "c", "--json").json
        assert len(backups) == keep
        assert (tmp_path / "backup" / "p.journal").exists() == keep
    assert pull(run, tmp_path, "--point", "p").status == 0
    assert run("verify", tmp_path / "backup").status == 0


def test_full_disk_cuts_the_pull_and_room_lets_it_go_on(
    tmp_path: Path, run: Run, large: tuple[str, bytes]
) -> None:
    uri, content = large
    words = ["pull", uri, "--to", str(tmp_path / "backup"), "--point", "p"]
    done = subprocess.run(
        ["prlimit", "--fsize=20000000", *PROGRAM, *words],
        capture_output=True,
        text=True,
        timeout=120,
        env=environment(tmp_path),
    )
    assert done.returncode == 75, done.stderr
    assert len(done.stderr.splitlines()) == 1
    assert run(*words, "--resume").status == 0
    assert content_of(tmp_path / "backup" / "p.disk.qcow2") == content


NO_ROOM = """
set -eu
nbdfleece=$1 folder=$2 uri=$3
mount -t tmpfs -o size=20M tmpfs "$folder"
pull() { "$nbdfleece" pull "$uri" --to "$folder/b" --point p "$@"; }
expect() { wanted=$1; shift; status=0; "$@" || status=$?; [ $status = $wanted ] || exit 99; }
expect 75 pull
expect 1 "$nbdfleece" show "$folder/b@p"
mount -o remount,size=80M "$folder"
expect 0 pull --resume
expect 0 "$nbdfleece" verify "$folder/b"
expect 0 qemu-img check -q "$folder/b/p.disk.qcow2"
expect 1 "$nbdfleece" restore "$folder/b" --to "$folder/out.raw"
ls "$folder"
"""


def test_no_room_cuts_pull_and_restore_and_the_pull_goes_on_with_more_room(
    tmp_path: Path, large: tuple[str, bytes]
) -> None:
    """ENOSPC, on a file system of 20 MiB in a mount namespace of its own."""
    folder = tmp_path / "small"
    folder.mkdir()
    rights = [] if os.geteuid() == 0 else ["--map-root-user"]
    done = subprocess.run(
        ["unshare", *rights, "--mount", "--propagation=private",
         "sh", "-c", NO_ROOM, "sh", PROGRAM[0], folder, large[0]],
        capture_output=True,
        text=True,
        timeout=200,
        env=environment(tmp_path),
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    first, missing, restored = done.stderr.splitlines()
    assert "was cut and can go on" in first
    assert "No space left on device" in first
    assert "no restore point or checkpoint 'p'" in missing
    assert "No space left on device" in restored
    assert done.stdout.splitlines()[-1] == "b"


def test_interrupted_pull_ends_with_the_signals_status(
    tmp_path: Path, large: tuple[str, bytes]
) -> None:
    uri, _ = large
    process = begin_slow_pull(tmp_path, uri, "--to", tmp_path / "backup", "--progress", "json")
    assert process.stdout is not None
    process.stdout.readline()
    process.send_signal(signal.SIGINT)
    process.communicate(timeout=120)
    assert process.returncode == 128 + signal.SIGINT


def test_rate_file_changes_the_rate_while_pulling(tmp_path: Path, large: tuple[str, bytes]) -> None:
    uri, content = large
    rate = tmp_path / "rate"
    rate.write_text("1M\n")
    process = subprocess.Popen(
        [*PROGRAM, "pull", uri, "--to", tmp_path / "backup", "--rate-file", rate,
         "--progress", "json"],
        stdout=subprocess.PIPE,
        env=environment(tmp_path),
    )  # fmt: skip
    assert process.stdout is not None
    process.stdout.readline()
    rate.write_text("0\n")
    out, _ = process.communicate(timeout=120)
    assert process.returncode == 0
    last = json.loads(out.splitlines()[-2])
    assert last["transferred"] == len(content)
    assert json.loads(out.splitlines()[-1])["disks"][0]["read-bytes"] == len(content)


def test_foreign_server_with_bitmaps(tmp_path: Path, run: Run, image: Path) -> None:
    backup = tmp_path / "backup"
    subprocess.run(["qemu-img", "bitmap", "--add", image, "monday"], check=True)
    with qemu_nbd(image, "-r") as uri:
        words = ("pull", f"vda={uri}", "--to", backup, "--checkpoint", "monday")
        assert run(*words).status == 0
    qemu_io(image, "write -q -P 8 2M 1M")
    with qemu_nbd(image, "-r", "-B", "monday") as uri:
        done = run("pull", f"vda={uri}", "--to", backup, "--point", "tuesday", "--since", "monday")
        assert f"tuesday: vda: since monday: read 1048576 bytes of {SIZE} (6.2%)" in done.output
        again = run("pull", f"vda={uri}", "--to", backup, "--point", "wednesday", "--json").json
        assert again["disks"][0]["parent"] == "monday"
        unknown = run("pull", f"vda={uri}", "--to", backup, "--point", "x", "--since", "friday")
        assert "no restore point or checkpoint 'friday'" in unknown.complaint
        difference = run("verify", f"{backup}@monday", "--against", uri)
        assert difference.status == 3
        assert "differs between 2097152 and 3145728" in difference.output
    with qemu_nbd(image, "-r") as uri:
        lost = run("pull", f"vda={uri}", "--to", backup, "--point", "thursday")
        assert lost.status == 4
        assert "offers no dirty bitmap" in lost.output
    listed = run("list", backup, "--json").json
    assert [each["name"] for each in listed] == ["monday", "tuesday", "wednesday", "thursday"]
    table = run("list", backup).output.splitlines()
    assert table[0].split()[:3] == ["POINT", "CREATED", "PARENT"]
    shown = run("show", f"{backup}@tuesday").output
    assert "tuesday.vda.qcow2 <- monday.vda.qcow2" in shown
    assert run("prune", backup, "--keep", "2", "--dry-run", "--json").json["removed"] == [
        "monday",
        "tuesday",
    ]
    assert run("prune", backup, "--keep", "2").status == 0
    assert run("verify", backup).output.endswith("no problems\n")


def test_damage_is_found_and_has_its_own_status(tmp_path: Path, run: Run, image: Path) -> None:
    backup = tmp_path / "backup"
    with qemu_nbd(image, "-r") as uri:
        run("pull", f"vda={uri}", "--to", backup, "--point", "p")
    qemu_io(backup / "p.vda.qcow2", "write -q -P 7 1M 512")
    found = run("verify", backup)
    assert found.status == 3
    assert "not what was pulled" in found.output
    failed = run("restore", backup, "--to", tmp_path / "out.raw")
    assert failed.status == 3
    assert "not what was pulled" in failed.complaint
    assert not (tmp_path / "out.raw").exists()


@pytest.mark.parametrize("options", [[], ["--json"], ["--totals"], ["--totals", "--json"]])
def test_map_is_that_of_nbdinfo(tmp_path: Path, run: Run, image: Path, options: list[str]) -> None:
    subprocess.run(["qemu-img", "bitmap", "--add", image, "b"], check=True)
    qemu_io(image, "write -q 2M 64k", "discard -q 3M 1M")
    with qemu_nbd(image, "-r", "-A", "-B", "b") as uri, nbdkit(tmp_path, "null", "0") as empty:
        for context in ("base:allocation", "qemu:dirty-bitmap:b", "qemu:allocation-depth"):
            theirs = subprocess.run(
                ["nbdinfo", f"--map={context}", *options, uri], capture_output=True, text=True
            )
            assert run("map", uri, "--context", context, *options).output == theirs.stdout
        theirs = subprocess.run(
            ["nbdinfo", "--map", *options, empty], capture_output=True, text=True
        )
        assert run("map", empty, *options).output == theirs.stdout
        missing = run("map", uri, "--context", "foo:bar")
        assert 'server does not support metadata context "foo:bar"' in missing.complaint


def test_map_draws_and_merges(tmp_path: Path, run: Run, image: Path) -> None:
    subprocess.run(["qemu-img", "bitmap", "--add", image, "b"], check=True)
    qemu_io(image, "write -q 2M 64k", "discard -q 3M 1M")
    with qemu_nbd(image, "-r", "-B", "b") as uri:
        merged = run("map", uri, "--changes", "b", "--json").json
        assert {each["description"] for each in merged} == {"clean", "dirty", "zero", "dirty,zero"}
        blocks = run("map", uri, "--changes", "b", "--blocks").output
        assert {"█", "▒", "○", "·"} <= set(blocks)
        drawn = run("map", uri, "--changes", "b", "--svg", tmp_path / "x.svg")
        assert (drawn.status, drawn.output) == (0, "")
        assert (tmp_path / "x.svg").read_text().startswith("<svg ")
        drawn = run("map", uri, "--changes", "b", "--png", tmp_path / "x.png")
        assert (drawn.status, drawn.output) == (0, "")
        assert (tmp_path / "x.png").read_bytes().startswith(b"\x89PNG")
        plain = run("map", uri, "--blocks").output
        assert "█ changed data: 0 bytes" in plain


@pytest.mark.parametrize(
    ("words", "status", "complaint"),
    [
        (["pull", "http://x", "--to", "b"], 2, "not an NBD URI"),
        (["pull", "nbd+unix:///?socket=none", "--to", "b"], 1, "No such file"),
        (["pull", "nbd://x", "--to", "b", "--full", "--auto"], 2, "exclude"),
        (["pull", "nbd://x", "--to", "b", "--resume", "--restart"], 2, "exclude"),
        (["pull", "nbd://x", "--to", "b", "--bitmap", "y"], 2, "--since"),
        (["pull", "nbd://x", "--to", "b", "--keep"], 2, "our own server"),
        (["pull", "--to", "b", "--control", "none.sock"], 1, "cannot reach a server"),
        (["pull", "nbd://x", "--to", "b", "--since", "y"], 1, "no such backup directory"),
        (["list", "nowhere"], 1, "no such backup directory"),
        (["show", "nowhere"], 1, "no such backup directory"),
        (["verify", "nowhere"], 1, "no such backup directory"),
        (["verify", "nowhere", "--disk", "x"], 2, "--against"),
        (["prune", "nowhere"], 2, "--keep N or --point"),
        (["prune", "nowhere", "--keep", "1"], 1, "no such backup directory"),
        (["restore", "nowhere", "--to", "x"], 1, "no such backup directory"),
        (["map", "nbd://x", "--context", "a", "--blocks"], 2, "--context"),
        (["map", "nbd://x", "--json", "--blocks"], 2, "print text"),
    ],
)
def test_mistake_is_one_line_and_a_status(
    run: Run, words: list[str], status: int, complaint: str
) -> None:
    done = run(*words)
    assert complaint in done.complaint
    assert done.status == status


def test_missing_libnbd_is_one_line_that_names_the_package(tmp_path: Path, run: Run) -> None:
    (tmp_path / "nbd.py").write_text("raise ImportError('no')\n")
    done = subprocess.run(
        [*PROGRAM, "map", "nbd://localhost"],
        capture_output=True,
        text=True,
        env={**environment(tmp_path), "PYTHONPATH": str(tmp_path)},
        cwd="/",
    )
    assert done.returncode == 2
    assert "python3-libnbd" in done.stderr
    assert len(done.stderr.splitlines()) == 1
    (tmp_path / "nbd.py").write_text("def diff(): pass\n")
    other = subprocess.run(done.args, capture_output=True, text=True, cwd="/", env={
        **os.environ, "PYTHONPATH": str(tmp_path)
    })  # fmt: skip
    assert "is not libnbd's" in other.stderr


def test_server_that_says_nothing_is_given_up(tmp_path: Path, run: Run) -> None:
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(f"{tmp_path}/silent")
        listener.listen()
        uri = f"nbd+unix:///?socket={tmp_path}/silent"
        for words in (
            ["map", uri],
            ["pull", uri, "--to", "b"],
            ["pull", uri, "--to", "b", "--full"],
        ):
            done = run(*words, "--timeout", "0.2")
            assert (done.status, "silent for 0.2 seconds" in done.complaint) == (1, True)


def random_commands(source: random.Random, count: int) -> list[str]:
    """Guest writes, zeroes and discards of all alignments."""
    commands = []
    for _ in range(count):
        length = source.choice([512, 4096, 65536, 100 << 10, 1 << 20])
        offset = source.randrange(0, SIZE - length + 1, 512)
        kind = source.choice(["write -q -P {}", "write -q -z", "write -q -z -u", "discard -q"])
        commands.append(f"{kind.format(source.randrange(1, 256))} {offset} {length}")
    return commands


ROUNDS = int(os.environ.get("NBDFLEECE_HISTORY_ROUNDS", "8"))
"""Rounds of a history, each of several processes; 30 are the full run."""


def test_random_history_on_our_server_is_what_the_disk_was(
    tmp_path: Path, server: Server, run: Run, live: str
) -> None:
    """The guest writes between the snapshot and the pull; some checkpoints and points go."""
    source = random.Random(11)
    control = ("--control", tmp_path / "c")
    backup = tmp_path / "backup"
    expected: dict[str, bytes] = {}
    for number in range(ROUNDS):
        name = f"p{number}"
        qemu_io(live, *random_commands(source, 6), image_format="raw")
        raw = tmp_path / "expected.raw"
        subprocess.run(["nbdcopy", live, raw], check=True)
        expected[name] = raw.read_bytes()
        since = source.choice(sorted(expected.keys() - {name})) if number else None
        words = ["--since", since] if since is not None else []
        begun = run("backup", "begin", name, "--checkpoint", name, *words, "--json", *control).json
        qemu_io(live, *random_commands(source, 6), image_format="raw")
        uri = begun["disks"][0]["uris"][0]
        mode = ["--since", since] if since is not None else ["--full"]
        mode += source.choice([[], ["--compress", "zlib"], ["--compress", "zstd"]])
        pulled = run("pull", f"vda={uri}", "--to", backup, "--checkpoint", name, *mode)
        assert pulled.status == 0, pulled.errors
        assert run("backup", "commit", name, *control).status == 0
        if number % 4 == 3:
            doomed = source.choice(sorted(expected.keys() - {name}))
            assert run("prune", backup, "--point", doomed).status == 0
            assert run("checkpoint", "delete", doomed, *control).status == 0
            del expected[doomed]
    assert run("verify", backup).status == 0
    for name, content in expected.items():
        assert content_of(backup / f"{name}.vda.qcow2") == content, name
        restored = tmp_path / f"{name}.raw"
        assert run("restore", f"{backup}@{name}", "--to", restored).status == 0
        assert restored.read_bytes() == content
