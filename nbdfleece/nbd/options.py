"""The bytes of options and of their replies: parsing and packing, without any state.

Spec: proto.md, "Fixed newstyle negotiation", "Option types", "Option reply types".
"""

from __future__ import annotations

import struct
from typing import Final, NamedTuple

from .constants import (
    EXPORT_NAME_PADDING,
    NBD_MAGIC,
    OPTION_MAGIC,
    OPTION_REPLY_MAGIC,
    HandshakeFlag,
    InfoType,
    OptionReply,
    TransmissionFlag,
)
from .errors import OptionError
from .export_info import ExportInfo
from .names import decode_string

_GREETING: Final = struct.Struct(">QQH")
CLIENT_FLAGS: Final = struct.Struct(">I")
OPTION_HEADER: Final = struct.Struct(">QII")
"""Magic, option, length of the data."""
_REPLY_HEADER: Final = struct.Struct(">QIII")
_EXPORT: Final = struct.Struct(">QH")
_INFO_EXPORT: Final = struct.Struct(">HQH")
_INFO_BLOCK_SIZE: Final = struct.Struct(">HIII")
_U32: Final = struct.Struct(">I")
_U16: Final = struct.Struct(">H")


class InfoRequest(NamedTuple):
    """The data of INFO and GO: an export's name, and what the client wants to know."""

    name: str
    types: frozenset[int]


class ContextRequest(NamedTuple):
    """The data of LIST_META_CONTEXT and SET_META_CONTEXT: an export's name and queries."""

    name: str
    queries: tuple[str, ...]


class _Reader:
    """Takes an option's data apart; whatever does not fit is ERR_INVALID."""

    def __init__(self, data: bytes) -> None:
        self._view = memoryview(data)
        self._position = 0

    def left(self) -> int:
        return len(self._view) - self._position

    def take(self, length: int, what: str) -> memoryview:
        if length > self.left():
            raise OptionError(
                OptionReply.ERR_INVALID,
                f"the {what} takes {length} bytes, but only {self.left()} of the option are left",
            )
        begin = self._position
        self._position += length
        return self._view[begin : self._position]

    def number(self, form: struct.Struct, what: str) -> int:
        (number,) = form.unpack(self.take(form.size, what))
        return int(number)

    def string(self, what: str) -> str:
        length = self.number(_U32, f"length of the {what}")
        return decode_string(self.take(length, what), what)

    def finish(self) -> None:
        if self.left():
            raise OptionError(
                OptionReply.ERR_INVALID, f"{self.left()} bytes too many at the end of the option"
            )


def parse_info_request(data: bytes) -> InfoRequest:
    """Take the data of INFO or GO apart.

    Raises:
        OptionError: ERR_INVALID: lengths that do not add up, or a bad name.

    Wire:
        C: 32 bits, length of name
        C: name
        C: 16 bits, number of information requests
        C: 16 bits each, information requests
    """
    reader = _Reader(data)
    name = reader.string("export name")
    count = reader.number(_U16, "number of information requests")
    types = reader.take(2 * count, "list of information requests")
    reader.finish()
    return InfoRequest(name, frozenset(struct.unpack(f">{count}H", types)))


def parse_context_request(data: bytes, *, queries_max: int) -> ContextRequest:
    """Take the data of LIST_META_CONTEXT or SET_META_CONTEXT apart.

    Raises:
        OptionError: ERR_INVALID: lengths that do not add up, or a bad string. ERR_TOO_BIG: more
            than ``queries_max`` queries, which are not looked at.

    Wire:
        C: 32 bits, length of export name
        C: export name
        C: 32 bits, number of queries
        C: for each: 32 bits, length of query; query
    """
    reader = _Reader(data)
    name = reader.string("export name")
    count = reader.number(_U32, "number of queries")
    if count * _U32.size > reader.left():
        raise OptionError(OptionReply.ERR_INVALID, f"{count} queries do not fit in the option")
    if count > queries_max:
        raise OptionError(
            OptionReply.ERR_TOO_BIG, f"{count} queries are too many, {queries_max} are allowed"
        )
    queries = tuple(reader.string("query") for _ in range(count))
    reader.finish()
    return ContextRequest(name, queries)


def pack_greeting(flags: HandshakeFlag) -> bytes:
    """What the server says first.

    Wire:
        S: 64 bits, 0x4e42444d41474943, magic
        S: 64 bits, 0x49484156454f5054, magic
        S: 16 bits, handshake flags
    """
    return _GREETING.pack(NBD_MAGIC, OPTION_MAGIC, flags)


def pack_option_reply(option: int, reply: OptionReply, data: bytes = b"") -> bytes:
    """One reply to an option.

    Wire:
        S: 64 bits, 0x3e889045565a9, magic
        S: 32 bits, option
        S: 32 bits, reply type
        S: 32 bits, length of the data
        S: data
    """
    return _REPLY_HEADER.pack(OPTION_REPLY_MAGIC, option, reply, len(data)) + data


def pack_export_reply(size: int, flags: TransmissionFlag, *, no_zeroes: bool) -> bytes:
    """The reply to EXPORT_NAME, which has no header.

    Wire:
        S: 64 bits, size of the export
        S: 16 bits, transmission flags
        S: 124 bytes, zeroes, unless NO_ZEROES was negotiated
    """
    return _EXPORT.pack(size, flags) + (b"" if no_zeroes else bytes(EXPORT_NAME_PADDING))


def pack_server(info: ExportInfo) -> bytes:
    """The data of a SERVER reply: one export of LIST.

    Wire:
        S: 32 bits, length of name
        S: name
        S: description
    """
    name = info.name.encode()
    return _U32.pack(len(name)) + name + info.description.encode()


def pack_info_export(size: int, flags: TransmissionFlag) -> bytes:
    """The data of an INFO reply of type EXPORT: 16 bits type, 64 bits size, 16 bits flags."""
    return _INFO_EXPORT.pack(InfoType.EXPORT, size, flags)


def pack_info_string(kind: InfoType, text: str) -> bytes:
    """The data of an INFO reply of type NAME or DESCRIPTION: 16 bits type, then the string."""
    return _U16.pack(kind) + text.encode()


def pack_info_block_size(info: ExportInfo) -> bytes:
    """The data of an INFO reply of type BLOCK_SIZE.

    Wire:
        S: 16 bits, type
        S: 32 bits, minimum block size
        S: 32 bits, preferred block size
        S: 32 bits, maximum payload size
    """
    sizes = info.told_block_sizes
    if sizes is None:
        sizes = info.minimum_block_size, info.preferred_block_size, info.maximum_payload
    return _INFO_BLOCK_SIZE.pack(InfoType.BLOCK_SIZE, *sizes)


def pack_meta_context(context_id: int, name: str) -> bytes:
    """The data of a META_CONTEXT reply: 32 bits id, then the context's name."""
    return _U32.pack(context_id) + name.encode()
