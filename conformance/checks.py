"""What must hold of any reply, as functions from a reply to the requirements that it breaks.

A survey sends an export what a client may send, in every form that the server speaks, keeps
all replies, and runs the checks once; the cases then ask for the problems of their rows.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import dataclass, field

from conformance import wire
from conformance.case import Server, closing_on_error
from conformance.client import Client
from conformance.content import DISK_BYTES, KIB, MIB
from conformance.errors import Finding, NotApplicable, require
from conformance.replies import (
    ExportInfo,
    Form,
    Reply,
    ReplyChunk,
    content_of,
    error_of,
    unpack_extents,
)
from conformance.wire import Chunk, Cmd, CmdFlag, Errno


@dataclass(frozen=True)
class Problem:
    number: int
    text: str


@dataclass(frozen=True)
class Setting:
    """What was agreed on the connection that a reply came over."""

    form: Form
    export: ExportInfo
    contexts: dict[int, str]


@dataclass
class Survey:
    """Every reply with its setting, and the problems found; ``broken`` is a stream that broke."""

    replies: list[tuple[Setting, Reply]] = field(default_factory=list)
    problems: list[Problem] = field(default_factory=list)
    broken: list[str] = field(default_factory=list)

    def of(self, number: int) -> list[str]:
        return [problem.text for problem in self.problems if problem.number == number]

    def chunks(self, *kinds: Chunk) -> int:
        """How many structured chunks of these types were seen."""
        return sum(
            chunk.type in kinds
            for _, reply in self.replies
            for chunk in reply.chunks
            if chunk.form is not Form.SIMPLE
        )


def problems_of(setting: Setting, reply: Reply) -> Iterator[Problem]:
    """All that is wrong with one reply."""
    yield from _form(setting, reply)
    for chunk in reply.chunks:
        yield from _chunk(setting, reply, chunk)
    yield from _errors(reply)
    if reply.request.type == Cmd.READ:
        yield from _content(setting, reply)
    if reply.request.type == Cmd.BLOCK_STATUS and not reply.error:
        yield from _status(setting, reply)


def _form(setting: Setting, reply: Reply) -> Iterator[Problem]:
    what, form = str(reply.request), setting.form
    got = {chunk.form for chunk in reply.chunks}
    if form is Form.SIMPLE and got != {Form.SIMPLE}:
        yield Problem(105, f"{what}: structured reply without agreement")
    if form is Form.EXTENDED and got != {Form.EXTENDED}:
        yield Problem(176, f"{what}: reply has a compact header")
    if form is Form.STRUCTURED and Form.EXTENDED in got:
        yield Problem(176, f"{what}: extended header without agreement")
    is_payload = reply.request.type in (Cmd.READ, Cmd.BLOCK_STATUS)
    if form is not Form.SIMPLE and is_payload and Form.SIMPLE in got:
        number = 106 if reply.request.type == Cmd.READ or not reply.error else 154
        yield Problem(number, f"{what}: simple reply ({reply.error_name})")


def _chunk(setting: Setting, reply: Reply, chunk: ReplyChunk) -> Iterator[Problem]:
    if chunk.form is Form.SIMPLE:
        return
    what, size = str(reply.request), len(chunk.payload)
    if chunk.flags & ~wire.CHUNK_FLAG_DONE:
        yield Problem(111, f"{what}: reply flags {chunk.flags:#x}")
    if chunk.form is Form.EXTENDED and chunk.offset != reply.request.offset:
        yield Problem(177, f"{what}: chunk echoes offset {chunk.offset:#x}")
    if chunk.type == Chunk.NONE and (size or not chunk.is_done):
        yield Problem(115, f"{what}: NONE with {size} bytes, flags {chunk.flags}")
    if chunk.type in (Chunk.BLOCK_STATUS, Chunk.BLOCK_STATUS_EXT):
        yield from _status_chunk(setting, reply, chunk)
    elif chunk.is_error:
        yield from _error_chunk(reply, chunk)
    elif chunk.type in (Chunk.OFFSET_DATA, Chunk.OFFSET_HOLE):
        yield from _content_chunk(setting, reply, chunk)
    elif chunk.type != Chunk.NONE:
        yield Problem(111, f"{what}: chunk of unknown type {chunk.type}")


def _content_chunk(setting: Setting, reply: Reply, chunk: ReplyChunk) -> Iterator[Problem]:
    what, size = str(reply.request), len(chunk.payload)
    number = 116 if chunk.type == Chunk.OFFSET_DATA else 117
    if reply.request.type != Cmd.READ:
        yield Problem(number, f"{what}: content in the reply to another command")
    if chunk.type == Chunk.OFFSET_DATA and size < 9:
        yield Problem(116, f"{what}: data chunk of {size} bytes")
    if chunk.type == Chunk.OFFSET_HOLE and (size != 12 or not int.from_bytes(chunk.payload[8:])):
        yield Problem(117, f"{what}: hole chunk {chunk.payload!r}")
    if chunk.type == Chunk.OFFSET_DATA and size - 8 > setting.export.payload_max:
        yield Problem(97, f"{what}: chunk of {size - 8} bytes, maximum advertised less")
    part = content_of(reply.request, chunk)
    if part and not _inside(reply, part[0], len(part[1])):
        yield Problem(number, f"{what}: content at {part[0]:#x}+{len(part[1]):#x}")


def _inside(reply: Reply, offset: int, length: int) -> bool:
    start, end = reply.request.offset, reply.request.offset + reply.request.length
    return start <= offset and offset + length <= end


def _error_chunk(reply: Reply, chunk: ReplyChunk) -> Iterator[Problem]:
    what, payload = str(reply.request), chunk.payload
    fixed = 14 if chunk.type == Chunk.ERROR_OFFSET else 6
    number = 124 if chunk.type == Chunk.ERROR_OFFSET else 123
    text = int.from_bytes(payload[4:6], "big")
    if len(payload) < fixed or (chunk.type in _KNOWN_ERRORS and len(payload) != fixed + text):
        yield Problem(number, f"{what}: error chunk of {len(payload)} bytes, text of {text}")
        return
    if not error_of(chunk):
        yield Problem(123, f"{what}: error chunk with error 0")
    if text > wire.STRING_BYTES_MAX:
        yield Problem(123, f"{what}: error text of {text} bytes")
    offset = int.from_bytes(payload[-8:], "big")
    if chunk.type == Chunk.ERROR_OFFSET and not _inside(reply, offset, 1):
        yield Problem(124, f"{what}: ERROR_OFFSET at {offset:#x}")


_KNOWN_ERRORS = (Chunk.ERROR, Chunk.ERROR_OFFSET)


def _errors(reply: Reply) -> Iterator[Problem]:
    what, kinds = str(reply.request), [chunk.type for chunk in reply.chunks if chunk.is_error]
    if kinds.count(Chunk.ERROR) > 1:
        yield Problem(123, f"{what}: {kinds.count(Chunk.ERROR)} ERROR chunks")
    if Chunk.ERROR in kinds and Chunk.ERROR_OFFSET in kinds:
        yield Problem(125, f"{what}: ERROR and ERROR_OFFSET")
    offsets = reply.error_offsets
    if len(set(offsets)) < len(offsets):
        yield Problem(124, f"{what}: ERROR_OFFSET repeats an offset")
    error = reply.error
    if error and error not in set(Errno):
        yield Problem(163, f"{what}: error {error}")
    if error == Errno.ENOMEM:
        yield Problem(170, f"{what}: ENOMEM")
    if error == Errno.ENOTSUP and not reply.request.flags & CmdFlag.FAST_ZERO:
        yield Problem(168, f"{what}: ENOTSUP")
    oversize = reply.request.length > wire.DEFAULT_PAYLOAD_BYTES_MAX
    if error == Errno.EOVERFLOW and not oversize and not reply.request.flags & CmdFlag.DF:
        yield Problem(167, f"{what}: EOVERFLOW")
    structured_error = error and not reply.simple
    if structured_error and not reply.text:
        yield Problem(107, f"{what}: {reply.error_name} without text")


def _content(setting: Setting, reply: Reply) -> Iterator[Problem]:
    what, parts = str(reply.request), sorted(reply.content)
    if reply.simple:
        return
    if any(parts[i][0] + len(parts[i][1]) > parts[i + 1][0] for i in range(len(parts) - 1)):
        yield Problem(131, f"{what}: content chunks overlap")
    if not reply.error and sum(len(data) for _, data in parts) != reply.request.length:
        yield Problem(133, f"{what}: {sum(len(d) for _, d in parts)} bytes of content")
    if reply.request.flags & CmdFlag.DF and not reply.error:
        kinds = [chunk.type for chunk in reply.chunks if chunk.type != Chunk.NONE]
        if kinds != [Chunk.OFFSET_DATA]:
            yield Problem(136, f"{what}: DF answered with chunks of types {kinds}")


def _status_chunk(setting: Setting, reply: Reply, chunk: ReplyChunk) -> Iterator[Problem]:
    what = str(reply.request)
    is_ext = chunk.type == Chunk.BLOCK_STATUS_EXT
    if is_ext != (setting.form is Form.EXTENDED):
        yield Problem(183 if is_ext else 181, f"{what}: {Chunk(chunk.type).name} chunk")
        return
    try:
        context, extents = unpack_extents(chunk)
    except Finding as finding:
        yield Problem(181 if is_ext else 118, f"{what}: {finding}")
        return
    if not extents:
        yield Problem(118, f"{what}: no descriptor")
    if is_ext and int.from_bytes(chunk.payload[4:8]) != len(extents):
        yield Problem(181, f"{what}: count {int.from_bytes(chunk.payload[4:8])}")
    if context not in setting.contexts:
        yield Problem(118, f"{what}: chunk for context {context}, which was not selected")
    yield from _extents(setting, reply, setting.contexts.get(context, ""), extents)


def _extents(
    setting: Setting, reply: Reply, context: str, extents: list[tuple[int, int]]
) -> Iterator[Problem]:
    what, lengths = f"{reply.request} ({context})", [length for length, _ in extents]
    size, start = setting.export.size, reply.request.offset
    if not all(lengths):
        yield Problem(119, f"{what}: extent of length 0")
    if len(extents) > 1 << 20:
        yield Problem(122, f"{what}: {len(extents)} extents")
    if sum(lengths[:-1]) >= reply.request.length:
        yield Problem(121, f"{what}: last extent is outside the request")
    if start + sum(lengths) > size:
        yield Problem(156, f"{what}: extents end at {start + sum(lengths):#x} of {size:#x}")
    if reply.request.flags & CmdFlag.REQ_ONE and (
        len(extents) != 1 or lengths[0] > reply.request.length
    ):
        yield Problem(120, f"{what}: REQ_ONE gave {extents[:3]}")
    if any(a[1] == b[1] for a, b in itertools.pairwise(extents)):
        yield Problem(157, f"{what}: equal neighbours")
    aligned = [n for n in lengths if n % 512] if not start % 512 else []
    if aligned and start + sum(lengths) != size:
        yield Problem(157, f"{what}: extent of {aligned[0]} bytes")
    statuses = {status for _, status in extents}
    yield from _statuses(what, context, statuses)


def _statuses(what: str, context: str, statuses: set[int]) -> Iterator[Problem]:
    if any(status >> 32 for status in statuses):
        yield Problem(182, f"{what}: status beyond 32 bits")
    if context == "base:allocation" and any(status & ~3 for status in statuses):
        yield Problem(161, f"{what}: reserved bits in {sorted(statuses)}")
    if context.startswith("qemu:dirty-bitmap:") and any(status & ~1 for status in statuses):
        yield Problem(189, f"{what}: bits other than DIRTY in {sorted(statuses)}")


def _status(setting: Setting, reply: Reply) -> Iterator[Problem]:
    kinds = (Chunk.BLOCK_STATUS, Chunk.BLOCK_STATUS_EXT)
    found = [int.from_bytes(chunk.payload[:4]) for chunk in reply.chunks if chunk.type in kinds]
    if sorted(found) != sorted(setting.contexts):
        yield Problem(154, f"{reply.request}: chunks for {found}, selected {setting.contexts}")


# --- the survey


def survey(server: Server) -> Survey:
    """The survey of the server's first export, made once per running server."""
    if "survey" not in server.memo:
        made = Survey()
        for form in Form:
            _survey_form(server, form, made)
        server.memo["survey"] = made
    found: Survey = server.memo["survey"]
    return found


def _survey_form(server: Server, form: Form, made: Survey) -> None:
    try:
        with _entered(server, form) as client:
            setting = Setting(form, client.export, client.contexts)
            for request in requests(client):
                client.send(client.request(*request))
                reply = client.receive()
                made.replies.append((setting, reply))
                made.problems += problems_of(setting, reply)
    except NotApplicable:
        return
    except Finding as finding:
        made.broken.append(f"{form.value}: {finding}")


def _entered(server: Server, form: Form) -> Client:
    if form is Form.SIMPLE:
        return server.enter()
    client = server.haggle()
    with closing_on_error(client):
        _agree(server, client, form)
    return client


def _agree(server: Server, client: Client, form: Form) -> None:
    agreed = client.agree_extended() if form is Form.EXTENDED else client.agree_structured()
    require(agreed, f"no {form.value} replies")
    name = server.export.name
    names = sorted(client.list_contexts(name).names)
    if names:
        client.set_contexts(name, names)
    client.go(name)


def requests(client: Client) -> Iterator[tuple[int, int, int, int]]:
    """(command, offset, length, flags) of what a client may send, good and bad."""
    size = client.export.size
    big = size >= DISK_BYTES
    spans = [
        (0, 64 * KIB),
        (512, 512),
        (1000, 5000),
        (MIB, 64 * KIB),
        (0, 2 * MIB),
        (960 * KIB, 128 * KIB),
    ]
    spans += [(3 * MIB, 3 * MIB), (size - 4096, 4096), (size - 512, 512), (size - 1, 1)]
    spans += [(0, 32 * MIB), (4 * MIB + 1, 2 * MIB)]
    spans = [(max(offset, 0), length) for offset, length in spans if offset + length <= size]
    for offset, length in spans:
        yield Cmd.READ, offset, length, 0
        if client.export.flags & wire.Flag.SEND_DF:
            yield Cmd.READ, offset, min(length, 64 * KIB), CmdFlag.DF
        if client.contexts:
            yield Cmd.BLOCK_STATUS, offset, length, 0
            yield Cmd.BLOCK_STATUS, offset, length, CmdFlag.REQ_ONE
    if client.contexts:
        yield Cmd.BLOCK_STATUS, 0, min(size, 0xFFFFFE00), 0
        yield Cmd.BLOCK_STATUS, 0, min(size, 0xFFFFFE00), CmdFlag.REQ_ONE
    if client.contexts and big and client.extended:
        yield Cmd.BLOCK_STATUS, 0, size, 0
        yield Cmd.BLOCK_STATUS, 0, size, CmdFlag.REQ_ONE
    if client.contexts:
        yield Cmd.BLOCK_STATUS, size, 512, 0
    yield Cmd.READ, size, 512, 0
    yield Cmd.READ, size - 512, 1024, 0
    yield Cmd.READ, 0, 512, 1 << 14
    yield 77, 0, 0, 0
    yield Cmd.READ, 0, 512, 0
