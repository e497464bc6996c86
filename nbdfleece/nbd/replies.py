"""Replies of the transmission phase: packing, in the three forms that can be negotiated.

A driver keeps one of :class:`SimpleReplies`, :class:`StructuredReplies` and
:class:`ExtendedReplies` per connection (:func:`replies_for`). They hold nothing; each method
gives the bytes of a whole message, or, for data, those that go before the payload, which the
driver sends from where it lies (``sendmsg``). ``done`` is the only reply flag, DONE, bit 0.

Spec: proto.md, "Simple reply message", "Structured reply chunk message", "Structured reply
types"; branch extension-ext-header, "Extended reply chunk message".
"""

from __future__ import annotations

import struct
from abc import ABC, abstractmethod
from typing import Final

import numpy as np

from ..extents import Extents
from .constants import (
    EXTENDED_REPLY_MAGIC,
    SIMPLE_REPLY_MAGIC,
    STRUCTURED_REPLY_MAGIC,
    Command,
    CommandFlag,
    Error,
    ReplyType,
)
from .errors import encode_error_text
from .outcomes import Negotiated
from .requests import Request

_SIMPLE: Final = struct.Struct(">IIQ")
"""Magic, error, cookie."""
_CHUNK: Final = struct.Struct(">IHHQI")
"""Magic, reply flags, type, cookie, length of the payload."""
_DATA: Final = struct.Struct(">IHHQIQ")
"""A chunk's header and the offset of its data."""
_EXTENDED_CHUNK: Final = struct.Struct(">IHHQQQ")
"""Magic, reply flags, type, cookie, offset of the request, length of the payload."""
_EXTENDED_DATA: Final = struct.Struct(">IHHQQQQ")
"""An extended chunk's header and the offset of its data."""
_HOLE: Final = struct.Struct(">QI")
_ERROR: Final = struct.Struct(">IH")
_OFFSET: Final = struct.Struct(">Q")
_STATUS: Final = struct.Struct(">I")
_EXTENDED_STATUS: Final = struct.Struct(">II")

_TYPE_DATA: Final = int(ReplyType.OFFSET_DATA)
_READ: Final = int(Command.READ)
_BLOCK_STATUS: Final = int(Command.BLOCK_STATUS)

HOLE_LENGTH_MAX: Final = (1 << 32) - 65536
"""The longest OFFSET_HOLE: below 2^32 and still a multiple of every minimum block size."""


class Replies(ABC):
    """What the server can say, in one of the three forms.

    Attributes:
        chunked: A READ may be answered in several chunks, with holes, and with errors in
            places. Without it a READ is one :meth:`data` over the whole request, or one
            :meth:`error` and no data.
    """

    __slots__ = ()
    chunked: bool

    @abstractmethod
    def data(self, request: Request, offset: int, length: int, *, done: bool) -> bytes:
        """What goes before ``length`` bytes of data read at ``offset``.

        Args:
            request: The READ.
            offset: Where the data lies in the export, in bytes, inside the request.
            length: Bytes that the driver sends next, at least 1.
            done: This is the last chunk and its data can no longer fail.
        """

    @abstractmethod
    def hole(self, request: Request, offset: int, length: int, *, done: bool) -> bytes:
        """``length`` bytes at ``offset`` read as zeroes; at most ``HOLE_LENGTH_MAX``."""

    @abstractmethod
    def success(self, request: Request) -> bytes:
        """The request is done and there is nothing (more) to send for it."""

    @abstractmethod
    def error(self, request: Request, error: int, text: str) -> bytes:
        """The request has failed as a whole; its reply ends here. ``error`` is sent as it is."""

    @abstractmethod
    def error_at(
        self, request: Request, error: Error, text: str, offset: int, *, done: bool
    ) -> bytes:
        """The request has failed at ``offset``, which lies inside it; the rest may be good.

        Simple replies cannot tell the place and end here.
        """

    @abstractmethod
    def block_status(
        self, request: Request, context_id: int, extents: Extents, *, done: bool
    ) -> bytes:
        """What a metadata context says of the range from the request's offset on.

        Args:
            request: The BLOCK_STATUS.
            context_id: The context's id.
            extents: At least one, as :func:`fit_extents` leaves them.
            done: This is the last context.
        """


def replies_for(negotiated: Negotiated) -> Replies:
    """The form of replies that was negotiated."""
    if negotiated.extended_headers:
        return ExtendedReplies()
    return StructuredReplies() if negotiated.structured_replies else SimpleReplies()


def fit_extents(extents: Extents, request: Request, length: int, *, extents_max: int) -> Extents:
    """Cut extents to what one block status chunk may say.

    Args:
        extents: From the request's offset on, of any total length, adjacent equal ones merged.
        request: The BLOCK_STATUS; with REQ_ONE exactly one extent remains.
        length: The request's effect length in bytes; nothing is told beyond it, so that with
            compact headers every length is below 2^32.
        extents_max: No more than so many.

    Spec: proto.md, "NBD_REPLY_TYPE_BLOCK_STATUS".
    """
    if request.flags & CommandFlag.REQ_ONE:
        extents_max = 1
    return extents.limited(extents_max).clipped(length)


class SimpleReplies(Replies):
    """Simple replies only: an error number, or data."""

    __slots__ = ()
    chunked = False

    def data(self, request: Request, offset: int, length: int, *, done: bool) -> bytes:
        """See :class:`Replies`.

        Wire:
            S: 32 bits, 0x67446698, magic
            S: 32 bits, error
            S: 64 bits, cookie
        """
        return _SIMPLE.pack(SIMPLE_REPLY_MAGIC, 0, request[3])

    def hole(self, request: Request, offset: int, length: int, *, done: bool) -> bytes:
        """Not to be had: the driver sends zeroes."""
        raise NotImplementedError("a simple reply has no holes")

    def success(self, request: Request) -> bytes:
        """See :class:`Replies`."""
        return _SIMPLE.pack(SIMPLE_REPLY_MAGIC, 0, request[3])

    def error(self, request: Request, error: int, text: str) -> bytes:
        """See :class:`Replies`; the text is lost."""
        return _SIMPLE.pack(SIMPLE_REPLY_MAGIC, error, request[3])

    def error_at(
        self, request: Request, error: Error, text: str, offset: int, *, done: bool
    ) -> bytes:
        """See :class:`Replies`; the text and the place are lost."""
        return self.error(request, error, text)

    def block_status(
        self, request: Request, context_id: int, extents: Extents, *, done: bool
    ) -> bytes:
        """Not to be had: without structured replies no context can be selected."""
        raise NotImplementedError("a simple reply has no block status")


class ChunkedReplies(Replies):
    """What structured replies and extended headers have in common: the payloads of chunks.

    Attributes:
        word: The type of an extent's length and of its status.
        extent_bytes: What both take.
    """

    __slots__ = ()
    chunked = True
    word: str
    extent_bytes: int

    @abstractmethod
    def status_head(self, request: Request, context_id: int, count: int, *, done: bool) -> bytes:
        """What goes before the ``count`` extents of a block status chunk."""

    def pack_extents(self, extents: Extents, view: memoryview) -> None:
        """Fill ``view``, ``extent_bytes`` per extent, as :meth:`block_status` has them."""
        table = np.frombuffer(view, dtype=self.word).reshape(-1, 2)
        table[:, 0] = extents.lengths
        table[:, 1] = extents.status

    def block_status(
        self, request: Request, context_id: int, extents: Extents, *, done: bool
    ) -> bytes:
        """See :class:`Replies`; the chunk is :meth:`status_head` and what is packed behind it."""
        count = len(extents.lengths)
        packed = bytearray(count * self.extent_bytes)
        self.pack_extents(extents, memoryview(packed))
        return self.status_head(request, context_id, count, done=done) + packed

    def hole(self, request: Request, offset: int, length: int, *, done: bool) -> bytes:
        """See :class:`Replies`."""
        return self._chunk(request, ReplyType.OFFSET_HOLE, done, _HOLE.pack(offset, length))

    def success(self, request: Request) -> bytes:
        """See :class:`Replies`."""
        return self._chunk(request, ReplyType.NONE, True)

    def error(self, request: Request, error: int, text: str) -> bytes:
        """See :class:`Replies`."""
        return self._chunk(request, ReplyType.ERROR, True, _error_payload(error, text))

    def error_at(
        self, request: Request, error: Error, text: str, offset: int, *, done: bool
    ) -> bytes:
        """See :class:`Replies`."""
        payload = _error_payload(error, text) + _OFFSET.pack(offset)
        return self._chunk(request, ReplyType.ERROR_OFFSET, done, payload)

    def _chunk(self, request: Request, kind: ReplyType, done: bool, payload: bytes = b"") -> bytes:
        """A whole chunk."""
        return self._header(request, kind, done, len(payload)) + payload

    @abstractmethod
    def _header(self, request: Request, kind: ReplyType, done: bool, length: int) -> bytes:
        """The header of a chunk with a payload of ``length`` bytes."""


class StructuredReplies(ChunkedReplies):
    """Structured reply chunks, compact headers.

    A request that succeeds without data is answered by a simple reply, which is shorter, but
    never a READ: "a read request MUST result in a structured reply".
    """

    __slots__ = ()
    word = ">u4"
    extent_bytes = 8

    def data(self, request: Request, offset: int, length: int, *, done: bool) -> bytes:
        """See :class:`Replies`.

        Wire:
            S: 32 bits, 0x668e33ef, magic
            S: 16 bits, reply flags
            S: 16 bits, type
            S: 64 bits, cookie
            S: 32 bits, length of payload
            S: 64 bits, offset
        """
        return _DATA.pack(STRUCTURED_REPLY_MAGIC, done, _TYPE_DATA, request[3], length + 8, offset)

    def success(self, request: Request) -> bytes:
        """See :class:`Replies`."""
        if request[2] == _READ or request[2] == _BLOCK_STATUS:
            return super().success(request)
        return _SIMPLE.pack(SIMPLE_REPLY_MAGIC, 0, request[3])

    def status_head(self, request: Request, context_id: int, count: int, *, done: bool) -> bytes:
        """See :class:`ChunkedReplies`.

        Wire:
            S: 32 bits, 0x668e33ef, magic
            S: 16 bits, reply flags
            S: 16 bits, type
            S: 64 bits, cookie
            S: 32 bits, length of payload
            S: 32 bits, metadata context id
            S: n times 32 bits, length; 32 bits, status
        """
        length = 4 + count * self.extent_bytes
        header = self._header(request, ReplyType.BLOCK_STATUS, done, length)
        return header + _STATUS.pack(context_id)

    def _header(self, request: Request, kind: ReplyType, done: bool, length: int) -> bytes:
        return _CHUNK.pack(STRUCTURED_REPLY_MAGIC, done, kind, request[3], length)


class ExtendedReplies(ChunkedReplies):
    """Chunks with extended headers, for everything; each repeats the request's offset."""

    __slots__ = ()
    word = ">u8"
    extent_bytes = 16

    def data(self, request: Request, offset: int, length: int, *, done: bool) -> bytes:
        """See :class:`Replies`.

        Wire:
            S: 32 bits, 0x6e8a278c, magic
            S: 16 bits, reply flags
            S: 16 bits, type
            S: 64 bits, cookie
            S: 64 bits, offset of the request
            S: 64 bits, length of payload
            S: 64 bits, offset
        """
        return _EXTENDED_DATA.pack(
            EXTENDED_REPLY_MAGIC, done, _TYPE_DATA, request[3], request[4], length + 8, offset
        )

    def status_head(self, request: Request, context_id: int, count: int, *, done: bool) -> bytes:
        """See :class:`ChunkedReplies`.

        Wire:
            S: 32 bits, 0x6e8a278c, magic
            S: 16 bits, reply flags
            S: 16 bits, type
            S: 64 bits, cookie
            S: 64 bits, offset of the request
            S: 64 bits, length of payload
            S: 32 bits, metadata context id
            S: 32 bits, number of descriptors
            S: n times 64 bits, length; 64 bits, status
        """
        length = 8 + count * self.extent_bytes
        header = self._header(request, ReplyType.BLOCK_STATUS_EXT, done, length)
        return header + _EXTENDED_STATUS.pack(context_id, count)

    def _header(self, request: Request, kind: ReplyType, done: bool, length: int) -> bytes:
        return _EXTENDED_CHUNK.pack(
            EXTENDED_REPLY_MAGIC, done, kind, request[3], request[4], length
        )


def _error_payload(error: int, text: str) -> bytes:
    message = encode_error_text(text)
    return _ERROR.pack(error, len(message)) + message
