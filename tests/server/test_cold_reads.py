"""Cold streams out of files that hold still: fetched in runs, answered in any order."""

from __future__ import annotations

import asyncio
import errno
import gc
import logging
import random
import threading
from pathlib import Path

import pytest

from nbdfleece.block import stable as stable_module
from nbdfleece.block.file import FileNode
from nbdfleece.block.stable import StableFile, StablePlace
from nbdfleece.nbd.constants import Command
from nbdfleece.qcow2.create import create_image
from nbdfleece.qcow2.image import Qcow2Image
from nbdfleece.server.cold_reads import FETCHES_MAX
from nbdfleece.server.connection import Connection
from nbdfleece.server.limits import Limits
from nbdfleece.server.outbox import Outbox
from nbdfleece.server.turns import COPIES_PER_SENDFILE, REQUEST_COST
from tests.loop_turns import until

from .harness import SECONDS_MAX, Client, Serve, Served, export_of, pack_request, settled
from .test_fairness import Counter

KIB = 1 << 10
MIB = 1 << 20
PART = 64 * KIB
PARTS = 40
CONTENT = random.Random(1).randbytes(4 * MIB)
SMALL_TURNS = Limits(wake_up_bytes_max=3 * (REQUEST_COST + PART // COPIES_PER_SENDFILE))
"""Three parts in each."""


class Disk:
    """A file of which nothing is in the page cache but what a thread has fetched.

    Attributes:
        begun: The ranges that threads were told to fetch, ``(offset, length)``.
        may_end: While it is not set, they wait.
        keeps: Whether the page cache keeps what was fetched.
        is_broken: Whether fetching fails.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.begun: list[tuple[int, int]] = []
        self.may_end = threading.Event()
        self.keeps = True
        self.is_broken = False
        self._warm: set[int] = set()

    def is_at_hand(self, file: StableFile, offset: int, length: int) -> bool:
        return self._warm.issuperset(_pages(offset, length))

    def fetch(self, fd: int, offset: int, length: int) -> None:
        self.begun.append((offset, length))
        assert self.may_end.wait(SECONDS_MAX)
        if self.is_broken:
            raise OSError(errno.EIO, "bad block")
        if self.keeps:
            self.warm(offset, length)

    def is_open(self) -> bool:
        """Whether anything but garbage has it open: errors and frames that hold one another."""
        gc.collect()
        links = (entry for entry in Path("/proc/self/fd").iterdir() if entry.is_symlink())
        return any(link.exists() and link.samefile(self.path) for link in links)

    def warm(self, offset: int, length: int) -> None:
        self._warm.update(_pages(offset, length))


def _pages(offset: int, length: int) -> range:
    return range(offset // (4 * KIB), (offset + length - 1) // (4 * KIB) + 1)


@pytest.fixture
def disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Disk:
    path = tmp_path / "disk"
    path.write_bytes(CONTENT)
    disk = Disk(path)
    monkeypatch.setattr(StableFile, "is_at_hand", lambda *range_: disk.is_at_hand(*range_))
    monkeypatch.setattr(stable_module, "fetch", disk.fetch)
    return disk


class Stream:
    """A client that has asked for :data:`PARTS` parts of a disk, one behind the other."""

    def __init__(self, served: Served, client: Client, node: FileNode) -> None:
        self.served = served
        self.client = client
        self.node = node
        (self.connection,) = served.server.connections

    async def check_replies(self, *others: int) -> None:
        """All parts are there, in whatever order, and ``others`` that were asked for, too."""
        await check_replies(self.client, {*range(PARTS), *others})


async def check_replies(client: Client, numbers: set[int]) -> None:
    while numbers:
        reply = await client.reply(PART)
        numbers.remove(reply.cookie)
        assert not reply.error
        assert reply.payload == CONTENT[reply.cookie * PART :][:PART]


async def stream(
    serve: Serve, disk: Disk, *, structured: bool = True, limits: Limits | None = None
) -> Stream:
    node = FileNode.open(disk.path, read_only=True)
    served = serve([export_of(node, read_only=True)], limits=limits or Limits())
    client = await served.open(structured=structured)
    found = Stream(served, client, node)
    for number in range(PARTS):
        await client.send(pack_request(Command.READ, number * PART, PART, cookie=number))
    await until(lambda: found.connection.statistics.requests == PARTS)
    await until(lambda: len(disk.begun) == FETCHES_MAX)
    return found


def transmission_of(connection: Connection) -> tuple[int, int]:
    """Requests and bytes in flight."""
    phase = connection._phase
    return phase.requests_in_flight, phase.bytes_in_flight


@pytest.mark.parametrize("structured", [False, True])
async def test_reads_that_follow_one_another_are_fetched_together(
    serve: Serve, disk: Disk, structured: bool
) -> None:
    reader = await stream(serve, disk, structured=structured)
    assert transmission_of(reader.connection)[1] == PARTS * PART, "all of them are in flight"
    disk.may_end.set()
    await reader.check_replies()
    await until(lambda: transmission_of(reader.connection) == (0, 0))
    waited = sorted(disk.begun[FETCHES_MAX:])
    assert len(waited) < PARTS // 4
    assert [begin for begin, _ in waited[1:]] == [sum(range_) for range_ in waited[:-1]]
    assert sum(length for _, length in disk.begun) == PARTS * PART
    assert reader.connection.statistics.read_bytes == PARTS * PART
    await reader.node.close()


async def test_run_is_no_more_than_is_sent_in_one_turn(serve: Serve, disk: Disk) -> None:
    """Rule 5."""
    reader = await stream(serve, disk, limits=SMALL_TURNS)
    disk.may_end.set()
    await reader.check_replies()
    assert max(length for _, length in disk.begun) == 3 * PART
    await reader.node.close()


async def test_runs_that_are_at_hand_all_the_same_are_sent_in_turns(
    serve: Serve, disk: Disk, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Rule 5: when the kernel has read ahead nothing waits for a thread."""
    reader = await stream(serve, disk, limits=SMALL_TURNS)
    counter = Counter()
    put_file = Outbox.put_file

    def counted(outbox: Outbox, place: StablePlace) -> None:
        counter.count()
        put_file(outbox, place)

    monkeypatch.setattr(Outbox, "put_file", counted)
    disk.warm(0, 4 * MIB)
    disk.may_end.set()
    watching = asyncio.create_task(counter.watch(PARTS))
    await reader.check_replies()
    await watching
    assert len(disk.begun) == FETCHES_MAX
    assert counter.most <= 2 * 3
    await reader.node.close()


async def test_what_is_at_hand_overtakes_a_stream(serve: Serve, disk: Disk) -> None:
    reader = await stream(serve, disk)
    disk.warm(3 * MIB, PART)
    await reader.client.send(pack_request(Command.READ, 3 * MIB, PART, cookie=1000))
    reply = await reader.client.reply()
    assert reply.cookie == 1000
    assert reply.payload == CONTENT[3 * MIB :][:PART]
    disk.may_end.set()
    await reader.check_replies()
    await reader.node.close()


async def test_reads_here_and_there_wait_for_no_others(serve: Serve, disk: Disk) -> None:
    reader = await stream(serve, disk)
    others = range(PARTS + 1, PARTS + 2 * FETCHES_MAX, 2)
    for number in others:
        await reader.client.send(pack_request(Command.READ, number * PART, PART, cookie=number))
    await until(lambda: len(disk.begun) == 2 * FETCHES_MAX)
    disk.may_end.set()
    await reader.check_replies(*others)
    await reader.node.close()


async def test_clusters_in_another_order_are_no_run(
    serve: Serve, disk: Disk, tmp_path: Path
) -> None:
    path = tmp_path / "image"
    await create_image(path, 4 * MIB)
    image = await Qcow2Image.open(path, read_only=False)
    for number in reversed(range(PARTS)):
        await image.write(number * PART, memoryview(CONTENT)[number * PART :][:PART])
    await image.close()
    image = await Qcow2Image.open(path, read_only=True)
    served = serve([export_of(image, read_only=True)])
    client = await served.open()
    for number in range(PARTS):
        await client.send(pack_request(Command.READ, number * PART, PART, cookie=number))
    (connection,) = served.server.connections
    await until(lambda: connection.statistics.requests == PARTS)
    disk.may_end.set()
    await check_replies(client, set(range(PARTS)))
    assert {length for _, length in disk.begun} == {PART}
    await image.close()


async def test_stream_that_the_page_cache_does_not_keep_is_copied(serve: Serve, disk: Disk) -> None:
    disk.keeps = False
    reader = await stream(serve, disk)
    disk.may_end.set()
    await reader.check_replies()
    await until(lambda: transmission_of(reader.connection) == (0, 0))
    await reader.node.close()


@pytest.mark.parametrize("structured", [False, True])
async def test_stream_that_cannot_be_fetched_is_read_one_by_one(
    serve: Serve,
    disk: Disk,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    structured: bool,
) -> None:
    """One bad block takes no more with it than the READ that it lies in."""
    caplog.set_level(logging.CRITICAL)  # a record would keep the error, its frames, and the file
    disk.is_broken = True
    read_into = FileNode.read_into
    bad = 25 * PART

    async def read_partly(node: FileNode, offset: int, view: memoryview) -> None:
        if offset <= bad < offset + len(view):
            raise OSError(errno.EIO, "bad block")
        await read_into(node, offset, view)

    monkeypatch.setattr(FileNode, "read_into", read_partly)
    reader = await stream(serve, disk, structured=structured)
    disk.may_end.set()
    failed, left = set(), set(range(PARTS))
    while left:
        reply = await reader.client.reply(PART)
        if reply.error:
            failed.add(reply.cookie)
        elif reply.cookie != 25:
            assert reply.payload == CONTENT[reply.cookie * PART :][:PART]
        if reply.done:
            left.remove(reply.cookie)
    assert failed == {25}
    await reader.node.close()
    await until(lambda: not disk.is_open())


async def test_client_that_leaves_takes_what_waits_with_it(serve: Serve, disk: Disk) -> None:
    reader = await stream(serve, disk)
    reader.client.close()
    await settled()
    assert reader.served.server.connections, "threads still use its file"
    disk.may_end.set()
    await reader.served.server.wait_idle()
    assert len(disk.begun) == FETCHES_MAX
    assert transmission_of(reader.connection) == (0, 0)
    await reader.node.close()
    await FileNode.open(disk.path, read_only=False).close()  # nobody has the locks any more


async def test_connection_that_is_aborted_takes_what_waits_with_it(
    serve: Serve, disk: Disk
) -> None:
    reader = await stream(serve, disk)
    reader.connection.abort("the test says so")
    assert await reader.client.is_at_end()
    disk.may_end.set()
    await reader.served.server.wait_idle()
    assert len(disk.begun) == FETCHES_MAX
    assert transmission_of(reader.connection) == (0, 0)
    await reader.node.close()
    await FileNode.open(disk.path, read_only=False).close()


async def test_what_was_asked_before_a_shutdown_is_answered(serve: Serve, disk: Disk) -> None:
    reader = await stream(serve, disk)
    end = asyncio.create_task(reader.served.server.shut_down(SECONDS_MAX))
    await settled()
    assert reader.connection.is_draining
    disk.may_end.set()
    await reader.check_replies()
    assert await reader.client.is_at_end()
    await end
    await reader.node.close()


async def test_client_that_reads_nothing_of_a_stream_is_given_up(serve: Serve, disk: Disk) -> None:
    """What was fetched and cannot be sent keeps no connection alive."""
    node = FileNode.open(disk.path, read_only=True)
    limits = Limits(idle_seconds=0.2, closing_seconds=0.2)
    served = serve([export_of(node, read_only=True)], limits=limits)
    client = await served.open()
    disk.may_end.set()
    for number in range(PARTS):
        await client.send(pack_request(Command.READ, number * MIB % (3 * MIB), MIB, cookie=number))
    await served.server.wait_idle()
    client.close()
    await node.close()
