"""Replies, byte for byte. Numbers are those of the conformance requirements."""

from __future__ import annotations

import struct
from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from nbdfleece.extents import Extents
from nbdfleece.nbd.constants import Command, CommandFlag, Error, ReplyType
from nbdfleece.nbd.export_info import ExportInfo
from nbdfleece.nbd.replies import (
    HOLE_LENGTH_MAX,
    ExtendedReplies,
    Replies,
    SimpleReplies,
    StructuredReplies,
    fit_extents,
    replies_for,
)
from nbdfleece.nbd.requests import Request

from .wire import transmission

COOKIE = 0xFEDCBA9876543210
READ = Request(0, 0, Command.READ, COOKIE, 1 << 40, 65536)
WRITE = READ._replace(command=Command.WRITE)
STATUS = READ._replace(command=Command.BLOCK_STATUS)

SIMPLE = SimpleReplies()
STRUCTURED = StructuredReplies()
EXTENDED = ExtendedReplies()
CHUNKED = [STRUCTURED, EXTENDED]


def split_chunk(replies: Replies, wire: bytes) -> tuple[int, int, bytes]:
    """Flags, type and payload of one chunk, whose header must be right."""
    if isinstance(replies, ExtendedReplies):
        magic, flags, kind, cookie, offset, length = struct.unpack_from(">IHHQQQ", wire)
        assert (magic, cookie, offset) == (0x6E8A278C, COOKIE, READ.offset)
        payload = wire[32:]
    else:
        magic, flags, kind, cookie, length = struct.unpack_from(">IHHQI", wire)
        assert (magic, cookie) == (0x668E33EF, COOKIE)
        payload = wire[20:]
    assert length == len(payload)
    return flags, kind, payload


def test_form_follows_what_was_negotiated() -> None:
    """100, 105, 175."""
    disk = ExportInfo(name="disk", size=1)
    assert isinstance(replies_for(transmission(disk)), SimpleReplies)
    assert isinstance(replies_for(transmission(disk, structured=True)), StructuredReplies)
    assert isinstance(replies_for(transmission(disk, extended=True)), ExtendedReplies)
    both = transmission(disk, structured=True, extended=True)
    assert isinstance(replies_for(both), ExtendedReplies)


# Simple


def test_simple_replies_are_sixteen_bytes() -> None:
    """100, 101, 126, 128, 163."""
    good = struct.pack(">IIQ", 0x67446698, 0, COOKIE)
    assert SIMPLE.success(WRITE) == good
    assert SIMPLE.data(READ, READ.offset, READ.length, done=True) == good
    bad = struct.pack(">IIQ", 0x67446698, 28, COOKIE)
    assert SIMPLE.error(WRITE, Error.ENOSPC, "no room") == bad
    assert SIMPLE.error_at(WRITE, Error.ENOSPC, "no room", WRITE.offset, done=True) == bad
    assert not SIMPLE.chunked


# Chunks


@pytest.mark.parametrize("done", [False, True])
@pytest.mark.parametrize("replies", CHUNKED)
def test_data_chunk_header_announces_the_data(replies: Replies, done: bool) -> None:
    """108, 116, 176, 177: the length covers the data that follows and the offset's 8 bytes."""
    offset = READ.offset + 512
    wire = replies.data(READ, offset, 1024, done=done) + bytes(1024)
    flags, kind, payload = split_chunk(replies, wire)
    assert (flags, kind) == (int(done), ReplyType.OFFSET_DATA)
    assert payload == struct.pack(">Q", offset) + bytes(1024)


@pytest.mark.parametrize("replies", CHUNKED)
def test_hole_chunk(replies: Replies) -> None:
    """117: 12 bytes."""
    for length in (1, HOLE_LENGTH_MAX):
        wire = replies.hole(READ, READ.offset + 512, length, done=False)
        expected = struct.pack(">QI", READ.offset + 512, length)
        assert split_chunk(replies, wire) == (0, ReplyType.OFFSET_HOLE, expected)


def test_success_without_data() -> None:
    """106, 108, 115, 176: never a simple reply to READ, nor any with extended headers."""
    for asked in (READ, STATUS):
        assert split_chunk(STRUCTURED, STRUCTURED.success(asked)) == (1, ReplyType.NONE, b"")
    assert STRUCTURED.success(WRITE) == SIMPLE.success(WRITE)
    for asked in (READ, WRITE, STATUS):
        assert split_chunk(EXTENDED, EXTENDED.success(asked)) == (1, ReplyType.NONE, b"")


@pytest.mark.parametrize("replies", CHUNKED)
@pytest.mark.parametrize("asked", [READ, WRITE, STATUS])
def test_error_chunk_has_its_text_and_ends_the_reply(replies: Replies, asked: Request) -> None:
    """106, 107, 123: structured whatever the command, nbd-server's early errors are not."""
    flags, kind, payload = split_chunk(replies, replies.error(asked, Error.EIO, "bad sector ü"))
    text = "bad sector ü".encode()
    assert (flags, kind) == (1, ReplyType.ERROR)
    assert payload == struct.pack(">IH", 5, len(text)) + text


@pytest.mark.parametrize("replies", CHUNKED)
@pytest.mark.parametrize("done", [False, True])
def test_error_with_offset(replies: Replies, done: bool) -> None:
    """124, 134: the reply may go on after it."""
    wire = replies.error_at(READ, Error.EIO, "bad", READ.offset + 512, done=done)
    expected = struct.pack(">IH3sQ", 5, 3, b"bad", READ.offset + 512)
    assert split_chunk(replies, wire) == (int(done), ReplyType.ERROR_OFFSET, expected)


@pytest.mark.parametrize("replies", CHUNKED)
@pytest.mark.parametrize("text", ["x" * 5000, "ü" * 3000, "\0" * 5, "\ud800", ""])
def test_error_text_never_makes_a_chunk_that_qemu_drops(replies: Replies, text: str) -> None:
    """1, 123; CVE-2020-10761: at most 1000 bytes, whole characters, no NUL."""
    for wire in (
        replies.error(READ, Error.EIO, text),
        replies.error_at(READ, Error.EIO, text, READ.offset, done=True),
    ):
        _, _, payload = split_chunk(replies, wire)
        assert len(payload) <= 1000
        (length,) = struct.unpack_from(">H", payload, 4)
        assert "\0" not in payload[6 : 6 + length].decode()


# Block status


@pytest.mark.parametrize("count", [1, 2, 1000])
def test_compact_block_status(count: int) -> None:
    """118: an id and 8 bytes for each extent."""
    pairs = [(512 * (i + 1), i % 4) for i in range(count)]
    extents = Extents(
        np.array([length for length, _ in pairs], dtype=np.int64),
        np.array([state for _, state in pairs], dtype=np.uint32),
    )
    wire = STRUCTURED.block_status(STATUS, 7, extents, done=False)
    flags, kind, payload = split_chunk(STRUCTURED, wire)
    assert (flags, kind) == (0, ReplyType.BLOCK_STATUS)
    assert payload[:4] == b"\0\0\0\7"
    assert list(struct.iter_unpack(">II", payload[4:])) == pairs


def test_extended_block_status_takes_lengths_above_4_gib() -> None:
    """181, 182, 183: count and 16 bytes for each; the upper half of a status is zero."""
    pairs = [(1 << 45, 3), (512, 0xFFFFFFFF), (1, 0)]
    wire = EXTENDED.block_status(STATUS, 2, Extents.from_pairs(pairs), done=True)
    flags, kind, payload = split_chunk(EXTENDED, wire)
    assert (flags, kind) == (1, ReplyType.BLOCK_STATUS_EXT)
    assert payload[:8] == struct.pack(">II", 2, 3)
    assert list(struct.iter_unpack(">QQ", payload[8:])) == pairs


def test_compact_block_status_of_whole_words() -> None:
    """190: an allocation depth is a whole 32-bit value."""
    extents = Extents.single((1 << 32) - 1, 0xFFFFFFFF)
    wire = STRUCTURED.block_status(STATUS, 0, extents, done=True)
    assert wire[24:] == b"\xff" * 8


@pytest.mark.parametrize("length", [(1 << 32) - 1, (1 << 32) - 512, 1 << 31, 1])
def test_extents_are_cut_to_the_request(length: int) -> None:
    """121, 192; CVE-2025-47711: 2^32-1 asked over one extent of terabytes."""
    found = fit_extents(Extents.single(1 << 42, 1), STATUS, length, extents_max=100)
    assert found.pairs() == [(length, 1)]
    STRUCTURED.block_status(STATUS, 0, found, done=True)


PAIRS = st.lists(st.tuples(st.integers(1, 1 << 40), st.integers(0, 3)), min_size=1, max_size=20)


@given(PAIRS, st.integers(1, (1 << 32) - 1), st.integers(1, 25), st.booleans())
def test_fitted_extents_obey_the_protocol(pairs, length, extents_max, req_one) -> None:
    """119, 120, 121, 155, 156, 157, 192."""
    extents = Extents.from_pairs(pairs)
    asked = STATUS._replace(flags=CommandFlag.REQ_ONE if req_one else 0)
    found = fit_extents(extents, asked, length, extents_max=extents_max).pairs()
    assert 1 <= len(found) <= (1 if req_one else extents_max)
    assert all(size > 0 for size, _ in found)
    assert sum(size for size, _ in found) <= length
    assert all(a[1] != b[1] for a, b in pairwise(found))
    whole = extents.pairs()
    assert found[:-1] == whole[: len(found) - 1]
    assert found[-1][1] == whole[len(found) - 1][1]
    covered = sum(size for size, _ in found)
    assert covered in (length, extents.total()) or len(found) == (1 if req_one else extents_max)
