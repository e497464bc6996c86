"""Slow, silent, vanishing and hostile clients: nobody else notices, nothing is left."""

from __future__ import annotations

import asyncio
import itertools
import logging
import socket
import struct

import pytest

from nbdfleece.nbd.constants import Command, Option, OptionReply
from nbdfleece.nbd.limits import Limits as WireLimits
from nbdfleece.server.channel import SocketChannel
from nbdfleece.server.connection_log import FAILURES_LOGGED_MAX, LIMITS_LOGGED_MAX
from nbdfleece.server.limits import Limits
from nbdfleece.testing.memory_node import MemoryNode
from tests.loop_turns import until

from .harness import Client, Serve, export_of, pack_request, settled

KIB = 1 << 10
MIB = 1 << 20


async def flood(client: Client, count: int, length: int) -> int:
    """Send READs as long as the server takes them; how many bytes of them it took."""
    stream = pack_request(Command.READ, 0, length) * count
    sent = 0
    for _ in range(2000):
        try:
            sent += client.sock.send(stream[sent:])
        except BlockingIOError:
            await settled(2)
        if sent == len(stream):
            break
    return sent


async def test_client_that_never_reads_is_paused_and_costs_bounded_memory(serve: Serve) -> None:
    """Rule 5."""
    limits = Limits(queued_bytes_max=1 * MIB)
    served = serve(MemoryNode(4 * MIB), limits=limits)
    hog = await served.open()
    sent = await flood(hog, 40_000, 64 * KIB)
    assert sent < 40_000 * 28, "requests were read although no reply was"
    (connection,) = served.server.connections
    assert connection.outbox.queued_bytes <= limits.queued_bytes_max + MIB
    assert served.server.pool.taken_bytes <= 6 * MIB
    other = await served.open()
    for index in range(50):
        assert await other.read(index * 4096, 4096) == bytes(4096)


async def test_paused_client_that_reads_again_gets_everything(serve: Serve) -> None:
    limits = Limits(queued_bytes_max=256 * KIB)
    content = bytes(itertools.islice(itertools.cycle(range(256)), MIB))
    client = await serve(MemoryNode(content), limits=limits).open(structured=False)
    count = 400
    requests = b"".join(
        pack_request(Command.READ, index * 256, 64 * KIB, cookie=index) for index in range(count)
    )
    sending = asyncio.ensure_future(client.send(requests))
    await settled(50)
    for index in range(count):
        reply = await client.reply(64 * KIB)
        assert reply.cookie == index
        assert reply.payload == content[index * 256 : index * 256 + 64 * KIB]
    await sending


async def test_client_that_reads_slowly_gets_a_large_reply_whole(serve: Serve) -> None:
    limits = Limits(queued_bytes_max=1 * MIB)
    served = serve(MemoryNode(b"s" * (24 * MIB)), limits=limits)
    client = await served.open()
    await client.request(Command.READ, 0, 24 * MIB)
    await settled(200)
    assert served.server.pool.taken_bytes < 12 * MIB, "the whole reply was read at once"
    total = sum(len(chunk.payload) for chunk in await client.replies())
    assert total == 24 * MIB


async def test_long_reads_side_by_side_all_end(serve: Serve) -> None:
    """Whoever waits for room is told of it, whichever way it came about."""
    limits = Limits(queued_bytes_max=64 * KIB, read_chunk_bytes_max=32 * KIB)
    client = await serve(MemoryNode(b"l" * MIB), limits=limits).open()
    for cookie in range(8):
        await client.request(Command.READ, 0, MIB, cookie=cookie)
    received = dict.fromkeys(range(8), 0)
    while any(count < MIB for count in received.values()):
        chunk = await client.reply()
        received[chunk.cookie] += len(chunk.payload)
    assert set(received.values()) == {MIB}


async def test_failure_of_ours_is_not_told_as_a_broken_connection(
    serve: Serve, caplog: pytest.LogCaptureFixture
) -> None:
    class Unreadable:
        def refusal(self, export: str, identity: str | None) -> str | None:
            raise PermissionError("the list of clients")

    served = serve(MemoryNode(MIB), authorization=Unreadable())
    with pytest.raises(EOFError):
        await served.open()
    assert "internal error" in caplog.text
    assert "the list of clients" in caplog.text


async def test_reply_that_waits_is_not_changed_by_a_later_write(serve: Serve) -> None:
    """Rule 1: nothing is sent from memory that can be overwritten while it is in flight."""
    served = serve(MemoryNode(b"old!" * (MIB // 4)))
    slow, writer = await served.open(structured=False), await served.open()
    await slow.send(pack_request(Command.READ, 0, MIB) * 3)
    await settled(50)
    await writer.perform(Command.WRITE, 0, payload=b"new!" * (MIB // 4))
    for _ in range(3):
        assert (await slow.reply(MIB)).payload == b"old!" * (MIB // 4)


async def test_busy_client_does_not_starve_another(serve: Serve) -> None:
    """Work per wake-up is bounded: a full receive buffer does not keep the loop."""
    limits = Limits(wake_up_bytes_max=64 * KIB)
    served = serve(MemoryNode(MIB), limits=limits)
    busy, other = await served.open(), await served.open()
    await flood(busy, 5_000, 512)
    turns = 0
    reading = asyncio.ensure_future(other.read(0, 512))
    while not reading.done() and turns < 200:
        await asyncio.sleep(0)
        turns += 1
    assert await reading == bytes(512)
    assert turns < 200


async def test_request_waits_for_one_turn_of_others_however_many_they_are(serve: Serve) -> None:
    """Rule 5: clients that stream share one turn between two looks at the sockets."""
    limits = Limits(wake_up_bytes_max=68 * KIB, queued_bytes_max=64 * MIB)
    node = MemoryNode(MIB)
    served = serve(node, limits=limits)
    hogs = [await served.open() for _ in range(8)]
    other = await served.open()
    lengths: list[int] = []
    read_into = node.read_into

    async def noting_read(offset: int, view: memoryview) -> None:
        lengths.append(len(view))
        await read_into(offset, view)

    node.read_into = noting_read  # type: ignore[method-assign]
    for hog in hogs:
        await flood(hog, 60, 64 * KIB)
    await settled()
    begin = len(lengths)
    other.sock.send(pack_request(Command.READ, 0, 512))
    while 512 not in lengths[begin:]:
        await asyncio.sleep(0)
    assert lengths[begin:].index(512) <= 4
    assert (await other.reply()).payload == bytes(512)


async def test_pauses_are_logged_once(serve: Serve, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    node = MemoryNode(MIB)
    wire = WireLimits(requests_in_flight_max=4)
    served = serve(node, limits=Limits(queued_bytes_max=MIB, wire=wire))
    hog = await served.open()
    await flood(hog, 2_000, 64 * KIB)
    await settled(100)
    client = await served.open()
    gate = asyncio.get_running_loop().create_future()
    node.pause = lambda operation: gate
    for _ in range(3):
        await client.send(pack_request(Command.FLUSH, 0, 0) * 8)
        await settled()
    gate.set_result(None)
    for _ in range(24):
        await client.reply()
    assert caplog.text.count("more than 1048576 bytes of replies are unread") == 1
    assert caplog.text.count("paused: 4 requests are in flight, the limit") == 1


async def test_options_that_exceed_limits_are_logged(
    serve: Serve, caplog: pytest.LogCaptureFixture
) -> None:
    served = serve(MemoryNode(MIB), limits=Limits(wire=WireLimits(queries_max=2)))
    client = await served.connect()
    await client.receive(18)
    await client.send(HELLO)
    for _ in range(3):
        queries = b"\0\0\0\5base:" * 3
        await client.option(Option.LIST_META_CONTEXT, b"\0\0\0\1x\0\0\0\3" + queries)
        assert (await client.option_reply())[0] == OptionReply.ERR_TOO_BIG
    for length in range(300_000, 300_050):
        await client.option(Option.INFO, bytes(length))
        assert (await client.option_reply())[0] == OptionReply.ERR_TOO_BIG
    assert caplog.text.count("option 9 refused: 3 queries are too many, 2 are allowed") == 1
    assert caplog.text.count("bytes of data are too many") == LIMITS_LOGGED_MAX - 1


async def test_pipelined_options_are_all_answered(serve: Serve) -> None:
    """More replies than may wait at one time, for a client that sent all its options at once."""
    served = serve([export_of(MemoryNode(MIB), description="d" * 4000)])
    client = await served.connect()
    await client.receive(18)
    count = 500
    await client.send(HELLO + (b"IHAVEOPT" + struct.pack(">II", Option.LIST, 0)) * count)
    for _ in range(count):
        assert (await client.option_reply())[0] == OptionReply.SERVER
        assert (await client.option_reply())[0] == OptionReply.ACK


HELLO = struct.pack(">I", 3)
GO = b"IHAVEOPT" + struct.pack(">III", Option.GO, 7, 1) + b"x\0\0"
SESSION = HELLO + GO + pack_request(Command.WRITE, 0, 64) + b"p" * 64


@pytest.mark.parametrize("hard", [False, True], ids=["closed", "reset"])
async def test_client_that_leaves_after_any_byte_leaves_nothing(serve: Serve, hard: bool) -> None:
    """CVE-2013-7441, CVE-2017-9524."""
    served = serve(MemoryNode(MIB))
    for length in range(len(SESSION) + 1):
        sock = socket.socket(socket.AF_UNIX)
        sock.connect(served.path)
        sock.sendall(SESSION[:length])
        if not hard:
            sock.shutdown(socket.SHUT_WR)
            await settled(3)
        sock.close()
    await settled()
    await served.server.wait_idle()
    assert await (await served.open()).read(0, 64) == (bytes(64) if hard else b"p" * 64)


async def test_reset_on_tcp_with_replies_pending_leaves_nothing(serve: Serve) -> None:
    """CVE-2017-10664."""
    served = serve(MemoryNode(4 * MIB))
    ours, theirs = tcp_pair()
    served.server.add_channel(SocketChannel(ours, "test"))
    client = Client(theirs)
    await client.negotiate()
    await flood(client, 500, 64 * KIB)
    theirs.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    theirs.close()
    await served.server.wait_idle()


def tcp_pair() -> tuple[socket.socket, socket.socket]:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        client = socket.create_connection(listener.getsockname())
        server, _ = listener.accept()
    client.setblocking(False)
    return server, client


async def test_client_that_leaves_with_requests_in_flight_lets_them_finish(serve: Serve) -> None:
    node = MemoryNode(MIB)
    served = serve(node)
    client = await served.open()
    gate = asyncio.get_running_loop().create_future()
    node.pause = lambda operation: gate
    await client.request(Command.WRITE, 0, payload=b"w" * 4096)
    await client.request(Command.READ, 0, 4096)
    await settled()
    client.close()
    await settled()
    assert len(served.server.connections) == 1
    gate.set_result(None)
    await served.server.wait_idle()
    assert node.content[:4096] == b"w" * 4096


async def test_long_read_ends_when_its_client_leaves(serve: Serve) -> None:
    node = MemoryNode(32 * MIB)
    served = serve(node, limits=Limits(queued_bytes_max=2 * MIB))
    client = await served.open()
    await client.request(Command.READ, 0, 32 * MIB)
    await settled(100)
    reads = []
    node.pause = lambda operation: reads.append(operation)
    client.close()
    await served.server.wait_idle()
    assert len(reads) <= 1


async def test_bug_of_ours_ends_one_connection_and_no_other(
    serve: Serve, caplog: pytest.LogCaptureFixture
) -> None:
    served = serve(MemoryNode(MIB))
    client, other = await served.open(), await served.open()
    connection, _ = served.server.connections

    def surprise(inbox: object) -> bool:
        raise KeyError("surprise")

    connection._phase.handle = surprise
    await client.request(Command.FLUSH)
    assert await client.is_at_end()
    assert "surprise" in caplog.text
    assert await other.read(0, 512) == bytes(512)


async def test_disconnect_lets_requests_finish_and_sends_their_replies(serve: Serve) -> None:
    """Requirement 112."""
    node = MemoryNode(MIB)
    client = await serve(node).open(structured=False)
    gate = asyncio.get_running_loop().create_future()
    node.pause = lambda operation: gate
    await client.request(Command.FLUSH, cookie=5)
    await client.request(Command.DISC)
    await client.request(Command.FLUSH, cookie=6)
    await settled()
    gate.set_result(None)
    assert (await client.reply()).cookie == 5
    assert await client.is_at_end()


async def test_half_closed_client_gets_its_replies(serve: Serve) -> None:
    client = await serve(MemoryNode(b"h" * MIB)).open(structured=False)
    await client.send(pack_request(Command.READ, 0, 300 * KIB) * 20)
    client.sock.shutdown(socket.SHUT_WR)
    for _ in range(20):
        assert (await client.reply(300 * KIB)).payload == b"h" * 300 * KIB
    assert await client.is_at_end()


async def test_wrong_magic_ends_the_connection_after_its_replies(serve: Serve) -> None:
    client = await serve(MemoryNode(MIB)).open(structured=False)
    await client.send(pack_request(Command.READ, 0, 512) + b"nonsense" * 10)
    assert (await client.reply(512)).payload == bytes(512)
    assert await client.is_at_end()


async def test_monstrous_write_ends_the_connection(serve: Serve) -> None:
    """CVE-2005-3534, CVE-2011-0530: no memory is taken for it."""
    served = serve(MemoryNode(MIB))
    client = await served.open()
    await client.request(Command.WRITE, 0, (1 << 32) - 1)
    assert await client.is_at_end()
    assert served.server.pool.taken_bytes < 4 * MIB


async def dribble(client: Client, data: bytes) -> None:
    for byte in data:
        await client.send(bytes([byte]))
        await asyncio.sleep(0.02)


async def test_handshake_has_a_time_limit(serve: Serve, caplog: pytest.LogCaptureFixture) -> None:
    """CVE-2024-7409: also for a client that dribbles."""
    served = serve(MemoryNode(MIB), limits=Limits(handshake_seconds=0.2))
    client = await served.connect()
    head = HELLO + b"IHAVEOPT" + struct.pack(">II", Option.LIST, 4096)
    with pytest.raises(ConnectionError):
        await dribble(client, head + b"x" * 4095)
    await served.server.wait_idle()
    assert "handshake not done after 0.2 s" in caplog.text


async def test_transmission_is_not_under_the_handshake_limit(serve: Serve) -> None:
    served = serve(MemoryNode(MIB), limits=Limits(handshake_seconds=30))
    client = await served.open()
    assert await client.read(0, 512) == bytes(512)
    (connection,) = served.server.connections
    assert connection._timer is None


async def test_idle_client_is_closed(serve: Serve, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    served = serve(MemoryNode(MIB), limits=Limits(idle_seconds=0.1))
    client = await served.open()
    assert await client.is_at_end()
    assert "idle for 0.1 s" in caplog.text


async def test_connections_are_limited(serve: Serve, caplog: pytest.LogCaptureFixture) -> None:
    served = serve(MemoryNode(MIB), limits=Limits(connections_max=2))
    first, _ = await served.open(), await served.open()
    third = await served.connect()
    assert await third.is_at_end()
    assert "2 are open, the limit" in caplog.text
    first.close()
    await settled()
    await served.open()


async def test_connections_of_an_export_are_limited(serve: Serve) -> None:
    one = export_of(MemoryNode(MIB), connections_max=1)
    served = serve([one, export_of(MemoryNode(MIB), "y")])
    await served.open("x")
    second = await served.connect()
    await second.receive(18)
    await second.send(HELLO + GO)
    kind, text = await second.option_reply()
    assert kind == OptionReply.ERR_POLICY
    assert b"the limit" in text
    await served.open("y")


async def test_thousand_clients_that_do_nothing_are_swept_away(serve: Serve) -> None:
    """CVE-2024-7409."""
    served = serve(MemoryNode(MIB), limits=Limits(connections_max=2000))
    sockets = []
    for _ in range(1000):
        sock = socket.socket(socket.AF_UNIX)
        sock.connect(served.path)
        sockets.append(sock)
        if len(sockets) % 100 == 0:
            await settled()
    await settled()
    assert len(served.server.connections) == 1000
    assert served.server.pool.taken_bytes == 0
    await served.server.shut_down(1)
    assert not served.server.connections
    for sock in sockets:
        sock.close()


async def test_idle_clients_hold_no_buffers(serve: Serve) -> None:
    served = serve(MemoryNode(MIB))
    for _ in range(20):
        client = await served.open()
        await client.read(0, 100 * KIB)
        await client.perform(Command.WRITE, 0, payload=bytes(100 * KIB))
    await settled()
    assert served.server.pool.taken_bytes == 0


async def test_failing_disk_does_not_flood_the_log(
    serve: Serve, caplog: pytest.LogCaptureFixture
) -> None:
    node = MemoryNode(MIB)

    def fail(operation: str, offset: int) -> None:
        raise OSError(5, "dead disk")

    node.fail = fail
    served = serve(node)
    client = await served.open()
    for _ in range(100):
        assert (await client.perform(Command.FLUSH)).error
    client.close()
    await served.server.wait_idle()
    assert caplog.text.count("dead disk") == FAILURES_LOGGED_MAX
    assert "90 more requests failed" in caplog.text


@pytest.mark.parametrize("read_only", [False, True], ids=["writable", "refused"])
@pytest.mark.parametrize("payload", [0, 512, 100 * KIB, MIB])
async def test_client_that_breaks_off_amid_a_request_is_noticed(
    serve: Serve, payload: int, read_only: bool
) -> None:
    """With a reply unread the socket is broken, which libuv tells once, together with the rest."""
    served = serve([export_of(MemoryNode(2 * MIB), read_only=read_only)])
    client = await served.open()
    await client.request(Command.READ, 0, 512)
    await settled()
    request = pack_request(Command.WRITE, 0, payload or 512) + bytes(payload)
    client.sock.send(request[: min(len(request), 64 * KIB) - 20])
    client.close()
    await until(lambda: not served.server.connections)
