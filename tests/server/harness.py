"""A server in this process, and a client that speaks NBD by hand over a raw socket."""

from __future__ import annotations

import asyncio
import itertools
import socket
import struct
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from nbdfleece.block.node import BlockNode
from nbdfleece.export.contexts import AllocationDepth, BaseAllocation
from nbdfleece.export.export import Export, ExportTable
from nbdfleece.nbd.constants import Command, Option, OptionReply, ReplyType
from nbdfleece.nbd.requests import REQUEST
from nbdfleece.server.listener import listen_unix
from nbdfleece.server.server import NbdServer

GREETING_BYTES = 18
SECONDS_MAX = 60.0
"""For what must happen, however little of the processor there is."""
_names = itertools.count()


def export_of(node: BlockNode, name: str = "x", **more: object) -> Export:
    contexts = (BaseAllocation(node), AllocationDepth(node))
    settings = {"read_only": False, "can_trim": True, "contexts": contexts} | more
    return Export(name=name, node=node, **settings)


async def settled(turns: int = 20) -> None:
    """Let everything happen that can happen without input from outside."""
    for _ in range(turns):
        await asyncio.sleep(0)


@dataclass
class Served:
    server: NbdServer
    path: str
    clients: list[Client] = field(default_factory=list)

    async def connect(self) -> Client:
        """A client that has read the greeting."""
        sock = socket.socket(socket.AF_UNIX)
        sock.setblocking(False)
        client = Client(sock)
        self.clients.append(client)
        try:
            await client.loop.sock_connect(sock, self.path)
        except OSError:
            client.close()
            raise
        return client

    async def open(self, export: str = "x", **more: object) -> Client:
        """A client in its transmission phase."""
        client = await self.connect()
        await client.negotiate(export, **more)
        return client

    def uri(self, export: str = "x") -> str:
        return f"nbd+unix:///{export}?socket={self.path}"

    async def close(self) -> None:
        for client in self.clients:
            client.close()
        await self.server.shut_down(SECONDS_MAX)


@dataclass
class Serve:
    """Makes servers: ``served = serve(node)`` or ``serve([exports], limits=...)``."""

    place: Path
    served: list[Served]

    def __call__(self, exports: BlockNode | Iterable[Export], **settings: Any) -> Served:
        if isinstance(exports, BlockNode):
            exports = [export_of(exports)]
        server = NbdServer(ExportTable(exports), **settings)
        path = str(self.place / f"s{next(_names)}")
        server.add_listener(listen_unix(path))
        self.served.append(Served(server, path))
        return self.served[-1]


class Chunk(NamedTuple):
    """A simple reply (``kind`` is None), or one structured chunk."""

    cookie: int
    kind: int | None
    done: bool
    payload: bytes
    error: int = 0
    text: str = ""
    offset: int | None = None


class Client:
    """Reads and writes exactly what it is told."""

    def __init__(self, sock: socket.socket) -> None:
        self.sock = sock
        self.structured = False
        self.context_ids: dict[str, int] = {}
        self.loop = asyncio.get_running_loop()

    def close(self) -> None:
        self.sock.close()

    async def send(self, data: bytes) -> None:
        await self.loop.sock_sendall(self.sock, data)

    async def receive(self, length: int) -> bytes:
        data = bytearray()
        while len(data) < length:
            part = await self.loop.sock_recv(self.sock, length - len(data))
            if not part:
                raise EOFError(f"{len(data)} of {length} bytes")
            data += part
        return bytes(data)

    async def is_at_end(self) -> bool:
        """Whether the server has closed, with nothing more to read."""
        try:
            return not await self.loop.sock_recv(self.sock, 1)
        except ConnectionError:
            return True

    # The handshake.

    async def option(self, option: int, data: bytes = b"") -> None:
        await self.send(b"IHAVEOPT" + struct.pack(">II", option, len(data)) + data)

    async def option_reply(self) -> tuple[int, bytes]:
        _, _, kind, length = struct.unpack(">QIII", await self.receive(20))
        return kind, await self.receive(length)

    async def negotiate(
        self, export: str = "x", *, structured: bool = True, contexts: Iterable[str] = ()
    ) -> None:
        await self.receive(GREETING_BYTES)
        await self.send(struct.pack(">I", 3))
        if structured:
            await self.option(Option.STRUCTURED_REPLY)
            assert await self.option_reply() == (OptionReply.ACK, b"")
            self.structured = True
        name = export.encode()
        if contexts:
            await self._select(name, [context.encode() for context in contexts])
        await self.option(Option.GO, struct.pack(">I", len(name)) + name + b"\0\0")
        while (reply := await self.option_reply())[0] == OptionReply.INFO:
            pass
        assert reply == (OptionReply.ACK, b""), reply

    async def _select(self, name: bytes, contexts: list[bytes]) -> None:
        queries = b"".join(struct.pack(">I", len(query)) + query for query in contexts)
        head = struct.pack(">I", len(name)) + name + struct.pack(">I", len(contexts))
        await self.option(Option.SET_META_CONTEXT, head + queries)
        while (reply := await self.option_reply())[0] == OptionReply.META_CONTEXT:
            self.context_ids[reply[1][4:].decode()] = int.from_bytes(reply[1][:4], "big")
        assert reply[0] == OptionReply.ACK

    # Transmission.

    async def request(
        self,
        command: int,
        offset: int = 0,
        length: int = 0,
        *,
        cookie: int = 1,
        flags: int = 0,
        payload: bytes = b"",
    ) -> None:
        length = length or len(payload)
        await self.send(pack_request(command, offset, length, cookie=cookie, flags=flags) + payload)

    async def reply(self, length: int = 0) -> Chunk:
        """The next simple reply with ``length`` bytes of data, or the next chunk."""
        (magic,) = struct.unpack(">I", await self.receive(4))
        if magic == 0x67446698:
            error, cookie = struct.unpack(">IQ", await self.receive(12))
            return Chunk(cookie, None, True, b"" if error else await self.receive(length), error)
        assert magic == 0x668E33EF, hex(magic)
        flags, kind, cookie, size = struct.unpack(">HHQI", await self.receive(16))
        return _chunk(cookie, kind, bool(flags & 1), await self.receive(size))

    async def replies(self) -> list[Chunk]:
        """All chunks up to the one that ends a reply."""
        chunks = [await self.reply()]
        while not chunks[-1].done:
            chunks.append(await self.reply())
        return chunks

    async def read(self, offset: int, length: int, *, flags: int = 0) -> bytes:
        await self.request(Command.READ, offset, length, flags=flags)
        if not self.structured:
            return (await self.reply(length)).payload
        data = bytearray(length)
        for chunk in await self.replies():
            assert not chunk.error, chunk
            if chunk.offset is not None:
                begin = chunk.offset - offset
                data[begin : begin + len(chunk.payload)] = chunk.payload
        return bytes(data)

    async def perform(self, command: int, *args: int, **more: object) -> Chunk:
        """A request and its only reply."""
        await self.request(command, *args, **more)
        return await self.reply()


def _chunk(cookie: int, kind: int, done: bool, payload: bytes) -> Chunk:
    if kind in (ReplyType.ERROR, ReplyType.ERROR_OFFSET):
        error, size = struct.unpack_from(">IH", payload)
        text = payload[6 : 6 + size].decode()
        rest = payload[6 + size :]
        offset = int.from_bytes(rest, "big") if rest else None
        return Chunk(cookie, kind, done, b"", error, text, offset)
    if kind == ReplyType.OFFSET_HOLE:
        offset, length = struct.unpack(">QI", payload)
        return Chunk(cookie, kind, done, bytes(length), offset=offset)
    if kind == ReplyType.OFFSET_DATA:
        return Chunk(cookie, kind, done, payload[8:], offset=int.from_bytes(payload[:8], "big"))
    return Chunk(cookie, kind, done, payload)


def pack_request(
    command: int, offset: int, length: int, *, cookie: int = 1, flags: int = 0
) -> bytes:
    return REQUEST.pack(0x25609513, flags, command, cookie, offset, length)


def extents_of(chunk: Chunk) -> tuple[int, list[tuple[int, int]]]:
    """The context id of a block status chunk and its (length, status) pairs."""
    context_id, *words = struct.unpack(f">{len(chunk.payload) // 4}I", chunk.payload)
    return context_id, list(zip(words[::2], words[1::2], strict=True))
