"""``nbdfleece serve``: beginning and end, and every way to get it wrong."""

from __future__ import annotations

import json
import os
import signal
import socket
import stat
import subprocess
from pathlib import Path

import pytest

from .conftest import PROGRAM, SIZE, Run, Server, Start, make_image


@pytest.fixture
def image(tmp_path: Path) -> Path:
    return make_image(tmp_path / "a.qcow2")


def uri(folder: Path) -> str:
    """Of the disk on the socket that the server was told by its name only."""
    return f"nbd+unix:///vda?socket={folder}/n"


def test_ready_line_has_the_uris_of_every_disk_on_every_listener(
    tmp_path: Path, image: Path, start: Start
) -> None:
    server = start("--disk", f"vda={image}", "--listen", "unix:n", "--listen", "tcp:127.0.0.1:0")
    words = server.ready.split()
    assert words[:3] == ["nbdfleece:", "ready:", uri(tmp_path)]
    assert words[3].startswith("nbd://127.0.0.1:")
    assert words[3].endswith("/vda")


def test_usual_places_are_under_the_runtime_directory(tmp_path: Path, server: Server) -> None:
    folder = tmp_path / "nbdfleece"
    assert stat.S_IMODE(folder.stat().st_mode) == 0o700
    assert {path.name for path in folder.iterdir()} == {"nbd.sock", "control.sock"}


def test_print_uri_prints_uris_only(tmp_path: Path, image: Path, start: Start) -> None:
    server = start("--disk", f"vda={image}", "--listen", "unix:n", "--print-uri")
    assert server.ready == uri(tmp_path) + "\n"
    assert server.end().output == server.ready


def test_json_prints_one_object(tmp_path: Path, image: Path, start: Start) -> None:
    server = start("--disk", f"vda={image}", "--listen", "unix:n", "--control", "c", "--json")
    assert json.loads(server.ready) == {
        "pid": server.process.pid,
        "control": "c",
        "exports": [{"name": "vda", "uris": [uri(tmp_path)]}],
    }


def test_listen_takes_nbd_uris(tmp_path: Path, image: Path, start: Start) -> None:
    server = start("--disk", f"vda={image}", "--listen", "nbd+unix:///?socket=n", "--print-uri")
    assert server.ready == uri(tmp_path) + "\n"


def test_control_none_makes_no_control_socket(tmp_path: Path, image: Path, start: Start) -> None:
    start("--disk", f"vda={image}", "--listen", "unix:n", "--control", "none")
    assert not (tmp_path / "nbdfleece").exists()


@pytest.mark.parametrize("loop", ["asyncio", "uvloop"])
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP])
def test_signal_ends_in_good_order(
    tmp_path: Path, image: Path, start: Start, run: Run, number: int, loop: str
) -> None:
    server = start("--disk", f"vda={image}", "--pid-file", "pid", "--loop", loop)
    assert (tmp_path / "pid").read_text() == f"{server.process.pid}\n"
    assert run("backup", "begin", "b", "--checkpoint", "monday").status == 0
    ended = server.end(number)
    assert (ended.status, ended.errors) == (0, "")
    assert not (tmp_path / "pid").exists()
    assert list((tmp_path / "nbdfleece").iterdir()) == []
    subprocess.run(["qemu-img", "check", "-q", image], check=True)
    information = json.loads(subprocess.check_output(["qemu-img", "info", "--output=json", image]))
    assert "bitmaps" not in information["format-specific"]["data"]


def test_checkpoints_are_there_after_a_restart(
    tmp_path: Path, server: Server, run: Run, start: Start
) -> None:
    assert run("checkpoint", "create", "monday").status == 0
    assert server.end().status == 0
    start("--disk", "vda=vda.qcow2", "--disk", "vdb=vdb.qcow2")
    (checkpoint,) = run("checkpoint", "list", "--json").json
    assert checkpoint["name"] == "monday"
    assert all(link["problem"] is None for link in checkpoint["disks"].values())


def test_second_signal_ends_at_once(image: Path, start: Start) -> None:
    server = start("--disk", f"vda={image}")
    os.kill(server.process.pid, signal.SIGSTOP)
    for number in (signal.SIGTERM, signal.SIGINT):
        os.kill(server.process.pid, number)
    os.kill(server.process.pid, signal.SIGCONT)
    status = server.process.wait(120)
    assert status in (-signal.SIGTERM, -signal.SIGINT)


def test_killed_servers_sockets_are_taken_over(tmp_path: Path, image: Path, start: Start) -> None:
    start("--disk", f"vda={image}").end(signal.SIGKILL)
    assert start("--disk", f"vda={image}").end().status == 0


def test_quit_over_the_control_socket_ends_with_status_0(server: Server, tmp_path: Path) -> None:
    with socket.socket(socket.AF_UNIX) as client:
        client.connect(str(tmp_path / "nbdfleece" / "control.sock"))
        client.sendall(b'{"execute": "qmp_capabilities"}{"execute": "quit"}')
        while client.recv(65536):
            pass
    assert server.process.wait(120) == 0


def test_ready_fd_gets_a_line(tmp_path: Path, image: Path, start: Start) -> None:
    fifo = tmp_path / "fifo"
    os.mkfifo(fifo)
    reading = os.open(fifo, os.O_RDONLY | os.O_NONBLOCK)
    writing = os.open(fifo, os.O_WRONLY)
    os.set_inheritable(writing, True)
    process = subprocess.Popen(
        [
            *("sh", "-c", 'exec 9>fifo; exec "$@" --ready-fd 9', "sh"),
            *(str(word) for word in _command(image)),
        ],
        cwd=tmp_path,
        stdout=subprocess.PIPE,
    )
    assert process.stdout is not None
    assert process.stdout.readline()
    assert os.read(reading, 100) == b"ready\n"
    process.terminate()
    assert process.wait(120) == 0
    process.stdout.close()
    os.close(reading)
    os.close(writing)


def _command(image: Path) -> list[str | Path]:
    return [*PROGRAM, "serve", "--disk", f"vda={image}", "--listen", "unix:n", "--control", "none"]


def test_log_format_json_logs_one_object_per_line(image: Path, start: Start) -> None:
    server = start("--disk", f"vda={image}", "-v", "--log-format", "json")
    records = [json.loads(line) for line in server.end().errors.splitlines()]
    assert any(record["message"].startswith("SHUTDOWN") for record in records)
    assert {"time", "level", "logger", "message"} <= set(records[0])


# -- bad input ------------------------------------------------------------------------


def test_missing_image_is_one_line_and_status_1(run: Run) -> None:
    outcome = run("serve", "--disk", "vda=nope.qcow2")
    assert outcome.status == 1
    assert outcome.complaint == "nope.qcow2: No such file or directory"


def test_image_of_another_kind_is_refused(tmp_path: Path, run: Run) -> None:
    (tmp_path / "raw.img").write_bytes(bytes(SIZE))
    outcome = run("serve", "--disk", "vda=raw.img")
    assert outcome.status == 1
    assert outcome.complaint == "raw.img: not a qcow2 image"


def test_damaged_image_is_refused_and_says_where(image: Path, run: Run) -> None:
    with image.open("r+b") as file:
        file.seek(40)
        file.write(b"\xff" * 8)
    outcome = run("serve", "--disk", f"vda={image}")
    assert outcome.status == 1
    assert outcome.complaint.startswith(f"{image}: ")
    assert "at offset" in outcome.complaint


def test_image_with_an_unknown_feature_is_refused(image: Path, run: Run) -> None:
    with image.open("r+b") as file:
        file.seek(72)
        file.write(b"\x40")
    outcome = run("serve", "--disk", f"vda={image}")
    assert outcome.status == 1
    assert "bit 62" in outcome.complaint


def test_image_locked_by_qemu_is_refused_and_left_alone(
    tmp_path: Path, image: Path, run: Run
) -> None:
    holder = subprocess.Popen(
        ["qemu-nbd", "-t", "-f", "qcow2", "-k", tmp_path / "q", "--pid-file", tmp_path / "pid"]
        + ["--fork", image]
    )
    assert holder.wait(120) == 0
    try:
        before = image.read_bytes()
        outcome = run("serve", "--disk", f"vda={image}")
        assert outcome.status == 1
        assert "in use by another program" in outcome.complaint
        assert image.read_bytes() == before
    finally:
        os.kill(int((tmp_path / "pid").read_text()), signal.SIGTERM)


def test_image_given_twice_is_refused(image: Path, run: Run) -> None:
    outcome = run("serve", "--disk", f"vda={image}", "--disk", f"vdb={image}")
    assert outcome.status == 1
    assert "in use" in outcome.complaint


def test_failed_start_leaves_nothing_behind(tmp_path: Path, image: Path, run: Run) -> None:
    before = image.read_bytes()
    outcome = run("serve", "--disk", f"vda={image}", "--disk", "vdb=nope", "--pid-file", "pid")
    assert outcome.status == 1
    assert image.read_bytes() == before
    assert list((tmp_path / "nbdfleece").iterdir()) == []
    assert not (tmp_path / "pid").exists()


@pytest.mark.parametrize("kind", ["--listen", "--control"])
def test_socket_in_use_is_refused_and_left_alone(
    tmp_path: Path, image: Path, start: Start, run: Run, kind: str
) -> None:
    other = make_image(tmp_path / "b.qcow2")
    start("--disk", f"vda={image}", "--listen", "unix:n", "--control", "c")
    before = other.read_bytes()
    taken = {"--listen": ["unix:n", "c2"], "--control": ["unix:n2", "c"]}[kind]
    outcome = run("serve", "--disk", f"vda={other}", "--listen", taken[0], "--control", taken[1])
    assert outcome.status == 1
    assert "another server listens there" in outcome.complaint
    assert other.read_bytes() == before
    assert run("info", "--control", "c").status == 0


def test_file_in_the_place_of_a_socket_is_left_alone(tmp_path: Path, image: Path, run: Run) -> None:
    (tmp_path / "n").write_text("mine")
    outcome = run("serve", "--disk", f"vda={image}", "--listen", "unix:n")
    assert outcome.status == 1
    assert outcome.complaint == "cannot listen on 'n': the file exists and is not a socket"
    assert (tmp_path / "n").read_text() == "mine"


def test_missing_scratch_directory_is_found_at_the_start(image: Path, run: Run) -> None:
    outcome = run("serve", "--disk", f"vda={image}", "--scratch-dir", "nowhere")
    assert outcome.status == 1
    assert "/nowhere/" in outcome.complaint


@pytest.mark.parametrize(
    "words",
    [
        [],
        ["--disk", "vda"],
        ["--disk", "=a.qcow2"],
        ["--disk", "vda=a", "--disk", "vda=b"],
        ["--disk", "vda=a", "--listen", "somewhere"],
        ["--disk", "vda=a", "--listen", "tcp:localhost:99999"],
        ["--disk", "vda=a", "--scratch-quota", "1.5G"],
        ["--disk", "vda=a", "--scratch-granularity", "3k"],
        ["--disk", "vda=a", "--cbw-timeout", "0"],
        ["--disk", "vda=a", "--loop", "trio"],
        ["--disk", "vda=a", "--on-cbw-error", "panic"],
        ["--disk", "vda=a", "extra"],
        ["--no-such-option"],
    ],
)
def test_command_line_that_cannot_be_meant_is_status_2(run: Run, words: list[str]) -> None:
    outcome = run("serve", *words)
    assert outcome.status == 2
    assert outcome.complaint
