"""The suite's own NBD client: it sends what it is told, right or wrong, and reads strictly.

States, and what leads from one to the next: connected (``greet``), greeted
(``send_client_flags``), haggling (``option``, ``go``, ``start_tls``), transmission (``call``,
``send``, ``receive``). Nothing stops a case from sending what does not belong to a state.

The client checks only what it needs to stay in step (magic, cookie, lengths); everything else
is for :mod:`conformance.checks` and the cases, so that one fault of a server fails the cases
that are about it and no others.
"""

from __future__ import annotations

import itertools
import ssl
import struct
from collections import deque
from collections.abc import Iterable

from conformance import wire
from conformance.errors import Violation, expect
from conformance.replies import (
    OPTION_REPLY_BYTES_MAX,
    Answer,
    ExportInfo,
    Form,
    OptionReply,
    Reply,
    ReplyChunk,
    Request,
)
from conformance.stream import TIMEOUT_SECONDS, Endpoint, Stream
from conformance.wire import Cmd, CmdFlag, HandshakeFlag, Option, name_of

ALL_FLAGS = HandshakeFlag.FIXED_NEWSTYLE | HandshakeFlag.NO_ZEROES
REPLIES_MAX = 100_000
"""Replies to one option, or chunks of one reply: more means that the server is in a loop."""
PAYLOAD_BYTES_MAX = 256 << 20
"""A chunk longer than this means that the stream is out of step."""


class Client:
    """One connection.

    Attributes:
        form: How requests are sent: compact, or extended after ``extend``.
        structured: Whether structured replies were agreed.
        export: What the last INFO or GO told.
        contexts: Selected contexts, id to name, of the last SET_META_CONTEXT.
    """

    def __init__(self, endpoint: Endpoint, timeout: float = TIMEOUT_SECONDS) -> None:
        self.stream = Stream(endpoint, timeout)
        self.handshake_flags = HandshakeFlag(0)
        self.client_flags = 0
        self.extended = False
        self.structured = False
        self.export = ExportInfo()
        self.contexts: dict[int, str] = {}
        self._cookies = itertools.count(0x1122334455660001)
        self._pending: dict[int, deque[Reply]] = {}

    def __enter__(self) -> Client:
        return self

    def __exit__(self, *_: object) -> None:
        self.stream.close()

    # --- handshake

    def greet(self) -> HandshakeFlag:
        """Read the greeting; the flags are not checked."""
        data = self.stream.receive(18, "greeting")
        magic, option_magic, flags = struct.unpack(">QQH", data)
        if (magic, option_magic) != (wire.NBDMAGIC, wire.IHAVEOPT):
            raise Violation(f"greeting {data!r}")
        self.handshake_flags = HandshakeFlag(flags)
        return self.handshake_flags

    def send_client_flags(self, flags: int) -> None:
        self.client_flags = flags
        self.stream.send(struct.pack(">I", flags))

    def handshake(self, flags: int = ALL_FLAGS) -> Client:
        self.greet()
        self.send_client_flags(flags)
        return self

    def send_option(self, option: int, data: bytes = b"", length: int | None = None) -> None:
        """Send an option; ``length`` is a lie where it is given."""
        size = len(data) if length is None else length
        self.stream.send(struct.pack(">QII", wire.IHAVEOPT, option, size) + data)

    def receive_option_reply(self, option: int) -> OptionReply:
        what = f"reply to {name_of(Option, option)}"
        data = self.stream.receive(20, what)
        magic, echoed, kind, length = struct.unpack(">QIII", data)
        if magic != wire.OPTION_REPLY_MAGIC or length > OPTION_REPLY_BYTES_MAX:
            raise Violation(f"{what}: header {data!r}")
        if echoed != option:
            raise Violation(f"{what}: echoes option {echoed:#x}")
        return OptionReply(kind, self.stream.receive(length, what))

    def receive_answer(self, option: int) -> Answer:
        replies = []
        for _ in range(REPLIES_MAX):
            replies.append(self.receive_option_reply(option))
            if replies[-1].is_final:
                return Answer(tuple(replies))
        raise Violation(f"{name_of(Option, option)}: no end after {REPLIES_MAX} replies")

    def option(self, option: int, data: bytes = b"", length: int | None = None) -> Answer:
        """Send an option and read its replies up to the final one."""
        self.send_option(option, data, length)
        return self.receive_answer(option)

    def info(self, name: str, requests: Iterable[int] = ()) -> Answer:
        return self.option(Option.INFO, pack_info(name, requests))

    def go(self, name: str, requests: Iterable[int] = (0, 1, 2, 3)) -> Answer:
        answer = self.option(Option.GO, pack_info(name, requests))
        if answer.acknowledged:
            self.export = ExportInfo.of(answer)
        return answer

    def agree_structured(self) -> bool:
        self.structured = self.option(Option.STRUCTURED_REPLY).acknowledged
        return self.structured

    def agree_extended(self) -> bool:
        self.extended = self.option(Option.EXTENDED_HEADERS).acknowledged
        return self.extended

    def list_contexts(self, name: str, queries: Iterable[str] = ()) -> Answer:
        return self.option(Option.LIST_META_CONTEXT, pack_queries(name, queries))

    def set_contexts(self, name: str, queries: Iterable[str]) -> Answer:
        answer = self.option(Option.SET_META_CONTEXT, pack_queries(name, queries))
        self.contexts = dict(answer.contexts) if answer.acknowledged else {}
        return answer

    def start_tls(self, context: ssl.SSLContext) -> None:
        answer = self.option(Option.STARTTLS)
        expect(answer.acknowledged, f"STARTTLS answered {answer}")
        self.stream.start_tls(context)

    def enter_by_name(self, name: str) -> bytes:
        """EXPORT_NAME; returns the padding that was sent (124 bytes, or none)."""
        self.send_option(Option.EXPORT_NAME, name.encode())
        size, flags = struct.unpack(">QH", self.stream.receive(10, "export's size and flags"))
        self.export = ExportInfo(size=size, flags=wire.Flag(flags))
        if self.client_flags & self.handshake_flags & HandshakeFlag.NO_ZEROES:
            return b""
        return self.stream.receive(124, "padding after EXPORT_NAME")

    # --- transmission

    def request(
        self,
        kind: int,
        offset: int = 0,
        length: int = 0,
        flags: int = 0,
        payload: bytes = b"",
        cookie: int | None = None,
    ) -> Request:
        """Build a request; WRITE takes its length, and with extended headers its flag, itself."""
        if kind == Cmd.WRITE and not length:
            length = len(payload)
        if kind == Cmd.WRITE and self.extended:
            flags |= CmdFlag.PAYLOAD_LEN
        return Request(
            kind, offset, length, flags, next(self._cookies) if cookie is None else cookie, payload
        )

    def send(self, *requests: Request) -> None:
        """Send requests in one write; their replies become due."""
        for request in requests:
            if request.type != Cmd.DISC:
                self._pending.setdefault(request.cookie, deque()).append(Reply(request))
        self.stream.send(b"".join(map(self.pack, requests)))

    def pack(self, request: Request) -> bytes:
        magic, form = wire.REQUEST_MAGIC, ">IHHQQI"
        if self.extended:
            magic, form = wire.EXTENDED_REQUEST_MAGIC, ">IHHQQQ"
        header = struct.pack(
            form,
            magic,
            request.flags,
            request.type,
            request.cookie,
            request.offset,
            request.length,
        )
        return header + request.payload

    def receive(self) -> Reply:
        """Read chunks until one reply, to whichever request, is complete."""
        for _ in range(REPLIES_MAX):
            chunk, due = self._receive_chunk()
            due[0].chunks.append(chunk)
            if chunk.is_done:
                reply = due.popleft()
                if not due:
                    del self._pending[chunk.cookie]
                return reply
        raise Violation(f"no end of a reply after {REPLIES_MAX} chunks")

    def call(
        self, kind: int, offset: int = 0, length: int = 0, flags: int = 0, payload: bytes = b""
    ) -> Reply:
        """Send one request and read its reply."""
        self.send(self.request(kind, offset, length, flags, payload))
        return self.receive()

    def read(self, offset: int, length: int, flags: int = 0) -> bytes:
        """READ that has to succeed."""
        reply = self.call(Cmd.READ, offset, length, flags)
        expect(not reply.error, str(reply))
        return reply.data

    def write(self, offset: int, data: bytes, flags: int = 0) -> None:
        """WRITE that has to succeed."""
        reply = self.call(Cmd.WRITE, offset, len(data), flags, data)
        expect(not reply.error, str(reply))

    def disconnect(self) -> None:
        self.send(self.request(Cmd.DISC))

    def _receive_chunk(self) -> tuple[ReplyChunk, deque[Reply]]:
        """One chunk, and the replies that wait for its cookie, the oldest first."""
        header = self.stream.receive(16, "reply")
        magic = int.from_bytes(header[:4], "big")
        if magic == wire.SIMPLE_REPLY_MAGIC:
            _, error, cookie = struct.unpack(">IIQ", header)
            due = self._due(cookie, header)
            return self._simple_chunk(error, cookie, due[0].request), due
        if magic == wire.CHUNK_MAGIC:
            return self._chunk(Form.STRUCTURED, header + self.stream.receive(4, "chunk"))
        if magic == wire.EXTENDED_REPLY_MAGIC:
            return self._chunk(Form.EXTENDED, header + self.stream.receive(16, "chunk"))
        raise Violation(f"reply header {header!r}")

    def _simple_chunk(self, error: int, cookie: int, request: Request) -> ReplyChunk:
        length = request.length if request.type == Cmd.READ and not error else 0
        payload = self.stream.receive(length, f"payload of {request}")
        return ReplyChunk(Form.SIMPLE, 0, 0, cookie, request.offset, payload, error)

    def _chunk(self, form: Form, header: bytes) -> tuple[ReplyChunk, deque[Reply]]:
        offset = 0
        if form is Form.STRUCTURED:
            _, flags, kind, cookie, length = struct.unpack(">IHHQI", header)
        else:
            _, flags, kind, cookie, offset, length = struct.unpack(">IHHQQQ", header)
        due = self._due(cookie, header)
        if length > PAYLOAD_BYTES_MAX:
            raise Violation(f"chunk of {length:#x} bytes for {due[0].request}")
        payload = self.stream.receive(length, f"chunk for {due[0].request}")
        return ReplyChunk(form, flags, kind, cookie, offset, payload), due

    def _due(self, cookie: int, header: bytes) -> deque[Reply]:
        try:
            return self._pending[cookie]
        except KeyError:
            raise Violation(f"reply to cookie {cookie:#x}, which is not due: {header!r}") from None


def pack_info(name: str, requests: Iterable[int] = ()) -> bytes:
    """The data of INFO and GO: name's length, name, count of requests, requests."""
    raw, asked = name.encode(), list(requests)
    return struct.pack(f">I{len(raw)}sH{len(asked)}H", len(raw), raw, len(asked), *asked)


def pack_queries(name: str, queries: Iterable[str]) -> bytes:
    """The data of LIST_META_CONTEXT and SET_META_CONTEXT."""
    asked = list(queries)
    parts = [pack_string(name), struct.pack(">I", len(asked)), *map(pack_string, asked)]
    return b"".join(parts)


def pack_string(text: str) -> bytes:
    raw = text.encode()
    return struct.pack(">I", len(raw)) + raw
