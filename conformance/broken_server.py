"""A small NBD server in memory that is right, or wrong in the ways that it is told.

Its purpose is to prove the suite: without faults every case passes on it or is not applicable,
and with a fault the case that is about it fails. Each fault is a word; what it breaks stands
where the word does. One thread per connection; requests are handled one after the other.
"""

from __future__ import annotations

import contextlib
import functools
import socket
import struct
import threading
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import NamedTuple, TypeVar

from conformance import wire
from conformance.case import READ_ONLY, WRITABLE, Export, Server
from conformance.content import DIRTY, FIRST_BITMAP, SMALL_DISK_BYTES, Content
from conformance.stream import TIMEOUT_SECONDS, Endpoint
from conformance.wire import Chunk, Cmd, CmdFlag, Errno, Flag, Info, Option, Rep

BASE = "base:allocation"
BITMAP = f"qemu:dirty-bitmap:{FIRST_BITMAP.name}"
IDS = {BASE: 1, BITMAP: 2}
OPTION_BYTES_MAX = 4 << 20
PAYLOAD_BYTES_MAX = 64 << 20
BLOCK = 65536
WRITES = (Cmd.WRITE, Cmd.TRIM, Cmd.WRITE_ZEROES)
Bytes = TypeVar("Bytes", bytes, memoryview)
FLAGS_OF = {
    Cmd.READ: CmdFlag.DF,
    Cmd.WRITE_ZEROES: CmdFlag.NO_HOLE | CmdFlag.FAST_ZERO,
    Cmd.BLOCK_STATUS: CmdFlag.REQ_ONE,
}


class Request(NamedTuple):
    flags: int
    type: int
    cookie: int
    offset: int
    length: int
    payload: bytes


class Refused(Exception):
    """A request in error: an error number and its text."""

    def __init__(self, error: Errno, text: str) -> None:
        super().__init__(text)
        self.error = error


class Malformed(Exception):
    """An option's data that does not parse."""


@functools.cache
def _small_disk() -> bytes:
    return Content(SMALL_DISK_BYTES).read(0, SMALL_DISK_BYTES)


class BrokenServer:
    """Listens on a Unix socket from construction to :meth:`close`."""

    def __init__(self, path: Path, faults: Iterable[str] = (), *, writable: bool = False) -> None:
        self.faults = frozenset(faults)
        self.writable = writable
        self.content = Content(SMALL_DISK_BYTES)
        self.disk = bytearray(_small_disk())
        self._zero: dict[int, bool] = {}
        self._path = path
        self._sessions: list[socket.socket] = []
        self._threads: list[threading.Thread] = []
        self._listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self._listener.bind(str(path))
        self._listener.listen(128)
        self._acceptor = threading.Thread(target=self._accept, daemon=True)
        self._acceptor.start()

    def handle(self, timeout: float = TIMEOUT_SECONDS) -> Server:
        """What a case is given."""
        dirty = {FIRST_BITMAP.name: DIRTY[FIRST_BITMAP.name]}
        content = None if self.writable else self.content
        export = Export("ex", SMALL_DISK_BYTES, self.writable, content, dirty)
        configuration = WRITABLE if self.writable else READ_ONLY
        endpoint = Endpoint(path=str(self._path))
        return Server("model", configuration, endpoint, (export,), timeout=timeout)

    def is_zero(self, block: int) -> bool:
        """Whether the block at this offset reads as zero."""
        if self.writable or block not in self._zero:
            self._zero[block] = self.disk.count(0, block, block + BLOCK) == BLOCK
        return self._zero[block]

    def close(self) -> None:
        """End; nothing of it runs on return.

        Each thread closes its own socket: closed from here, its number could be another's by
        the time that the thread reads from it.
        """
        self._end(self._listener)
        self._acceptor.join()
        self._listener.close()
        for session in self._sessions:
            self._end(session)
        for thread in self._threads:
            thread.join()

    @staticmethod
    def _end(sock: socket.socket) -> None:
        with contextlib.suppress(OSError):
            sock.shutdown(socket.SHUT_RDWR)

    def _accept(self) -> None:
        while True:
            try:
                connection, _ = self._listener.accept()
            except OSError:
                return  # closed
            self._sessions.append(connection)
            self._threads.append(
                threading.Thread(target=self._serve, args=(connection,), daemon=True)
            )
            self._threads[-1].start()

    def _serve(self, connection: socket.socket) -> None:
        with connection, contextlib.suppress(ConnectionError, OSError):
            Session(self, connection).run()


class Session:
    """One connection: handshake, haggling, transmission."""

    def __init__(self, server: BrokenServer, connection: socket.socket) -> None:
        self.server = server
        self.faults = server.faults
        self.connection = connection
        self.client_flags = 0
        self.structured = False
        self.extended = False
        self.selected: tuple[str, list[str]] = ("", [])
        self.contexts: list[str] = []

    def run(self) -> None:
        extra = 1 << 5 if "extra-handshake-flag" in self.faults else 0
        self.send(struct.pack(">QQH", wire.NBDMAGIC, wire.IHAVEOPT, 3 | extra))
        self.client_flags = int.from_bytes(self.receive(4))
        if self.client_flags & ~3 and "unknown-client-flag-accepted" not in self.faults:
            return
        while not self.option():
            pass
        while self.request():
            pass

    def send(self, data: bytes) -> None:
        self.connection.sendall(data)

    def receive(self, length: int) -> bytes:
        parts = bytearray()
        while len(parts) < length:
            piece = self.connection.recv(min(length - len(parts), 1 << 20))
            if not piece:
                raise ConnectionError("client closed")
            parts += piece
        return bytes(parts)

    # --- haggling

    def reply(self, option: int, kind: int, data: bytes = b"") -> None:
        if "wrong-option-echo" in self.faults:
            option ^= 1
        self.send(struct.pack(">QIII", wire.OPTION_REPLY_MAGIC, option, kind, len(data)) + data)

    def option(self) -> bool:
        """Handle one option; whether the transmission phase begins.

        Raises:
            ConnectionError: The session ends.
        """
        magic, option, length = struct.unpack(">QII", self.receive(16))
        if magic != wire.IHAVEOPT or length > OPTION_BYTES_MAX:
            raise ConnectionError("out of step")
        known = option in set(Option)
        data = b"" if not known and "data-not-skipped" in self.faults else self.receive(length)
        if option == Option.EXPORT_NAME:
            return self.export_name(data)
        if not self.client_flags & 1:
            raise ConnectionError("not fixed newstyle")
        try:
            return self.answer(option, data)
        except (Malformed, struct.error):
            if option == Option.SET_META_CONTEXT and "failed-set-keeps" not in self.faults:
                self.selected = ("", [])
            self.reply(option, Rep.ERR_INVALID, b"malformed")
            return False

    def answer(self, option: int, data: bytes) -> bool:
        if option in (Option.INFO, Option.GO):
            return self.info(option, data)
        if option in (Option.LIST_META_CONTEXT, Option.SET_META_CONTEXT):
            self.meta(option, data)
        elif option == Option.ABORT:
            if "abort-unanswered" not in self.faults:
                self.reply(option, Rep.ACK)
            raise ConnectionError("aborted")
        elif option == Option.STARTTLS:
            self.reply(option, Rep.ERR_POLICY, b"no TLS")
        elif option in (Option.LIST, Option.STRUCTURED_REPLY, Option.EXTENDED_HEADERS):
            self.plain(option, data)
        else:
            self.reply(option, Rep.ERR_UNSUP, b"unknown option")
        return False

    def plain(self, option: int, data: bytes) -> None:
        """Options without data."""
        if data and "data-ignored" not in self.faults:
            raise Malformed
        if option == Option.LIST:
            name = b"ex\0" if "nul-in-name" in self.faults else b"ex"
            self.reply(option, Rep.SERVER, struct.pack(">I", len(name)) + name)
        elif option == Option.STRUCTURED_REPLY:
            if self.extended:
                self.reply(option, Rep.ERR_EXT_HEADER_REQD, b"headers are extended")
                return
            self.structured = True
        else:
            self.extended = self.structured = True
        self.reply(option, Rep.ACK)

    def flags(self) -> int:
        flags = Flag.HAS_FLAGS | Flag.SEND_FLUSH | Flag.SEND_FUA | Flag.SEND_CACHE
        flags |= Flag.CAN_MULTI_CONN
        if self.server.writable:
            flags |= Flag.SEND_TRIM | Flag.SEND_WRITE_ZEROES | Flag.SEND_FAST_ZERO
        else:
            flags |= Flag.READ_ONLY
        if self.structured or "df-always-offered" in self.faults:
            flags |= Flag.SEND_DF
        if self.extended and self.contexts:
            flags |= Flag.BLOCK_STATUS_PAYLOAD
        if "no-has-flags" in self.faults:
            flags &= ~Flag.HAS_FLAGS
        if "writing-offered-read-only" in self.faults:
            flags |= Flag.SEND_WRITE_ZEROES
        return int(flags)

    def export_name(self, data: bytes) -> bool:
        known = data in (b"", b"ex") or "any-export-name" in self.faults
        if not known or self.extended:
            raise ConnectionError("no such export")
        self.choose("ex")
        self.send(struct.pack(">QH", len(self.server.disk), self.flags()))
        if not self.client_flags & 2 or "padding-always" in self.faults:
            self.send(bytes(124))
        return True

    def choose(self, name: str) -> None:
        self.contexts = self.selected[1] if self.selected[0] == name else []

    def info(self, option: int, data: bytes) -> bool:
        name, rest = take_string(data)
        (count,) = struct.unpack_from(">H", rest)
        if len(rest) != 2 + 2 * count:
            raise Malformed
        asked = struct.unpack_from(f">{count}H", rest, 2)
        if name not in (b"", b"ex"):
            if "info-before-unknown" in self.faults:
                self.reply(option, Rep.INFO, struct.pack(">H", Info.NAME) + name)
            self.reply(option, Rep.ERR_UNKNOWN, b"no such export")
            return False
        self.choose("ex")
        for body in self.infos(option, set(asked)):
            self.reply(option, Rep.INFO, body)
            if "info-twice" in self.faults:
                self.reply(option, Rep.INFO, body)
        self.reply(option, Rep.ACK)
        if option == Option.GO and "padding-after-go" in self.faults:
            self.send(bytes(124))
        return option == Option.GO

    def infos(self, option: int, asked: set[int]) -> Iterator[bytes]:
        size = len(self.server.disk)
        if option == Option.INFO and "info-size-zero" in self.faults:
            size = 0
        if "no-info-export" not in self.faults:
            yield struct.pack(">HQH", Info.EXPORT, size, self.flags())
        if Info.NAME in asked:
            yield struct.pack(">H", Info.NAME) + b"ex"
        if Info.BLOCK_SIZE in asked:
            preferred = 100 if "odd-preferred-size" in self.faults else 4096
            yield struct.pack(">HIII", Info.BLOCK_SIZE, 1, preferred, 32 << 20)

    def meta(self, option: int, data: bytes) -> None:
        is_set = option == Option.SET_META_CONTEXT
        if is_set and not self.structured and "set-without-structured" not in self.faults:
            raise Malformed
        name, queries = self.queries(data)
        if name not in (b"", b"ex"):
            self.selected = ("", []) if is_set else self.selected
            self.reply(option, Rep.ERR_UNKNOWN, b"no such export")
            return
        wildcards = not is_set or "wildcards-select" in self.faults
        chosen = [query for query in queries if query in IDS]
        chosen += [c for query in queries for c in IDS if wildcards and matches(query, c)]
        chosen += list(IDS) if not is_set and not queries else []
        if "duplicate-contexts" not in self.faults:
            chosen = list(dict.fromkeys(chosen))
        if is_set:
            kept = self.selected[1] if "set-adds" in self.faults else []
            self.selected = ("ex", list(dict.fromkeys(kept + chosen)))
        for context in chosen:
            number = IDS[context] if is_set or "list-with-ids" in self.faults else 0
            body = struct.pack(">I", number) + context.encode()
            self.reply(option, Rep.META_CONTEXT, body)
        self.reply(option, Rep.ACK)

    def queries(self, data: bytes) -> tuple[bytes, list[str]]:
        name, tail = take_string(data)
        (count,) = struct.unpack_from(">I", tail)
        rest, found = memoryview(tail)[4:], []  # not copied for each of many queries
        for _ in range(count):
            query, rest = take_string(rest)
            found.append(bytes(query).decode(errors="replace"))
        if rest and "trailing-bytes-accepted" not in self.faults:
            raise Malformed
        return name, found

    # --- transmission

    def request(self) -> bool:
        """Handle one request; False at DISC."""
        request = self.take_request()
        if request.type == Cmd.DISC:
            return False
        if "never-replies" in self.faults:
            return True
        if not request.length and "drop-on-length-zero" in self.faults:
            raise ConnectionError("fault")
        try:
            chunks = self.perform(request)
        except Refused as refused:
            if "drop-on-error" in self.faults:
                raise ConnectionError("fault") from refused
            self.refuse(request, refused)
            return True
        self.finish(request, chunks)
        return True

    def take_request(self) -> Request:
        form, size = (">IHHQQQ", 32) if self.extended else (">IHHQQI", 28)
        magic, flags, kind, cookie, offset, length = struct.unpack(form, self.receive(size))
        expected = wire.EXTENDED_REQUEST_MAGIC if self.extended else wire.REQUEST_MAGIC
        if magic != expected:
            raise ConnectionError("out of step")
        has_payload = kind == Cmd.WRITE or (self.extended and flags & CmdFlag.PAYLOAD_LEN)
        if has_payload and length > PAYLOAD_BYTES_MAX:
            raise ConnectionError("payload too long")
        if has_payload and kind == Cmd.WRITE and "cut-payload-written" in self.faults:
            return self.write_as_it_comes(Request(flags, kind, cookie, offset, length, b""))
        unread = "refused-payload-left" in self.faults and not self.server.writable
        payload = self.receive(length) if has_payload and not unread else b""
        return Request(flags, kind, cookie, offset, length, payload)

    def write_as_it_comes(self, request: Request) -> Request:
        parts = bytearray()
        while len(parts) < request.length:
            byte = self.receive(1)
            self.server.disk[request.offset + len(parts)] = byte[0]
            parts += byte
        return request._replace(payload=bytes(parts))

    def check(self, request: Request) -> None:
        """Raise Refused for what must not be done."""
        kind, end = request.type, request.offset + request.length
        if kind not in (0, 1, 3, 4, 5, 6, 7):
            raise Refused(Errno.EINVAL, "unknown command")
        if request.flags & ~self.allowed_flags(kind) and "any-flag-accepted" not in self.faults:
            raise Refused(Errno.EINVAL, "unknown flag")
        if kind in WRITES and not self.server.writable and "read-only-written" not in self.faults:
            wrong = "einval-when-read-only" in self.faults
            raise Refused(Errno.EINVAL if wrong else Errno.EPERM, "export is read-only")
        has_payload = request.flags & CmdFlag.PAYLOAD_LEN and kind == Cmd.BLOCK_STATUS
        if end > len(self.server.disk) and not has_payload and kind != Cmd.FLUSH:
            outgrown = kind in (Cmd.WRITE, Cmd.WRITE_ZEROES)
            raise Refused(Errno.ENOSPC if outgrown else Errno.EINVAL, "beyond the end")

    def allowed_flags(self, kind: int) -> int:
        allowed = int(CmdFlag.FUA) | int(FLAGS_OF.get(Cmd(kind), 0))
        if self.extended and kind in (Cmd.WRITE, Cmd.BLOCK_STATUS):
            allowed |= CmdFlag.PAYLOAD_LEN
        return allowed if self.structured else allowed & ~int(CmdFlag.DF)

    def perform(self, request: Request) -> list[tuple[int, bytes]]:
        """Do what is asked; the (type, payload) of the reply's chunks."""
        self.check(request)
        kind, offset, length = request.type, request.offset, request.length
        disk = self.server.disk
        if kind == Cmd.READ:
            return self.read(request)
        if kind == Cmd.BLOCK_STATUS:
            return self.status(request)
        if kind == Cmd.WRITE and "writes-lost" not in self.faults:
            disk[offset : offset + length] = request.payload
        elif kind == Cmd.TRIM and length >= BLOCK:
            outwards = "trim-rounds-outwards" in self.faults
            start = offset // BLOCK * BLOCK if outwards else -(-offset // BLOCK) * BLOCK
            end = (offset + length) // BLOCK * BLOCK
            disk[start:end] = bytes(max(end - start, 0))
        elif kind == Cmd.WRITE_ZEROES:
            self.write_zeroes(request)
        return []

    def write_zeroes(self, request: Request) -> None:
        offset, length = request.offset, request.length
        if "zeroes-short" in self.faults:
            length = max(length - 1, 0)
        if request.flags & CmdFlag.FAST_ZERO and "fast-zero-in-part" in self.faults:
            self.server.disk[offset : offset + length // 2] = bytes(length // 2)
            raise Refused(Errno.ENOTSUP, "not fast")
        self.server.disk[offset : offset + length] = bytes(length)

    def read(self, request: Request) -> list[tuple[int, bytes]]:
        offset, length = request.offset, request.length
        if length > wire.DEFAULT_PAYLOAD_BYTES_MAX:
            raise Refused(Errno.EINVAL, "longer than the maximum payload")
        with memoryview(self.server.disk) as disk:
            data = bytes(disk[offset : offset + length])
        if "wrong-content" in self.faults and length > 1000:
            data = data[:-1] + bytes([data[-1] ^ 1])
        if not length:
            return []
        zero_tail = length > 512 and data.endswith(bytes(length - 512))
        if not zero_tail or (request.flags & CmdFlag.DF and "df-fragmented" not in self.faults):
            body = [(Chunk.OFFSET_DATA, struct.pack(">Q", offset) + data)]
        else:
            hole_at = offset + (0 if "content-overlaps" in self.faults else 512)
            hole = struct.pack(">QI", hole_at, offset + length - hole_at)
            if "hole-outside" in self.faults:
                hole = struct.pack(">QI", hole_at, length)
            head = struct.pack(">Q", offset) + data[:512]
            body = [(Chunk.OFFSET_DATA, head), (Chunk.OFFSET_HOLE, hole)]
        is_short = "content-short" in self.faults and self.structured
        if is_short and len(body) == 1 and length > 1:
            body = [(Chunk.OFFSET_DATA, body[0][1][:-1])]
        return [(int(kind), payload) for kind, payload in body]

    def status(self, request: Request) -> list[tuple[int, bytes]]:
        if not self.contexts:
            raise Refused(Errno.EINVAL, "no context was selected")
        contexts, length = self.contexts, request.length
        if self.extended and request.flags & CmdFlag.PAYLOAD_LEN:
            contexts, length = self.status_payload(request.payload)
        if request.offset + length > len(self.server.disk):
            raise Refused(Errno.EINVAL, "beyond the end")
        one = request.flags & CmdFlag.REQ_ONE and "req-one-ignored" not in self.faults
        chunks = []
        for context in contexts:
            extents = self.extents(context, request.offset, length)[: 1 if one else None]
            chunks.append(self.status_chunk(context, extents))
        if not length or not chunks:
            return []
        return chunks[:1] if "one-context-only" in self.faults else chunks

    def status_payload(self, payload: bytes) -> tuple[list[str], int]:
        count, rest = divmod(len(payload) - 8, 4)
        if rest or count < 0:
            raise Refused(Errno.EINVAL, "payload of a wrong size")
        length, *ids = struct.unpack(f">Q{count}I", payload)
        names = [name for name in self.contexts if IDS[name] in ids]
        if len(names) != len(ids) and "status-ids-unchecked" not in self.faults:
            raise Refused(Errno.EINVAL, "unknown or repeated context")
        return (self.contexts if "status-ids-unchecked" in self.faults else names), length

    def status_chunk(self, context: str, extents: list[tuple[int, int]]) -> tuple[int, bytes]:
        if not self.extended:
            body = b"".join(struct.pack(">II", *extent) for extent in extents)
            return Chunk.BLOCK_STATUS, struct.pack(">I", IDS[context]) + body
        count = len(extents) + ("extended-count-wrong" in self.faults)
        body = b"".join(struct.pack(">QQ", *extent) for extent in extents)
        return Chunk.BLOCK_STATUS_EXT, struct.pack(">II", IDS[context], count) + body

    def extents(self, context: str, offset: int, length: int) -> list[tuple[int, int]]:
        found: list[tuple[int, int]] = []
        position = offset
        while position < offset + length:
            end = min((position // BLOCK + 1) * BLOCK, offset + length)
            status = self.state(context, position)
            if found and found[-1][1] == status and "equal-neighbours" not in self.faults:
                found[-1] = (found[-1][0] + end - position, status)
            else:
                found.append((end - position, status))
            position = end
        if "extent-of-zero" in self.faults:
            found.append((0, 0))
        if "extent-outside" in self.faults and position < len(self.server.disk):
            found.append((min(512, len(self.server.disk) - position), 7))
        return found

    def state(self, context: str, position: int) -> int:
        if context == BITMAP:
            shift = BLOCK if "bitmap-shifted" in self.faults else 0
            ranges = DIRTY[FIRST_BITMAP.name]
            return int(any(start <= position - shift < end for start, end in ranges))
        block = position // BLOCK * BLOCK
        is_zero = self.server.is_zero(block)
        if "zero-is-a-lie" in self.faults and block == 0:
            is_zero = True
        reserved = 4 if "reserved-status-bits" in self.faults else 0
        return (2 if is_zero else 0) | reserved

    # --- replies

    def finish(self, request: Request, chunks: list[tuple[int, bytes]]) -> None:
        simple = not self.structured or (not self.extended and request.type not in (0, 7))
        if "structured-always" in self.faults:
            simple = False
        if "simple-read" in self.faults and request.type == Cmd.READ:
            simple = True
        if simple:
            self.simple(request, 0, b"".join(self.plain_content(chunks)))
            return
        chunks = chunks or [(int(Chunk.NONE), b"")]
        for index, (kind, payload) in enumerate(chunks):
            last = index == len(chunks) - 1
            self.chunk(request, kind, payload, done=last or "done-early" in self.faults)

    def plain_content(self, chunks: list[tuple[int, bytes]]) -> Iterator[bytes]:
        for kind, payload in chunks:
            if kind == Chunk.OFFSET_HOLE:
                yield bytes(int.from_bytes(payload[8:]))
            elif kind == Chunk.OFFSET_DATA:
                yield payload[8:]

    def refuse(self, request: Request, refused: Refused) -> None:
        error = 111 if "own-error-numbers" in self.faults else refused.error
        simple = request.type in (0, 7) and "simple-errors" in self.faults
        if not self.structured or (simple and not self.extended):
            self.simple(request, error, b"")
            return
        text = b"" if "errors-without-text" in self.faults else str(refused).encode()
        if "error-text-long" in self.faults:
            text = b"t" * 5000
        payload = struct.pack(">IH", error, len(text)) + text
        self.chunk(request, Chunk.ERROR, payload, done=True)

    def cookie(self, request: Request) -> int:
        return request.cookie & 0xFFFFFFFF if "cookie-cut" in self.faults else request.cookie

    def simple(self, request: Request, error: int, payload: bytes) -> None:
        head = struct.pack(">IIQ", wire.SIMPLE_REPLY_MAGIC, error, self.cookie(request))
        self.send(head + payload)

    def chunk(self, request: Request, kind: int, payload: bytes, *, done: bool) -> None:
        flags = int(done) | (2 if "reply-flag-unknown" in self.faults else 0)
        cookie = self.cookie(request)
        if not self.extended:
            head = (wire.CHUNK_MAGIC, flags, kind, cookie, len(payload))
            self.send(struct.pack(">IHHQI", *head) + payload)
            return
        offset = 0 if "extended-offset-zero" in self.faults else request.offset
        extended = (wire.EXTENDED_REPLY_MAGIC, flags, kind, cookie, offset, len(payload))
        self.send(struct.pack(">IHHQQQ", *extended) + payload)


def take_string(data: Bytes) -> tuple[Bytes, Bytes]:
    """A string with its length before it, and the rest.

    Raises:
        Malformed: It does not fit.
    """
    if len(data) < 4:
        raise Malformed
    length = int.from_bytes(data[:4])
    if length > len(data) - 4:
        raise Malformed
    return data[4 : 4 + length], data[4 + length :]


def matches(query: str, context: str) -> bool:
    """Whether ``query`` is a wildcard that ``context`` falls under."""
    return query in ("base:", "qemu:", "qemu:dirty-bitmap:") and context.startswith(query)
