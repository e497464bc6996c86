"""The commands that talk to a server: what they print, and how they fail."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import threading
from pathlib import Path

import pytest

from .conftest import PROGRAM, SIZE, Outcome, Run, Server, Start

NBD = "nbd+unix:///{}?socket={}/nbdfleece/nbd.sock"


@pytest.fixture(autouse=True)
def _running(server: Server) -> None:
    assert server.ready.startswith("nbdfleece: ready: ")


def write(folder: Path, disk: str, offset: int, length: int) -> None:
    """Write as a guest does, with QEMU's own client."""
    subprocess.run(
        [
            "qemu-io",
            "-f",
            "raw",
            "-c",
            f"write -q -P 7 {offset} {length}",
            NBD.format(disk, folder),
        ],
        check=True,
    )


def dirty(uri: str, context: str) -> list[tuple[int, int]]:
    """The dirty ranges, as nbdinfo tells them."""
    printed = subprocess.check_output(["nbdinfo", f"--map={context}", "--json", uri])
    return [
        (extent["offset"], extent["length"]) for extent in json.loads(printed) if extent["type"] & 1
    ]


def succeeded(outcome: Outcome) -> str:
    assert (outcome.status, outcome.errors) == (0, "")
    return outcome.output


def test_info_shows_disks_and_exports(run: Run, tmp_path: Path) -> None:
    lines = succeeded(run("info")).splitlines()
    assert lines[2].split() == ["DISK", "SIZE", "SCRATCH", "CHECKPOINTS", "IMAGE", "PROBLEM"]
    assert lines[3].split() == ["vda", "16", "MiB", "0", "B", "-", "vda.qcow2"]
    assert NBD.format("vdb", tmp_path) in lines[-1]


def test_info_json_has_everything(run: Run, server: Server) -> None:
    shown = run("info", "--json").json
    assert shown["pid"] == server.process.pid
    assert [disk["name"] for disk in shown["disks"]] == ["vda", "vdb"]
    assert set(shown) == {
        *("version", "pid", "disks", "checkpoints", "snapshots", "backups", "nbd-exports")
    }


def test_snapshot_is_created_listed_and_deleted(run: Run) -> None:
    assert succeeded(run("snapshot", "create", "s", "--disk", "vda")) == ""
    lines = succeeded(run("snapshot", "list")).splitlines()
    assert lines[0].split() == ["SNAPSHOT", "CREATED", "DISKS", "CHECKPOINT", "EXPORTS", "STATE"]
    assert lines[1].split()[-4:] == ["vda", "-", "-", "good"]
    assert run("snapshot", "delete", "s", "--json").json == {}
    assert run("snapshot", "list", "--json").json == []


def test_checkpoint_is_created_listed_and_deleted(run: Run, tmp_path: Path) -> None:
    succeeded(run("checkpoint", "create", "monday", "--owner", "me"))
    write(tmp_path, "vda", 0, 4096)
    assert "64 KiB" in succeeded(run("checkpoint", "list"))
    (checkpoint,) = run("checkpoint", "list", "--json").json
    assert checkpoint["owner"] == "me"
    assert checkpoint["disks"]["vda"] == {"size": SIZE, "changed": 65536, "problem": None}
    assert checkpoint["disks"]["vdb"]["changed"] == 0
    succeeded(run("checkpoint", "delete", "monday"))
    assert run("checkpoint", "list", "--json").json == []


def test_export_shows_changes_under_the_chosen_name(run: Run, tmp_path: Path) -> None:
    succeeded(run("checkpoint", "create", "monday"))
    write(tmp_path, "vda", 1 << 20, 65536)
    succeeded(run("snapshot", "create", "s"))
    write(tmp_path, "vda", 0, 65536)
    uri = succeeded(run("export", "add", "s", "vda", "--name", "e", "--since", "monday=mine"))
    assert uri == NBD.format("e", tmp_path) + "\n"
    assert dirty(uri.strip(), "qemu:dirty-bitmap:mine") == [(1 << 20, 65536)]
    listed = run("export", "list", "--json").json
    assert [export["name"] for export in listed] == ["vda", "vdb", "e"]
    assert "qemu:dirty-bitmap:mine" in succeeded(run("export", "list"))
    succeeded(run("export", "remove", "e"))
    assert len(run("export", "list", "--json").json) == 2


def test_export_shows_changes_between_two_checkpoints(run: Run, tmp_path: Path) -> None:
    for number, name in enumerate(("one", "two", "three")):
        succeeded(run("checkpoint", "create", name))
        write(tmp_path, "vda", number << 20, 4096)
    succeeded(run("snapshot", "create", "snap"))
    added = run("export", "add", "snap", "vda", "--between", "one..three=early", "--json").json
    assert dirty(added["uris"][0], "qemu:dirty-bitmap:early") == [(0, 65536), (1 << 20, 65536)]


@pytest.mark.parametrize("word", ["one", "one..two", "..two=x", "one..=x", "one..two="])
def test_between_of_another_form_is_status_2(run: Run, word: str) -> None:
    outcome = run("export", "add", "snap", "vda", "--between", word)
    assert outcome.status == 2
    assert "CHECKPOINT..CHECKPOINT=BITMAP" in outcome.complaint


def test_prune_names_what_it_deleted(run: Run) -> None:
    for name, owner in (("one", "night"), ("two", "week"), ("three", "night")):
        succeeded(run("checkpoint", "create", name, "--owner", owner))
    assert succeeded(run("checkpoint", "prune", "--keep", "1", "--owner", "night")) == "one\n"
    assert succeeded(run("checkpoint", "prune", "--older-than", "1h")) == ""
    assert [each["name"] for each in run("checkpoint", "list", "--json").json] == ["two", "three"]
    assert "how many" in run("checkpoint", "prune").complaint
    assert run("checkpoint", "prune", "--older-than", "yesterday").status == 2


def test_cumulative_bitmaps_are_adopted_and_handed_over(
    run: Run, tmp_path: Path, server: Server, start: Start
) -> None:
    server.end()
    image = tmp_path / "vda.qcow2"
    for name in ("c1", "c2"):
        subprocess.run(["qemu-img", "bitmap", "--add", image, name], check=True)
    start("--disk", "vda=vda.qcow2", "--scratch-dir", tmp_path)
    succeeded(run("checkpoint", "adopt", "vda", "c1", "c2", "--owner", "me"))
    found = run("checkpoint", "list", "--json").json
    assert [(each["name"], each["owner"]) for each in found] == [("c1", "me"), ("c2", "me")]
    succeeded(run("checkpoint", "hand-over", "vda"))
    assert run("checkpoint", "list", "--json").json == []
    listed = run("bitmap", "list", "--json").json
    assert {each["name"]: each["recording"] for each in listed} == {"c1": True, "c2": True}


def test_snapshot_of_changes_only_refuses_the_rest(run: Run, tmp_path: Path) -> None:
    succeeded(run("checkpoint", "create", "one"))
    write(tmp_path, "vda", 1 << 20, 4096)
    begun = run("backup", "begin", "job", "--since", "one", "--only-changes", "--json").json
    uri = begun["disks"][0]["uris"][0]
    read = ["qemu-io", "-r", "-f", "raw", uri, "-c"]
    subprocess.run([*read, "read -P 7 1M 4k"], check=True, capture_output=True)
    refused = subprocess.run([*read, "read 0 4k"], check=False, capture_output=True, text=True)
    assert "read failed" in refused.stdout + refused.stderr


@pytest.mark.parametrize(("release", "is_offered"), [("never", False), ("trim", True)])
def test_trim_is_offered_on_a_snapshot_only_if_it_releases(
    run: Run, release: str, is_offered: bool
) -> None:
    """A read-only export offers no TRIM, unless it means that the client is done with a range."""
    succeeded(run("snapshot", "create", "snap", "--release", release))
    uri = run("export", "add", "snap", "vda", "--json").json["uris"][0]
    outcome = subprocess.run(["nbdinfo", "--can", "trim", uri], check=False)
    assert outcome.returncode == (0 if is_offered else 2)


def test_bitmap_list_shows_flags(run: Run) -> None:
    succeeded(run("checkpoint", "create", "monday"))
    lines = succeeded(run("bitmap", "list", "vda")).splitlines()
    assert lines[0].split() == ["DISK", "BITMAP", "GRANULARITY", "DIRTY", "FLAGS"]
    assert lines[1].split() == ["vda", "monday", "64", "KiB", "0", "B", "recording,", "persistent"]
    assert len(run("bitmap", "list", "--json").json) == 2


def test_backup_goes_from_full_to_incremental(run: Run, tmp_path: Path) -> None:
    first = run("backup", "begin", "b1", "--checkpoint", "monday", "--json").json
    assert [disk["mode"] for disk in first["disks"]] == ["full", "full"]
    succeeded(run("backup", "commit", "b1"))
    write(tmp_path, "vdb", 0, 4096)
    lines = succeeded(run("backup", "begin", "b2", "--since", "monday")).splitlines()
    assert lines[2].split() == [
        *("vdb", "incremental", NBD.format("b2/vdb", tmp_path), "qemu:dirty-bitmap:monday")
    ]
    assert dirty(NBD.format("b2/vdb", tmp_path), "qemu:dirty-bitmap:monday") == [(0, 65536)]
    assert succeeded(run("backup", "list")).startswith("b2: ")
    succeeded(run("backup", "abort", "b2"))
    assert run("backup", "list", "--json").json == []


def test_backup_that_falls_back_to_full_is_status_4_with_the_reason(run: Run) -> None:
    succeeded(run("checkpoint", "create", "monday", "--disk", "vda"))
    outcome = run("backup", "begin", "b", "--since", "monday")
    assert (outcome.status, outcome.errors) == (4, "")
    assert outcome.output.splitlines()[2].split()[:2] == ["vdb", "full"]
    assert outcome.output.endswith("there is no checkpoint 'monday'\n")


def test_commit_of_a_broken_snapshot_is_status_5(
    run: Run, start: Start, server: Server, tmp_path: Path
) -> None:
    server.end()
    words = ["--disk", "vda=vda.qcow2", "--scratch-quota", "64k", "--scratch-dir", str(tmp_path)]
    start(*words)
    write(tmp_path, "vda", 0, 1 << 20)
    succeeded(run("backup", "begin", "b", "--checkpoint", "monday"))
    write(tmp_path, "vda", 0, 1 << 20)
    outcome = run("backup", "commit", "b")
    assert outcome.status == 5
    assert outcome.complaint.startswith("backup 'b' cannot be committed: disk 'vda': ")
    assert "broken" in succeeded(run("snapshot", "list"))
    succeeded(run("backup", "abort", "b"))


REFUSED = [
    ("snapshot create s", "snapshot 's' exists already"),
    ("snapshot create t --checkpoint monday", "checkpoint 'monday' exists already"),
    ("snapshot create t --disk sda", "there is no disk 'sda'"),
    ("snapshot delete x", "there is no snapshot 'x'"),
    ("checkpoint create monday", "checkpoint 'monday' exists already"),
    ("checkpoint create c --disk sda", "there is no disk 'sda'"),
    ("checkpoint create c --disk vda --disk vda", "a disk is named twice"),
    ("checkpoint delete x", "there is no checkpoint 'x'"),
    ("export add x vda", "there is no snapshot 'x'"),
    ("export add s sda", "snapshot 's' has no disk 'sda'"),
    ("export add s vda --name vdb", "export 'vdb' exists already"),
    ("export add s vda --since x", "there is no checkpoint 'x'"),
    ("export remove x", "there is no export 'x' of a snapshot"),
    ("export remove vda", "there is no export 'vda' of a snapshot"),
    ("bitmap list sda", "there is no disk 'sda'"),
    ("backup begin s", "snapshot 's' exists already"),
    ("backup begin b --checkpoint monday", "checkpoint 'monday' exists already"),
    ("backup begin b --since x", "there is no checkpoint 'x'"),
    ("backup commit x", "there is no backup 'x'"),
    ("backup abort s", "there is no backup 's'"),
]


def test_taken_or_unknown_name_is_one_line_status_1_and_changes_nothing(run: Run) -> None:
    succeeded(run("checkpoint", "create", "sunday"))
    succeeded(run("snapshot", "create", "s", "--checkpoint", "monday"))
    before = run("info", "--json").json
    for words, complaint in REFUSED:
        outcome = run(*words.split())
        assert (outcome.status, outcome.complaint) == (1, complaint), words
    assert run("info", "--json").json == before


@pytest.mark.parametrize("name", ["", "a\nb", "x" * 300])
def test_name_that_cannot_be_is_refused(run: Run, name: str) -> None:
    outcome = run("checkpoint", "create", name)
    assert outcome.status == 1
    assert "checkpoint" in outcome.complaint


def test_since_twice_is_status_2(run: Run) -> None:
    outcome = run("export", "add", "s", "vda", "--since", "a=b", "--since", "a=c")
    assert (outcome.status, outcome.complaint) == (2, "--since names checkpoint 'a' twice")


def test_no_server_is_one_line_and_status_1(run: Run, tmp_path: Path) -> None:
    outcome = run("info", "--control", "nowhere.sock")
    assert outcome.status == 1
    assert outcome.complaint == (
        "cannot reach a server at 'nowhere.sock': No such file or directory; is it running?"
    )


def test_server_that_ended_is_one_line_and_status_1(
    run: Run, server: Server, tmp_path: Path
) -> None:
    server.end(signal.SIGKILL)
    outcome = run("info")
    assert outcome.status == 1
    assert "Connection refused; is it running?" in outcome.complaint


def test_other_kind_of_server_is_one_line_and_status_1(run: Run, tmp_path: Path) -> None:
    outcome = run("info", "--control", tmp_path / "nbdfleece" / "nbd.sock")
    assert outcome.status == 1
    assert "is no control socket" in outcome.complaint


def test_server_that_hangs_up_is_status_75(run: Run, tmp_path: Path) -> None:
    with socket.socket(socket.AF_UNIX) as listening:
        listening.bind(str(tmp_path / "busy.sock"))
        listening.listen()

        def hang_up() -> None:
            listening.accept()[0].close()

        thread = threading.Thread(target=hang_up)
        thread.start()
        outcome = run("info", "--control", "busy.sock")
        thread.join()
    assert outcome.status == 75
    assert outcome.complaint == "the server at 'busy.sock' hung up; try again later"


def test_control_socket_is_taken_from_the_environment(
    run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    os.rename(tmp_path / "nbdfleece" / "control.sock", tmp_path / "moved.sock")
    assert run("info").status == 1
    monkeypatch.setenv("NBDFLEECE_CONTROL", str(tmp_path / "moved.sock"))
    assert run("info").status == 0


def test_qmp_shell_of_qemu_drives_the_server(tmp_path: Path, server: Server) -> None:

    shell = Path(PROGRAM[0]).with_name("qmp-shell")
    done = subprocess.run(
        [shell, tmp_path / "nbdfleece" / "control.sock"],
        input="query-status\nsnapshot-create name=s\n",
        capture_output=True,
        text=True,
        timeout=120,
        env={**os.environ, "HOME": str(tmp_path)},
    )
    assert '"status": "running"' in done.stdout
    assert '"name": "s"' in done.stdout
