"""What came back: option replies, and replies of the transmission phase, as they were sent."""

from __future__ import annotations

import struct
from dataclasses import dataclass, field
from enum import Enum

from conformance import wire
from conformance.errors import Violation
from conformance.wire import Chunk, Cmd, Errno, Info, Rep, name_of

_NO_FLAGS = wire.Flag(0)
_NO_FLAGS = wire.Flag(0)
OPTION_REPLY_BYTES_MAX = 1 << 20
"""No reply of any option comes near; a longer one means that the stream is out of step."""


@dataclass(frozen=True)
class OptionReply:
    type: int
    data: bytes

    @property
    def is_error(self) -> bool:
        return bool(self.type >> 31)

    @property
    def is_final(self) -> bool:
        return self.is_error or self.type == Rep.ACK

    def __str__(self) -> str:
        text = self.data.decode("utf-8", "backslashreplace") if self.is_error else ""
        return name_of(Rep, self.type) + (f" {text[:80]!r}" if text else "")


@dataclass(frozen=True)
class Answer:
    """All replies to one option, the final one (ACK or error) last."""

    replies: tuple[OptionReply, ...]

    @property
    def final(self) -> OptionReply:
        return self.replies[-1]

    @property
    def type(self) -> int:
        return self.final.type

    @property
    def acknowledged(self) -> bool:
        return self.type == Rep.ACK

    @property
    def infos(self) -> list[tuple[int, bytes]]:
        """(type, payload) of each INFO reply; a payload too short for a type is a violation."""
        found = []
        for reply in self.of(Rep.INFO):
            if len(reply.data) < 2:
                raise Violation(f"INFO reply of {len(reply.data)} bytes")
            found.append((struct.unpack_from(">H", reply.data)[0], reply.data[2:]))
        return found

    @property
    def contexts(self) -> list[tuple[int, str]]:
        """(id, name) of each META_CONTEXT reply."""
        found = []
        for reply in self.of(Rep.META_CONTEXT):
            if len(reply.data) < 5:
                raise Violation(f"META_CONTEXT reply of {len(reply.data)} bytes")
            try:
                name = reply.data[4:].decode()
            except UnicodeDecodeError as error:
                raise Violation(f"context name is not UTF-8: {reply.data[4:]!r}") from error
            found.append((struct.unpack_from(">I", reply.data)[0], name))
        return found

    @property
    def names(self) -> set[str]:
        return {name for _, name in self.contexts}

    @property
    def exports(self) -> list[tuple[str, bytes]]:
        """(name, rest) of each SERVER reply."""
        found = []
        for reply in self.of(Rep.SERVER):
            length = int.from_bytes(reply.data[:4], "big") if len(reply.data) >= 4 else -1
            if not 0 <= length <= len(reply.data) - 4:
                raise Violation(f"SERVER reply: name of {length} in {len(reply.data)} bytes")
            found.append((reply.data[4 : 4 + length].decode(), reply.data[4 + length :]))
        return found

    def of(self, kind: Rep) -> list[OptionReply]:
        return [reply for reply in self.replies if reply.type == kind]

    def __str__(self) -> str:
        return ", ".join(map(str, self.replies[-8:]))


@dataclass
class ExportInfo:
    """What INFO or GO told about an export; None where it did not."""

    size: int = -1
    flags: wire.Flag = _NO_FLAGS
    name: bytes | None = None
    description: bytes | None = None
    block_sizes: tuple[int, int, int] | None = None

    @classmethod
    def of(cls, answer: Answer) -> ExportInfo:
        made = cls()
        for kind, payload in answer.infos:
            made._take(kind, payload)
        return made

    def _take(self, kind: int, payload: bytes) -> None:
        if kind == Info.EXPORT and len(payload) == 10:
            self.size, flags = struct.unpack(">QH", payload)
            self.flags = wire.Flag(flags)
        elif kind == Info.BLOCK_SIZE and len(payload) == 12:
            self.block_sizes = struct.unpack(">III", payload)
        elif kind == Info.NAME:
            self.name = payload
        elif kind == Info.DESCRIPTION:
            self.description = payload
        elif kind in (Info.EXPORT, Info.BLOCK_SIZE):
            raise Violation(f"{name_of(Info, kind)} with {len(payload)} bytes after its type")

    @property
    def minimum(self) -> int:
        return self.block_sizes[0] if self.block_sizes else 1

    @property
    def payload_max(self) -> int:
        return self.block_sizes[2] if self.block_sizes else wire.DEFAULT_PAYLOAD_BYTES_MAX


@dataclass(frozen=True)
class Request:
    """One request as sent; ``length`` is the header's (of the effect, or of the payload)."""

    type: int
    offset: int
    length: int
    flags: int
    cookie: int
    payload: bytes = b""

    def __str__(self) -> str:
        flags = f" flags {self.flags:#x}" if self.flags else ""
        return f"{name_of(Cmd, self.type)} {self.offset:#x}+{self.length:#x}{flags}"


class Form(Enum):
    SIMPLE = "simple"
    STRUCTURED = "structured"
    EXTENDED = "extended"


@dataclass(frozen=True)
class ReplyChunk:
    """One message: a simple reply is one chunk with an error number, or with READ's data."""

    form: Form
    flags: int
    type: int
    cookie: int
    offset: int
    payload: bytes
    error: int = 0

    @property
    def is_error(self) -> bool:
        return self.error != 0 if self.form is Form.SIMPLE else bool(self.type >> 15)

    @property
    def is_done(self) -> bool:
        return self.form is Form.SIMPLE or bool(self.flags & wire.CHUNK_FLAG_DONE)


@dataclass
class Reply:
    """All chunks of the reply to one request, in the order in which they came."""

    request: Request
    chunks: list[ReplyChunk] = field(default_factory=list)

    @property
    def simple(self) -> bool:
        return self.chunks[0].form is Form.SIMPLE

    @property
    def error(self) -> int:
        """The first error's number, or 0."""
        return next((error_of(chunk) for chunk in self.chunks if chunk.is_error), 0)

    @property
    def error_name(self) -> str:
        return name_of(Errno, self.error) if self.error else "success"

    @property
    def text(self) -> str:
        return next((error_text(chunk) for chunk in self.chunks if chunk.is_error), "")

    @property
    def error_offsets(self) -> list[int]:
        return [
            int.from_bytes(chunk.payload[-8:], "big")
            for chunk in self.chunks
            if chunk.type == Chunk.ERROR_OFFSET and chunk.form is not Form.SIMPLE
        ]

    @property
    def content(self) -> list[tuple[int, bytes]]:
        """(offset, bytes) of each data or hole chunk; a hole is zeroes."""
        return [part for chunk in self.chunks if (part := content_of(self.request, chunk))]

    @property
    def data(self) -> bytes:
        """READ's bytes; gaps and overlaps are violations."""
        position, parts = self.request.offset, []
        for offset, data in sorted(self.content):
            if offset != position:
                raise Violation(f"{self.request}: content at {offset:#x}, due {position:#x}")
            parts.append(data)
            position += len(data)
        if position != self.request.offset + self.request.length:
            raise Violation(f"{self.request}: content ends at {position:#x}")
        return b"".join(parts)

    @property
    def extents(self) -> dict[int, list[tuple[int, int]]]:
        """(length, status) of each extent by context id; a repeated id is a violation."""
        found: dict[int, list[tuple[int, int]]] = {}
        for chunk in self.chunks:
            if chunk.form is Form.SIMPLE or chunk.is_error or chunk.type == Chunk.NONE:
                continue
            context_id, extents = unpack_extents(chunk)
            if context_id in found:
                raise Violation(f"{self.request}: two chunks for context {context_id}")
            found[context_id] = extents
        return found

    def __str__(self) -> str:
        text = f" {self.text[:80]!r}" if self.text else ""
        return f"{self.request}: {self.error_name}{text}"


def error_of(chunk: ReplyChunk) -> int:
    if chunk.form is Form.SIMPLE:
        return chunk.error
    if len(chunk.payload) < 6:
        raise Violation(f"error chunk of {len(chunk.payload)} bytes")
    return int.from_bytes(chunk.payload[:4], "big")


def error_text(chunk: ReplyChunk) -> str:
    if chunk.form is Form.SIMPLE or len(chunk.payload) < 6:
        return ""
    length = int.from_bytes(chunk.payload[4:6], "big")
    return chunk.payload[6 : 6 + length].decode("utf-8", "backslashreplace")


def content_of(request: Request, chunk: ReplyChunk) -> tuple[int, bytes] | None:
    if chunk.form is Form.SIMPLE:
        return None if chunk.is_error else (request.offset, chunk.payload)
    if chunk.type == Chunk.OFFSET_DATA and len(chunk.payload) >= 8:
        return int.from_bytes(chunk.payload[:8], "big"), chunk.payload[8:]
    if chunk.type == Chunk.OFFSET_HOLE and len(chunk.payload) == 12:
        offset, length = struct.unpack(">QI", chunk.payload)
        if length > request.length:
            raise Violation(f"{request}: hole of {length:#x} bytes")
        return offset, bytes(length)
    return None


def unpack_extents(chunk: ReplyChunk) -> tuple[int, list[tuple[int, int]]]:
    """The context id and (length, status) pairs of a BLOCK_STATUS or BLOCK_STATUS_EXT chunk."""
    size, head, form = (16, 8, ">QQ") if chunk.type == Chunk.BLOCK_STATUS_EXT else (8, 4, ">II")
    body = chunk.payload[head:]
    known = chunk.type in (Chunk.BLOCK_STATUS, Chunk.BLOCK_STATUS_EXT)
    if not known or len(chunk.payload) < head or len(body) % size:
        raise Violation(f"{name_of(Chunk, chunk.type)} chunk of {len(chunk.payload)} bytes")
    return int.from_bytes(chunk.payload[:4], "big"), list(struct.iter_unpack(form, body))
