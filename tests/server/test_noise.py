"""Random and nearly valid bytes on a real connection, while others work."""

from __future__ import annotations

import asyncio
import gc
import os
import socket
import struct
import tracemalloc
from collections.abc import Callable

import pytest
import uvloop
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from nbdfleece.export.export import ExportTable
from nbdfleece.nbd.constants import CommandFlag, Option
from nbdfleece.nbd.requests import EXTENDED_REQUEST, REQUEST
from nbdfleece.server.channel import SocketChannel
from nbdfleece.server.limits import Limits
from nbdfleece.server.server import NbdServer
from nbdfleece.testing.memory_node import MemoryNode

from .conftest import debug_loop
from .harness import Client, export_of

KIB, MIB = 1 << 10, 1 << 20
END_SECONDS = 60.0
POOL_BYTES_MAX = 16 * MIB

Loop = Callable[[], asyncio.AbstractEventLoop]


# What clients send, right or nearly so.

numbers = st.sampled_from([0, 1, 2, 511, 512, 4096, 65536, MIB - 1, MIB, MIB + 1, 1 << 31]) | (
    st.integers(0, (1 << 32) - 1)
)
offsets = numbers | st.sampled_from([(1 << 63) - 1, 1 << 63, (1 << 64) - 1])
names = st.sampled_from([b"x", b"y", b"", b"none", b"\xff\0", b"n" * 4096, b"n" * 5000])
queries = st.lists(
    st.sampled_from([b"base:allocation", b"base:", b"qemu:", b"qemu:allocation-depth", b":", b""]),
    max_size=4,
)


def counted(data: bytes, length: int | None = None) -> bytes:
    return struct.pack(">I", len(data) if length is None else length) + data


def option(number: int, data: bytes, length: int | None = None) -> bytes:
    return b"IHAVEOPT" + struct.pack(">I", number) + counted(data, length)


def info(name: bytes, types: list[int]) -> bytes:
    return counted(name) + struct.pack(f">H{len(types)}H", len(types), *types)


def contexts(name: bytes, asked: list[bytes]) -> bytes:
    return counted(name) + struct.pack(">I", len(asked)) + b"".join(map(counted, asked))


plain_options = st.builds(
    option,
    st.sampled_from([2, 3, 4, 5, 8, 11, 99]),
    st.sampled_from([b"", b"data"]),
    st.none() | numbers,
)
info_options = st.builds(
    lambda number, name, types: option(number, info(name, types)),
    st.sampled_from([Option.INFO, Option.GO]),
    names,
    st.lists(st.integers(0, 4), max_size=4),
)
context_options = st.builds(
    lambda number, name, asked: option(number, contexts(name, asked)),
    st.sampled_from([Option.LIST_META_CONTEXT, Option.SET_META_CONTEXT]),
    names,
    queries,
)
name_options = st.builds(option, st.just(int(Option.EXPORT_NAME)), names)
options = plain_options | info_options | context_options | name_options


def request(extended: bool, flags: int, command: int, offset: int, length: int) -> bytes:
    if not extended:
        return REQUEST.pack(0x25609513, flags, command, 7, offset, length & 0xFFFFFFFF)
    return EXTENDED_REQUEST.pack(0x21E41C71, flags, command, 7, offset, length)


requests = st.builds(
    lambda extended, flags, command, offset, length, has_payload: (
        request(extended, flags, command, offset, length) + bytes(min(length, 70000)) * has_payload
    ),
    st.booleans(),
    st.sampled_from([0, 0, 0, *(int(flag) for flag in CommandFlag), 0xFFFF]),
    st.sampled_from([0, 0, 1, 1, 3, 4, 5, 6, 7, 7, 8, 2, 99]),
    offsets,
    offsets,
    st.booleans(),
)
status_payloads = st.builds(
    lambda offset, effect, ids, length: (
        request(True, int(CommandFlag.PAYLOAD_LEN), 7, offset, length or 8 + 4 * len(ids))
        + struct.pack(f">Q{len(ids)}I", effect, *ids)
    ),
    offsets,
    offsets,
    st.lists(st.sampled_from([0, 1, 2, (1 << 32) - 1]), max_size=3),
    st.sampled_from([None, None, 8, 9, 12, 16]),
)
"""With extended headers: contexts by their ids, some twice or unknown, some cut off."""

HELLO = st.sampled_from([b"\0\0\0\3", b"\0\0\0\3", b"\0\0\0\1", b"\0\0\0\0", b"\xff\xff\xff\xff"])
GO = option(Option.GO, info(b"x", []))
PREPARED = st.sampled_from(
    [
        b"",
        option(Option.STRUCTURED_REPLY, b""),
        option(Option.EXTENDED_HEADERS, b""),
        option(Option.STRUCTURED_REPLY, b"")
        + option(Option.SET_META_CONTEXT, contexts(b"x", [b"base:allocation"])),
        option(Option.EXTENDED_HEADERS, b"")
        + option(
            Option.SET_META_CONTEXT,
            contexts(b"x", [b"base:allocation", b"qemu:allocation-depth"]),
        ),
    ]
)
sessions = (
    st.binary(max_size=200)
    | st.tuples(HELLO, st.lists(options, max_size=6).map(b"".join)).map(b"".join)
    | st.tuples(
        st.just(b"\0\0\0\3"),
        PREPARED,
        st.just(GO),
        st.lists(requests | status_payloads, max_size=12).map(b"".join),
    ).map(b"".join)
)


@st.composite
def spoilt(draw: st.DrawFn) -> bytes:
    """A session in which something may have been changed, lost, repeated or cut off."""
    data = bytearray(draw(sessions))
    for _ in range(draw(st.integers(0, 3))):
        if not data:
            break
        place = draw(st.integers(0, len(data) - 1))
        length = draw(st.integers(1, 40))
        how = draw(st.sampled_from(["change", "lose", "repeat", "cut"]))
        if how == "change":
            data[place] ^= 1 << draw(st.integers(0, 7))
        elif how == "lose":
            del data[place : place + length]
        elif how == "repeat":
            data[place:place] = data[place : place + length]
        else:
            del data[place:]
    return bytes(data)


# The connection under it.


async def send_in_slices(sock: socket.socket, data: bytes, sizes: list[int]) -> None:
    """Send as long as the server listens; read nothing."""
    loop = asyncio.get_running_loop()
    position = 0
    while position < len(data):
        size = sizes[position % len(sizes)]
        try:
            await asyncio.wait_for(
                loop.sock_sendall(sock, data[position : position + size]), END_SECONDS
            )
        except ConnectionError:
            return
        position += size
        await asyncio.sleep(0)


async def read_to_the_end(sock: socket.socket) -> None:
    loop = asyncio.get_running_loop()
    async with asyncio.timeout(END_SECONDS):
        try:
            while await loop.sock_recv(sock, MIB):
                pass
        except ConnectionError:
            return


def pair() -> tuple[socket.socket, socket.socket]:
    ours, theirs = socket.socketpair()
    theirs.setblocking(False)
    return ours, theirs


async def attack(data: bytes, sizes: list[int], *, waits: bool = True) -> None:
    """One hostile connection beside one that works; afterwards nothing of it is left.

    Args:
        data: What it sends.
        sizes: In which slices.
        waits: Whether it reads what is left for it at the end, or is gone at once.
    """
    before = len(os.listdir("/proc/self/fd"))
    nodes = [MemoryNode(MIB), MemoryNode(b"y" * MIB)]
    exports = ExportTable([export_of(nodes[0]), export_of(nodes[1], "y", read_only=True)])
    server = NbdServer(exports, limits=Limits(closing_seconds=1.0))
    ours, theirs = pair()
    server.add_channel(SocketChannel(ours, "other"))
    other = Client(theirs)
    await other.negotiate("y")
    ours, theirs = pair()
    server.add_channel(SocketChannel(ours, "hostile"))
    sending = asyncio.ensure_future(send_in_slices(theirs, data, sizes))
    while not sending.done():
        assert await other.read(4096, 4096) == b"y" * 4096
        assert server.pool.taken_bytes <= POOL_BYTES_MAX
    await sending
    if waits:
        theirs.shutdown(socket.SHUT_WR)
        await read_to_the_end(theirs)
    theirs.close()
    assert await other.read(0, 512) == b"y" * 512
    other.close()
    async with asyncio.timeout(END_SECONDS):
        await server.wait_idle()
    assert server.pool.taken_bytes == 0
    assert asyncio.all_tasks() == {asyncio.current_task()}
    assert nodes[1].content == b"y" * MIB
    await asyncio.sleep(0)
    assert len(os.listdir("/proc/self/fd")) <= before


@pytest.mark.parametrize("loop", [debug_loop, uvloop.new_event_loop], ids=["asyncio", "uvloop"])
@settings(
    max_examples=150,
    deadline=None,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large],
)
@given(
    data=spoilt(),
    sizes=st.lists(st.sampled_from([1, 3, 28, 1000, 1 << 20]), min_size=1),
    waits=st.booleans(),
)
def test_noise_harms_nobody_and_leaves_nothing(
    loop: Loop, data: bytes, sizes: list[int], waits: bool
) -> None:
    """CVE-2017-7539, and what is not known yet."""
    if len(data) > 2000:
        sizes = [1000, 1 << 20]  # byte by byte it would take for ever
    with asyncio.Runner(loop_factory=loop) as runner:
        runner.run(attack(data, sizes, waits=waits))


GROWTH_BYTES_MAX = 256 * KIB


def test_memory_does_not_grow_with_the_number_of_hostile_clients() -> None:
    """Rule 5, counted: what a connection takes it gives back."""
    noise = [
        b"\0\0\0\3" + option(Option.LIST, b"") * 50,
        b"\0\0\0\3" + option(Option.GO, info(b"n" * 4096, [])) * 20,
        b"\0\0\0\3" + GO + request(False, 0, 0, 0, MIB) * 30,
        b"\0\0\0\3" + GO + request(False, 0, 1, 0, MIB)[:-1],
        b"\0\0\0\3" + GO + request(False, 0, 1, 0, 700_000) + bytes(400_000),
        b"IHAVEOPT" * 100,
    ]

    async def rounds(count: int) -> None:
        for _ in range(count):
            for data in noise:
                await attack(data, [1 << 20])

    with asyncio.Runner() as runner:
        runner.run(rounds(3))
        tracemalloc.start()
        try:
            runner.run(rounds(2))
            gc.collect()
            before, _ = tracemalloc.get_traced_memory()
            runner.run(rounds(8))
            gc.collect()
            after, _ = tracemalloc.get_traced_memory()
        finally:
            tracemalloc.stop()
    assert after - before < GROWTH_BYTES_MAX
