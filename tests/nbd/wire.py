"""The client's side of the wire, for tests: bytes to send, replies taken apart, every cut tried."""

from __future__ import annotations

import struct
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import NamedTuple

from nbdfleece.nbd.constants import (
    EXTENDED_REQUEST_MAGIC,
    OPTION_MAGIC,
    OPTION_REPLY_MAGIC,
    REQUEST_MAGIC,
    Command,
    Option,
)
from nbdfleece.nbd.export_info import ExportInfo
from nbdfleece.nbd.negotiation import Negotiation
from nbdfleece.nbd.outcomes import Closed, Negotiated, Outcome, SelectedContext
from nbdfleece.nbd.requests import RequestRules

GREETING = b"NBDMAGIC" + b"IHAVEOPT" + b"\0\3"
MIB = 1 << 20


@dataclass
class Exports:
    """A catalogue over a list; "" means the first."""

    infos: Sequence[ExportInfo] = field(default_factory=list)

    def exports(self) -> Iterable[ExportInfo]:
        return self.infos

    def find(self, name: str) -> ExportInfo | None:
        if name == "" and self.infos:
            return self.infos[0]
        return next((info for info in self.infos if info.name == name), None)


def client_flags(flags: int = 3) -> bytes:
    return struct.pack(">I", flags)


def option(number: int, data: bytes = b"", *, length: int | None = None) -> bytes:
    """An option; ``length`` lies about the data's."""
    return struct.pack(">QII", OPTION_MAGIC, number, len(data) if length is None else length) + data


def string(text: str | bytes) -> bytes:
    data = text.encode() if isinstance(text, str) else text
    return struct.pack(">I", len(data)) + data


def info_data(name: str | bytes = "disk", types: Sequence[int] = ()) -> bytes:
    return string(name) + struct.pack(f">H{len(types)}H", len(types), *types)


def go(name: str | bytes = "disk", types: Sequence[int] = ()) -> bytes:
    return option(Option.GO, info_data(name, types))


def info(name: str | bytes = "disk", types: Sequence[int] = ()) -> bytes:
    return option(Option.INFO, info_data(name, types))


def context_data(name: str | bytes, queries: Sequence[str | bytes]) -> bytes:
    return string(name) + struct.pack(">I", len(queries)) + b"".join(map(string, queries))


def set_contexts(*queries: str | bytes, name: str | bytes = "disk") -> bytes:
    return option(Option.SET_META_CONTEXT, context_data(name, queries))


def list_contexts(*queries: str | bytes, name: str | bytes = "disk") -> bytes:
    return option(Option.LIST_META_CONTEXT, context_data(name, queries))


STRUCTURED = option(Option.STRUCTURED_REPLY)
EXTENDED = option(Option.EXTENDED_HEADERS)
STARTTLS = option(Option.STARTTLS)
ABORT = option(Option.ABORT)
LIST = option(Option.LIST)


def request(
    command: int = Command.READ,
    offset: int = 0,
    length: int = 0,
    *,
    flags: int = 0,
    cookie: int = 0x1122334455667788,
    extended: bool = False,
    payload: bytes = b"",
) -> bytes:
    form = ">IHHQQQ" if extended else ">IHHQQI"
    magic = EXTENDED_REQUEST_MAGIC if extended else REQUEST_MAGIC
    return struct.pack(form, magic, flags, command, cookie, offset, length) + payload


class Reply(NamedTuple):
    """One reply to an option."""

    option: int
    reply: int
    data: bytes


def split_replies(sent: bytes) -> list[Reply]:
    """The option replies in ``sent``, which holds nothing else."""
    return list(_replies(sent))


def _replies(sent: bytes) -> Iterator[Reply]:
    position = 0
    while position < len(sent):
        magic, number, reply, length = struct.unpack_from(">QIII", sent, position)
        assert magic == OPTION_REPLY_MAGIC
        position += 20
        assert position + length <= len(sent)
        yield Reply(number, reply, sent[position : position + length])
        position += length


class Talk(NamedTuple):
    """What became of a conversation.

    ``rest`` are the client's bytes that do not belong to the handshake any more.
    """

    sent: bytes
    outcome: Outcome | None
    rest: bytes

    @property
    def replies(self) -> list[Reply]:
        """The option replies after the greeting."""
        return split_replies(self.sent.removeprefix(GREETING))

    @property
    def kinds(self) -> list[int]:
        return [reply.reply for reply in self.replies]

    @property
    def negotiated(self) -> Negotiated:
        assert isinstance(self.outcome, Negotiated), self.outcome
        return self.outcome


def drain(negotiation: Negotiation) -> bytes:
    sent = b""
    while data := negotiation.data_to_send():
        sent += data
    return sent


def feed(negotiation: Negotiation, pieces: Iterable[bytes]) -> Talk:
    """Give the pieces one by one, taking what is sent after each, as a driver does."""
    sent = drain(negotiation)
    rest = b""
    for piece in pieces:
        if negotiation.outcome is not None:
            rest += piece
            continue
        negotiation.receive_data(piece)
        sent += drain(negotiation)
    outcome = negotiation.outcome
    if isinstance(outcome, Negotiated):
        rest = outcome.leftover + rest
        outcome = replace(outcome, leftover=b"")
    elif isinstance(outcome, Closed):
        rest = b""
    return Talk(sent, outcome, rest)


def cuts(data: bytes, boundaries_max: int = 400) -> Iterator[list[bytes]]:
    """The data byte by byte, then cut in two at every boundary (of long data: at some)."""
    if len(data) <= 16384:
        yield [data[i : i + 1] for i in range(len(data))]
    step = max(1, len(data) // boundaries_max)
    for cut in range(1, len(data), step):
        yield [data[:cut], data[cut:]]


def talk(make: Callable[[], Negotiation], *messages: bytes) -> Talk:
    """Hold a conversation in one piece and in every cut; all must come to the same."""
    data = b"".join(messages)
    whole = feed(make(), [data])
    for pieces in cuts(data):
        assert feed(make(), pieces) == whole, [len(piece) for piece in pieces]
    return whole


def transmission(
    export: ExportInfo,
    *,
    structured: bool = False,
    extended: bool = False,
    contexts: Sequence[str] = (),
) -> Negotiated:
    """The outcome of a handshake that asked for this much."""
    return Negotiated(
        export=export,
        transmission_flags=export.transmission_flags(
            structured_replies=structured,
            extended_headers=extended,
            contexts_selected=bool(contexts),
        ),
        structured_replies=structured or extended,
        extended_headers=extended,
        contexts=tuple(SelectedContext(i, name) for i, name in enumerate(contexts)),
        leftover=b"",
    )


def rules(export: ExportInfo, **negotiated: bool | Sequence[str]) -> RequestRules:
    return RequestRules(transmission(export, **negotiated))  # type: ignore[arg-type] # by keyword
