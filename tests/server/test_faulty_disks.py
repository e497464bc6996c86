"""A disk that fails once, at any operation, under a server: what its client gets (rule 8).

The file that fails is the image, its external data file, or its backing file. The request
in whose course it fails is answered by the right code, all others are done; the image
stays sound (rule 4); and the server goes on, for this client and the next.
"""

from __future__ import annotations

import errno
import random
from functools import partial
from pathlib import Path

import pytest

from nbdfleece.block.file import FileNode
from nbdfleece.block.node import BlockNode
from nbdfleece.extents import Extents
from nbdfleece.nbd.constants import Command, CommandFlag, Error
from nbdfleece.qcow2 import image as image_module
from nbdfleece.qcow2.header import Header
from nbdfleece.qcow2.image import Qcow2Image
from tests.qcow2.fake_disk import FakeDisk, Fault
from tests.qcow2.guest import check, qemu_content, qemu_img
from tests.qcow2.test_faults import POINTS, UnluckyGuest

from .harness import Client, Serve, extents_of

SIZE = 512 << 10
STEPS = 25

CODES = {errno.ENOSPC: Error.ENOSPC, errno.EIO: Error.EIO}


class RemoteDisk(BlockNode):
    """A disk as a client has it: an error is an ``OSError`` with the code on the wire."""

    read_only = False

    def __init__(self, client: Client) -> None:
        self.client = client
        self.size = SIZE

    async def _perform(
        self, command: Command, offset: int = 0, length: int = 0, **more: object
    ) -> None:
        await self.client.request(command, offset, length, **more)  # type: ignore[arg-type]
        for chunk in await self.client.replies():
            if chunk.error:
                raise OSError(chunk.error, chunk.text)

    async def read_into(self, offset: int, view: memoryview) -> None:
        # Without DF what cannot be read at once is tried again in parts.
        await self.client.request(Command.READ, offset, len(view), flags=CommandFlag.DF)
        failed = None
        for chunk in await self.client.replies():
            if chunk.error:
                failed = OSError(chunk.error, chunk.text)
            elif chunk.offset is not None:
                begin = chunk.offset - offset
                view[begin : begin + len(chunk.payload)] = chunk.payload
        if failed is not None:
            raise failed

    async def write(self, offset: int, data: memoryview) -> None:
        await self._perform(Command.WRITE, offset, payload=bytes(data))

    async def write_zeroes(
        self, offset: int, length: int, *, unmap: bool = True, fast: bool = False
    ) -> None:
        flags = 0 if unmap else CommandFlag.NO_HOLE
        await self._perform(Command.WRITE_ZEROES, offset, length, flags=flags)

    async def trim(self, offset: int, length: int) -> None:
        await self._perform(Command.TRIM, offset, length)

    async def flush(self) -> None:
        await self._perform(Command.FLUSH)

    async def block_status(
        self, offset: int, length: int, *, extents_max: int = 1 << 20
    ) -> Extents:
        await self.client.request(Command.BLOCK_STATUS, offset, length)
        (chunk,) = await self.client.replies()
        if chunk.error:
            raise OSError(chunk.error, chunk.text)
        return Extents.from_pairs(extents_of(chunk)[1])

    async def close(self) -> None:
        self.client.close()


class CuriousGuest(UnluckyGuest):
    """A guest at a client that also asks what is where."""

    async def step(self, length_max: int = 300_000) -> None:
        if self.rng.random() < 0.15:
            extents = await self.node.block_status(0, self.node.size)
            assert extents.total() <= self.node.size
        else:
            await super().step(length_max)

    async def flush_twice(self) -> None:
        """Flush; the first may fail, but then the second must not."""
        try:
            await self.flush()
        except OSError as error:
            self.told.append(error)
            await self.flush()


class Files:
    """An image's files, each a fake disk, one of which is to fail."""

    def __init__(self, folder: Path, where: str) -> None:
        self.path = folder / "disk.qcow2"
        self.others = {"data file": folder / "data", "backing file": folder / "base"}
        rng = random.Random(where)
        options = "cluster_size=4096"
        words: list[object] = []
        if where == "data file":
            options += f",data_file={self.others[where]}"
        if where == "backing file":
            self.others[where].write_bytes(rng.randbytes(SIZE - 70_000))
            words = ["-b", self.others[where], "-F", "raw"]
        qemu_img("create", "-q", "-f", "qcow2", *words, "-o", options, self.path, str(SIZE))
        self.image = FakeDisk(self.path.read_bytes())
        self.failing = self.image
        if where != "image":
            is_backing = where == "backing file"
            content = self.others[where].read_bytes()
            self.failing = FakeDisk(content, read_only=is_backing)
        self.where = where
        self.content = bytes(SIZE) if where != "backing file" else content.ljust(SIZE, b"\0")

    async def open(self, monkeypatch: pytest.MonkeyPatch) -> Qcow2Image:
        """The image over the fake disks."""
        if self.where == "data file":
            monkeypatch.setattr(image_module, "open_data_file", lambda *_: self.failing)
        return await Qcow2Image.from_file(self.image, open_backing=self._open_backing)

    async def _open_backing(
        self, file: FileNode, header: Header, chain: object
    ) -> BlockNode | None:
        return self.failing if self.where == "backing file" else None

    def store(self) -> None:
        """Put what the fake disks have where QEMU finds it."""
        self.path.write_bytes(self.image.content)
        if self.where == "data file":
            self.others[self.where].write_bytes(self.failing.content)


async def serve_unlucky_client(
    files: Files, faults: dict[int, Fault], serve: Serve, monkeypatch: pytest.MonkeyPatch
) -> tuple[list[int], int]:
    """A client's life; return the codes it was sent, and how much the failing file did."""
    image = await files.open(monkeypatch)
    begun = files.failing.operations
    files.failing.faults = {begun + number: fault for number, fault in faults.items()}
    served = serve(image)
    try:
        client = await served.open(contexts=["base:allocation"])
        guest = CuriousGuest(RemoteDisk(client), 4096, random.Random(7), files.failing)
        guest.content[:] = files.content
        guest.track()
        for _ in range(STEPS):
            await guest.attempt()
        await guest.flush_twice()
        operations = files.failing.operations - begun
        again = await served.open()
        assert guest.allowed(await again.read(0, SIZE))
    finally:
        await served.close()
        serve.served.remove(served)
    await image.close()
    files.store()
    check(files.path, leaks_allowed=True)
    assert guest.allowed(qemu_content(files.path))
    return [error.errno or 0 for error in guest.told], operations


@pytest.mark.parametrize(
    "fault",
    [Fault(errno.ENOSPC), Fault(errno.EIO), Fault(errno.ENOSPC, is_short=True)],
    ids=["ENOSPC", "EIO", "short"],
)
@pytest.mark.parametrize("where", ["image", "data file", "backing file"])
async def test_client_of_a_disk_that_fails_once_gets_the_code_and_is_served_on(
    tmp_path: Path,
    where: str,
    fault: Fault,
    serve: Serve,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    live = partial(serve_unlucky_client, serve=serve, monkeypatch=monkeypatch)
    codes, count = await live(Files(tmp_path, where), {})
    assert codes == []
    assert count > 10
    points = range(count)
    if POINTS:
        points = random.Random(f"{where}{fault}").sample(points, POINTS // 2)
    failures = 0
    for number in points:
        caplog.clear()
        files = Files(tmp_path, where)
        codes, _ = await live(files, {number: fault})
        assert [error.errno for error in files.failing.met] == [fault.error]
        if "leaked clusters" in caplog.text or "no hole" in caplog.text:  # nobody asked for that
            assert codes == []
        else:
            assert codes == [CODES[fault.error]]
            failures += 1
    assert failures > len(points) // 2
