"""A guest that works on an image, remembers what it did, and QEMU as its judge."""

from __future__ import annotations

import random
import subprocess
from pathlib import Path

from nbdfleece.block.node import BlockNode

SECTOR = 512


class Guest:
    """Random work on a block node, checked against a plain bytearray.

    ``history`` has for every sector what it may read as after a power cut: what was
    flushed, and everything written since, in order.
    """

    def __init__(self, node: BlockNode, cluster_size: int, rng: random.Random) -> None:
        self.node = node
        self.cluster_size = cluster_size
        self.rng = rng
        self.content = bytearray(node.size)
        self.history: list[list[bytes]] = []
        self.uncertain: set[int] = set()
        """Sectors of failed writes: they may have the old content or the new."""
        self.is_tracking = False

    def track(self) -> None:
        """Begin to keep histories; everything up to now is durable."""
        self.is_tracking = True
        size = len(self.content)
        self.history = [[bytes(self.content[i : i + SECTOR])] for i in range(0, size, SECTOR)]

    def _change(self, offset: int, data: bytes) -> None:
        """The guest is about to change its disk."""
        self.content[offset : offset + len(data)] = data
        if not self.is_tracking or not data:
            return
        for sector in range(offset // SECTOR, (offset + len(data) - 1) // SECTOR + 1):
            state = bytes(self.content[sector * SECTOR : (sector + 1) * SECTOR])
            if self.history[sector][-1] != state:
                self.history[sector].append(state)

    def allowed(self, content: bytes) -> bool:
        """Whether a power cut now may leave the guest this content."""
        return all(
            content[i * SECTOR : (i + 1) * SECTOR] in states
            for i, states in enumerate(self.history)
        )

    def pick_range(self, length_max: int) -> tuple[int, int]:
        """A range at an awkward place, or at a cluster's edge."""
        size = self.node.size
        length = self.rng.choice([1, 511, 512, 4096, self.cluster_size, length_max])
        length = min(size, length_max, self.rng.randint(1, length) if length > 1 else 1)
        offset = self.rng.randrange(size - length + 1)
        if self.rng.random() < 0.4:
            offset = offset // self.cluster_size * self.cluster_size
            length = min(size - offset, max(1, length // self.cluster_size) * self.cluster_size)
        return offset, min(length, size - offset)

    async def step(self, length_max: int = 300_000) -> None:
        """One operation."""
        operation = self.rng.choice(["write"] * 5 + ["zero"] * 2 + ["trim", "flush", "read"])
        await getattr(self, operation)(*self.pick_range(length_max))

    async def steps(self, count: int, length_max: int = 300_000) -> None:
        for _ in range(count):
            await self.step(length_max)

    async def write(self, offset: int, length: int) -> None:
        data = self.rng.randbytes(length)
        self._change(offset, data)
        await self.node.write(offset, memoryview(data))

    async def zero(self, offset: int, length: int) -> None:
        self._change(offset, bytes(length))
        await self.node.write_zeroes(offset, length, unmap=self.rng.random() < 0.5)

    async def trim(self, offset: int, length: int) -> None:
        size = self.cluster_size
        first = -(-offset // size) * size
        end = offset + length
        last = end if end == self.node.size else end // size * size
        self._change(first, bytes(max(0, last - first)))
        await self.node.trim(offset, length)

    async def flush(self, *_range: int) -> None:
        await self.node.flush()
        if self.is_tracking:
            self.history = [
                states if sector in self.uncertain else states[-1:]
                for sector, states in enumerate(self.history)
            ]

    async def write_sectors(self, offset: int, length: int) -> None:
        """Write whole sectors; if that fails, who knows what is there."""
        offset = offset // SECTOR * SECTOR
        length = max(SECTOR, length // SECTOR * SECTOR)
        sectors = range(offset // SECTOR, (offset + length) // SECTOR)
        self.uncertain.update(sectors)
        await self.write(offset, length)
        self.uncertain.difference_update(sectors)

    async def read(self, offset: int, length: int) -> None:
        buffer = bytearray(length)
        await self.node.read_into(offset, memoryview(buffer))
        assert buffer == self.content[offset : offset + length]
        again = bytearray(length)
        if self.node.read_at_once(offset, memoryview(again)):
            assert again == buffer

    async def check_all(self) -> None:
        await self.read(0, self.node.size)


def qemu_img(*arguments: str | Path) -> str:
    """Run qemu-img and return what it prints."""
    command = ["qemu-img", *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, f"{command}: {done.stdout}{done.stderr}"
    return done.stdout


def check(path: Path, *, leaks_allowed: bool = False) -> None:
    """``qemu-img check`` finds nothing, or leaked clusters at most."""
    done = subprocess.run(["qemu-img", "check", str(path)], capture_output=True, text=True)
    allowed = (0, 3) if leaks_allowed else (0,)
    assert done.returncode in allowed, done.stdout + done.stderr


def qemu_content(path: Path, image_format: str = "qcow2") -> bytes:
    """The guest's bytes as QEMU reads them, rounded up to sectors."""
    raw = path.with_suffix(".content")
    qemu_img("convert", "-f", image_format, "-O", "raw", path, raw)
    content = raw.read_bytes()
    raw.unlink()
    return content


def qemu_io(path: Path, commands: list[str], *options: str) -> None:
    """Run qemu-io commands on an image."""
    arguments = [argument for command in commands for argument in ("-c", command)]
    done = subprocess.run(
        ["qemu-io", "-f", "qcow2", *options, *arguments, str(path)], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "failed" not in done.stdout, done.stdout
