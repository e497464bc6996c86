"""How a handshake ends, and what the transmission phase has to know of it."""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum

from .constants import ClientFlag, TransmissionFlag
from .export_info import ExportInfo


class TlsMode(Enum):
    """What the server thinks of TLS, for the life of a connection.

    Spec: proto.md, "TLS support".
    """

    NOTLS = "off"
    """STARTTLS is refused."""
    FORCEDTLS = "require"
    """Nothing but STARTTLS and ABORT before TLS."""
    SELECTIVETLS = "allow"
    """The client may choose; exports that are TLS-only do not exist before TLS."""


@dataclass(frozen=True, slots=True)
class SelectedContext:
    """A metadata context that the client selected.

    Attributes:
        context_id: How the client and the server call it, 32 bits.
        name: Its full name, ``namespace:leaf``.
    """

    context_id: int
    name: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Negotiated:
    """The transmission phase begins.

    Attributes:
        export: The very object that :meth:`Catalogue.find` returned.
        transmission_flags: What the client was told.
        structured_replies: READ is answered in chunks; also true with extended headers.
        extended_headers: Requests and replies have 32-byte headers.
        contexts: What BLOCK_STATUS answers for, in the order of the ids.
        leftover: Bytes that the client had sent already: the beginning of its requests.
    """

    export: ExportInfo
    transmission_flags: TransmissionFlag
    structured_replies: bool
    extended_headers: bool
    contexts: tuple[SelectedContext, ...]
    leftover: bytes


@dataclass(frozen=True, slots=True)
class StartTls:
    """STARTTLS was acknowledged: send what is queued, then do the TLS handshake.

    Attributes:
        client_flags: All that outlives the plaintext part.
    """

    client_flags: ClientFlag


@dataclass(frozen=True, slots=True)
class Closed:
    """The connection is over: send what is queued, shut TLS down, close.

    Attributes:
        reason: One line for the log.
        clean: The client asked for it (ABORT), or left between two options.
    """

    reason: str
    clean: bool = False


Outcome = Negotiated | StartTls | Closed
