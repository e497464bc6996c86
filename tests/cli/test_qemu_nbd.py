"""What stands in for qemu-nbd does what qemu-nbd does: compared side by side, by real clients."""

from __future__ import annotations

import json
import logging
import os
import re
import shutil
import signal
import socket
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from nbdfleece.cli.nbd_flags import FLAGS, help_lines
from nbdfleece.cli.qemu_nbd import main, parse
from nbdfleece.errors import UsageError
from tests.tree import debian_13

from .look_alike import (
    MIB,
    NBDSH,
    OURS,
    ROOT,
    Twin,
    call,
    checked,
    end_by,
    environment,
    need,
    ours,
    theirs,
    uri,
    wait_gone,
    wait_until,
    without_place,
)

__all__ = ["ours", "theirs"]

pytestmark = need("qemu-nbd", "qemu-img", "qemu-io", "nbdinfo", "nbdcopy")


@pytest.fixture
def images(tmp_path: Path) -> Path:
    """A folder of images: a chain with bitmaps and snapshots, and a raw disk."""
    folder = tmp_path / "images"
    folder.mkdir()

    def img(*words: str) -> None:
        checked("qemu-img", *words, cwd=folder)

    def io(image: str, *commands: str) -> None:
        checked("qemu-io", *[word for each in commands for word in ("-c", each)], image, cwd=folder)

    img("create", "-q", "-f", "qcow2", "base.qcow2", "6M")
    img("bitmap", "--add", "--disable", "base.qcow2", "old")
    img("bitmap", "--add", "base.qcow2", "below")
    io("base.qcow2", "write -P 1 0 1M", "write -P 2 5M 64k")
    img("create", "-q", "-f", "qcow2", "-b", "base.qcow2", "-F", "qcow2", "disk.qcow2", "8M")
    img("bitmap", "--add", "disk.qcow2", "b0")
    io("disk.qcow2", "write -P 3 512k 1M", "write -z 4M 1M", "write -P 4 7M 512k")
    img("snapshot", "-c", "first", "disk.qcow2")
    img("bitmap", "--add", "-g", "4k", "disk.qcow2", "b1")
    img("bitmap", "--add", "--disable", "disk.qcow2", "b2")
    io("disk.qcow2", "write -P 5 2M 64k", "discard 7M 256k")
    (folder / "disk.raw").write_bytes(os.urandom(3 * 65536) + bytes(MIB) + os.urandom(512))
    return folder


@pytest.fixture(scope="module")
def refusable(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of images that nobody writes."""
    folder = tmp_path_factory.mktemp("images")
    checked("qemu-img", "create", "-q", "-f", "qcow2", folder / "disk.qcow2", "1M")
    (folder / "disk.raw").write_bytes(bytes(65536))
    return folder


@pytest.fixture(autouse=True)
def restored_log() -> Iterator[None]:
    """The entry point sets up the log, which is the process's."""
    root = logging.getLogger()
    handlers, level = root.handlers[:], root.level
    yield
    root.handlers[:] = handlers
    root.setLevel(level)


JSON_RAW = '{"driver": "raw", "offset": 65536, "size": 131072, "file.filename": "%s/disk.raw"}'
JSON_NONE = '{"driver": "qcow2", "file.filename": "%s/disk.qcow2", "backing": null}'
JSON_CHAIN = (
    '{"driver": "qcow2", "file": {"driver": "file", "filename": "%s/disk.qcow2"}, "backing":'
    ' {"driver": "raw", "file": {"driver": "file", "filename": "%s/disk.raw"}}}'
)


@pytest.mark.parametrize(
    "words",
    [
        "-f qcow2 disk.qcow2",
        "-f qcow2 -r disk.qcow2",
        "-r disk.qcow2",
        "-f qcow2 -A -e 0 disk.qcow2",
        "-f qcow2 -r -A -e 5 -B b0 -B b1 --bitmap=b2 disk.qcow2",
        "-f qcow2 -A -B b0 -B b2 disk.qcow2",
        "-f qcow2 -r -D some_text -A -B b1 ./disk.qcow2",
        "-f qcow2 -s -A -B b0 disk.qcow2",
        "-f qcow2 -o 66048 base.qcow2 --allocation-depth",
        "-f qcow2 -l first -A disk.qcow2",
        "-f qcow2 -l 1 disk.qcow2",
        "-f qcow2 --load-snapshot snapshot.id=1,snapshot.name=first disk.qcow2",
        "-f qcow2 --load-snapshot=snapshot.name=first disk.qcow2",
        "-f raw disk.raw",
        "-f raw -r -e 2 file:disk.raw",
        "-f raw -o 65536 -r disk.raw",
        "-t --image-opts driver=qcow2,file.filename=disk.qcow2",
        "--image-opts driver=raw,offset=64k,size=128k,file.driver=file,file.filename=disk.raw",
        "--image-opts driver=qcow2,file.filename=disk.qcow2,backing.driver=raw,"
        "backing.file.filename=disk.raw -A",
        "json-none -A",
        "--image-opts driver=raw,offset=1M,file.driver=qcow2,file.file.filename=base.qcow2",
        "json-raw -r",
        "json-chain -A",
    ],
)
def test_clients_are_told_the_same(images: Path, ours: Twin, theirs: Twin, words: str) -> None:
    def place(word: str) -> str:
        named = {
            "json-raw": JSON_RAW % images,
            "json-chain": JSON_CHAIN % (images, images),
            "json-none": JSON_NONE % images,
        }
        if word in named:
            return f"json:{named[word]}"
        return re.sub(r"(^|=|:)((?:\./)?(?:disk|base)\.)", rf"\1{images}/\2", word)

    args = [place(word) for word in words.split()]
    assert without_place(ours.info(*args)) == without_place(theirs.info(*args))


def test_bitmap_of_an_image_behind_is_found(images: Path, ours: Twin, theirs: Twin) -> None:
    checked("qemu-img", "resize", "-q", "--shrink", "disk.qcow2", "6M", cwd=images)
    args = ["-f", "qcow2", "-r", "-B", "old", "-B", "below", images / "disk.qcow2"]
    assert without_place(ours.info(*args)) == without_place(theirs.info(*args))


def test_named_export_is_found_by_its_name(images: Path, ours: Twin, theirs: Twin) -> None:
    args = ["-f", "qcow2", "-x", "näme", "-D", "a text", images / "disk.qcow2"]
    found = [without_place(twin.info(*args, export="n%C3%A4me")) for twin in (ours, theirs)]
    assert found[0] == found[1]
    assert found[0][0]["exports"][0]["export-name"] == "näme"


def test_guessed_raw_disk_is_served_with_a_warning(images: Path, ours: Twin, theirs: Twin) -> None:
    args = ["-r", images / "disk.raw"]
    mine, other = without_place(ours.info(*args)), without_place(theirs.info(*args))
    del mine[0]["exports"][0]["block_size_minimum"], other[0]["exports"][0]["block_size_minimum"]
    assert mine == other
    done = call(
        *OURS, "-k", ours.socket, "-f", "raw", "-t", "--fork", images / "disk.raw", "-o", "x"
    )
    assert "--offset" in done.stderr
    with ours.serving(images / "disk.raw") as where:
        written = call("qemu-io", "-f", "raw", "-c", "write -P 1 0 512", where)
        assert written.returncode == 0
        script = "h.pwrite(b'QFI\\xfb' + bytes(508), 0)"
        done = call(*NBDSH, "-u", where, "-c", script)
        assert "Operation not permitted" in done.stderr


def test_list_shows_the_same(images: Path, ours: Twin, theirs: Twin) -> None:
    args = ["-f", "qcow2", "-r", "-e", "2", "-x", "foo", "-D", "text", "-A", "-B", "b0"]
    for twin in (ours, theirs):
        with twin.serving(*args, images / "disk.qcow2"):
            listed = [checked(*each, "-L", "-k", twin.socket) for each in (OURS, ["qemu-nbd"])]
        assert listed[0] == listed[1]
        assert " export: 'foo'" in listed[0]


def test_list_of_nobody_fails_alike(ours: Twin, theirs: Twin) -> None:
    failures = [twin.fails("-L", "-k", ours.socket).stderr for twin in (ours, theirs)]
    assert failures[0] == failures[1]


@pytest.mark.parametrize(
    "words",
    [
        "nosuch",
        "-f qcow2 disk.raw",
        "-f vmdk disk.raw",
        "--no-such-flag",
        "-e",
        "",
        "one two",
        "-B zz disk.qcow2",
        "-B old -o 512 disk.qcow2",
        "-e x disk.raw",
        "-e -1 disk.raw",
        "-o 1k disk.raw",
        "-f raw -o 100000000 disk.raw",
        "--cache=zz disk.raw",
        "--cache=none -n disk.raw",
        "--aio=zz disk.raw",
        "--discard=zz disk.raw",
        "--detect-zeroes=zz disk.raw",
        "--detect-zeroes=unmap disk.raw",
        "--tls-creds=x disk.raw",
        "--tls-authz=x disk.raw",
        "--tls-hostname=x disk.raw",
        "--object foo,id=a disk.raw",
        "--image-opts driver=qcow2",
        "--image-opts -f raw driver=raw,file.filename=disk.raw",
        "--image-opts driver=qcow2,file.filename=disk.qcow2,zz=1",
        "--image-opts driver=raw,size=1G,file.filename=disk.raw",
        "--image-opts driver=raw,offset=x,file.filename=disk.raw",
        "-l zz disk.qcow2",
        "-l snapshot.id=2 disk.qcow2",
        "-L disk.qcow2",
        "-L -B b0",
        "-L --fork",
        "--pid-file=/nonexistent/pid -f raw disk.raw",
    ],
)
def test_what_cannot_be_is_refused_alike(
    refusable: Path,
    theirs: Twin,
    words: str,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(refusable)
    assert main(["-k", str(theirs.socket), *words.split()]) == 1
    said = capfd.readouterr()
    done = theirs.fails("-k", theirs.socket, *words.split())
    for output, errors in ((said.out, said.err), (done.stdout, done.stderr)):
        assert output == ""
        assert errors.startswith("qemu-nbd: ")
    assert "Traceback" not in said.err


def test_socket_that_is_no_path_from_the_root_is_refused(ours: Twin) -> None:
    assert ours.fails("-k", "s", "x").stderr == "qemu-nbd: socket path must be absolute\n"


@pytest.mark.parametrize(
    "words", ["-c /dev/nbd0 disk.raw", "-d /dev/nbd0", "--connect=/dev/nbd9 x"]
)
def test_kernel_devices_are_refused_by_name(ours: Twin, words: str) -> None:
    assert "nbd-client" in ours.fails(*words.split()).stderr


@pytest.mark.parametrize(
    ("flag", "word"),
    [
        ("--cache=none", "O_DIRECT"),
        ("-n", "O_DIRECT"),
        ("--cache=unsafe", "--cache=unsafe"),
        ("--aio=io_uring", "--aio"),
        ("--trace=nbd_*", "--trace"),
    ],
)
def test_flag_without_a_meaning_is_said_to_be_ignored_once(
    images: Path, ours: Twin, flag: str, word: str
) -> None:
    args = [*OURS, "-k", ours.socket, "--fork", "-f", "raw", flag, images / "disk.raw"]
    done = call(*args)
    assert done.returncode == 0
    assert len(done.stderr.splitlines()) == 1
    assert done.stderr.startswith("qemu-nbd: warning: ")
    assert word in done.stderr
    checked("nbdinfo", uri(ours.socket))


# What is written.


def test_writes_are_recorded_in_bitmaps_as_by_qemu(images: Path, ours: Twin, theirs: Twin) -> None:
    other = shutil.copy(images / "disk.qcow2", images / "other.qcow2")
    commands = ["write -P 9 0 1", "write -P 9 3M 70000", "write -z 6M 64k", "discard 1M 512k"]
    flags = [word for command in commands for word in ("-c", command)]
    for twin, image in ((ours, images / "disk.qcow2"), (theirs, Path(other))):
        with twin.serving("-f", "qcow2", "--discard=unmap", image) as where:
            checked("qemu-io", "-f", "raw", "-d", "unmap", *flags, where)
        info = json.loads(checked("qemu-img", "info", "--output=json", image))
        assert [each["flags"] for each in info["format-specific"]["data"]["bitmaps"]] == [
            ["auto"],
            ["auto"],
            [],
        ]
        checked("qemu-img", "check", "-q", image)
    args = ["-f", "qcow2", "-r", "-A", "-B", "b0", "-B", "b1", "-B", "b2"]
    mine = without_place(theirs.info(*args, images / "disk.qcow2"))
    assert mine == without_place(theirs.info(*args, other))
    checked("qemu-img", "compare", images / "disk.qcow2", other)


def test_bitmaps_that_are_shown_change_with_writes(images: Path, ours: Twin, theirs: Twin) -> None:
    maps = []
    for twin in (ours, theirs):
        with twin.serving("-f", "qcow2", "-e", "2", "-B", "b1", images / "disk.qcow2") as where:
            checked("qemu-io", "-f", "raw", "-c", "write -P 1 3M 4k", where)
            maps.append(checked("nbdinfo", "--map=qemu:dirty-bitmap:b1", where))
    assert maps[0] == maps[1]


def test_bitmaps_survive_the_end_of_the_last_client_and_no_other(images: Path, ours: Twin) -> None:
    process = subprocess.Popen(
        [*OURS, "-k", str(ours.socket), "-f", "qcow2", str(images / "disk.qcow2")],
        env=environment(),
    )
    wait_until(ours.socket)
    checked("qemu-io", "-f", "raw", "-c", "write -P 1 3M 4k", uri(ours.socket))
    assert process.wait(120) == 0
    info = json.loads(checked("qemu-img", "info", "--output=json", images / "disk.qcow2"))
    assert info["format-specific"]["data"]["bitmaps"][0]["flags"] == ["auto"]


def test_inconsistent_bitmap_is_refused_by_name(images: Path, ours: Twin, theirs: Twin) -> None:
    image = images / "disk.qcow2"
    process = subprocess.Popen(
        [*OURS, "-k", str(ours.socket), "-f", "qcow2", str(image)], env=environment()
    )
    wait_until(ours.socket)
    checked("nbdinfo", "--list", uri(ours.socket))
    process.kill()
    process.wait()
    for twin in (theirs, ours):
        error = twin.fails("-k", twin.socket, "-f", "qcow2", "-B", "b0", image).stderr
        assert "Bitmap 'b0' is inconsistent and cannot be used" in error
    with ours.serving("-f", "qcow2", "-B", "b2", image) as where:
        assert "clean" in checked("nbdinfo", "--map=qemu:dirty-bitmap:b2", where)


def test_temporary_snapshot_leaves_the_image_as_it_is(images: Path, ours: Twin) -> None:
    before = (images / "disk.qcow2").read_bytes()
    with ours.serving("-f", "qcow2", "-s", images / "disk.qcow2") as where:
        checked("qemu-io", "-f", "raw", "-c", "write -P 7 0 3M", "-c", "read -P 7 0 3M", where)
        checked("qemu-io", "-f", "raw", "-c", "read -P 4 7424k 256k", where)
    assert (images / "disk.qcow2").read_bytes() == before


@pytest.mark.parametrize("discard", ["ignore", "unmap"])
@pytest.mark.parametrize("detect", ["off", "on", "unmap"])
def test_discards_and_zeroes_take_as_much_space_as_with_qemu(
    tmp_path: Path, ours: Twin, theirs: Twin, discard: str, detect: str
) -> None:
    if detect == "unmap" and discard == "ignore":
        pytest.skip("refused by both")
    maps = []
    for twin in (ours, theirs):
        image = twin.folder / "disk.qcow2"
        checked("qemu-img", "create", "-q", "-f", "qcow2", image, "4M")
        args = ["-f", "qcow2", f"--discard={discard}", f"--detect-zeroes={detect}", image]
        with twin.serving(*args) as where:
            commands = ["write -P 1 0 4M", "discard 1M 1M", "write -P 0 2M 1M", "write -z -u 3M 1M"]
            flags = [word for command in commands for word in ("-c", command)]
            checked("qemu-io", "-f", "raw", "-d", "unmap", *flags, where)
        found = json.loads(checked("qemu-img", "map", "--output=json", image))
        maps.append([(e["start"], e["length"], e["zero"], "offset" in e) for e in found])
    assert maps[0] == maps[1]


# Real clients.


def test_image_is_copied_both_ways(images: Path, ours: Twin, tmp_path: Path) -> None:
    copy, back = tmp_path / "copy.raw", tmp_path / "back.qcow2"
    checked("qemu-img", "create", "-q", "-f", "qcow2", back, "8M")
    with ours.serving("-f", "qcow2", "-r", "-e", "4", images / "disk.qcow2") as where:
        checked("nbdcopy", where, copy)
        checked("qemu-img", "compare", "-f", "qcow2", "-F", "raw", images / "disk.qcow2", where)
        checked("qemu-img", "convert", "-O", "raw", where, tmp_path / "converted.raw")
    with ours.serving("-f", "qcow2", "-e", "0", back) as where:
        checked("nbdcopy", copy, where)
        checked("qemu-img", "compare", "-f", "raw", "-F", "raw", copy, where)
        checked("qemu-img", "convert", "-n", "-f", "raw", "-O", "raw", copy, where)
    checked("qemu-img", "check", "-q", back)
    checked("qemu-img", "compare", images / "disk.qcow2", back)
    assert copy.read_bytes() == (tmp_path / "converted.raw").read_bytes()


def test_clients_that_start_the_server_themselves_are_served(images: Path) -> None:
    image = images / "disk.qcow2"
    info = checked("nbdinfo", "--size", "--", "[", *OURS, "-f", "qcow2", image, "]")
    assert info == f"{8 * MIB}\n"
    copied = subprocess.run(
        ["nbdcopy", "--", "[", *OURS, "-r", "-f", "qcow2", str(image), "]", "-"],
        stdout=subprocess.PIPE,
        timeout=120,
        check=True,
        env=environment(),
    )
    raw = images / "converted.raw"
    checked("qemu-img", "convert", "-O", "raw", image, raw)
    assert copied.stdout == raw.read_bytes()


@pytest.mark.parametrize("flag", ["-k/tmp/s", "-p10809", "-b127.0.0.1"])
def test_address_beside_an_activated_socket_is_refused(images: Path, flag: str) -> None:
    server = ["[", *OURS, flag, "-f", "qcow2", images / "disk.qcow2", "]"]
    done = call("nbdinfo", "--size", "--", *server)
    assert "can't be set when using socket activation" in done.stderr


def test_script_finds_the_stand_in_on_its_path(images: Path, tmp_path: Path) -> None:
    """As libnbd's and nbdkit's test scripts call it."""
    program = tmp_path / "bin" / "qemu-nbd"
    program.parent.mkdir()
    program.write_text(f"#!/bin/sh\nexec '{OURS[0]}' -c '{OURS[2]}' \"$@\"\n")
    program.chmod(0o755)
    script = """
        set -e
        qemu-nbd --version | grep -q qemu-nbd
        for flag in --bitmap= --tls-creds= --allocation-depth --pid-file=; do
            qemu-nbd --help | grep -sq -e "$flag"
        done
        qemu-nbd --fork -t -e 4 -f qcow2 -r -k "$PWD/sock" --pid-file="$PWD/pid" disk.qcow2
        nbdinfo --size "nbd+unix:///?socket=$PWD/sock"
        $NBDSH -u "nbd+unix:///?socket=$PWD/sock" -c 'print(h.pread(4, 7 << 20 | 1 << 18))'
        kill "$(cat pid)"
        while kill -0 "$(cat pid)" 2>/dev/null; do :; done
        test ! -e sock
    """
    env = {**environment(), "PATH": f"{program.parent}:{os.environ['PATH']}"}
    env["NBDSH"] = " ".join(NBDSH)
    try:
        done = subprocess.run(
            ["sh", "-c", script], cwd=images, env=env, capture_output=True, text=True, timeout=120
        )
    finally:
        end_by(images / "pid")
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout == f"{8 * MIB}\nbytearray(b'\\x04\\x04\\x04\\x04')\n"


# The process.


def test_server_without_t_leaves_after_the_last_client(images: Path, ours: Twin) -> None:
    args = [*OURS, "-k", str(ours.socket), "-f", "raw", str(images / "disk.raw")]
    process = subprocess.Popen(args, env=environment())
    wait_until(ours.socket)
    checked("nbdinfo", "--list", uri(ours.socket))  # does not count: it opens no export
    assert process.poll() is None
    checked("nbdinfo", "--size", uri(ours.socket))
    assert process.wait(120) == 0
    assert not ours.socket.exists()


def test_clients_above_the_limit_wait(images: Path, ours: Twin) -> None:
    with ours.serving("-f", "raw", "-r", images / "disk.raw") as where:
        first = subprocess.Popen(
            [*NBDSH, "-u", where, "-c", "print('in', flush=True); input()"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        assert first.stdout is not None
        assert first.stdout.readline() == "in\n"
        second = subprocess.Popen(["nbdinfo", "--size", where], stdout=subprocess.PIPE, text=True)
        with pytest.raises(subprocess.TimeoutExpired):
            second.wait(0.5)
        first.communicate("\n", timeout=120)
        assert second.communicate(timeout=120)[0] == f"{(images / 'disk.raw').stat().st_size}\n"


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP])
def test_signal_ends_the_server_with_status_zero(images: Path, ours: Twin, number: int) -> None:
    args = [*OURS, "-t", "-k", str(ours.socket), "-f", "qcow2", str(images / "disk.qcow2")]
    process = subprocess.Popen(args, env=environment())
    wait_until(ours.socket)
    checked("nbdinfo", "--size", uri(ours.socket))
    process.send_signal(number)
    assert process.wait(120) == 0
    assert not ours.socket.exists()


def test_forked_server_leaves_stderr_and_keeps_its_pid_file(images: Path, ours: Twin) -> None:
    pid_file = ours.folder / "pid"
    args = ["-k", ours.socket, "-f", "raw", "--fork", "--pid-file", pid_file, images / "disk.raw"]
    done = call(*OURS, *args)  # returns only once nobody holds stdout and stderr any more
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
    pid = int(pid_file.read_text())
    assert os.readlink(f"/proc/{pid}/cwd") == "/"
    assert os.getsid(pid) != os.getsid(0)
    assert pid_file.stat().st_mode & 0o777 == 0o600
    locked = call(*OURS, *args[:-1], "--read-only", images / "disk.qcow2", "-k", f"{ours.socket}2")
    assert locked.returncode == 1
    assert "lock" in locked.stderr
    checked("nbdinfo", uri(ours.socket))
    wait_gone(pid)
    assert int(pid_file.read_text()) == pid


def test_forked_server_that_cannot_start_says_why(ours: Twin, theirs: Twin) -> None:
    for twin in (ours, theirs):
        done = twin.fails("-k", twin.socket, "--fork", "/nonexistent/image")
        assert "No such file or directory" in done.stderr


def test_server_listens_on_tcp_addresses(images: Path, ours: Twin) -> None:
    for _ in range(5):  # what was free a moment ago may be taken
        with socket.create_server(("127.0.0.1", 0)) as probe:
            port = probe.getsockname()[1]
        args = ["-b", "127.0.0.1", "-p", str(port), "--fork", "-f", "raw", images / "disk.raw"]
        done = call(*OURS, *args)
        if "in use" not in done.stderr:
            break
    assert done.returncode == 0, done.stderr
    assert "exports available: 1" in checked(*OURS, "-L", "-b", "127.0.0.1", "-p", str(port))
    checked("nbdinfo", f"nbd://127.0.0.1:{port}")


def test_selinux_label_without_selinux_or_socket_is_refused(images: Path, ours: Twin) -> None:
    args = ["--selinux-label=system_u:object_r:svirt_t:s0", "-f", "raw", images / "disk.raw"]
    if not Path("/sys/fs/selinux/enforce").exists():
        assert "Cannot set SELinux" in ours.fails("-k", ours.socket, *args).stderr
    assert "not permitted without --socket" in ours.fails(*args).stderr


# The table.


def test_flags_are_read_as_getopt_reads_them() -> None:
    found = parse(["disk", "-te5", "--read", "-Bb0", "--bitmap", "b1", "--", "-x"])
    assert list(found.flags) == [
        ("persistent", ""),
        ("shared", "5"),
        ("read-only", ""),
        ("bitmap", "b0"),
        ("bitmap", "b1"),
    ]
    assert list(found.names) == ["disk", "-x"]
    for words in (["--d=x"], ["--fork=yes"], ["-Z"]):
        with pytest.raises(UsageError, match="--help"):
            parse(words)


def qemu_flags(help_text: str) -> set[str]:
    return set(re.findall(r"(?:^|\s)(--?[a-zA-Z][a-z-]*)", help_text)) - {"--"}


def documented() -> dict[str, str]:
    """The table of docs/qemu-nbd.md: flags, and what is said of them."""
    rows = {}
    for line in (ROOT / "docs" / "qemu-nbd.md").read_text().splitlines():
        if line.startswith("| `-"):
            _, flags, meaning, _ = line.split("|")
            rows.update(dict.fromkeys(re.findall(r"`(--?[a-zA-Z][a-z-]*)", flags), meaning.strip()))
    return rows


def our_flags() -> set[str]:
    long = {f"--{flag.name}" for flag in FLAGS}
    return long | {f"-{flag.short}" for flag in FLAGS if flag.short}


@pytest.mark.parametrize("debian", [12, 13])
def test_every_flag_of_qemu_is_known_and_documented(debian: int) -> None:
    command = ["qemu-nbd"] if debian == 12 else ["chroot", str(debian_13()), "qemu-nbd"]
    flags = qemu_flags(checked(*command, "--help"))
    assert len(flags) > 40
    assert flags <= our_flags()
    assert flags <= documented().keys()


def test_every_flag_that_we_have_is_documented_and_in_the_help() -> None:
    assert documented().keys() == our_flags()
    assert qemu_flags("\n".join(help_lines())) >= our_flags()


def test_help_and_version_go_to_stdout(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--help"]) == 0
    assert capsys.readouterr().out.startswith("Usage: qemu-nbd ")
    assert main(["-V"]) == 0
    assert capsys.readouterr().out.startswith("qemu-nbd (nbdfleece) ")
