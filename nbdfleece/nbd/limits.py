"""Limits of the wire: how much one client may ask for, and why that much."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise
from typing import Final

from ..errors import UsageError

KIB: Final = 1 << 10
MIB: Final = 1 << 20

DEFAULT_PAYLOAD_MAX: Final = 32 * MIB
"""The specification's own maximum payload: what a client may assume when it was told nothing."""

PAYLOAD_MAX_LEAST: Final = 64 * KIB
"""A DF read of this size must be possible, whatever the maximum payload."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Limits:
    """What a connection may take of the server; each limit bounds memory or time.

    Attributes:
        options_max: Options in one handshake. libnbd's tools send about five for each export
            that they look at and look at many; a client that goes on for ever costs nothing
            but its socket until the handshake's time is up. Above it: the connection is dropped.
        option_length_max: Bytes of one option that are kept. An export name and a thousand
            queries for bitmaps fit; a thousand connections that stop half way hold 256 MiB.
            Above it: the data is skipped unread and the answer is ERR_TOO_BIG.
        option_skip_max: Bytes of one option that are skipped at all, as much as QEMU takes.
            Above it: the connection is dropped (a length of 4 GiB is an attack,
            CVE-2017-15119).
        queries_max: Queries in one LIST or SET_META_CONTEXT. Each takes part in a search over
            the export's contexts. Above it: ERR_TOO_BIG.
        reply_bytes_max: Bytes of option replies that wait to be sent before no further option
            is looked at: a client that pipelines LIST without reading gets no more than this
            and the replies to one option.
        payload_advertised_max: The maximum payload in INFO_BLOCK_SIZE unless the export has a
            smaller one; the specification's default, which every client may assume.
        payload_accepted_max: What compact requests get away with, since old clients never
            asked: nbd-tester-client writes 50 MB at once, nbdkit takes 64 MiB. Above it: EINVAL.
        payload_skip_max: Payload of a refused write that is read and thrown away so that the
            connection lives on. Above it: the connection is dropped.
        extents_max: Extents in one block status chunk, as QEMU; 1 MiB compact, 2 MiB extended.
        requests_in_flight_max: Requests of one connection that are worked on at a time. QEMU
            has 16; a client with a deep queue over a slow disk gains from more.
        bytes_in_flight_max: Bytes of payload, either way, that these may hold; at least twice
            the accepted payload, so that the largest request never waits for itself.
    """

    options_max: int = 4096
    option_length_max: int = 256 * KIB
    option_skip_max: int = 32 * MIB
    queries_max: int = 1024
    reply_bytes_max: int = 64 * KIB
    payload_advertised_max: int = DEFAULT_PAYLOAD_MAX
    payload_accepted_max: int = 2 * DEFAULT_PAYLOAD_MAX
    payload_skip_max: int = 4 * DEFAULT_PAYLOAD_MAX
    extents_max: int = 1 << 17
    requests_in_flight_max: int = 64
    bytes_in_flight_max: int = 4 * DEFAULT_PAYLOAD_MAX

    def __post_init__(self) -> None:
        _check_order(
            ("64 KiB", PAYLOAD_MAX_LEAST),
            ("payload_advertised_max", self.payload_advertised_max),
            ("payload_accepted_max", self.payload_accepted_max),
            ("payload_skip_max", self.payload_skip_max),
            ("4 GiB", 1 << 32),
        )
        _check_order(
            ("payload_accepted_max", self.payload_accepted_max),
            ("half of bytes_in_flight_max", self.bytes_in_flight_max // 2),
        )
        _check_order(
            ("option_length_max", self.option_length_max),
            ("option_skip_max", self.option_skip_max),
        )


def _check_order(*limits: tuple[str, int]) -> None:
    """Check that each limit is at least the one before it.

    Raises:
        UsageError: One is not.
    """
    for (less, least), (more, value) in pairwise(limits):
        if value < least:
            raise UsageError(f"limits: {more} is {value}, less than {less} ({least})")


DEFAULT_LIMITS: Final = Limits()
