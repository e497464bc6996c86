"""Replies whose data are sent from where they lie, and those that must never be (rule 1)."""

from __future__ import annotations

import os
import random
from pathlib import Path

import pytest

from nbdfleece.block.copy_before_write import CopyBeforeWrite
from nbdfleece.block.file import FileNode
from nbdfleece.block.guest import GuestNode
from nbdfleece.block.snapshot_access import SnapshotAccess
from nbdfleece.block.stable import StablePlace, open_stable
from nbdfleece.nbd.constants import Command
from nbdfleece.qcow2.create import create_image
from nbdfleece.qcow2.image import Qcow2Image
from nbdfleece.server.buffers import BufferPool
from nbdfleece.server.outbox import Outbox
from tests.loop_turns import until

from .harness import Serve, export_of, pack_request, settled
from .test_outbox import Sink

KIB = 1 << 10
MIB = 1 << 20
CONTENT = random.Random(1).randbytes(4 * MIB)


@pytest.fixture
def disk(tmp_path: Path) -> Path:
    path = tmp_path / "disk"
    path.write_bytes(CONTENT)
    return path


@pytest.mark.parametrize("structured", [False, True])
async def test_files_and_memory_leave_in_the_order_of_the_requests(
    serve: Serve, disk: Path, structured: bool
) -> None:
    node = FileNode.open(disk, read_only=True)
    await node.read(0, 4 * MIB)
    client = await serve([export_of(node, read_only=True)]).open(structured=structured)
    rng = random.Random(2)
    ranges = [(rng.randrange(3 * MIB), rng.choice([1, 4096, 70000, MIB])) for _ in range(60)]
    for number, (offset, length) in enumerate(ranges):
        await client.send(pack_request(Command.READ, offset, length, cookie=number))
        if number % 8 == 7:
            for cookie in range(number - 7, number + 1):
                begin, size = ranges[cookie]
                reply = await client.reply(size)
                assert reply.cookie == cookie
                assert reply.payload == CONTENT[begin : begin + size]
    await node.close()


async def test_client_that_leaves_with_files_queued_frees_them(serve: Serve, disk: Path) -> None:
    node = FileNode.open(disk, read_only=True)
    await node.read(0, 4 * MIB)
    served = serve([export_of(node, read_only=True)])
    client = await served.open()
    for cookie in range(8):
        await client.send(pack_request(Command.READ, 0, 2 * MIB, cookie=cookie))
    await settled()
    client.close()
    await settled()
    await node.close()
    await FileNode.open(disk, read_only=False).close()


def test_file_that_has_become_shorter_breaks_the_connection(disk: Path) -> None:
    """What cannot be sent any more cannot be told either: the reply's header has left."""
    fd = os.open(disk, os.O_RDONLY)
    stable = open_stable(fd, is_in_memory=True)
    os.close(fd)
    assert stable is not None
    outbox = Outbox(BufferPool(MIB))
    outbox.sendfile = lambda fd, offset, length: 0
    outbox.put_file(StablePlace(stable, 0, MIB))
    with pytest.raises(OSError, match="shorter"):
        outbox.send(Sink(step=MIB))
    outbox.close()


async def test_snapshot_holds_still_in_the_socket_of_a_slow_client(
    serve: Serve, tmp_path: Path
) -> None:
    """Rule 1: "This includes bytes already handed to the kernel"."""
    path = tmp_path / "image"
    await create_image(path, 4 * MIB)
    image = await Qcow2Image.open(path, read_only=False)
    await image.write(0, memoryview(CONTENT))
    copies = CopyBeforeWrite(image, tmp_path)
    guest = GuestNode(image, copies)
    fleece = SnapshotAccess(copies, copies.add_layer(), image.size, 65536)
    served = serve([export_of(guest, "live"), export_of(fleece, "snapshot", read_only=True)])
    writer = await served.open("live")
    reader = await served.open("snapshot")
    for round_ in range(2):  # the second time what the first write displaced is in the scratch
        for part in range(8):
            await reader.send(pack_request(Command.READ, part * 64 * KIB, 64 * KIB, cookie=part))
        await settled()
        new = random.Random(round_).randbytes(MIB)
        assert (await writer.perform(Command.WRITE, payload=new)).error == 0
        for part in range(8):
            begin = part * 64 * KIB
            assert (await reader.reply()).payload == CONTENT[begin : begin + 64 * KIB]
    await fleece.close()
    await image.close()


async def test_live_read_holds_still_in_the_socket_of_a_slow_client(
    serve: Serve, disk: Path
) -> None:
    """Rule 1, for what was read before a write: the reply is what was there when it was made."""
    node = FileNode.open(disk, read_only=False)
    served = serve([export_of(node)])
    reader, writer = await served.open(), await served.open()
    for part in range(8):
        await reader.send(pack_request(Command.READ, part * 64 * KIB, 64 * KIB, cookie=part))
    connection, _ = served.server.connections
    await until(lambda: connection.statistics.requests == 8 and not connection.requests_in_flight)
    assert (await writer.perform(Command.WRITE, payload=bytes(MIB))).error == 0
    for part in range(8):
        begin = part * 64 * KIB
        assert (await reader.reply()).payload == CONTENT[begin : begin + 64 * KIB]
    await node.close()
