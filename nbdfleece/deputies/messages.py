"""What a server and its deputies tell each other, as MessagePack.

Exports have numbers that the server gives them; clients have those of
:class:`~..server.delegation.DelegatedClient`.
"""

from __future__ import annotations

from typing import Any, Final, Literal

import msgspec

from ..block.shared_fleece import Geometry
from ..server.delegation import Ending
from ..server.limits import Limits

Lent = Literal["file", "scratch", "codes"]


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


class Image(msgspec.Struct, kw_only=True):
    """An image that nobody writes.

    Attributes:
        path: Its file.
        identity: Device and inode of what the server has found there.
        is_raw: It is the bytes themselves, and not qcow2.
    """

    path: bytes
    identity: tuple[int, int]
    is_raw: bool = False


class Open(Message):
    """Serve an image; the answer is :class:`Done` or :class:`Failed`.

    Attributes:
        export: The export's number.
        image: A qcow2 image.
        settings: Attributes of the :class:`~..export.export.Export` that are plain values.
    """

    export: int
    image: Image
    settings: dict[str, Any]


class Lend(Message):
    """A descriptor comes along, for the :class:`Share` that follows.

    Attributes:
        what: Which descriptor of a :class:`~..block.shared_fleece.Share`.
    """

    what: Lent


class Share(Message):
    """Serve a snapshot, with what was lent for it; the answer is :class:`Done` or :class:`Failed`.

    Attributes:
        export: The export's number.
        geometry: The snapshot's.
        below: What is below the disk's file.
        has_depth: Whether ``qemu:allocation-depth`` is offered.
        settings: As of :class:`Open`.
    """

    export: int
    geometry: Geometry
    below: Image | None
    has_depth: bool
    settings: dict[str, Any]


class Answer(Message):
    """What a deputy asked for: the arrays' bytes, or the data."""

    question: int
    parts: tuple[bytes, ...]


class Refusal(Message):
    """Why a deputy is not told what it asked for.

    Attributes:
        question: The question's number.
        error: An ``errno``; 0 for a snapshot that is broken or gone.
        reason: In words.
    """

    question: int
    error: int
    reason: str


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


class Question(Message):
    """Something of an export that a deputy needs: an :class:`Answer` or a :class:`Refusal` follows.

    Attributes:
        question: A number of the deputy's.
        export: The export's.
    """

    question: int
    export: int


class Locate(Question):
    """Where the clusters of a part of a disk lie; the answer is an array of 64-bit places."""

    part: int


class Read(Question):
    """Bytes of a snapshot, :data:`READ_BYTES_MAX` at most."""

    offset: int
    length: int


class Describe(Question):
    """Block status; the answer is two arrays, of 64-bit lengths and of 32-bit words."""

    offset: int
    length: int
    extents_max: int


AnyQuestion = Locate | Read | Describe


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


READ_BYTES_MAX: Final = 1 << 20

encode: Final = msgspec.msgpack.Encoder().encode
decode_for_deputy: Final = msgspec.msgpack.Decoder(
    Begin | Open | Lend | Share | Answer | Refusal | Bits | Serve | End | Close
).decode
decode_of_deputy: Final = msgspec.msgpack.Decoder(
    AnyQuestion | Done | Failed | Drained | Closed | Logged
).decode
