"""The configuration file: what it sets, and errors that name the line."""

from __future__ import annotations

import tomllib
from pathlib import Path
from typing import Any

import pytest

from nbdfleece.cli.config import line_of, load_config
from nbdfleece.errors import UsageError

from .conftest import Run, Start, make_image

WHOLE = """\
control = "none"
listen = ["tcp:127.0.0.1:0"]
socket-mode = "660"

[disks]
vda = "a.qcow2"

[disks.vdb]
file = "b.qcow2"
discard = "ignore"
detect-zeroes = "on"

[read-only]
t = "t.qcow2"

[read-only.u]
file = "u.qcow2"
bitmaps = ["b"]
since = ["k", "l"]

[scratch]
directory = "."
quota = "1M"
granularity = 8192
on-cbw-error = "break-guest-write"
cbw-timeout = 2.5

[limits]
handshake-seconds = 1.5

[exports."*/vda"]
connections-max = 4
rotational = true

[tls]
mode = "off"
authorize = [["vda", "CN=*"]]
"""


def written(folder: Path, text: str) -> Path:
    path = folder / "server.toml"
    path.write_text(text)
    return path


def test_whole_file_becomes_the_options_of_serve(tmp_path: Path) -> None:
    assert load_config(written(tmp_path, WHOLE)) == {
        "control": "none",
        "listen": ["tcp:127.0.0.1:0"],
        "socket_mode": "660",
        "disks": [f"vda={tmp_path}/a.qcow2", f"vdb={tmp_path}/b.qcow2"],
        "discard": ["vdb=ignore"],
        "detect_zeroes": ["vdb=on"],
        "images": [f"t={tmp_path}/t.qcow2", f"u={tmp_path}/u.qcow2"],
        "bitmaps": ["u=b"],
        "since": ["u=k", "u=l"],
        "scratch_dir": str(tmp_path),
        "scratch_quota": "1M",
        "scratch_granularity": "8192",
        "on_cbw_error": "break-guest-write",
        "cbw_timeout": 2.5,
        "limits": ["handshake-seconds=1.5"],
        "export_rules": ["*/vda:connections-max=4", "*/vda:rotational=on"],
        "tls": "off",
        "authorize": [("vda", "CN=*")],
    }


@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        ("listen = [", "Invalid value (at end of document)"),
        ("\n[scratch]\nquotas = 1\n", ":3: there is no 'quotas' here"),
        ("\n\nlistens = 1\n", ":3: there is no 'listens' here"),
        ("[scratch]\n\nquota = true\n", ":3: scratch.quota: Expected `int | str | null`"),
        ("[scratch]\ndirectory = 'x'\nquota = '1Q'\n", ":3: '1Q' is not a size"),
        ("listen = [\n'tcp:1:2:3']\n", ":1: 'tcp:1:2:3' is no address"),
        ("[limits]\nhandshake-second = 3\n", ":2: --limit: there is no 'handshake-second'"),
        ("[exports.'a.b']\nfast = true\n", ":2: --export: there is no 'fast'"),
        ("[tls]\nmode = 'maybe'\n", ":2: tls.mode: Invalid enum value 'maybe'"),
        ("[disks]\nvda = 3\n", ":1: disks: Expected `str | object`"),
        ("[disks.vda]\nfile = 'a'\ndiscard = 'x'\n", ":1: disks.discard: Invalid enum value 'x'"),
        ("[disks]\na = 'x'\n[read-only]\na = 'y'\n", ":4: 'a' is a name of --disk and of --read"),
        ("[read-only.a]\nfile = 'a'\nbitmap = 'x'\n", ":1: there is no 'bitmap' here"),
        (
            "[read-only.a]\nfile = 'a'\nbitmaps = ['x', 'x']\n",
            ":3: --bitmap names 'x' of 'a' twice",
        ),
        ("[read-only.a]\nfile = 'a'\nbitmaps = ['']\n", ":3: --bitmap is NAME=BITMAP, 'a=' is"),
        (
            "[read-only.a]\nfile = 'a'\nbitmaps = ['x']\nsince = ['x']\n",
            ":4: --bitmap and --since both name 'x' of 'a'",
        ),
        ("[disks.vda]\ndiscard = 'unmap'\n", ":1: disks: Object missing required field `file`"),
    ],
)
def test_error_names_the_line(tmp_path: Path, text: str, complaint: str) -> None:
    path = written(tmp_path, text)
    with pytest.raises(UsageError) as caught:
        load_config(path)
    assert str(caught.value).startswith(str(path))
    assert complaint in str(caught.value)


def test_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="none: No such file or directory"):
        load_config(tmp_path / "none")


@pytest.mark.parametrize(
    ("keys", "line"),
    [([], 1), (["a"], 1), (["t", "b"], 4), (["t", "none"], 3), (["t.u", "c"], 6), (["x"], 1)],
)
def test_line_of_a_key_or_of_what_is_around_it(keys: list[str], line: int) -> None:
    text = "a = 1\n\n[t]\nb = 2\n['t.u']\nc = 3\n"
    assert tomllib.loads(text)
    assert line_of(text, keys) == line


def test_documented_file_is_one(tmp_path: Path) -> None:
    page = Path(__file__).parents[2] / "docs/config.md"
    example = page.read_text().partition("```toml\n")[2].partition("```")[0]
    found: dict[str, Any] = load_config(written(tmp_path, example))
    assert found["disks"] == ["vda=/images/vda.qcow2", "vdb=/images/vdb.qcow2"]


def test_server_starts_from_a_file_and_options_have_the_last_word(
    tmp_path: Path, start: Start
) -> None:
    folder = tmp_path / "etc"
    folder.mkdir()
    make_image(folder / "a.qcow2")
    lines = ['listen = ["unix:file.sock"]', 'control = "none"', "[disks]", 'vda = "a.qcow2"']
    path = written(folder, "\n".join(lines))
    server = start("--config", path, "--listen", f"unix:{tmp_path}/option.sock")
    assert server.ready == f"nbdfleece: ready: nbd+unix:///vda?socket={tmp_path}/option.sock\n"


def test_wrong_file_is_a_usage_error(tmp_path: Path, run: Run) -> None:
    path = written(tmp_path, "[scratch]\nquotas = 1\n")
    outcome = run("serve", "--config", path)
    assert outcome.complaint == f"{path}:2: there is no 'quotas' here"
    assert outcome.status == 2
