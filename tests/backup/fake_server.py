"""An NBD server that can lie: negotiation and transmission in a few lines, all of it scripted.

It runs in the test's own event loop; libnbd is turned by the same loop.
"""

from __future__ import annotations

import asyncio
import contextlib
import struct
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass, field
from pathlib import Path

ALLOCATION = "base:allocation"
BITMAP = "qemu:dirty-bitmap:b0"

_OPTION_REPLY = 0x3E889045565A9
_REQUEST = struct.Struct(">IHHQQI")
_CHUNK = struct.Struct(">IHHQI")

_HAS_FLAGS = 1
_MULTI_CONN = 1 << 8
_SEND_DF = 1 << 7

Answers = list[tuple[str, list[tuple[int, int]]]]


@dataclass
class Script:
    """What the server says.

    Attributes:
        content: The disk.
        status: Extents by context for a request; what is said is sent as it is.
        contexts: What is offered.
        fails: Called with the number of the request (from 0) and its type; an errno, or None.
        hangs_up: Called likewise before the answer; True drops the connection.
        hangs: Called likewise; True keeps the connection and never says anything any more.
        hangs_at_once: Accept, and say nothing.
        connections: How many clients there were.
    """

    content: bytearray
    status: Callable[[int, int], Answers]
    contexts: list[str] = field(default_factory=lambda: [ALLOCATION, BITMAP])
    fails: Callable[[int, int], int | None] = lambda number, kind: None
    hangs_up: Callable[[int, int], bool] = lambda number, kind: False
    hangs: Callable[[int, int], bool] = lambda number, kind: False
    hangs_at_once: bool = False
    sizes: list[int] = field(default_factory=list)
    reads: list[tuple[int, int]] = field(default_factory=list)
    requests: int = 0
    connections: int = 0


READ, BLOCK_STATUS, DISCONNECT = 0, 7, 2


class _Client:
    """One connection."""

    def __init__(
        self, script: Script, reader: asyncio.StreamReader, writer: asyncio.StreamWriter
    ) -> None:
        self.script = script
        self.reader = reader
        self.writer = writer
        self.contexts: list[str] = []

    async def serve(self) -> None:
        try:
            with contextlib.suppress(asyncio.IncompleteReadError, ConnectionError):
                if await self._negotiate():
                    while await self._answer_request():
                        pass
        finally:
            self.writer.close()

    async def _negotiate(self) -> bool:
        if self.script.hangs_at_once:
            await asyncio.Event().wait()
        self.writer.write(b"NBDMAGICIHAVEOPT" + struct.pack(">H", 3))
        await self.reader.readexactly(4)
        while True:
            _, option, length = struct.unpack(">QII", await self.reader.readexactly(16))
            data = await self.reader.readexactly(length)
            if option == 7:  # GO
                size = self.script.sizes.pop(0) if self.script.sizes else len(self.script.content)
                flags = _HAS_FLAGS | _SEND_DF | _MULTI_CONN
                self._reply(option, 3, struct.pack(">HQH", 0, size, flags))
                self._reply(option, 1)
                return True
            if option == 8:  # STRUCTURED_REPLY
                self._reply(option, 1)
            elif option in (9, 10):  # LIST and SET_META_CONTEXT
                self._reply_contexts(option, data)
            elif option == 2:  # ABORT
                self._reply(option, 1)
                return False
            else:
                self._reply(option, 1 << 31 | 1)

    def _reply(self, option: int, kind: int, data: bytes = b"") -> None:
        self.writer.write(struct.pack(">QIII", _OPTION_REPLY, option, kind, len(data)) + data)

    def _reply_contexts(self, option: int, data: bytes) -> None:
        position = 4 + struct.unpack_from(">I", data)[0]
        (count,) = struct.unpack_from(">I", data, position)
        position += 4
        queries = []
        for _ in range(count):
            (length,) = struct.unpack_from(">I", data, position)
            queries.append(data[position + 4 : position + 4 + length].decode())
            position += 4 + length
        matches = [
            name
            for name in self.script.contexts
            if name in queries or (option == 9 and any(name.startswith(each) for each in queries))
        ]
        if option == 10:
            self.contexts = matches
        for name in matches:
            number = self.script.contexts.index(name)
            self._reply(option, 4, struct.pack(">I", number) + name.encode())
        self._reply(option, 1)

    async def _answer_request(self) -> bool:
        header = await self.reader.readexactly(_REQUEST.size)
        _, _, kind, cookie, offset, length = _REQUEST.unpack(header)
        if kind == DISCONNECT:
            return False
        number = self.script.requests
        self.script.requests += 1
        if self.script.hangs_up(number, kind):
            return False
        if self.script.hangs(number, kind):
            await asyncio.Event().wait()
        error = self.script.fails(number, kind)
        if error is not None:
            self._chunk(0x8001, cookie, struct.pack(">IH", error, 0), is_last=True)
        elif kind == READ:
            self.script.reads.append((offset, length))
            data = bytes(self.script.content[offset : offset + length])
            self._chunk(1, cookie, struct.pack(">Q", offset) + data, is_last=True)
        else:
            self._answer_status(cookie, offset, length)
        await self.writer.drain()
        return True

    def _answer_status(self, cookie: int, offset: int, length: int) -> None:
        answers = [
            (self.script.contexts.index(context), extents)
            for context, extents in self.script.status(offset, length)
            if context in self.contexts
        ]
        for left, (number, extents) in zip(reversed(range(len(answers))), answers, strict=True):
            words = [word for extent in extents for word in extent]
            data = struct.pack(f">I{len(words)}I", number, *words)
            self._chunk(5, cookie, data, is_last=not left)
        if not answers:
            self._chunk(0, cookie, b"", is_last=True)

    def _chunk(self, kind: int, cookie: int, data: bytes, *, is_last: bool) -> None:
        header = _CHUNK.pack(0x668E33EF, int(is_last), kind, cookie, len(data))
        self.writer.write(header + data)


def truthful(dirty: set[int], zero: set[int], size: int, block: int) -> Callable[..., Answers]:
    """Honest extents from the numbers of blocks that are dirty or zero."""

    def extents(marked: set[int], value: int, offset: int, length: int) -> list[tuple[int, int]]:
        found: list[tuple[int, int]] = []
        end = min(offset + length, size)
        while offset < end:
            stop = min(end, (offset // block + 1) * block)
            status = value if offset // block in marked else 0
            if found and found[-1][1] == status:
                found[-1] = (found[-1][0] + stop - offset, status)
            else:
                found.append((stop - offset, status))
            offset = stop
        return found

    def status(offset: int, length: int) -> Answers:
        return [
            (ALLOCATION, extents(zero, 3, offset, length)),
            (BITMAP, extents(dirty, 1, offset, length)),
        ]

    return status


@contextlib.asynccontextmanager
async def serving(script: Script, folder: Path) -> AsyncIterator[str]:
    """Serve a script; the value is the URI."""
    tasks: set[asyncio.Task[None]] = set()

    async def accept(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None
        tasks.add(task)
        script.connections += 1
        await _Client(script, reader, writer).serve()
        tasks.discard(task)

    path = folder / "fake.sock"
    server = await asyncio.start_unix_server(accept, path)
    try:
        yield f"nbd+unix:///?socket={path}"
    finally:
        server.close()
        for _ in range(5):
            await asyncio.sleep(0)  # who was accepted just now has a task after some turns
        for task in list(tasks):
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        await asyncio.sleep(0)  # transports close in the loop's next turn
        path.unlink(missing_ok=True)
