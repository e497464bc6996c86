"""SIGKILL of a real server under load, again and again, on one image that lives through it all.

In each life of the server a checkpoint is made, then fio writes, trims and flushes in the
disk's first half while a writer of our own keeps books on the second half: what it has
written last and what it has flushed. Then the server is killed. After that

* qemu-img check finds leaked clusters at worst (rule 4);
* every sector of the second half has what was flushed last, or something newer (rule 4);
* every checkpoint is there, and what it says has changed covers what differs (rule 2).
"""

from __future__ import annotations

import argparse
import contextlib
import itertools
import json
import os
import random
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import nbd
import numpy as np

from nbdfleece.control.client import ControlClient
from tests.qcow2.guest import qemu_content, qemu_img

SIZE = 32 << 20
HALF = SIZE // 2
BLOCK = 4096
CHECKPOINTS_MAX = 3
FLUSHES_MIN = 2
"""Of our writer in each life."""
SECONDS_MAX = 180
PROGRAM = str(Path(sys.executable).with_name("nbdfleece"))

IMAGE_OPTIONS = [
    "cluster_size=65536",
    "cluster_size=4096",
    "cluster_size=2048",
    "cluster_size=65536,extended_l2=on",
]
"""Of the images that take turns."""


class Books:
    """What the writer has written to each block of the second half: rising numbers."""

    def __init__(self) -> None:
        self.written: list[list[int]] = [[0] for _ in range(HALF // BLOCK)]
        """From the number that was flushed last up to the one issued last."""
        self.numbers = itertools.count(1)

    def issue(self, block: int) -> bytes:
        """Note a write that is about to be made, and return its data."""
        number = next(self.numbers)
        self.written[block].append(number)
        return number.to_bytes(8, "little") * (BLOCK // 8)

    def flushed(self) -> None:
        """Everything written up to now is durable."""
        self.written = [numbers[-1:] for numbers in self.written]

    def check(self, half: bytes) -> None:
        """Insist that every sector has one of the numbers that it may have, all over."""
        words = np.frombuffer(half, dtype="<u8").reshape(-1, BLOCK // 512, 64)
        assert (words == words[:, :, :1]).all(), "a sector is torn"
        for block, sectors in enumerate(words[:, :, 0].tolist()):
            allowed = self.written[block]
            assert set(sectors) <= set(allowed), f"block {block}: {sectors} not in {allowed}"
            self.written[block] = [max(sectors)] if len(set(sectors)) == 1 else allowed


class Life:
    """One life of a server."""

    def __init__(self, folder: Path, image: Path) -> None:
        self.folder = folder
        self.socket, self.control = folder / "nbd.sock", folder / "control.sock"
        for path in (self.socket, self.control):
            path.unlink(missing_ok=True)
        self.log = (folder / "server.log").open("a+")
        self.server = subprocess.Popen(
            [PROGRAM, "serve", "--disk", f"vda={image}", "--listen", f"unix:{self.socket}"]
            + ["--control", self.control, "--scratch-dir", folder],
            stdout=subprocess.PIPE,
            stderr=self.log,
        )
        assert self.server.stdout is not None
        assert self.server.stdout.readline(), "the server did not start"

    def uri(self, export: str) -> str:
        """The URI of an export."""
        return f"nbd+unix:///{export}?socket={self.socket}"

    def connect(self, export: str, *contexts: str) -> nbd.NBD:
        """A client of an export."""
        client = nbd.NBD()
        for context in contexts:
            client.add_meta_context(context)
        client.connect_uri(self.uri(export))
        return client

    def content(self) -> bytes:
        """The disk's content, with nobody writing."""
        client = self.connect("vda")
        data = b"".join(bytes(client.pread(1 << 20, at)) for at in range(0, SIZE, 1 << 20))
        client.shutdown()
        return data

    def kill(self) -> None:
        """SIGKILL, and the end."""
        self.server.kill()
        self.server.wait(SECONDS_MAX)
        self.server.stdout.close()
        self.log.close()


@contextlib.contextmanager
def fio_on(life: Life, seed: int) -> Iterator[None]:
    """fio on the first half until the server is gone."""
    command = ["fio", "--name=load", "--ioengine=nbd", f"--uri={life.uri('vda')}", "--rw=randrw"]
    command += ["--rwmixread=10", "--bsrange=4k-128k", "--iodepth=8"]
    command += [f"--size={HALF}", "--fsync=24", f"--randseed={seed}", "--time_based"]
    command += [f"--runtime={SECONDS_MAX}", "--output=/dev/null"]
    fio = subprocess.Popen(command, stderr=subprocess.DEVNULL, cwd=life.folder)
    try:
        yield
    finally:
        try:
            fio.wait(5)
        except subprocess.TimeoutExpired:
            fio.kill()
            fio.wait()


def write_until_killed(life: Life, books: Books, rng: random.Random, seconds: float) -> None:
    """Keep books on writes and flushes until the server dies, ``seconds`` after the first few."""
    client = life.connect("vda")

    def write_and_flush() -> None:
        for _ in range(rng.randint(1, 12)):
            block = rng.randrange(HALF // BLOCK)
            client.pwrite(books.issue(block), HALF + block * BLOCK)
        if rng.random() < 0.2:
            client.trim(HALF // 4, rng.randrange(HALF // 2 // BLOCK) * BLOCK)
        client.flush()
        books.flushed()

    for _ in range(FLUSHES_MIN):
        write_and_flush()
    timer = threading.Timer(seconds, life.server.kill)
    timer.start()
    with contextlib.suppress(nbd.Error):
        while True:
            write_and_flush()
    timer.join()


def check_image(path: Path) -> None:
    """Leaks at worst."""
    done = subprocess.run(["qemu-img", "check", path], capture_output=True, text=True)
    assert done.returncode in (0, 3), done.stdout + done.stderr


def changed_since(life: Life, checkpoint: str) -> np.ndarray:
    """Which blocks the server says have changed since a checkpoint."""
    context = f"qemu:dirty-bitmap:{checkpoint}"
    changed = np.zeros(SIZE // BLOCK, dtype=bool)
    client = life.connect("now/vda", context)
    position = 0

    def note(name: str, offset: int, entries: list[int], _error: object) -> None:
        nonlocal position
        position = offset
        for length, flags in zip(entries[::2], entries[1::2], strict=True):
            end = min(position + length, SIZE)
            if flags & 1:
                changed[position // BLOCK : -(-end // BLOCK)] = True
            position = end

    while position < SIZE:
        client.block_status(SIZE - position, position, note)
    client.shutdown()
    return changed


def check_checkpoints(life: Life, contents: dict[str, bytes], now: bytes) -> None:
    """Insist that every checkpoint is there and covers what differs."""
    with ControlClient(life.control) as control:
        names = {name: name for name in contents}
        control.execute("snapshot-create", {"name": "now"})
        control.execute("snapshot-export-add", {"snapshot": "now", "disk": "vda", "since": names})
        blocks = np.frombuffer(now, dtype=np.uint8).reshape(-1, BLOCK)
        for name, content in contents.items():
            before = np.frombuffer(content, dtype=np.uint8).reshape(-1, BLOCK)
            missed = (blocks != before).any(axis=1) & ~changed_since(life, name)
            assert not missed.any(), f"{name} misses blocks {np.flatnonzero(missed)[:10].tolist()}"
        control.execute("snapshot-delete", {"name": "now"})


class Campaign:
    """The lives of one image."""

    def __init__(self, folder: Path, options: str, rng: random.Random) -> None:
        self.folder = folder
        self.image = folder / "disk.qcow2"
        self.rng = rng
        self.books = Books()
        self.contents: dict[str, bytes] = {}
        """What the disk was at each checkpoint."""
        qemu_img("create", "-q", "-f", "qcow2", "-o", options, self.image, str(SIZE))

    def live_and_die(self, number: int) -> None:
        """Serve, be killed, and look what is left."""
        life = Life(self.folder, self.image)
        try:
            now = life.content()
            self.books.check(now[HALF:])
            check_checkpoints(life, self.contents, now)
            self.make_checkpoint(life, f"life-{number}", now)
            with fio_on(life, number):
                write_until_killed(life, self.books, self.rng, self.rng.uniform(0.05, 0.8))
        finally:
            life.kill()
        check_image(self.image)
        self.books.check(qemu_content(self.image)[HALF:])
        assert set(self.contents) <= set(self.stored_bitmaps())

    def make_checkpoint(self, life: Life, name: str, now: bytes) -> None:
        """Make a checkpoint, and delete one if they become many."""
        with ControlClient(life.control) as control:
            control.execute("checkpoint-create", {"name": name})
            self.contents[name] = now
            if len(self.contents) > CHECKPOINTS_MAX:
                old = self.rng.choice(list(self.contents)[:-1])
                control.execute("checkpoint-delete", {"name": old})
                del self.contents[old]

    def stored_bitmaps(self) -> list[str]:
        """The bitmaps that QEMU sees in the image."""
        info = json.loads(qemu_img("info", "--output=json", self.image))
        return [bitmap["name"] for bitmap in info["format-specific"]["data"]["bitmaps"]]


def run_campaign(folder: Path, kills: int, seed: int) -> None:
    """Kill a server ``kills`` times, the images taking turns.

    Raises:
        AssertionError: Something was lost; the image is kept until the folder goes.
    """
    campaigns = []
    for index, options in enumerate(IMAGE_OPTIONS[:kills]):
        place = folder / str(index)
        place.mkdir()
        campaigns.append(Campaign(place, options, random.Random(f"{seed}:{index}")))
    for number in range(kills):
        campaigns[number % len(campaigns)].live_and_die(number)
    for campaign in campaigns:
        halves = {content[:HALF] for content in campaign.contents.values()}
        lives = kills // len(campaigns)
        assert next(campaign.books.numbers) > lives * FLUSHES_MIN, "the writer has hardly written"
        assert len(halves) > 1 or kills < 2 * len(campaigns), "fio has not written"


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(prog="kill-campaign", description=__doc__)
    parser.add_argument("--kills", type=int, default=100)
    parser.add_argument("--seed", type=int, default=1)
    options = parser.parse_args()
    begun = time.monotonic()
    folder = Path(tempfile.mkdtemp(prefix="kill-", dir=os.environ.get("TMPDIR", "/var/tmp")))
    try:
        run_campaign(folder, options.kills, options.seed)
    except BaseException:
        print(f"the images are in {folder}", file=sys.stderr)
        raise
    subprocess.run(["rm", "-r", folder], check=True)
    seconds = time.monotonic() - begun
    print(f"{options.kills} kills survived in {seconds:.0f} s, seed {options.seed}")


if __name__ == "__main__":
    main()
