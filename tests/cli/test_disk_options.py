"""``--disk``, ``--discard`` and ``--detect-zeroes`` of serve, by what an image becomes."""

from __future__ import annotations

import itertools
import json
import subprocess
from pathlib import Path
from typing import Any

import pytest

from nbdfleece.block.guest_options import DetectZeroes, GuestPolicy
from nbdfleece.cli.disk_options import parse_disks, parse_policies
from nbdfleece.control.client import ControlClient
from nbdfleece.errors import UsageError

from .conftest import Start, make_image

MIB = 1 << 20


def test_last_word_about_a_disk_counts() -> None:
    words = ["on", "vdb=unmap", "vdc=on", "vdc=off"]
    assert parse_policies(["vda", "vdb", "vdc"], ["ignore", "vdb=unmap"], words) == {
        "vda": GuestPolicy(discard=False, detect_zeroes=DetectZeroes.ON),
        "vdb": GuestPolicy(discard=True, detect_zeroes=DetectZeroes.UNMAP),
        "vdc": GuestPolicy(discard=False, detect_zeroes=DetectZeroes.OFF),
    }
    assert parse_policies(["vda"], [], []) == {"vda": GuestPolicy()}


@pytest.mark.parametrize(
    ("discard", "detect_zeroes", "complaint"),
    [
        (["never"], [], "--discard is to be one of unmap, ignore, not 'never'"),
        ([], ["vda=zz"], "--detect-zeroes is to be one of off, on, unmap, not 'zz'"),
        ([], ["vdb=on"], "--detect-zeroes: there is no disk 'vdb'"),
        (["ignore"], ["unmap"], "disk 'vda': zeroes cannot be unmapped where discards are ignored"),
    ],
)
def test_what_cannot_be_meant_is_refused(
    discard: list[str], detect_zeroes: list[str], complaint: str
) -> None:
    with pytest.raises(UsageError) as caught:
        parse_policies(["vda"], discard, detect_zeroes)
    assert str(caught.value) == complaint


@pytest.mark.parametrize("words", [["vda"], ["=a"], ["vda="], ["vda=a", "vda=b"]])
def test_disk_that_is_no_name_and_file_is_refused(words: list[str]) -> None:
    with pytest.raises(UsageError, match="--disk"):
        parse_disks(words)


def zeroes_of(image: Path) -> list[dict[str, Any]]:
    """The map of the image's first MiB, which the guest has filled with data and zeroes."""
    command = ["qemu-img", "map", "--output=json", "--max-length=1M", image]
    rows: list[dict[str, Any]] = json.loads(subprocess.check_output(command))
    shown = [{key: row[key] for key in ("present", "zero", "data")} for row in rows]
    return [row for row, _ in itertools.groupby(shown)]


DATA = {"present": True, "zero": False, "data": True}
ZERO = {"present": True, "zero": True, "data": False}


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ([], [DATA, ZERO, DATA]),
        (["--discard", "ignore"], [DATA]),
        (["--detect-zeroes", "on"], [ZERO, DATA]),
        (["--detect-zeroes", "vda=unmap"], [ZERO, DATA]),
        (["--detect-zeroes", "on", "--discard", "vda=ignore"], [ZERO, DATA]),
    ],
)
def test_zeroes_and_discards_of_a_guest_are_as_the_operator_says(
    tmp_path: Path, start: Start, options: list[str], expected: list[dict[str, Any]]
) -> None:
    """The guest fills a MiB, writes zeroes as data at its beginning, and discards its middle."""
    image = make_image(tmp_path / "a.qcow2")
    server = start("--disk", f"vda={image}", "--listen", "unix:n", *options)
    commands = ["write -P 7 0 1M", "write -P 0 0 256k", "discard 256k 256k", "flush"]
    words = [word for command in commands for word in ("-c", command)]
    uri = server.ready.split()[-1]
    subprocess.run(
        ["qemu-io", "-f", "raw", "-d", "unmap", *words, uri], check=True, capture_output=True
    )
    server.end()
    assert zeroes_of(image) == expected


def test_settings_of_a_disk_are_taken_from_the_file_and_shown(tmp_path: Path, start: Start) -> None:
    make_image(tmp_path / "a.qcow2")
    lines = ["[disks.vda]", 'file = "a.qcow2"', 'detect-zeroes = "unmap"']
    (tmp_path / "server.toml").write_text("\n".join(lines))
    control = tmp_path / "control"
    start("--config", tmp_path / "server.toml", "--listen", "unix:n", "--control", control)
    with ControlClient(control) as client:
        (shown,) = client.execute("query-named-block-nodes", {})
    assert (shown["node-name"], shown["detect_zeroes"]) == ("vda", "unmap")
