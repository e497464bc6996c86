"""Our plugin inside real nbdkits: what they serve is what is in the image, and stays there."""

from __future__ import annotations

import errno
import json
import os
import random
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import nbd
import pytest

import nbdfleece
from tests.backup.programs import nbdkit as in_background

from .real import Nbdkit, find_nbdkit

MIB = 1 << 20
KIB = 1 << 10
SIZE = 8 * MIB
NBDFLEECE = Path(sys.executable).with_name("nbdfleece")
HOLE, ZERO = nbd.STATE_HOLE, nbd.STATE_ZERO


def run(*argv: str | Path) -> str:
    done = subprocess.run([str(word) for word in argv], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, f"{argv}: {done.stdout}{done.stderr}"
    return done.stdout


def make_image(folder: Path, *options: str, size: int = SIZE) -> Path:
    """A disk with data in its first MiB, and ``bits`` recording from then on."""
    path = folder / "disk.qcow2"
    run("qemu-img", "create", "-q", "-f", "qcow2", *options, path, str(size))
    run("qemu-io", "-f", "qcow2", "-c", "write -P 1 0 1M", path)
    run("qemu-img", "bitmap", "--add", path, "bits")
    return path


def content_of(image: Path) -> bytes:
    raw = image.with_suffix(".raw")
    run("qemu-img", "convert", "-f", "qcow2", "-O", "raw", image, raw)
    return raw.read_bytes()


def bitmap_flags(image: Path, name: str = "bits") -> list[str]:
    described: dict[str, Any] = json.loads(run("qemu-img", "info", "--output=json", image))
    found = described["format-specific"]["data"]["bitmaps"]
    flags: list[str] = next(each["flags"] for each in found if each["name"] == name)
    return flags


@contextmanager
def connected(uri: str) -> Iterator[nbd.NBD]:
    client = nbd.NBD()
    client.add_meta_context(nbd.CONTEXT_BASE_ALLOCATION)
    client.connect_uri(uri)
    yield client
    client.shutdown()


def map_of(client: nbd.NBD) -> list[tuple[int, int]]:
    """(length, flags) of the whole disk, equal neighbours joined."""
    found: list[tuple[int, int]] = []
    position = 0

    def take(context: str, offset: int, entries: list[int], error: object) -> int:
        for length, flags in zip(entries[::2], entries[1::2], strict=True):
            if found and found[-1][1] == flags:
                found[-1] = (found[-1][0] + length, flags)
            else:
                found.append((length, flags))
        return 0

    while position < client.get_size():
        client.block_status(client.get_size() - position, position, take)
        position = sum(length for length, _ in found)
    return found


def change_at_random(client: nbd.NBD, model: bytearray, seed: int, count: int = 60) -> None:
    """Writes, zeroes and trims with all their flags, on the disk and on its model."""
    chance = random.Random(seed)
    for _ in range(count):
        offset = chance.randrange(len(model) - 1)
        length = min(chance.choice([1, 511, 4096, 65536, 200_000]), len(model) - offset)
        fua = chance.choice([0, nbd.CMD_FLAG_FUA])
        kind = chance.choice(["write", "write", "zero", "zero", "trim"])
        if kind == "write":
            model[offset : offset + length] = data = chance.randbytes(length)
            client.pwrite(data, offset, fua)
        elif kind == "zero" and client.can_zero():
            model[offset : offset + length] = bytes(length)
            client.zero(length, offset, fua | chance.choice([0, nbd.CMD_FLAG_NO_HOLE]))
        elif client.can_trim():
            client.trim(length, offset, fua)
            model[offset : offset + length] = client.pread(length, offset)


# --- the disk


def test_guest_writes_reach_the_image_and_its_bitmap(nbdkit: Nbdkit, tmp_path: Path) -> None:
    """Rules 2 and 7: QEMU reads what was written, and the bitmap has recorded it."""
    image = make_image(tmp_path)
    model = bytearray(content_of(image))
    before = bytes(model)
    with nbdkit.running("python", nbdkit.plugin, f"image={image}") as running:
        with connected(running.uri) as client:
            change_at_random(client, model, seed=1)
            client.flush()
            assert client.pread(SIZE, 0) == model
        assert "Traceback" not in running.stop()
    assert content_of(image) == model
    run("qemu-img", "check", image)
    assert bitmap_flags(image) == ["auto"], "closed cleanly"
    with (
        nbdkit.running("python", nbdkit.plugin, f"image={image}", "bitmap=bits") as running,
        connected(running.uri) as client,
    ):
        position = 0
        for length, flags in map_of(client):
            end = position + length
            if flags == HOLE | ZERO:
                assert before[position:end] == model[position:end], "a change was missed"
            position = end


def test_extents_are_those_that_qemu_sees(nbdkit: Nbdkit, tmp_path: Path) -> None:
    image = make_image(tmp_path)
    run("qemu-io", "-f", "qcow2", "-c", "write -z 3M 64k", "-c", "write -P 2 5M 192k", image)
    wanted = bytearray()
    for each in json.loads(run("qemu-img", "map", "--output=json", "-f", "qcow2", image)):
        wanted += bytes([each["zero"]]) * (each["length"] // KIB)
    with (
        nbdkit.running("-r", "python", nbdkit.plugin, f"image={image}") as running,
        connected(running.uri) as client,
    ):
        found = bytearray()
        for length, flags in map_of(client):
            found += bytes([flags & ZERO == ZERO]) * (length // KIB)
        assert found == wanted


def test_client_is_told_what_the_disk_can_do(nbdkit: Nbdkit, tmp_path: Path) -> None:
    image = make_image(tmp_path)
    with (
        nbdkit.running("python", nbdkit.plugin, f"image={image}") as running,
        connected(running.uri) as client,
    ):
        can = (client.can_trim, client.can_zero, client.can_fast_zero, client.can_fua)
        also = (client.can_flush, client.can_cache, client.can_multi_conn, client.can_df)
        assert all(each() for each in can + also)
        assert not client.is_read_only()
        assert not client.is_rotational()
        assert client.get_block_size(nbd.SIZE_MINIMUM) == 1
        assert client.get_block_size(nbd.SIZE_PREFERRED) >= 4096
        client.cache(MIB, 0)
        client.zero(MIB, 4 * MIB, nbd.CMD_FLAG_FAST_ZERO)


def test_read_only_server_lets_others_read_and_itself_not_write(
    nbdkit: Nbdkit, tmp_path: Path
) -> None:
    image = make_image(tmp_path)
    image.chmod(0o444)
    before = image.read_bytes()
    with (
        nbdkit.running("-r", "python", nbdkit.plugin, f"image={image}") as running,
        connected(running.uri) as client,
    ):
        assert client.is_read_only()
        assert client.can_multi_conn()
        run("qemu-img", "info", image)
        assert content_of(image) == client.pread(SIZE, 0)
        refused = subprocess.run(["qemu-io", "-c", "write 0 512", image], capture_output=True)
        assert b"lock" in refused.stderr
    assert image.read_bytes() == before


def test_image_that_is_written_is_locked_as_qemu_locks_it(nbdkit: Nbdkit, tmp_path: Path) -> None:
    """Rule 7: no two programs write one image."""
    image = make_image(tmp_path)
    words = ("python", nbdkit.plugin, f"image={image}")
    with nbdkit.running(*words) as running, connected(running.uri):
        refused = subprocess.run(["qemu-img", "info", image], capture_output=True, text=True)
        assert "lock" in refused.stderr
        assert "another program" in nbdkit.fail(*words)
        assert bitmap_flags_forced(image) == ["in-use", "auto"]
    with nbdkit.running(*words) as running, connected(running.uri) as client:
        client.pwrite(b"x", 0)  # the lock and the process ended together


def test_client_who_finds_the_image_in_use_is_refused_and_a_later_one_is_not(
    system_nbdkit: Nbdkit, tmp_path: Path
) -> None:
    """QEMU may read what we have not begun to write; then we may not write."""
    image = make_image(tmp_path)
    with subprocess.Popen(
        ["qemu-io", "-r", "-f", "qcow2", image], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    ) as reader:
        assert reader.stdin is not None
        assert reader.stdout is not None
        reader.stdin.write(b"length\n")
        reader.stdin.flush()
        assert reader.stdout.readline()
        with system_nbdkit.running("python", system_nbdkit.plugin, f"image={image}") as running:
            with pytest.raises(nbd.Error), connected(running.uri):
                pass
            [said] = [each for each in running.log.read_text().splitlines() if "open: err" in each]
            assert f"{image}: " in said
            assert "another program" in said
            reader.communicate(b"quit\n")
            with connected(running.uri) as client:
                client.pwrite(b"x", 0)


def bitmap_flags_forced(image: Path) -> list[str]:
    described = json.loads(run("qemu-img", "info", "-U", "--output=json", image))
    flags: list[str] = described["format-specific"]["data"]["bitmaps"][0]["flags"]
    return flags


def test_kill_leaves_the_image_sound_and_the_bitmap_inconsistent(
    system_nbdkit: Nbdkit, tmp_path: Path
) -> None:
    """Rules 2 and 4: what was flushed stays, and an incomplete bitmap does not look complete."""
    image = make_image(tmp_path)
    with system_nbdkit.running("python", system_nbdkit.plugin, f"image={image}") as running:
        with connected(running.uri) as client:
            client.pwrite(b"kept" * KIB, 2 * MIB, nbd.CMD_FLAG_FUA)
        running.stop(signal.SIGKILL)
    assert content_of(image)[2 * MIB :].startswith(b"kept" * KIB)
    checked = subprocess.run(["qemu-img", "check", image], capture_output=True)
    assert checked.returncode in (0, 3), "at most leaked clusters"
    assert bitmap_flags(image) == ["in-use", "auto"]
    assert "inconsistent" in system_nbdkit.fail(
        "python", system_nbdkit.plugin, f"image={image}", "bitmap=bits"
    )


def test_many_clients_at_a_time_see_one_disk(system_nbdkit: Nbdkit, tmp_path: Path) -> None:
    """CAN_MULTI_CONN: what one has written the others read, and any flush covers it."""
    image = make_image(tmp_path)
    with system_nbdkit.running("python", system_nbdkit.plugin, f"image={image}") as running:

        def write_part(number: int) -> None:
            with connected(running.uri) as client:
                for block in range(number, 128, 8):
                    client.pwrite(bytes([number + 1]) * 65536, block * 65536)

        with ThreadPoolExecutor(8) as threads:
            list(threads.map(write_part, range(8)))
        with connected(running.uri) as client:
            client.flush()
            read = client.pread(SIZE, 0)
        assert read == b"".join(bytes([block % 8 + 1]) * 65536 for block in range(128))
        running.stop()
    assert content_of(image) == read


def test_relative_name_is_found_from_the_background(
    system_nbdkit: Nbdkit, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """nbdkit forks and goes to the folder ``/``; no thread of ours, which only a cold image
    needs while it is opened, may have begun before that."""
    image = make_image(tmp_path)
    with image.open("rb+") as file:
        os.fsync(file)
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
    monkeypatch.chdir(tmp_path)
    with in_background(tmp_path, "python", str(system_nbdkit.plugin), "image=disk.qcow2") as uri:
        run("qemu-io", "-f", "raw", "-c", "write -P 9 4M 64k", uri)
    assert content_of(image)[4 * MIB :].startswith(b"\x09" * 65536)
    assert bitmap_flags(image) == ["auto"]


# --- under filters

FILTERS = {
    "log delay blocksize readahead": ["logfile=LOG", "wdelay=1ms", "minblock=512", "maxlen=64k"],
    "cache stats multi-conn": ["statsfile=LOG"],
    "fua noparallel noextents rate": ["fuamode=emulate", "rate=800M"],
    "cow": [],
}


@pytest.mark.parametrize("names", FILTERS)
def test_disk_is_the_same_under_filters(names: str, system_nbdkit: Nbdkit, tmp_path: Path) -> None:
    image = make_image(tmp_path)
    before = content_of(image)
    model = bytearray(before)
    filters = [f"--filter={name}" for name in names.split()]
    options = [option.replace("LOG", str(tmp_path / "log")) for option in FILTERS[names]]
    words = (*filters, "python", system_nbdkit.plugin, f"image={image}", *options)
    with system_nbdkit.running(*words) as running:
        with connected(running.uri) as client:
            change_at_random(client, model, seed=2, count=25)
            client.flush()
            assert client.pread(SIZE, 0) == model
        running.stop()
    assert content_of(image) == (before if names == "cow" else model)
    run("qemu-img", "check", image)


def test_copy_on_write_filter_shares_the_image(nbdkit: Nbdkit, tmp_path: Path) -> None:
    """It only reads: two of them, and QEMU too, may have the image."""
    image = make_image(tmp_path)
    words = ("--filter=cow", "python", nbdkit.plugin, f"image={image}")
    with (
        nbdkit.running(*words) as one,
        nbdkit.running(*words) as two,
        connected(one.uri) as first,
        connected(two.uri) as second,
    ):
        first.pwrite(b"one", 0)
        second.pwrite(b"two", 0)
        assert (first.pread(3, 0), second.pread(3, 0)) == (b"one", b"two")
        assert content_of(image)[:3] == b"\1\1\1"


def test_error_filter_fails_before_our_disk_does(system_nbdkit: Nbdkit, tmp_path: Path) -> None:
    image = make_image(tmp_path)
    words = (
        "--filter=error",
        "python",
        system_nbdkit.plugin,
        f"image={image}",
        "error-pread=ENOSPC",
    )
    with (
        system_nbdkit.running(*words, "error-pread-rate=100%") as running,
        connected(running.uri) as client,
    ):
        with pytest.raises(nbd.Error) as caught:
            client.pread(512, 0)
        assert caught.value.errnum == errno.ENOSPC
        client.pwrite(b"x", 0)


def test_partition_filter_shows_a_partition(system_nbdkit: Nbdkit, tmp_path: Path) -> None:
    image = make_image(tmp_path)
    table = bytearray(512)
    table[446:462] = (
        bytes([0, 0, 0, 0, 0x83, 0, 0, 0])
        + (2048).to_bytes(4, "little")
        + (4096).to_bytes(4, "little")
    )
    table[510:512] = b"\x55\xaa"
    (tmp_path / "table").write_bytes(table)
    run("qemu-io", "-f", "qcow2", "-c", f"write -s {tmp_path / 'table'} 0 512", image)
    words = ("--filter=partition", "python", system_nbdkit.plugin, f"image={image}", "partition=1")
    with system_nbdkit.running(*words) as running:
        with connected(running.uri) as client:
            assert client.get_size() == 4096 * 512
            client.pwrite(b"inside", 0)
        running.stop()
    assert content_of(image)[MIB : MIB + 6] == b"inside"


# --- what changed


def copy_changes(nbdkit: Nbdkit, folder: Path, full: Path, *words: str) -> Path:
    """The changes into an overlay over a full copy, by nbdcopy.

    It skips only requests that are holes as a whole, so these are no larger than a granule.
    """
    overlay = folder / "incremental.qcow2"
    run("qemu-img", "create", "-q", "-f", "qcow2", "-b", full, "-F", "qcow2", overlay)
    target = f"[ qemu-nbd -f qcow2 {overlay} ]"
    with nbdkit.running("-r", "python", nbdkit.plugin, *words) as running:
        options = "--destination-is-zero --sparse=0 --request-size=65536"
        run("sh", "-c", f"nbdcopy {options} -- '{running.uri}' {target}")
    return overlay


def change_for_increment(image: Path) -> None:
    """Data over data, data over nothing, and zeroes over data: the last is what gets lost."""
    commands = ["write -P 5 64k 64k", "write -P 6 6M 64k", "write -z 512k 128k"]
    words = [word for command in commands for word in ("-c", command)]
    run("qemu-io", "-f", "qcow2", *words, image)


def test_increment_of_a_bitmap_is_complete(nbdkit: Nbdkit, tmp_path: Path) -> None:
    """Rule 2: a full copy and the marked ranges together are the disk, zeroed ranges too."""
    image = make_image(tmp_path)
    full = tmp_path / "full.qcow2"
    run("qemu-img", "convert", "-O", "qcow2", image, full)
    change_for_increment(image)
    overlay = copy_changes(nbdkit, tmp_path, full, f"image={image}", "bitmap=bits")
    assert content_of(overlay) == content_of(image)
    mapped = json.loads(run("qemu-img", "map", "--output=json", overlay))
    copied = sum(each["length"] for each in mapped if each["depth"] == 0)
    assert copied == 4 * 65536, "what changed, and nothing more"


def test_increment_since_a_checkpoint_is_complete(system_nbdkit: Nbdkit, tmp_path: Path) -> None:
    """The union of the chain's bitmaps from the checkpoint on; recorded by the plugin itself."""
    image = make_image(tmp_path)
    full = tmp_path / "full.qcow2"
    run("qemu-img", "convert", "-O", "qcow2", image, full)
    for number, checkpoint in enumerate(["monday", "tuesday"]):
        run(NBDFLEECE, "checkpoint", "create", checkpoint, "--image", image)
        with system_nbdkit.running("python", system_nbdkit.plugin, f"image={image}") as running:
            with connected(running.uri) as client:
                client.pwrite(bytes([number + 2]) * 65536, number * 5 * MIB)
                client.zero(65536, (number + 8) * 65536)
            running.stop()
    overlay = copy_changes(system_nbdkit, tmp_path, full, f"image={image}", "checkpoint=monday")
    assert content_of(overlay) == content_of(image)


def test_view_of_changes_reads_as_it_is_described(nbdkit: Nbdkit, tmp_path: Path) -> None:
    """Unmarked ranges are holes and read as zeroes; marked ones are data even if zero."""
    image = make_image(tmp_path)
    change_for_increment(image)
    disk = content_of(image)
    with (
        nbdkit.running("python", nbdkit.plugin, f"image={image}", "bitmap=bits") as running,
        connected(running.uri) as client,
    ):
        assert client.is_read_only(), "also without -r"
        shown = client.pread(SIZE, 0)
        changed = [(64 * KIB, 128 * KIB), (512 * KIB, 640 * KIB), (6 * MIB, 6 * MIB + 64 * KIB)]
        wanted, extents, position = bytearray(SIZE), [], 0
        for begin, end in changed:
            wanted[begin:end] = disk[begin:end]
            extents += [(begin - position, HOLE | ZERO), (end - begin, 0)]
            position = end
        assert shown == wanted
        assert map_of(client) == [*extents, (SIZE - position, HOLE | ZERO)]


def test_internal_snapshot_is_shown(system_nbdkit: Nbdkit, tmp_path: Path) -> None:
    image = make_image(tmp_path)
    before = content_of(image)
    run("qemu-img", "snapshot", "-c", "first", image)
    run("qemu-io", "-f", "qcow2", "-c", "write -P 8 0 64k", image)
    with (
        system_nbdkit.running(
            "python", system_nbdkit.plugin, f"image={image}", "snapshot=first"
        ) as running,
        connected(running.uri) as client,
    ):
        assert client.is_read_only()
        assert client.pread(SIZE, 0) == before


# --- errors

WRONG = [
    (["imgae=x"], "unknown parameter 'imgae': there are image, format"),
    (["image=PLACE/disk.qcow2", "checkpoint=none"], "there is no checkpoint 'none'"),
    (["image=PLACE/missing"], "No such file or directory: 'PLACE/missing'"),
]


@pytest.mark.parametrize(("words", "wanted"), WRONG, ids=["config", "checkpoint", "file"])
def test_wrong_parameters_end_nbdkit_with_one_line(
    words: list[str], wanted: str, system_nbdkit: Nbdkit, tmp_path: Path
) -> None:
    """Rule 8; never a traceback for something that a user did."""
    make_image(tmp_path)
    given = [word.replace("PLACE", str(tmp_path)) for word in words]
    said = system_nbdkit.fail("python", system_nbdkit.plugin, *given)
    assert wanted.replace("PLACE", str(tmp_path)) in said
    assert len(said.strip().splitlines()) == 1, said


def test_damaged_cluster_is_an_error_of_its_read_only(
    system_nbdkit: Nbdkit, tmp_path: Path
) -> None:
    plain = make_image(tmp_path)
    image = tmp_path / "compressed.qcow2"
    run("qemu-img", "convert", "-c", "-O", "qcow2", plain, image)
    data = bytearray(image.read_bytes())
    metadata = 5 * 65536  # header, refcounts and tables; the deflated clusters follow
    data[metadata:] = b"\xff" * (len(data) - metadata)
    image.write_bytes(data)
    with (
        system_nbdkit.running("-r", "python", system_nbdkit.plugin, f"image={image}") as running,
        connected(running.uri) as client,
    ):
        with pytest.raises(nbd.Error) as caught:
            client.pread(MIB, 0)
        assert caught.value.errnum == errno.EIO
        assert client.pread(512, 4 * MIB) == bytes(512)
        said = [line for line in running.log.read_text().splitlines() if "compressed" in line]
        assert len(said) == 1
        assert "Traceback" not in running.log.read_text()


def test_image_that_needs_zstd_is_refused_by_name_where_it_is_missing(tmp_path: Path) -> None:
    """Debian 13 has no package of backports.zstd."""
    nbdkit = find_nbdkit("tree", tmp_path)
    image = make_image(tmp_path, "-o", "compression_type=zstd")
    said = nbdkit.fail("python", nbdkit.plugin, f"image={image}")
    assert "is compressed with zstd: install the Python package backports.zstd" in said


def test_plugin_without_its_packages_says_what_is_missing(
    system_nbdkit: Nbdkit, tmp_path: Path
) -> None:
    """A copy of the package that numpy is not beside."""
    shutil.copytree(system_nbdkit.plugin.parents[1], tmp_path / "alone" / "nbdfleece")
    script = tmp_path / "alone" / "nbdfleece" / "nbdkit" / "nbdfleece_plugin.py"
    (tmp_path / "alone" / "numpy.py").write_text("raise ImportError('no numpy here')")
    said = system_nbdkit.fail("python", script, "image=x")
    assert "cannot be imported by nbdkit's Python 3." in said
    assert "no numpy here; install it for python3." in said
    assert len(said.strip().splitlines()) == 1, said


def test_dump_plugin_tells_our_version(nbdkit: Nbdkit) -> None:
    assert f"nbdfleece_version={nbdfleece.__version__}\n" in nbdkit.dump(nbdkit.plugin)
