"""What a server and its deputies tell each other, as MessagePack.

Exports have numbers that the server gives them; clients have those of
:class:`~..server.delegation.DelegatedClient`.
"""

from __future__ import annotations

from typing import Any, Final

import msgspec

from ..server.delegation import Ending
from ..server.limits import Limits


class Message(msgspec.Struct, tag=True, kw_only=True):
    """One message."""


# From the server.


class Begin(Message):
    """The first message.

    Attributes:
        limits: What clients may take.
        log_level: The least level of what is to be told.
    """

    limits: Limits
    log_level: int


class Open(Message):
    """Serve an image; the answer is :class:`Done` or :class:`Failed`.

    Attributes:
        export: The export's number.
        path: The qcow2 image.
        identity: Device and inode of what the server has found there.
        settings: Attributes of the :class:`~..export.export.Export` that are plain values.
    """

    export: int
    path: bytes
    identity: tuple[int, int]
    settings: dict[str, Any]


class Bits(Message):
    """An export has a dirty bitmap.

    Attributes:
        export: The export's number.
        leaf: The name after ``qemu:dirty-bitmap:``.
        size: Bytes of the disk.
        granularity: Bytes per bit.
        data: The packed bits.
    """

    export: int
    leaf: str
    size: int
    granularity: int
    data: bytes


class Serve(Message):
    """Serve a client; its socket comes along. The answer, some time, is :class:`Closed`.

    Attributes:
        client: The client's number.
        export: The export's.
        peer: Who it is, for the log.
        contexts: Ids and names of the metadata contexts that it selected.

    The rest is as in :class:`~..nbd.outcomes.Negotiated`.
    """

    client: int
    export: int
    peer: str
    transmission_flags: int
    structured_replies: bool
    extended_headers: bool
    contexts: list[tuple[int, str]]
    leftover: bytes


class End(Message):
    """End a client."""

    client: int
    how: Ending
    reason: str


class Close(Message):
    """No client of an export is left, and none will come; the answer is :class:`Done`."""

    export: int


# From a deputy.


class Done(Message):
    """What was asked for an export is done."""

    export: int


class Failed(Message):
    """An image cannot be opened."""

    export: int
    reason: str


class Drained(Message):
    """A client that is shutting down has nothing left to finish."""

    client: int


class Closed(Message):
    """A client is over."""

    client: int


class Logged(Message):
    """A line for the log."""

    logger: str
    level: int
    text: str


encode: Final = msgspec.msgpack.Encoder().encode
decode_for_deputy: Final = msgspec.msgpack.Decoder(Begin | Open | Bits | Serve | End | Close).decode
decode_of_deputy: Final = msgspec.msgpack.Decoder(Done | Failed | Drained | Closed | Logged).decode
