"""What the wire must know of an export, and of where exports are found.

The server package mirrors its exports into these; nothing here knows an image. A subclass of
:class:`ExportInfo` may carry a handle to the real thing: negotiation gives back the object that
:meth:`Catalogue.find` returned.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Final, Protocol

from ..errors import UsageError
from .constants import Option, TransmissionFlag
from .limits import DEFAULT_PAYLOAD_MAX, PAYLOAD_MAX_LEAST
from .names import check_context_names, check_string

EXPORT_SIZE_END: Final = 1 << 63
"""Clients keep sizes in signed 64 bits (CVE-2017-2630)."""
MINIMUM_BLOCK_SIZE_MAX: Final = 65536


@dataclass(frozen=True, slots=True, kw_only=True)
class ExportInfo:
    """One export as clients see it.

    Attributes:
        name: The canonical name.
        description: For people; "" for none.
        size: Bytes, any number below 2^63.
        read_only: Writes are refused.
        rotational: Seeks are expensive.
        can_multi_conn: A flush on one connection covers the others' writes.
        can_trim: TRIM is offered; on a read-only export too, if set ("I am done with this").
        can_write_zeroes: WRITE_ZEROES is offered (never on a read-only export).
        can_fast_zero: FAST_ZERO is understood (never without WRITE_ZEROES).
        can_cache: CACHE is offered.
        can_flush: FLUSH is offered.
        can_fua: FUA is offered.
        minimum_block_size: Bytes, a power of two up to 64 KiB; requests off it get EINVAL.
        tells_block_sizes: Clients are told of the block sizes.
        told_block_sizes: What they are told instead of the three: minimum, preferred and
            maximum of what serves them well, which nobody enforces. None: what holds.
        preferred_block_size: Bytes, a power of two, at least 512 and the minimum.
        maximum_payload: Bytes of data in one message; at least 64 KiB and the preferred size.
        contexts: Names of the metadata contexts that can be selected, each once; their ids
            are their places here.
        tls_only: Not shown and not served without TLS (in SELECTIVETLS mode).
        requires_block_size: Clients that do not ask for the block sizes are turned away.

    Raises:
        UsageError: A value breaks a rule of the protocol; nothing can be served this way.
    """

    name: str
    size: int
    description: str = ""
    read_only: bool = False
    rotational: bool = False
    can_multi_conn: bool = False
    can_trim: bool = False
    can_write_zeroes: bool = False
    can_fast_zero: bool = False
    can_cache: bool = False
    can_flush: bool = True
    can_fua: bool = True
    minimum_block_size: int = 1
    tells_block_sizes: bool = True
    told_block_sizes: tuple[int, int, int] | None = None
    preferred_block_size: int = 4096
    maximum_payload: int = DEFAULT_PAYLOAD_MAX
    contexts: Sequence[str] = ()
    tls_only: bool = False
    requires_block_size: bool = False

    def __post_init__(self) -> None:
        check_string(self.name, "export name")
        check_string(self.description, "description")
        check_context_names(self.contexts)
        if not 0 <= self.size < EXPORT_SIZE_END:
            raise UsageError(f"export '{self.name}': size {self.size} is not below 2^63 bytes")
        _check_block_sizes(self)

    def transmission_flags(
        self, *, structured_replies: bool, extended_headers: bool, contexts_selected: bool
    ) -> TransmissionFlag:
        """What this export can do for a client that has negotiated this much.

        Spec: proto.md, "Transmission flags".
        """
        flags = TransmissionFlag.HAS_FLAGS
        zeroes = self.can_write_zeroes and not self.read_only
        for flag, on in (
            (TransmissionFlag.SEND_FLUSH, self.can_flush),
            (TransmissionFlag.SEND_FUA, self.can_fua),
            (TransmissionFlag.READ_ONLY, self.read_only),
            (TransmissionFlag.ROTATIONAL, self.rotational),
            (TransmissionFlag.SEND_TRIM, self.can_trim),
            (TransmissionFlag.SEND_WRITE_ZEROES, zeroes),
            (TransmissionFlag.SEND_DF, structured_replies or extended_headers),
            (TransmissionFlag.CAN_MULTI_CONN, self.can_multi_conn),
            (TransmissionFlag.SEND_CACHE, self.can_cache),
            (TransmissionFlag.SEND_FAST_ZERO, zeroes and self.can_fast_zero),
            (TransmissionFlag.BLOCK_STATUS_PAYLOAD, extended_headers and contexts_selected),
        ):
            if on:
                flags |= flag
        return flags


@dataclass(frozen=True, slots=True)
class Lookup:
    """What a catalogue must find out before an option can be answered.

    Attributes:
        option: LIST, or one that names an export.
        name: The export's name as the client gave it; "" for LIST.
        types: What INFO or GO asks for.
    """

    option: Option
    name: str = ""
    types: frozenset[int] = frozenset()


class NotKnownYet(Exception):
    """A catalogue must first find the answer out; the negotiation then waits for its driver."""


class Catalogue(Protocol):
    """Where negotiation finds exports.

    Both methods may raise :class:`NotKnownYet`, as the first thing that they do for an option,
    or an ``OptionError``. After :meth:`Negotiation.resume` they are called again.
    """

    def exports(self) -> Iterable[ExportInfo]:
        """The exports that LIST shows, in its order."""

    def find(self, name: str) -> ExportInfo | None:
        """The export that a client means by ``name``; "" is the default export, if any."""


def _is_power_of_two(number: int) -> bool:
    return number > 0 and number & (number - 1) == 0


def _check_block_sizes(info: ExportInfo) -> None:
    minimum, preferred = info.minimum_block_size, info.preferred_block_size
    if not _is_power_of_two(minimum) or minimum > MINIMUM_BLOCK_SIZE_MAX:
        raise UsageError(
            f"export '{info.name}': minimum block size {minimum} is not a power of two up to 65536"
        )
    if not _is_power_of_two(preferred) or not max(minimum, 512) <= preferred < 1 << 32:
        raise UsageError(
            f"export '{info.name}': preferred block size {preferred} is not a power of two "
            f"from {max(minimum, 512)} on"
        )
    if not max(preferred, PAYLOAD_MAX_LEAST) <= info.maximum_payload < 1 << 32:
        raise UsageError(
            f"export '{info.name}': maximum payload {info.maximum_payload} is not at least "
            f"{max(preferred, PAYLOAD_MAX_LEAST)}"
        )
