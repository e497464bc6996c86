"""Snapshots, checkpoints and backups of a disk that only a script knows."""

from __future__ import annotations

import asyncio
import errno
import os
import random
import shutil
import signal
import subprocess
from collections.abc import Awaitable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from nbdfleece.nbdkit.fleece import ScriptDisk
from tests.listening import is_listening
from tests.waiting import until

from .conftest import OURS, PROGRAM, SCRIPTS, SECONDS_MAX, Running, wait_for
from .in_process import Inside, value_of
from .observe import nbd

SIZE = 8 << 20
BLOCK = 65536
CLOSE = """

def close(h):
    __import__("pathlib").Path({folder!r}, "closed").touch()
"""


class Site:
    """A folder with a script's disk, its side file, and a backup directory."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.disk = folder / "disk"
        self.disk.write_bytes(random.Random(1).randbytes(SIZE))
        self.control = folder / "control"

    @contextmanager
    def serve(self, *flags: str) -> Iterator[Running]:
        self.control.unlink(missing_ok=True)
        words = [f"--fleece={self.folder / 'side.qcow2'}", f"--control={self.control}", *flags]
        script = str(SCRIPTS / "diskfile.py")
        with OURS.serve(
            self.folder, "--disk=vda", "--scratch-dir=.", *words, script, f"file={self.disk}"
        ) as running:
            wait_for(lambda: is_listening(self.control))
            self.client = nbd.NBD()
            self.client.connect_uri(f"nbd+unix:///vda?socket={running.socket}")
            yield running

    def write(self, block: int, byte: int) -> None:
        self.client.pwrite(bytes([byte]) * BLOCK, block * BLOCK)

    def run(self, *words: str) -> str:
        done = subprocess.run(
            [PROGRAM, *words],
            capture_output=True,
            text=True,
            timeout=SECONDS_MAX,
            env={**os.environ, "NBDFLEECE_CONTROL": str(self.control)},
        )
        assert done.returncode == 0, done.stderr
        return done.stdout

    def pull(self, point: str, *flags: str) -> str:
        return self.run("pull", "--to", str(self.folder / "backup"), "--point", point, *flags)

    def restored(self, point: str) -> bytes:
        """The content of a restore point, as qemu-img sees it."""
        images = sorted((self.folder / "backup").rglob(f"*{point}*.qcow2"))
        assert images, [str(path) for path in (self.folder / "backup").rglob("*")]
        raw = self.folder / "raw"
        subprocess.run(["qemu-img", "convert", "-O", "raw", images[0], raw], check=True)
        return raw.read_bytes()


@pytest.fixture
def site(tmp_path: Path) -> Site:
    if shutil.which("qemu-img") is None:
        pytest.skip("needs qemu-img")
    return Site(tmp_path)


def test_disk_of_a_script_is_pulled_in_full_then_incrementally(site: Site) -> None:
    with site.serve() as running:
        site.write(3, 1)
        site.pull("monday")
        monday = site.disk.read_bytes()
        site.write(5, 2)
        site.write(100, 3)
        report = site.pull("tuesday")
        tuesday = site.disk.read_bytes()
        site.write(6, 4)
        assert running.stop() == 0, running.errors
    assert site.restored("monday") == monday
    assert site.restored("tuesday") == tuesday
    assert f"read {2 * BLOCK} bytes" in report


def test_snapshot_of_a_script_holds_still(site: Site) -> None:
    """Rule 1: every byte is the disk's at the instant, whatever is written afterwards."""
    with site.serve() as running:
        before = site.disk.read_bytes()
        site.run("snapshot", "create", "frozen")
        site.run("export", "add", "frozen", "vda", "--name", "view")
        for block in range(0, SIZE // BLOCK, 3):
            site.write(block, 9)
        view: Any = nbd.NBD()
        view.connect_uri(f"nbd+unix:///view?socket={running.socket}")
        assert bytes(view.pread(SIZE, 0)) == before
        assert site.disk.read_bytes() != before


def test_checkpoints_of_a_script_survive_a_kill(site: Site) -> None:
    """Rule 2: what was written before and after SIGKILL is in the next increment."""
    with site.serve() as running:
        site.pull("monday")
        site.write(7, 5)
        running.process.send_signal(signal.SIGKILL)
        running.process.wait(SECONDS_MAX)
    with site.serve():
        site.write(8, 6)
        site.pull("tuesday", "--since", "monday")
    assert site.restored("tuesday") == site.disk.read_bytes()


def test_side_file_of_another_disk_is_refused(site: Site) -> None:
    with site.serve() as running:
        running.stop()
    site.disk.write_bytes(bytes(SIZE * 2))
    words = [f"--fleece={site.folder / 'side.qcow2'}", "--control=none", "--run=true"]
    script = site.folder / "closing.py"
    script.write_text((SCRIPTS / "diskfile.py").read_text() + CLOSE.format(folder=str(site.folder)))
    done = subprocess.run(
        [PROGRAM, "plugin", *words, str(script), f"file={site.disk}"],
        capture_output=True,
        text=True,
        timeout=SECONDS_MAX,
    )
    assert done.returncode == 2, done.stderr
    assert f"has bitmaps of a disk of {SIZE} bytes; disk 'disk' has {SIZE * 2}" in done.stderr
    assert (site.folder / "closed").exists(), "what was opened was not closed"


HELD_WRITE = """
def pwrite(h, buf, offset, flags):
    begun.set()
    go.wait()
"""


async def test_cancelled_write_lasts_until_the_script_has_done_it(inside: Inside) -> None:
    """Or else a snapshot could begin before the write reaches the disk (rules 1 and 2)."""
    plugin = inside.load(HELD_WRITE)
    async with asyncio.timeout(SECONDS_MAX), ScriptDisk(plugin) as disk:
        node = await disk.open()
        writing = asyncio.create_task(node.write(0, memoryview(b"x" * 512)))
        await until(value_of(plugin, "begun").is_set)
        for _ in range(3):
            writing.cancel()
            await asyncio.sleep(0)
        assert not writing.done()
        value_of(plugin, "go").set()
        with pytest.raises(asyncio.CancelledError):
            await writing
        await node.close()


async def test_write_that_hangs_fails_when_the_server_gives_it_up(inside: Inside) -> None:
    plugin = inside.load(HELD_WRITE)
    async with asyncio.timeout(SECONDS_MAX), ScriptDisk(plugin, closing_seconds=0.05) as disk:
        node = await disk.open()
        writes = [
            asyncio.create_task(node.write(offset, memoryview(b"x" * 512))) for offset in (0, 512)
        ]
        await until(value_of(plugin, "begun").is_set)
        writes[0].cancel()
        node.give_up()
        with pytest.raises(asyncio.CancelledError):
            await writes[0]
        await shut_down(writes[1])
        await shut_down(node.read_into(0, memoryview(bytearray(512))))
        await node.close()
    value_of(plugin, "go").set()


async def shut_down(work: Awaitable[None]) -> None:
    with pytest.raises(OSError, match="failed") as caught:
        await work
    assert caught.value.errno == errno.ESHUTDOWN


async def test_hung_callback_does_not_hold_up_the_end(inside: Inside) -> None:
    """Nor is ``cleanup`` left out, nor ``close`` called beside it."""
    plugin = inside.load(
        """
        closed, cleaned = threading.Event(), threading.Event()
        def pread(h, buf, offset, flags):
            begun.set()
            go.wait()
        def close(h): closed.set()
        def cleanup(): cleaned.set()
        """
    )
    async with asyncio.timeout(SECONDS_MAX):
        async with ScriptDisk(plugin, closing_seconds=0.05) as disk:
            node = await disk.open()
            reading = asyncio.create_task(node.read_into(0, memoryview(bytearray(512))))
            await until(value_of(plugin, "begun").is_set)
            await node.close()
            assert not value_of(plugin, "closed").is_set()
    assert value_of(plugin, "cleaned").is_set()
    value_of(plugin, "go").set()
    await reading
