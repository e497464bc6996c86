"""Requests of the transmission phase: decoding, framing, and what may be asked for.

A driver keeps one :class:`RequestRules` per connection and does, for each request::

    request = rules.unpack(buffer, position)         # rules.header_size bytes
    payload = rules.payload_length(request)          # that many bytes follow the header
    try:
        rules.check(request)
    except RequestError as error:
        ...throw the payload away as it comes, answer the error...

``unpack`` and ``payload_length`` raise :class:`~nbdfleece.errors.ProtocolError` where the
connection cannot go on. A request for DISC has no reply and is the driver's to notice.

**What is answered with what.** In this order: changing a read-only export: EPERM. An unknown
command, or one that the export does not offer, and flags that do not fit: EINVAL. Length 0:
EINVAL. Past the end: ENOSPC for WRITE and WRITE_ZEROES, EINVAL for the rest. Off the minimum
block size: EINVAL (a request that ends with the export may end unaligned, so that an export of
any size is served whole). Too much data for one message: EINVAL; for READ with DF: EOVERFLOW;
other READs with structured replies have no limit, the driver answers them in several chunks.

Spec: proto.md, "Request message", "Request types", "Error values", "Size constraints".
"""

from __future__ import annotations

import struct
from typing import Final, NamedTuple

from ..errors import ProtocolError
from .constants import (
    EXTENDED_REQUEST_MAGIC,
    REQUEST_MAGIC,
    Command,
    CommandFlag,
    Error,
    TransmissionFlag,
)
from .errors import RequestError
from .limits import DEFAULT_LIMITS, DEFAULT_PAYLOAD_MAX, Limits
from .outcomes import Negotiated

REQUEST: Final = struct.Struct(">IHHQQI")
"""Magic, command flags, type, cookie, offset, length."""
EXTENDED_REQUEST: Final = struct.Struct(">IHHQQQ")
"""The same with a length of 64 bits."""


class Request(NamedTuple):
    """One request header. ``offset`` and ``length`` are bytes, as the client sent them.

    It is the tuple that ``struct`` gives, under another class: the shortest way to make one.
    """

    magic: int
    flags: int
    command: int
    cookie: int
    offset: int
    length: int


def unpack_request(buffer: bytes | bytearray | memoryview, position: int) -> Request:
    """Decode one compact request header.

    Args:
        buffer: Received bytes; at least 28 from ``position`` on.
        position: Where the header begins, in bytes.

    Returns:
        The request, not yet checked.

    Raises:
        ProtocolError: Wrong magic. The stream is out of step: drop the connection.

    Wire:
        C: 32 bits, 0x25609513, magic
        C: 16 bits, command flags
        C: 16 bits, type
        C: 64 bits, cookie
        C: 64 bits, offset
        C: 32 bits, length

    Spec: proto.md, "Request message".
    """
    request = tuple.__new__(Request, REQUEST.unpack_from(buffer, position))
    if request[0] != REQUEST_MAGIC:
        raise ProtocolError(f"request with magic {request[0]:#010x}, expected 0x25609513")
    return request


def unpack_extended_request(buffer: bytes | bytearray | memoryview, position: int) -> Request:
    """Decode one extended request header.

    Args:
        buffer: Received bytes; at least 32 from ``position`` on.
        position: Where the header begins, in bytes.

    Returns:
        The request, not yet checked; with PAYLOAD_LEN ``length`` is the payload's.

    Raises:
        ProtocolError: Wrong magic. The stream is out of step: drop the connection.

    Wire:
        C: 32 bits, 0x21e41c71, magic
        C: 16 bits, command flags
        C: 16 bits, type
        C: 64 bits, cookie
        C: 64 bits, offset
        C: 64 bits, payload or effect length

    Spec: proto.md (extension-ext-header), "Request message".
    """
    request = tuple.__new__(Request, EXTENDED_REQUEST.unpack_from(buffer, position))
    if request[0] != EXTENDED_REQUEST_MAGIC:
        raise ProtocolError(f"request with magic {request[0]:#010x}, expected 0x21e41c71")
    return request


class StatusQuery(NamedTuple):
    """What a BLOCK_STATUS asks for: how many bytes, and which contexts by their ids."""

    length: int
    context_ids: tuple[int, ...]


_DESCRIPTOR_SIZE_MAX: Final = 16
"""Bytes of an extent in a block status chunk with extended headers; 8 without."""
_FUA: Final = int(CommandFlag.FUA)
_DF: Final = int(CommandFlag.DF)
_PAYLOAD_LEN: Final = int(CommandFlag.PAYLOAD_LEN)
_READ: Final = int(Command.READ)
_WRITE: Final = int(Command.WRITE)
_FLUSH: Final = int(Command.FLUSH)
_BLOCK_STATUS: Final = int(Command.BLOCK_STATUS)
_CHANGING: Final = frozenset({Command.WRITE, Command.TRIM, Command.WRITE_ZEROES})
_BEYOND_IS_ENOSPC: Final = frozenset({Command.WRITE, Command.WRITE_ZEROES})


class RequestRules:
    """What one connection may ask for, worked out once when its transmission phase begins.

    Args:
        negotiated: What the handshake ended with.
        limits: How large a payload may be.

    Attributes:
        unpack: :func:`unpack_request` or :func:`unpack_extended_request`.
        header_size: Bytes of a request header, 28 or 32.
        payload_max: Bytes of data in one WRITE, and in one READ answered by a simple reply.
        chunk_max: Bytes of data in one structured chunk; a READ of more takes several.
        extents_max: Extents in one block status chunk, so that it is no larger than that either.
        context_ids: The ids that a BLOCK_STATUS without payload asks for.
    """

    __slots__ = (
        "_allowed",
        "_common",
        "_common_length_max",
        "_extended",
        "_mask",
        "_read_only",
        "_size",
        "_skip_max",
        "_structured",
        "chunk_max",
        "context_ids",
        "extents_max",
        "header_size",
        "payload_max",
        "unpack",
    )

    def __init__(self, negotiated: Negotiated, limits: Limits = DEFAULT_LIMITS) -> None:
        export = negotiated.export
        self._extended = negotiated.extended_headers
        self._structured = negotiated.structured_replies
        self._size = export.size
        self._read_only = export.read_only
        self._mask = export.minimum_block_size - 1
        self.context_ids = tuple(context.context_id for context in negotiated.contexts)
        self.unpack = unpack_extended_request if self._extended else unpack_request
        self.header_size = EXTENDED_REQUEST.size if self._extended else REQUEST.size
        self.chunk_max = export.maximum_payload
        self.extents_max = min(limits.extents_max, self.chunk_max // _DESCRIPTOR_SIZE_MAX - 1)
        self.payload_max = _payload_max(negotiated, limits)
        self._skip_max = _skip_max(negotiated, limits)
        self._allowed = _allowed_flags(negotiated)
        self._common = _common_requests(self._allowed)
        self._common_length_max = min(self.payload_max, self.chunk_max)

    def payload_length(self, request: Request) -> int:
        """How many bytes of payload follow the request's header, accepted or not.

        Raises:
            ProtocolError: More than is worth throwing away: drop the connection.

        Spec: proto.md (extension-ext-header), "Request message": "A server SHOULD initiate
        hard disconnect if a client sets the NBD_CMD_FLAG_PAYLOAD_LEN flag and uses a length
        larger than a server's advertised or default maximum payload length". A WRITE without
        that flag is taken to carry its payload all the same, as QEMU does.
        """
        _, flags, command, _, _, length = request
        if command != _WRITE and not (self._extended and flags & _PAYLOAD_LEN):
            return 0
        if length > self._skip_max:
            raise ProtocolError(
                f"{_command_name(command)} with {length} bytes of payload, "
                f"{self._skip_max} is the most that is read"
            )
        return length

    def check(self, request: Request) -> None:
        """Check that a request may be carried out; the usual ones pass in one expression.

        Raises:
            RequestError: Why not, see the module's table.
        """
        _, flags, command, _, offset, length = request
        if (
            flags << 16 | command in self._common
            and 0 < length <= self._common_length_max
            and offset + length <= self._size
            and not (offset | length) & self._mask
        ):
            return
        self._check_command(request)
        if command == _FLUSH:
            _check_flush(request)
        elif command == _BLOCK_STATUS and flags & _PAYLOAD_LEN:
            self._check_status_payload_length(length)
        else:
            self._check_range(command, offset, length)
            self._check_length(request)

    def status_query(
        self, request: Request, payload: bytes | bytearray | memoryview = b""
    ) -> StatusQuery:
        """What a BLOCK_STATUS that passed :meth:`check` asks for.

        Args:
            request: The request.
            payload: Its payload, ``payload_length(request)`` bytes.

        Raises:
            RequestError: The payload names a context twice or one that was not selected, or
                the range that it describes is not in the export: EINVAL.

        Wire (with PAYLOAD_LEN):
            C: 64 bits, effect length
            C: n * 32 bits, metadata context ids

        Spec: proto.md (extension-ext-header), "NBD_CMD_BLOCK_STATUS".
        """
        if not request.flags & _PAYLOAD_LEN:
            return StatusQuery(request.length, self.context_ids)
        length, *ids = struct.unpack(f">Q{(len(payload) - 8) // 4}I", payload)
        if len(set(ids)) != len(ids):
            raise RequestError(Error.EINVAL, "BLOCK_STATUS: a metadata context id is given twice")
        unknown = set(ids).difference(self.context_ids)
        if unknown:
            raise RequestError(
                Error.EINVAL, f"BLOCK_STATUS: no metadata context has the id {min(unknown)}"
            )
        self._check_range(_BLOCK_STATUS, request.offset, length)
        return StatusQuery(length, tuple(ids))

    def _check_command(self, request: Request) -> None:
        command = request.command
        allowed = self._allowed.get(command)
        if allowed is None:
            raise self._refusal(command)
        excess = request.flags & ~allowed
        if excess:
            raise RequestError(
                Error.EINVAL, f"{_command_name(command)}: command flags {excess:#x} do not apply"
            )

    def _refusal(self, command: int) -> RequestError:
        name = _command_name(command)
        if self._read_only and command in _CHANGING:
            return RequestError(Error.EPERM, f"{name}: the export is read-only")
        if command == _BLOCK_STATUS:
            return RequestError(Error.EINVAL, f"{name}: no metadata context was selected")
        return RequestError(Error.EINVAL, f"{name}: the export does not offer this command")

    def _check_range(self, command: int, offset: int, length: int) -> None:
        end = offset + length
        if length == 0:
            problem = "the length is 0"
        elif end > self._size:
            problem = f"past the end of the export at {self._size}"
        elif offset & self._mask or (length & self._mask and end != self._size):
            problem = f"not a multiple of the minimum block size {self._mask + 1}"
        else:
            return
        beyond = length and end > self._size and command in _BEYOND_IS_ENOSPC
        raise RequestError(
            Error.ENOSPC if beyond else Error.EINVAL,
            f"{_command_name(command)} at {offset}, length {length}: {problem}",
        )

    def _check_length(self, request: Request) -> None:
        _, flags, command, _, _, length = request
        if command == _WRITE or (command == _READ and not self._structured):
            error, length_max = Error.EINVAL, self.payload_max
        elif command == _READ and flags & _DF:
            error, length_max = Error.EOVERFLOW, self.chunk_max
        else:
            return
        if length > length_max:
            raise RequestError(
                error,
                f"{_command_name(command)} of {length} bytes: {length_max} is the most at once",
            )

    def _check_status_payload_length(self, length: int) -> None:
        ids, rest = divmod(length - 8, 4)
        if rest or not 1 <= ids <= len(self.context_ids):
            raise RequestError(
                Error.EINVAL,
                f"BLOCK_STATUS: a payload of {length} bytes is not a length and the ids of "
                f"1 to {len(self.context_ids)} metadata contexts",
            )


def _check_flush(request: Request) -> None:
    if request.offset or request.length:
        raise RequestError(Error.EINVAL, "FLUSH: offset and length must be 0")


def _command_name(command: int) -> str:
    try:
        return Command(command).name
    except ValueError:
        return f"command {command}"


def _allowed_flags(negotiated: Negotiated) -> dict[int, int]:
    """The commands that the connection may send, each with the flags that fit it.

    FUA fits all of them, if it was offered: "the server MUST accept all commands with this bit
    set".
    """
    offered = negotiated.transmission_flags
    flags = {_READ: CommandFlag(0)}
    if offered & TransmissionFlag.SEND_FLUSH:
        flags[_FLUSH] = CommandFlag(0)
    if offered & TransmissionFlag.SEND_DF:
        flags[_READ] |= CommandFlag.DF
    if not offered & TransmissionFlag.READ_ONLY:
        flags[_WRITE] = CommandFlag(0)
        if negotiated.extended_headers:
            flags[_WRITE] |= CommandFlag.PAYLOAD_LEN
    if offered & TransmissionFlag.SEND_TRIM:
        flags[Command.TRIM] = CommandFlag(0)
    if offered & TransmissionFlag.SEND_CACHE:
        flags[Command.CACHE] = CommandFlag(0)
    if offered & TransmissionFlag.SEND_WRITE_ZEROES:
        flags[Command.WRITE_ZEROES] = CommandFlag.NO_HOLE
        if offered & TransmissionFlag.SEND_FAST_ZERO:
            flags[Command.WRITE_ZEROES] |= CommandFlag.FAST_ZERO
    if negotiated.contexts:
        flags[_BLOCK_STATUS] = CommandFlag.REQ_ONE
        if offered & TransmissionFlag.BLOCK_STATUS_PAYLOAD:
            flags[_BLOCK_STATUS] |= CommandFlag.PAYLOAD_LEN
    fua = _FUA if offered & TransmissionFlag.SEND_FUA else 0
    return {int(command): int(fit) | fua for command, fit in flags.items()}


def _common_requests(allowed: dict[int, int]) -> frozenset[int]:
    """The ``flags << 16 | command`` of requests whose offset and length are a plain range."""
    pairs = {
        flags << 16 | command
        for command, fit in allowed.items()
        for flags in range(fit + 1)
        if flags & ~fit == 0
    }
    special = {pair for pair in pairs if pair & 0xFFFF == _FLUSH}
    special |= {pair for pair in pairs if pair == pair | _PAYLOAD_LEN << 16 | _BLOCK_STATUS}
    return frozenset(pairs - special)


def _payload_max(negotiated: Negotiated, limits: Limits) -> int:
    advertised = negotiated.export.maximum_payload
    if negotiated.extended_headers or advertised < DEFAULT_PAYLOAD_MAX:
        return advertised
    return max(advertised, limits.payload_accepted_max)


def _skip_max(negotiated: Negotiated, limits: Limits) -> int:
    """What is thrown away rather than taken for an attack; never less than 32 MiB."""
    if negotiated.extended_headers:
        return max(negotiated.export.maximum_payload, DEFAULT_PAYLOAD_MAX)
    return max(negotiated.export.maximum_payload, DEFAULT_PAYLOAD_MAX, limits.payload_skip_max)
