"""``nbdfleece plugin``: its flags, and scripts that cannot be served."""

from __future__ import annotations

import os
import signal
import subprocess
import time
from pathlib import Path

import pytest

from .conftest import PROGRAM, SECONDS_MAX, Run

GOOD = """
import nbdkit
API_VERSION = 2
def config(key, value):
    if value == "bad":
        raise ValueError("no such value")
def dump_plugin(): print("mine=yes")
def open(readonly): return readonly
def get_size(h): return 4096
def pread(h, buf, offset, flags): pass
def pwrite(h, buf, offset, flags): pass
"""


@pytest.fixture
def script(tmp_path: Path) -> Path:
    path = tmp_path / "script.py"
    path.write_text(GOOD)
    return path


def test_run_tells_the_uri_and_gives_its_exit_status(run: Run, script: Path) -> None:
    show = 'nbdinfo --size "$uri"; echo "$exportname $unixsocket"; exit 7'
    done = run("plugin", script, "key=value", "--exportname", "name", "--run", show)
    assert done.status == 7, done.errors
    size, rest = done.output.splitlines()
    assert size == "4096"
    assert rest.startswith("name /")


def test_readonly_is_told_to_the_script_and_to_clients(run: Run, script: Path) -> None:
    done = run("plugin", "-r", script, "--run", 'nbdinfo "$uri"')
    assert "is_read_only: true" in done.output


def test_dump_plugin_calls_config_and_the_script(run: Run, script: Path) -> None:
    done = run("plugin", "--dump-plugin", f"script={script}", "key=value")
    assert done.status == 0
    assert "thread_model=serialize_all_requests" in done.output.splitlines()
    assert done.output.splitlines()[-1] == "mine=yes"


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("x = ", "error running this script: SyntaxError"),
        ("1 / 0", "error running this script: ZeroDivisionError"),
        ("def open(r): pass", "required callbacks 'open', 'get_size' or 'pread'"),
        (GOOD.replace("VERSION = 2", "VERSION = 3"), "unknown version: 3"),
        (GOOD.replace("VERSION = 2", "VERSION = '2'"), "unknown version: 2"),
        (GOOD.replace("def config", "def other"), "does not need command line configuration"),
        (GOOD + "def config(k, v): 1 / 0", "config: ZeroDivisionError: division by zero"),
        (GOOD + "def config_complete(): 1 / 0", "config_complete: ZeroDivisionError"),
        (GOOD + "def thread_model(): return 9", "thread_model: 9 is none of nbdkit.THREAD_MODEL_*"),
        (GOOD + "def get_ready(): 1 / 0", "get_ready: ZeroDivisionError"),
        (GOOD + "def after_fork(): 1 / 0", "after_fork: ZeroDivisionError"),
        (GOOD + "async def get_ready(): 1 / 0", "get_ready: ZeroDivisionError"),
    ],
)
def test_bad_script_is_refused_in_one_line(run: Run, script: Path, text: str, reason: str) -> None:
    script.write_text(text)
    done = run("plugin", script, "key=value", "--run", "true")
    assert done.status == 1
    last = done.errors.splitlines()[-1]
    assert last.startswith(f"nbdfleece: error: {script}: ")
    assert reason in last


@pytest.mark.parametrize(
    ("words", "reason"),
    [
        (["{script}", "bare"], "expecting key=value"),
        (["{script}", "1a=b"], "expecting key=value"),
        (["--fork", "--run", "true", "{script}"], "--fork and --run exclude each other"),
        (["--unix", "a", "--ipaddr", "::1", "{script}"], "exclude each other"),
        (["--fork", "--unix", "-", "{script}"], "not --unix -"),
        (["--fleece", "f", "--readonly", "{script}"], "--fleece and --readonly exclude"),
        (["--disk", "vda", "{script}"], "--disk goes with --fleece"),
        (["--scratch-dir", ".", "{script}"], "--scratch-dir goes with --fleece"),
        ([], "Missing argument"),
    ],
)
def test_wrong_usage_is_refused(run: Run, script: Path, words: list[str], reason: str) -> None:
    done = run("plugin", *(word.format(script=script) for word in words))
    assert done.status == 2
    assert reason in done.complaint


def test_missing_script_is_named(run: Run) -> None:
    done = run("plugin", "nowhere.py", "--run", "true")
    assert (done.status, done.complaint) == (
        1,
        "nowhere.py: cannot open file: No such file or directory",
    )


def end(pid_file: Path) -> None:
    """End a server in the background."""
    os.kill(int(pid_file.read_text()), signal.SIGTERM)
    deadline = time.monotonic() + SECONDS_MAX
    while pid_file.exists():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def test_server_goes_to_the_background_and_writes_its_process_id(
    run: Run, script: Path, tmp_path: Path
) -> None:
    """Files that config names by a relative path are found after chdir, if it made them so."""
    script.write_text(
        GOOD
        + "import os\n"
        + f"def after_fork(): open_file = __builtins__['open']({str(tmp_path / 'seen')!r}, 'w')"
        + ".write(os.getcwd())\n"
    )
    done = run("plugin", "--fork", "--unix", "socket", "--pidfile", tmp_path / "pid", script)
    assert (done.status, done.errors) == (0, "")
    try:
        uri = f"nbd+unix:///?socket={tmp_path / 'socket'}"
        size = subprocess.run(["nbdinfo", "--size", uri], capture_output=True, text=True)
        assert size.stdout == "4096\n"
        assert (tmp_path / "seen").read_text() == "/"
    finally:
        end(tmp_path / "pid")


def test_files_of_fleece_are_where_it_was_started(run: Run, script: Path, tmp_path: Path) -> None:
    """Not below the root folder, where a server in the background is."""
    words = ["--fork", "--unix", "socket", "--pidfile", "pid", "--scratch-dir", "."]
    done = run("plugin", *words, "--fleece", "side", "--control", "control", script)
    assert (done.status, done.errors) == (0, "")
    try:
        shown = run("info", "--control", "control", "--json").json
        assert shown["disks"][0]["file"] == str(tmp_path / "side")
    finally:
        end(tmp_path / "pid")


def test_single_client_is_served_on_stdin_and_stdout(script: Path) -> None:
    nbd = pytest.importorskip("nbd", reason="needs python3-libnbd")
    client = nbd.NBD()
    client.connect_command([*PROGRAM, "plugin", "--single", str(script)])
    assert client.get_size() == 4096
    client.shutdown()


def test_sockets_of_systemd_are_taken_over(script: Path) -> None:
    words = ["nbdinfo", "--size", "--", "[", *PROGRAM, "plugin", str(script), "]"]
    done = subprocess.run(words, capture_output=True, text=True, timeout=SECONDS_MAX)
    assert (done.stdout, done.returncode) == ("4096\n", 0), done.stderr
