"""``--read-only``, ``--bitmap`` and ``--since`` of serve: images that are only shown."""

from __future__ import annotations

import json
import os
import random
import re
import signal
import subprocess
import time
from pathlib import Path
from typing import Any

import nbd
import pytest

from nbdfleece.cli.read_only_options import parse_bitmaps, parse_images, parse_since
from nbdfleece.control.client import ControlClient
from nbdfleece.control.errors import QmpError
from nbdfleece.errors import UsageError
from tests.backup.conftest import tmp_path as in_memory
from tests.backup.programs import content_of, qemu_io, qemu_nbd
from tests.backup.programs import run as execute

from .conftest import SECONDS_MAX, SIZE, Run, Server, Start, make_image

tmp_path = in_memory
MIB = 1 << 20
GRANULE = 65536
LISTEN = ("--listen", "unix:n")
READ_CONTEXTS = ["base:allocation", "qemu:allocation-depth"]


@pytest.fixture(params=[0, 2], ids=["alone", "processes"])
def start(request: pytest.FixtureRequest, start: Start) -> Start:
    """Start servers, in the second round with processes that serve the images."""

    def call(*words: str | Path) -> Server:
        more = ("--processes", request.param) if "--read-only" in words else ()
        return start(*words, *more)

    return call


@pytest.fixture
def image(tmp_path: Path) -> Path:
    """A template with data over a backing file, and two bitmaps of QEMU's."""
    base = make_image(tmp_path / "base.qcow2")
    qemu_io(base, "write -q -P 1 0 3M")
    path = tmp_path / "template.qcow2"
    words = ("-b", base, "-F", "qcow2", path)
    execute("qemu-img", "create", "-q", "-f", "qcow2", *words)
    execute("qemu-img", "bitmap", "--add", path, "early")
    qemu_io(path, "write -q -P 2 1M 64k")
    execute("qemu-img", "bitmap", "--add", path, "late")
    qemu_io(path, "write -q -P 3 8M 128k", "write -q -z 2M 64k")
    return path


def uri(folder: Path, export: str) -> str:
    return f"nbd+unix:///{export}?socket={folder}/n"


def exports(folder: Path) -> dict[str, dict[str, Any]]:
    """What nbdinfo lists, by name."""
    listed = json.loads(execute("nbdinfo", "--list", "--json", uri(folder, "")))
    return {each["export-name"]: each for each in listed["exports"]}


def dirty(folder: Path, export: str, bitmap: str) -> list[tuple[int, int]]:
    context = f"--map=qemu:dirty-bitmap:{bitmap}"
    found = json.loads(execute("nbdinfo", context, "--json", uri(folder, export)))
    return [(each["offset"], each["length"]) for each in found if each["type"]]


def children(server: Server) -> list[int]:
    """The processes of a server beside its own."""
    pid = server.process.pid
    return [int(it) for it in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


def damage(image: Path, bitmap: str) -> None:
    """Let a bitmap be of an unknown type, in every directory that the file has had."""
    data = bytearray(image.read_bytes())
    for match in re.finditer(bitmap.encode() + b"\0", data):
        data[match.start() - 24 + 16] = 9
    image.write_bytes(data)


def test_foreign_clients_read_several_images_beside_a_disk(
    tmp_path: Path, image: Path, start: Start
) -> None:
    """Content and maps are those of qemu-nbd -r, and nobody can write."""
    disk, before = make_image(tmp_path / "disk.qcow2"), image.read_bytes()
    words = ("--read-only", f"t={image}", "--read-only", f"base={tmp_path}/base.qcow2")
    start("--disk", f"vda={disk}", *words, *LISTEN)
    found = exports(tmp_path)
    assert {name: each["is_read_only"] for name, each in found.items()} == {
        "vda": False,
        "t": True,
        "base": True,
    }
    assert found["t"]["contexts"] == READ_CONTEXTS
    assert found["t"]["can_multi_conn"]
    assert [found["t"][what] for what in ("can_trim", "can_zero")] == [False, False]
    contents = {"t": content_of(image), "base": content_of(tmp_path / "base.qcow2")}
    for name, content in contents.items():
        execute("nbdcopy", uri(tmp_path, name), tmp_path / "copied")
        assert (tmp_path / "copied").read_bytes() == content
        execute("qemu-img", "convert", "-O", "raw", uri(tmp_path, name), tmp_path / "converted")
        assert (tmp_path / "converted").read_bytes() == content
    with qemu_nbd(image, "-r", "-A") as theirs:
        for context in READ_CONTEXTS:
            maps = {
                execute("nbdinfo", f"--map={context}", it) for it in (theirs, uri(tmp_path, "t"))
            }
            assert len(maps) == 1
    write = subprocess.run(
        ["qemu-io", "-f", "raw", "-c", "write 0 512", uri(tmp_path, "t")],
        capture_output=True,
        text=True,
    )
    assert "Permission denied" in write.stderr
    assert image.read_bytes() == before


def test_named_bitmaps_are_shown_and_no_others(tmp_path: Path, image: Path, start: Start) -> None:
    """A recording bitmap, too: nothing is written to the image, so it holds still (rule 2)."""
    other = ("--read-only", f"u={image}", "--bitmap", "u=early", "--bitmap", "u=late")
    start("--read-only", f"t={image}", "--bitmap", "t=late", *other, *LISTEN)
    contexts = {name: each["contexts"][2:] for name, each in exports(tmp_path).items()}
    late, early = (f"qemu:dirty-bitmap:{name}" for name in ("late", "early"))
    assert contexts == {"t": [late], "u": [early, late]}
    assert dirty(tmp_path, "t", "late") == [(2 * MIB, GRANULE), (8 * MIB, 2 * GRANULE)]
    assert dirty(tmp_path, "u", "late") == dirty(tmp_path, "t", "late")
    assert dirty(tmp_path, "u", "early")[0] == (MIB, GRANULE)


def test_two_servers_and_qemu_read_one_image_and_no_writer_comes_in(
    tmp_path: Path, image: Path, start: Start, run: Run
) -> None:
    """Rule 7: the locks are QEMU's."""
    server = start("--read-only", f"t={image}", *LISTEN)
    other = start("--read-only", f"t={image}", "--listen", "unix:m", "--control", "none")
    with qemu_nbd(image, "-r") as theirs:
        for it in (theirs, uri(tmp_path, "t"), f"nbd+unix:///t?socket={tmp_path}/m"):
            assert "identical" in execute("qemu-img", "compare", "-F", "raw", image, it)
    writer = ("--disk", f"vda={image}", "--listen", "unix:w", "--control", "none")
    refused = run("serve", *writer)
    assert (refused.status, "in use by another program" in refused.complaint) == (1, True)
    server.end()
    assert other.end().status == 0
    assert start(*writer).end().status == 0


def test_processes_end_with_a_server_that_is_killed(
    tmp_path: Path, image: Path, start: Start
) -> None:
    """Rule 7: nothing of it holds the image any more."""
    server = start("--read-only", f"t={image}", *LISTEN)
    client = nbd.NBD()
    client.connect_uri(uri(tmp_path, "t"))
    found = children(server)
    assert server.end(signal.SIGKILL).status == -signal.SIGKILL
    deadline = time.monotonic() + SECONDS_MAX
    while any(Path(f"/proc/{pid}/exe").exists() for pid in found):
        assert time.monotonic() < deadline
        time.sleep(0.01)
    qemu_io(image, "write -q 0 512")


def test_image_that_is_being_written_is_refused(
    tmp_path: Path, image: Path, start: Start, run: Run
) -> None:
    second = ("--listen", "unix:m", "--control", "none")
    with qemu_nbd(image):
        refused = run("serve", "--read-only", f"t={image}", *second)
    told = f"{image}: being written by another program: stop it before serving the image"
    assert (refused.status, refused.complaint) == (1, told)


@pytest.mark.parametrize(
    ("shown", "locked"), [("other", "other"), ("template.qcow2", "base.qcow2")]
)
def test_image_that_is_a_disk_of_the_same_server_is_refused_by_that_name(
    tmp_path: Path, image: Path, run: Run, shown: str, locked: str
) -> None:
    """Rule 8: also by another file name, and as the backing file; no program is to be sought."""
    (tmp_path / "other").hardlink_to(tmp_path / "base.qcow2")
    disks = ("--disk", f"vda={make_image(tmp_path / 'a.qcow2')}", "--disk", "vdb=base.qcow2")
    both = run("serve", *disks, "--read-only", f"t={tmp_path}/{shown}", *LISTEN)
    told = (
        f"{tmp_path}/{locked}: being written by this server itself, as disk 'vdb': serve it as one"
        " of the two only, or export a snapshot of the disk"
    )
    assert (both.status, both.complaint) == (1, told)


def test_inconsistent_bitmap_is_refused_by_name(
    tmp_path: Path, image: Path, start: Start, run: Run
) -> None:
    """Rule 2: what cannot be proven complete is never exported as if it were good."""
    start("--disk", f"vda={image}", *LISTEN).end(signal.SIGKILL)
    refused = run("serve", "--read-only", f"t={image}", "--bitmap", "t=late", *LISTEN)
    told = f"{image}: Bitmap 'late' is inconsistent and cannot be used; remove it"
    assert (refused.status, refused.complaint) == (1, told)
    start("--read-only", f"t={image}", *LISTEN)
    assert exports(tmp_path)["t"]["contexts"] == READ_CONTEXTS


def test_damaged_or_missing_bitmap_is_refused_by_name(image: Path, run: Run) -> None:
    damage(image, "late")
    for bitmap, told in (
        ("late", "Bitmap 'late' is damaged: is of the unknown type 9"),
        ("none", "Bitmap 'none' is not found"),
    ):
        refused = run("serve", "--read-only", f"t={image}", "--bitmap", f"t={bitmap}", *LISTEN)
        assert (refused.status, refused.complaint) == (1, f"{image}: {told}")


def test_missing_and_raw_images_are_refused_as_for_disks(tmp_path: Path, run: Run) -> None:
    (tmp_path / "raw").write_bytes(random.Random(1).randbytes(MIB))
    for file, told in (("none", "No such file or directory"), ("raw", "not a qcow2 image")):
        for option in ("--disk", "--read-only"):
            refused = run("serve", option, f"t={file}", *LISTEN)
            assert (refused.status, refused.complaint) == (1, f"{file}: {told}")


@pytest.mark.parametrize(
    ("words", "complaint"),
    [
        (["--read-only", "t"], "--read-only is NAME=FILE, 't' is not"),
        (["--read-only", "t=a", "--read-only", "t=b"], "--read-only names 't' twice"),
        (
            ["--disk", "t=a", "--read-only", "t=b"],
            "'t' is a name of --disk and of --read-only: choose another",
        ),
        (["--read-only", "t=a", "--bitmap", "b"], "--bitmap is NAME=BITMAP, 'b' is not"),
        (
            ["--disk", "vda=a", "--bitmap", "vda=b"],
            "--bitmap: there is no image 'vda' of --read-only",
        ),
        (
            ["--read-only", "t=a", "--bitmap", "t=b", "--bitmap", "t=b"],
            "--bitmap names 'b' of 't' twice",
        ),
        (["--read-only", "t=a", "--since", "t="], "--since is NAME=CHECKPOINT, 't=' is not"),
        (
            ["--disk", "vda=a", "--since", "vda=k"],
            "--since: there is no image 'vda' of --read-only",
        ),
        (
            ["--read-only", "t=a", "--since", "t=k", "--since", "t=k"],
            "--since names 'k' of 't' twice",
        ),
        (
            ["--read-only", "t=a", "--since", "t=k", "--bitmap", "t=k"],
            "--bitmap and --since both name 'k' of 't': leave one",
        ),
        (
            ["--backup", "a", "--processes", "2"],
            "--processes are for --read-only images and the snapshots of --disk: there are none",
        ),
        (
            ["--read-only", "t=a", "--processes", "2", "--stdio"],
            "--stdio serves one client only: leave --processes out",
        ),
    ],
)
def test_what_cannot_be_meant_is_status_2(run: Run, words: list[str], complaint: str) -> None:
    refused = run("serve", *words)
    assert (refused.status, refused.complaint) == (2, complaint)


def test_names_of_bitmaps_and_checkpoints_may_have_the_sign() -> None:
    bitmaps = parse_bitmaps(["t=a=b", "t=c"], ["t", "u"])
    assert bitmaps == {"t": ["a=b", "c"], "u": []}
    assert parse_since(["u=a=b", "t=a"], bitmaps) == {"t": ["a"], "u": ["a=b"]}
    with pytest.raises(UsageError, match="'u'"):
        parse_images(["t=a", "u=b"], {"u": Path("c")})


# -- what has changed since a checkpoint ----------------------------------------------


@pytest.fixture
def guest(tmp_path: Path, start: Start, run: Run) -> Path:
    """The image of a guest that is shut down.

    After monday QEMU has written at 1M, after tuesday our server at 3M, after wednesday nobody.
    """
    path = make_image(tmp_path / "guest.qcow2")
    qemu_io(path, "write -q -P 1 0 64k")
    checkpoint(run, path, "monday")
    qemu_io(path, "write -q -P 2 1M 64k")
    checkpoint(run, path, "tuesday")
    server = start("--disk", f"vda={path}", *LISTEN)
    qemu_io(uri(tmp_path, "vda"), "write -q -P 3 3M 128k", image_format="raw")
    assert server.end().status == 0
    checkpoint(run, path, "wednesday")
    return path


MONDAY, TUESDAY = (MIB, GRANULE), (3 * MIB, 2 * GRANULE)


def checkpoint(run: Run, image: Path, name: str) -> None:
    made = run("checkpoint", "create", name, "--image", image)
    assert (made.status, made.errors) == (0, "")


def killed_writer(image: Path) -> None:
    """Open for writing by QEMU, which marks all bitmaps as in use, and killed."""
    words = ["qemu-io", "-f", "qcow2", image]
    with subprocess.Popen(words, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as writer:
        assert writer.stdin is not None
        assert writer.stdout is not None
        writer.stdin.write(b"write 0 64k\n")
        writer.stdin.flush()
        writer.stdout.readline()
        writer.kill()


def test_changes_since_a_checkpoint_are_those_of_all_its_successors(
    tmp_path: Path, guest: Path, start: Start
) -> None:
    """Rule 2: not of the checkpoint's own bitmap alone, as --bitmap shows it."""
    before = guest.read_bytes()
    since = [
        word for each in ("monday", "tuesday", "wednesday") for word in ("--since", f"t={each}")
    ]
    bitmap = ("--read-only", f"u={guest}", "--bitmap", "u=monday", "--since", "u=tuesday")
    start("--read-only", f"t={guest}", *since, *bitmap, *LISTEN)
    names = [f"qemu:dirty-bitmap:{each}" for each in ("monday", "tuesday", "wednesday")]
    assert exports(tmp_path)["t"]["contexts"] == [*READ_CONTEXTS, *names]
    assert dirty(tmp_path, "t", "monday") == [MONDAY, TUESDAY]
    assert dirty(tmp_path, "t", "tuesday") == dirty(tmp_path, "u", "tuesday") == [TUESDAY]
    assert dirty(tmp_path, "t", "wednesday") == []
    assert dirty(tmp_path, "u", "monday") == [MONDAY]
    assert guest.read_bytes() == before


def test_increment_is_pulled_from_an_image(
    tmp_path: Path, guest: Path, start: Start, run: Run
) -> None:
    """Of a guest that was shut down for both backups."""
    pull = ("pull", f"vda={uri(tmp_path, 'vda')}", "--to", "backup", "--json")
    server = start("--read-only", f"vda={guest}", *LISTEN)
    assert run(*pull, "--checkpoint", "wednesday").json["disks"][0]["parent"] is None
    server.end()
    qemu_io(guest, "write -q -P 4 5M 64k", "write -q -z 3M 64k")
    start("--read-only", f"vda={guest}", "--since", "vda=wednesday", *LISTEN)
    pulled = run(*pull, "--since", "wednesday", "--point", "next").json
    assert pulled["disks"][0]["parent"] == "wednesday"
    assert content_of(tmp_path / "backup/next.vda.qcow2") == content_of(guest)


def test_changes_are_known_after_our_server_was_killed(
    tmp_path: Path, guest: Path, start: Start
) -> None:
    """The log has kept the recording bitmap a superset; nothing is settled in the image."""
    server = start("--disk", f"vda={guest}", *LISTEN)
    qemu_io(uri(tmp_path, "vda"), "write -q -P 4 8M 64k", "flush", image_format="raw")
    server.end(signal.SIGKILL)
    before = guest.read_bytes()
    start("--read-only", f"t={guest}", "--since", "t=tuesday", *LISTEN)
    found = dirty(tmp_path, "t", "tuesday")
    for offset, length in (TUESDAY, (8 * MIB, GRANULE)):
        assert any(at <= offset and offset + length <= at + size for at, size in found)
    assert guest.read_bytes() == before


@pytest.mark.parametrize(
    ("how", "told"),
    [
        ("removed", "bitmap 'tuesday' is missing in the image"),
        ("in use", "bitmap 'monday' is inconsistent: the image was not closed properly"),
        ("disabled", "bitmap 'wednesday' was disabled and has missed changes"),
        ("damaged", "Bitmap 'monday' is damaged: is of the unknown type 9"),
    ],
)
def test_changes_that_are_not_known_are_refused_with_the_reason(
    tmp_path: Path, guest: Path, start: Start, run: Run, how: str, told: str
) -> None:
    """Rule 2: a chain that is broken is not shown as if it were good."""
    if how == "removed":
        execute("qemu-img", "bitmap", "--remove", guest, "tuesday")
    elif how == "in use":
        killed_writer(guest)
    elif how == "disabled":
        execute("qemu-img", "bitmap", "--disable", guest, "wednesday")
    else:
        damage(guest, "monday")
    if how != "damaged":
        told = f"the changes since checkpoint 'monday' are not known: {told}"
    refused = run("serve", "--read-only", f"t={guest}", "--since", "t=monday", *LISTEN)
    advice = "without --since the image can be read in full"
    assert (refused.status, refused.complaint) == (1, f"{guest}: {told}; {advice}")
    start("--read-only", f"t={guest}", *LISTEN)
    assert exports(tmp_path)["t"]["contexts"] == READ_CONTEXTS


def test_checkpoints_after_a_broken_one_are_good(tmp_path: Path, guest: Path, start: Start) -> None:
    execute("qemu-img", "bitmap", "--remove", guest, "monday")
    start("--read-only", f"t={guest}", "--since", "t=tuesday", *LISTEN)
    assert dirty(tmp_path, "t", "tuesday") == [TUESDAY]


def test_unknown_checkpoint_is_named(image: Path, run: Run) -> None:
    """A bitmap of that name makes none: nobody knows what it stands for."""
    refused = run("serve", "--read-only", f"t={image}", "--since", "t=late", *LISTEN)
    told = "there is no checkpoint 'late'; without --since the image can be read in full"
    assert (refused.status, refused.complaint) == (1, f"{image}: {told}")


# -- beside commands ------------------------------------------------------------------


@pytest.fixture
def control(tmp_path: Path) -> Path:
    return tmp_path / "c"


@pytest.fixture
def mixed(tmp_path: Path, image: Path, control: Path, start: Start) -> Server:
    """A server of a disk and a read-only image with a bitmap."""
    disk = make_image(tmp_path / "disk.qcow2")
    words = ("--disk", f"vda={disk}", "--read-only", f"t={image}", "--bitmap", "t=late")
    return start(*words, *LISTEN, "--control", control)


def test_image_is_a_node_and_an_export_and_no_disk(
    tmp_path: Path, image: Path, control: Path, mixed: Server, run: Run
) -> None:
    with ControlClient(control) as client:
        assert [disk["name"] for disk in client.execute("query-disks")] == ["vda"]
        nodes = {each["node-name"]: each for each in client.execute("query-named-block-nodes")}
        shown = nodes["t"]
        assert (shown["ro"], shown["drv"], shown["file"]) == (True, "qcow2", str(image))
        busy = {each["name"]: each["busy"] for each in shown["dirty-bitmaps"]}
        assert busy == {"early": False, "late": True}
        exported = {each["id"]: each["node-name"] for each in client.execute("query-block-exports")}
        assert exported == {"vda": "vda", "t": "t"}
        (found,) = (it for it in client.execute("query-nbd-exports") if it["name"] == "t")
    assert (found["read-only"], found["size"], found["uris"]) == (True, SIZE, [uri(tmp_path, "t")])
    assert "read-only" in run("info", "--control", control).output


@pytest.mark.parametrize(
    "words", [("snapshot", "create"), ("backup", "begin"), ("checkpoint", "create")]
)
def test_commands_on_disks_refuse_an_image(
    control: Path, mixed: Server, run: Run, words: tuple[str, ...]
) -> None:
    refused = run(*words, "new", "--disk", "t", "--control", control)
    assert (refused.status, refused.complaint) == (1, "there is no disk 't'")


@pytest.mark.parametrize(
    ("command", "arguments", "complaint"),
    [
        (
            "block-dirty-bitmap-add",
            {"name": "b", "persistent": True},
            "node 't' has no image for a persistent bitmap",
        ),
        ("block-dirty-bitmap-remove", {"name": "early"}, "node 't' is read-only"),
        ("block-dirty-bitmap-clear", {"name": "early"}, "node 't' is read-only"),
    ],
)
def test_bitmaps_of_an_image_do_not_change(
    image: Path,
    control: Path,
    mixed: Server,
    command: str,
    arguments: dict[str, Any],
    complaint: str,
) -> None:
    before = image.read_bytes()
    with ControlClient(control) as client, pytest.raises(QmpError) as caught:
        client.execute(command, {"node": "t", **arguments})
    assert str(caught.value) == complaint
    assert image.read_bytes() == before


def test_backup_of_all_disks_leaves_images_out(control: Path, mixed: Server, run: Run) -> None:
    begun = run("backup", "begin", "b", "--checkpoint", "c", "--control", control, "--json").json
    assert [part["disk"] for part in begun["disks"]] == ["vda"]


def test_nbd_server_stop_leaves_the_image_and_its_removal_frees_the_file(
    tmp_path: Path, image: Path, control: Path, mixed: Server
) -> None:
    """An image can be put in the place of another while the server runs."""
    more = {"type": "unix", "data": {"path": str(tmp_path / "more")}}
    with ControlClient(control) as client:
        client.execute("nbd-server-start", {"addr": more})
        client.execute("nbd-server-add", {"device": "t", "name": "again"})
        client.execute("nbd-server-stop")
        assert [each["name"] for each in client.execute("query-nbd-exports")] == ["vda", "t"]
        client.execute("block-export-del", {"id": "t"})
        client.execute("blockdev-del", {"node-name": "t"})
    qemu_io(image, "write -q -P 9 0 64k")


def test_config_file_names_images_and_what_is_shown_with_them(
    tmp_path: Path, image: Path, guest: Path, start: Start
) -> None:
    lines = ["processes = 3", "processes-nice = 19", "[read-only]", 'base = "base.qcow2"']
    lines += ["[read-only.t]", 'file = "template.qcow2"']
    lines += ['bitmaps = ["late"]', "[read-only.vda]", 'file = "guest.qcow2"']
    lines += ['since = ["monday"]']
    (tmp_path / "server.toml").write_text("\n".join(lines))
    server = start("--config", tmp_path / "server.toml", *LISTEN)
    assert [os.getpriority(os.PRIO_PROCESS, pid) for pid in children(server)] == 3 * [19]
    found = exports(tmp_path)
    assert {name: each["is_read_only"] for name, each in found.items()} == {
        "base": True,
        "t": True,
        "vda": True,
    }
    assert found["t"]["contexts"][2:] == ["qemu:dirty-bitmap:late"]
    assert dirty(tmp_path, "vda", "monday") == [MONDAY, TUESDAY]
