"""``nbdfleece nbd``: the flags of qemu-nbd with the manners of nbdfleece."""

from __future__ import annotations

import os
import signal
import subprocess
from pathlib import Path

import pytest

from nbdfleece.cli.nbd_flags import FLAGS

from .conftest import PROGRAM, SIZE, Run, environment, make_image
from .look_alike import checked, need, uri, wait_gone, wait_until

pytestmark = need("qemu-img", "qemu-io", "nbdinfo")


@pytest.fixture
def image(tmp_path: Path) -> Path:
    return make_image(tmp_path / "disk.qcow2")


def serve(folder: Path, *words: str | Path) -> subprocess.Popen[str]:
    """A server in the foreground; its first line says that clients can come."""
    return subprocess.Popen(
        [*PROGRAM, "nbd", "--print-uri", *map(str, words)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=environment(folder),
        cwd=folder,
    )


def test_image_is_served_until_the_last_client_leaves(image: Path, tmp_path: Path) -> None:
    process = serve(tmp_path, "-k", "sock", "-f", "qcow2", "-x", "vda", "--pid-file=pid", image)
    assert process.stdout is not None
    where = process.stdout.readline().strip()
    assert where == "nbd+unix:///vda?socket=sock"
    assert (tmp_path / "pid").read_text() == f"{process.pid}\n"
    checked("qemu-io", "-f", "raw", "-c", "write -P 7 0 64k", uri(tmp_path / "sock", "vda"))
    output, errors = process.communicate(timeout=120)
    assert (process.returncode, output, errors) == (0, "", "")
    assert not (tmp_path / "pid").exists()
    assert not (tmp_path / "sock").exists()
    checked("qemu-io", "-r", "-c", "read -P 7 0 64k", image)


def test_server_in_the_background_serves_several_clients(
    image: Path, tmp_path: Path, run: Run
) -> None:
    flags = ["-t", "-e", "3", "-r", "-f", "qcow2", "-k", "sock", "--fork", "--pid-file", "pid"]
    done = run("nbd", *flags, image)
    assert (done.status, done.output, done.errors) == (0, "", "")
    where = uri(tmp_path / "sock")
    assert checked("nbdinfo", "--size", where) == f"{SIZE}\n"
    assert checked("nbdinfo", "--can", "multi-conn", where) == ""
    listed = run("nbd", "--list", "-k", tmp_path / "sock")
    assert (listed.status, listed.errors) == (0, "")
    assert "readonly" in listed.output
    pid = int((tmp_path / "pid").read_text())
    os.kill(pid, signal.SIGTERM)
    wait_gone(pid)
    assert not (tmp_path / "sock").exists()


def test_second_signal_is_not_needed_and_the_first_ends_in_good_order(
    image: Path, tmp_path: Path
) -> None:
    checked("qemu-img", "bitmap", "--add", image, "b0")
    process = serve(tmp_path, "-k", tmp_path / "sock", "-f", "qcow2", "-t", image)
    wait_until(tmp_path / "sock")
    checked("qemu-io", "-f", "raw", "-c", "write 0 64k", uri(tmp_path / "sock"))
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=120)
    assert (process.returncode, errors) == (0, "")
    assert '"in-use"' not in checked("qemu-img", "info", "--output=json", image)


@pytest.mark.parametrize(
    ("words", "status", "text"),
    [
        ("", 2, "one image is to be served"),
        ("--no-such-flag x", 2, "No such option"),
        ("--aio=zz x", 2, "--aio is to be one of"),
        ("-c /dev/nbd0 x", 2, "nbd-client"),
        ("-k s nosuch", 1, "No such file or directory"),
        ("-k s -f qcow2 -B zz disk.qcow2", 1, "Bitmap 'zz' is not found"),
        ("-k s -f raw --image-opts driver=raw,file.filename=x", 2, "mutually exclusive"),
        ("-k missing/s -f qcow2 disk.qcow2", 2, "cannot listen on"),
    ],
)
def test_error_is_one_line_with_a_status(
    image: Path, run: Run, words: str, status: int, text: str
) -> None:
    done = run("nbd", *words.split())
    assert done.status == status
    assert text in done.complaint


def test_backing_file_outside_the_folder_needs_leave(
    image: Path, tmp_path: Path, run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "sub"
    folder.mkdir()
    overlay = folder / "overlay.qcow2"
    checked("qemu-img", "create", "-q", "-f", "qcow2", "-b", image, "-F", "qcow2", overlay)
    flags = ["nbd", "-k", "sock", "--fork", "-f", "qcow2", overlay]
    assert "outside its folder" in run(*flags).complaint
    assert run(*flags, "--backing-files=any").status == 0
    checked("nbdinfo", uri(tmp_path / "sock"))
    monkeypatch.setenv("NBDFLEECE_BACKING_FILES", "refuse")
    assert "not to be opened" in run(*flags).complaint


def test_help_has_every_flag(run: Run) -> None:
    text = run("nbd", "--help").output
    for flag in FLAGS:
        if flag.name != "version":
            assert f"--{flag.name}" in text
