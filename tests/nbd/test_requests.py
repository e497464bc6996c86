"""Requests: decoding, framing and what may be asked for. Numbers are those of the requirements."""

from __future__ import annotations

import struct

import pytest
from hypothesis import given
from hypothesis import strategies as st

from nbdfleece.errors import ProtocolError
from nbdfleece.nbd.constants import Command, CommandFlag, Error
from nbdfleece.nbd.errors import RequestError
from nbdfleece.nbd.export_info import ExportInfo
from nbdfleece.nbd.limits import Limits
from nbdfleece.nbd.requests import (
    Request,
    RequestRules,
    StatusQuery,
    unpack_extended_request,
    unpack_request,
)

from .wire import MIB, request, rules, transmission

SIZE = 100 * MIB + 7
DISK = ExportInfo(
    name="disk",
    size=SIZE,
    can_trim=True,
    can_write_zeroes=True,
    can_fast_zero=True,
    can_cache=True,
    contexts=("base:allocation", "qemu:allocation-depth"),
)
FROZEN = ExportInfo(name="frozen", size=SIZE, read_only=True, can_cache=True)
PLAIN = ExportInfo(name="plain", size=SIZE)
BLOCKS = ExportInfo(
    name="blocks",
    size=1_000_000,
    minimum_block_size=4096,
    can_trim=True,
    can_write_zeroes=True,
    can_cache=True,
    contexts=("base:allocation",),
)
RANGE_COMMANDS = [
    Command.READ,
    Command.WRITE,
    Command.TRIM,
    Command.CACHE,
    Command.WRITE_ZEROES,
    Command.BLOCK_STATUS,
]


def full(export: ExportInfo = DISK, *, extended: bool = False) -> RequestRules:
    """Rules of a client that negotiated everything, with compact or extended headers."""
    return rules(export, structured=True, extended=extended, contexts=export.contexts)


def make(
    command: int, offset: int = 0, length: int = 512, flags: int = 0, cookie: int = 7
) -> Request:
    return Request(0, int(flags), int(command), cookie, offset, length)


def verdict(checker: RequestRules, asked: Request) -> Error | None:
    try:
        checker.check(asked)
    except RequestError as refusal:
        found = refusal
    else:
        return None
    assert 0 < len(found.text) < 200
    return found.error


# Decoding


@pytest.mark.parametrize("cookie", [0, 1, 1 << 63, (1 << 64) - 1])
def test_compact_request_is_decoded_where_it_lies(cookie: int) -> None:
    """101: the cookie is 64 opaque bits."""
    wire = b"xyz" + request(Command.TRIM, 1 << 40, 0xFFFFFFFF, flags=1, cookie=cookie) + b"rest"
    found = unpack_request(memoryview(bytearray(wire)), 3)
    assert found[1:] == (1, Command.TRIM, cookie, 1 << 40, 0xFFFFFFFF)


def test_extended_request_has_a_length_of_64_bits() -> None:
    """176."""
    wire = b"\0" + request(Command.WRITE_ZEROES, 5, 1 << 50, flags=2, cookie=9, extended=True)
    assert unpack_extended_request(wire, 1)[1:] == (2, Command.WRITE_ZEROES, 9, 5, 1 << 50)


@pytest.mark.parametrize("extended", [False, True])
def test_wrong_magic_drops_the_connection(extended: bool) -> None:
    """176: the other form's magic is wrong too."""
    unpack = full(extended=extended).unpack
    for wire in request(extended=not extended) + bytes(8), bytes(32), b"\xff" * 32:
        with pytest.raises(ProtocolError):
            unpack(wire, 0)


def test_header_size_and_unpack_fit_what_was_negotiated() -> None:
    assert (full().header_size, full().unpack) == (28, unpack_request)
    extended = full(extended=True)
    assert (extended.header_size, extended.unpack) == (32, unpack_extended_request)


# Framing


def test_only_write_has_a_payload_with_compact_headers() -> None:
    """178: PAYLOAD_LEN means nothing there."""
    checker = full()
    for command in range(10):
        for flags in (0, CommandFlag.PAYLOAD_LEN):
            expected = 512 if command == Command.WRITE else 0
            assert checker.payload_length(make(command, 0, 512, flags)) == expected


def test_payload_len_gives_any_command_a_payload_with_extended_headers() -> None:
    """178, 180: a WRITE has one anyhow, as QEMU takes it."""
    checker = full(extended=True)
    for command in range(10):
        assert checker.payload_length(make(command, 0, 512, CommandFlag.PAYLOAD_LEN)) == 512
        expected = 512 if command == Command.WRITE else 0
        assert checker.payload_length(make(command, 0, 512)) == expected


@pytest.mark.parametrize(
    ("length", "framed", "error"),
    [
        (64 * MIB - 1, True, None),
        (64 * MIB, True, None),
        (64 * MIB + 1, True, Error.EINVAL),
        (128 * MIB, True, Error.EINVAL),
        (128 * MIB + 1, False, None),
        (1 << 31, False, None),
        ((1 << 32) - 1, False, None),
    ],
)
def test_large_compact_write(length: int, framed: bool, error: Error | None) -> None:
    """96, 139; CVE-2005-3534, CVE-2011-0530: taken, thrown away, or the connection is dropped."""
    checker = full(ExportInfo(name="huge", size=1 << 40))
    asked = make(Command.WRITE, 0, length)
    if not framed:
        with pytest.raises(ProtocolError):
            checker.payload_length(asked)
        return
    assert checker.payload_length(asked) == length
    assert verdict(checker, asked) == error


@pytest.mark.parametrize("command", [Command.WRITE, Command.READ, Command.BLOCK_STATUS, 99])
def test_large_extended_payload_drops_the_connection(command: int) -> None:
    """179: "larger than a server's advertised or default maximum payload length"."""
    checker = full(extended=True)
    allowed = make(command, 0, 32 * MIB, CommandFlag.PAYLOAD_LEN)
    assert checker.payload_length(allowed) == 32 * MIB
    for length in (32 * MIB + 1, 1 << 32, (1 << 64) - 1):
        with pytest.raises(ProtocolError):
            checker.payload_length(allowed._replace(length=length))


@pytest.mark.parametrize("extended", [False, True])
def test_small_maximum_payload_is_enforced_without_disconnecting(extended: bool) -> None:
    """92, 96: "SHOULD NOT be considered a denial of service attack" up to 32 MiB."""
    checker = full(ExportInfo(name="small", size=SIZE, maximum_payload=1 * MIB), extended=extended)
    asked = make(Command.WRITE, 0, 1 * MIB + 1)
    assert checker.payload_length(asked) == 1 * MIB + 1
    assert verdict(checker, asked) == Error.EINVAL
    assert verdict(checker, asked._replace(length=1 * MIB)) is None
    assert checker.payload_length(asked._replace(length=32 * MIB)) == 32 * MIB


# Commands and flags


def test_what_is_offered_passes() -> None:
    """104, 171: FUA goes with every command."""
    for extended in (False, True):
        checker = full(extended=extended)
        for command in RANGE_COMMANDS:
            for flags in (0, CommandFlag.FUA):
                assert verdict(checker, make(command, 512, 512, flags)) is None
        assert verdict(checker, make(Command.FLUSH, 0, 0, CommandFlag.FUA)) is None


@pytest.mark.parametrize("command", [8, 9, 255, 65535])
def test_unknown_command_gets_einval(command: int) -> None:
    """169; RESIZE is one of them."""
    assert verdict(full(), make(command)) == Error.EINVAL


def test_flags_that_do_not_fit_get_einval() -> None:
    """145, 169: unknown ones, and known ones on the wrong command."""
    fitting = {
        Command.READ: CommandFlag.DF,
        Command.WRITE: 0,
        Command.TRIM: 0,
        Command.CACHE: 0,
        Command.WRITE_ZEROES: CommandFlag.NO_HOLE | CommandFlag.FAST_ZERO,
        Command.BLOCK_STATUS: CommandFlag.REQ_ONE,
    }
    checker = full()
    for command, fit in fitting.items():
        for bit in range(16):
            expected = None if (1 << bit) & (fit | CommandFlag.FUA) else Error.EINVAL
            assert verdict(checker, make(command, 0, 512, 1 << bit)) == expected
    assert verdict(checker, make(Command.FLUSH, 0, 0, CommandFlag.DF)) == Error.EINVAL


def test_payload_len_on_commands_without_payload_gets_einval() -> None:
    """180: consumed (see framing), then refused."""
    checker = full(extended=True)
    for command in RANGE_COMMANDS:
        if command in (Command.WRITE, Command.BLOCK_STATUS):
            continue
        asked = make(command, 0, 512, CommandFlag.PAYLOAD_LEN)
        assert verdict(checker, asked) == Error.EINVAL
    flush = make(Command.FLUSH, 0, 8, CommandFlag.PAYLOAD_LEN)
    assert verdict(checker, flush) == Error.EINVAL


def test_df_without_structured_replies_gets_einval() -> None:
    """43, 169."""
    assert verdict(rules(DISK), make(Command.READ, 0, 512, CommandFlag.DF)) == Error.EINVAL


def test_fast_zero_that_was_not_advertised_gets_einval() -> None:
    """70, 151: never ENOTSUP; nbdkit aborts."""
    slow = ExportInfo(name="slow", size=SIZE, can_write_zeroes=True)
    asked = make(Command.WRITE_ZEROES, 0, 512, CommandFlag.FAST_ZERO)
    assert verdict(full(slow), asked) == Error.EINVAL
    assert verdict(full(slow), asked._replace(flags=CommandFlag.NO_HOLE)) is None


@pytest.mark.parametrize(
    "command", [Command.TRIM, Command.CACHE, Command.WRITE_ZEROES, Command.BLOCK_STATUS]
)
def test_command_that_is_not_offered_gets_einval(command: int) -> None:
    """67, 153."""
    assert verdict(full(PLAIN), make(command)) == Error.EINVAL


@pytest.mark.parametrize("command", [Command.WRITE, Command.TRIM, Command.WRITE_ZEROES])
def test_changing_a_read_only_export_gets_eperm(command: int) -> None:
    """68, 152, 166: past the end, with odd flags or length 0 too; qemu says EINVAL."""
    for extended in (False, True):
        checker = full(FROZEN, extended=extended)
        for offset, length, flags in ((0, 512, 0), (SIZE, 512, 1), (0, 0, 0), (0, 1, 0x30)):
            assert verdict(checker, make(command, offset, length, flags)) == Error.EPERM
        assert verdict(checker, make(Command.READ)) is None
        assert verdict(checker, make(Command.FLUSH, 0, 0)) is None


def test_trim_of_a_read_only_export_may_be_offered() -> None:
    """A client says that it has finished with a range of a snapshot."""
    fleece = ExportInfo(name="fleece", size=SIZE, read_only=True, can_trim=True)
    assert verdict(full(fleece), make(Command.TRIM)) is None
    assert verdict(full(fleece), make(Command.WRITE)) == Error.EPERM


@pytest.mark.parametrize(("offset", "length"), [(1, 0), (0, 1), (512, 512), (1 << 63, 0)])
def test_flush_of_a_range_gets_einval(offset: int, length: int) -> None:
    """141."""
    assert verdict(full(), make(Command.FLUSH, offset, length)) == Error.EINVAL


# Ranges


@pytest.mark.parametrize("command", RANGE_COMMANDS)
@pytest.mark.parametrize("offset", [0, SIZE, (1 << 64) - 1])
def test_length_zero_gets_einval(command: int, offset: int) -> None:
    """127, 137, 143, 147, 162: an error, not a disconnect."""
    assert verdict(full(), make(command, offset, 0)) == Error.EINVAL


@pytest.mark.parametrize("command", RANGE_COMMANDS)
@pytest.mark.parametrize(
    ("offset", "length"),
    [
        (SIZE, 1),
        (SIZE - 1, 2),
        (0, SIZE + 1),
        ((1 << 63) - 1, 1),
        (1 << 63, 1),
        ((1 << 64) - 1, 1),
        ((1 << 64) - 1, (1 << 32) - 1),
        ((1 << 64) - 512, 512),
    ],
)
def test_past_the_end_is_refused(command: int, offset: int, length: int) -> None:
    """99, 152, 160, 164, 165; CVE-2025-47712: ENOSPC for what writes, else EINVAL; no overflow."""
    writing = command in (Command.WRITE, Command.WRITE_ZEROES)
    expected = Error.ENOSPC if writing else Error.EINVAL
    assert verdict(full(), make(command, offset, length)) == expected
    if command != Command.WRITE:
        assert verdict(full(extended=True), make(command, offset, length)) == expected


@pytest.mark.parametrize("length", [1 << 40, 1 << 63, (1 << 64) - 1])
def test_extended_lengths_past_the_end_are_refused(length: int) -> None:
    checker = full(extended=True)
    for offset in (0, 1, SIZE, (1 << 64) - 1):
        assert verdict(checker, make(Command.READ, offset, length)) == Error.EINVAL
        assert verdict(checker, make(Command.WRITE_ZEROES, offset, length)) == Error.ENOSPC


@pytest.mark.parametrize("command", RANGE_COMMANDS)
def test_the_last_byte_can_be_reached(command: int) -> None:
    assert verdict(full(), make(command, SIZE - 1, 1)) is None


@pytest.mark.parametrize("command", RANGE_COMMANDS)
def test_unaligned_request_gets_einval(command: int) -> None:
    """92, 99, 165: the minimum block size is enforced, for reading too."""
    checker = full(BLOCKS)
    for offset, length in ((1, 4096), (4096, 1), (512, 512), (4096, 4095), (100, 4096 - 100)):
        assert verdict(checker, make(command, offset, length)) == Error.EINVAL
    assert verdict(checker, make(command, 4096, 8192)) is None


@pytest.mark.parametrize("command", RANGE_COMMANDS)
def test_unaligned_tail_of_an_export_can_be_reached(command: int) -> None:
    """93: a size that is no multiple of the minimum block size is served whole."""
    tail = BLOCKS.size // 4096 * 4096
    assert verdict(full(BLOCKS), make(command, tail, BLOCKS.size - tail)) is None
    assert verdict(full(BLOCKS), make(command, tail, 1)) == Error.EINVAL
    assert verdict(full(BLOCKS), make(command, tail + 1, BLOCKS.size - tail - 1)) == Error.EINVAL


# Sizes


def test_commands_without_payload_have_no_limit() -> None:
    """98, 150: neither compact nor extended."""
    huge = ExportInfo(
        name="huge",
        size=1 << 50,
        can_trim=True,
        can_write_zeroes=True,
        can_cache=True,
        contexts=("base:allocation",),
    )
    for command in (Command.TRIM, Command.CACHE, Command.WRITE_ZEROES, Command.BLOCK_STATUS):
        assert verdict(full(huge), make(command, 0, (1 << 32) - 1)) is None
        assert verdict(full(huge, extended=True), make(command, 0, 1 << 50)) is None


def test_large_read_is_split_with_structured_replies_and_refused_with_simple_ones() -> None:
    """97, 132."""
    huge = ExportInfo(name="huge", size=1 << 40)
    asked = make(Command.READ, 0, (1 << 32) - 1)
    assert verdict(rules(huge, structured=True), asked) is None
    assert verdict(rules(huge, extended=True), asked._replace(length=1 << 39)) is None
    assert verdict(rules(huge), asked) == Error.EINVAL
    assert verdict(rules(huge), asked._replace(length=64 * MIB)) is None
    assert verdict(rules(huge), asked._replace(length=64 * MIB + 1)) == Error.EINVAL


def test_df_read_over_the_maximum_payload_gets_eoverflow() -> None:
    """97, 136, 167."""
    checker = full()
    asked = make(Command.READ, 0, 32 * MIB, CommandFlag.DF)
    assert verdict(checker, asked) is None
    assert verdict(checker, asked._replace(length=32 * MIB + 1)) == Error.EOVERFLOW


def test_df_read_of_64_kib_is_always_possible() -> None:
    """136: "the server MUST support unfragmented reads [of] 65,536 bytes"."""
    small = ExportInfo(name="small", size=SIZE, maximum_payload=65536)
    assert verdict(full(small), make(Command.READ, 0, 65536, CommandFlag.DF)) is None


def test_extents_of_one_chunk_fit_the_maximum_payload() -> None:
    """97, 122: with 16 bytes each."""
    small = ExportInfo(name="small", size=SIZE, maximum_payload=65536)
    assert full(small).extents_max * 16 + 8 <= 65536
    assert full().extents_max == 1 << 17


# BLOCK_STATUS with payload


def status(
    effect: int, *ids: int, offset: int = 0, flags: int = CommandFlag.PAYLOAD_LEN
) -> tuple[Request, bytes]:
    payload = struct.pack(f">Q{len(ids)}I", effect, *ids)
    return make(Command.BLOCK_STATUS, offset, len(payload), flags), payload


def test_status_without_payload_asks_for_all_contexts() -> None:
    """154."""
    asked = make(Command.BLOCK_STATUS, 0, 1 << 20)
    assert full().status_query(asked) == StatusQuery(1 << 20, (0, 1))


def test_status_payload_chooses_contexts() -> None:
    """185."""
    checker = full(extended=True)
    for ids in ((0,), (1,), (1, 0)):
        asked, payload = status(4096, *ids, offset=512)
        assert checker.payload_length(asked) == 8 + 4 * len(ids)
        assert verdict(checker, asked) is None
        assert checker.status_query(asked, memoryview(payload)) == StatusQuery(4096, ids)


@pytest.mark.parametrize("length", [0, 1, 7, 8, 9, 11, 13, 20, 32 * MIB])
def test_status_payload_of_a_wrong_size_gets_einval(length: int) -> None:
    """185: no ids, half an id, more ids than contexts; all are consumed first."""
    checker = full(extended=True)
    asked = make(Command.BLOCK_STATUS, 0, length, CommandFlag.PAYLOAD_LEN)
    assert checker.payload_length(asked) == length
    assert verdict(checker, asked) == Error.EINVAL


@pytest.mark.parametrize(
    ("effect", "ids", "offset"),
    [
        (4096, (0, 0), 0),
        (4096, (2,), 0),
        (4096, (0xFFFFFFFF, 0), 0),
        (0, (0,), 0),
        (SIZE + 1, (0,), 0),
        ((1 << 64) - 1, (0,), 1),
        (1, (0,), SIZE),
    ],
)
def test_bad_status_payload_gets_einval(effect: int, ids: tuple[int, ...], offset: int) -> None:
    """160, 162, 185."""
    checker = full(extended=True)
    asked, payload = status(effect, *ids, offset=offset)
    checker.check(asked)
    with pytest.raises(RequestError) as caught:
        checker.status_query(asked, payload)
    assert caught.value.error == Error.EINVAL


def test_status_payload_without_contexts_gets_einval() -> None:
    """153, 180, 184."""
    checker = rules(DISK, extended=True)
    asked, payload = status(4096, 0)
    assert checker.payload_length(asked) == len(payload)
    assert verdict(checker, asked) == Error.EINVAL


def test_req_one_and_payload_go_together() -> None:
    asked, payload = status(4096, 1, flags=CommandFlag.PAYLOAD_LEN | CommandFlag.REQ_ONE)
    checker = full(extended=True)
    assert verdict(checker, asked) is None
    assert checker.status_query(asked, payload) == StatusQuery(4096, (1,))


# Everything at once

U64 = st.one_of(
    st.integers(0, (1 << 64) - 1),
    st.integers(0, 10),
    st.integers(SIZE - 5000, SIZE + 5000),
    st.integers((1 << 64) - 5000, (1 << 64) - 1),
)


@given(
    st.sampled_from([DISK, FROZEN, PLAIN, BLOCKS]),
    st.sampled_from(["simple", "structured", "extended"]),
    st.integers(0, 0x7F) | st.integers(0, 0xFFFF),
    st.integers(0, 9) | st.integers(0, 0xFFFF),
    U64,
    U64,
)
def test_what_passes_is_safe_to_carry_out(export, form, flags, command, offset, length) -> None:
    """Whatever the request, it is refused cleanly or lies inside the export."""
    checker = RequestRules(
        transmission(
            export,
            structured=form == "structured",
            extended=form == "extended",
            contexts=() if form == "simple" else export.contexts,
        ),
        Limits(),
    )
    asked = make(command, offset, length, flags)
    try:
        payload = checker.payload_length(asked)
    except ProtocolError:
        assert length > 32 * MIB
        return
    if verdict(checker, asked) is not None or command == Command.FLUSH:
        return
    if payload and command == Command.BLOCK_STATUS:
        assert payload <= 8 + 4 * len(export.contexts)
        return
    assert length > 0
    assert offset + length <= export.size
    assert offset % export.minimum_block_size == 0
    assert command in RANGE_COMMANDS
    if export.read_only:
        assert command in (Command.READ, Command.CACHE, Command.BLOCK_STATUS)
    if command == Command.WRITE:
        assert payload == length <= checker.payload_max


@given(st.binary(min_size=32, max_size=32))
def test_noise_is_never_a_request(noise: bytes) -> None:
    """The magic is all there is to hold on to."""
    for extended in (False, True):
        checker = full(extended=extended)
        magic = struct.pack(">I", 0x21E41C71 if extended else 0x25609513)
        if noise.startswith(magic):
            continue
        with pytest.raises(ProtocolError):
            checker.unpack(noise, 0)
        asked = checker.unpack(magic + noise[4:], 0)
        verdict(checker, asked)
