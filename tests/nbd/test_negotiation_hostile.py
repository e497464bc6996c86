"""Clients that mean harm: too much, too long, too soon, cut short, or plain noise."""

from __future__ import annotations

import struct

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from nbdfleece.nbd.constants import OPTION_MAGIC, Option, OptionReply
from nbdfleece.nbd.export_info import ExportInfo
from nbdfleece.nbd.limits import Limits
from nbdfleece.nbd.negotiation import Negotiation
from nbdfleece.nbd.outcomes import Closed, Negotiated, StartTls, TlsMode

from .wire import (
    ABORT,
    EXTENDED,
    LIST,
    STARTTLS,
    STRUCTURED,
    Exports,
    client_flags,
    context_data,
    cuts,
    drain,
    feed,
    go,
    info,
    info_data,
    list_contexts,
    option,
    set_contexts,
    split_replies,
)

LIMITS = Limits(
    options_max=20,
    option_length_max=4096,
    option_skip_max=8192,
    queries_max=4,
    reply_bytes_max=1000,
)
EXPORTS = Exports(
    [
        ExportInfo(name="disk", size=1 << 20, contexts=("base:allocation", "qemu:x")),
        ExportInfo(name="secret", size=5, description="d" * 100, tls_only=True),
    ]
)


def start(tls: TlsMode = TlsMode.NOTLS, limits: Limits = LIMITS) -> Negotiation:
    return Negotiation(EXPORTS, limits, tls=tls)


def held_bytes(negotiation: Negotiation) -> int:
    return len(negotiation._received) + len(negotiation._replies)


# Limits


def test_option_header_that_announces_too_much_drops_the_connection() -> None:
    """CVE-2017-15119: 4 GiB of trickled data is an attack; it is not waited for."""
    for length in (8193, 1 << 31, (1 << 32) - 1):
        negotiation = start()
        found = feed(negotiation, [client_flags(), option(Option.INFO, length=length)])
        assert isinstance(found.outcome, Closed)


@pytest.mark.parametrize(
    ("number", "reply"),
    [
        (Option.GO, OptionReply.ERR_TOO_BIG),
        (Option.INFO, OptionReply.ERR_TOO_BIG),
        (Option.LIST_META_CONTEXT, OptionReply.ERR_TOO_BIG),
        (Option.LIST, OptionReply.ERR_INVALID),
        (Option.ABORT, OptionReply.ACK),
        (99, OptionReply.ERR_UNSUP),
    ],
)
def test_option_with_too_much_data_is_skipped_and_answered(number: int, reply: int) -> None:
    """9, 14, 16: none of it is kept, and the next option is in step."""
    negotiation = start()
    feed(negotiation, [client_flags()])
    message = option(number, bytes(8192))
    for piece in (message[i : i + 100] for i in range(0, len(message), 100)):
        negotiation.receive_data(piece)
        assert held_bytes(negotiation) <= 100
    assert split_replies(drain(negotiation))[0][:2] == (number, reply)
    if number != Option.ABORT:
        assert feed(negotiation, [LIST]).kinds[-1] == OptionReply.ACK


@pytest.mark.parametrize("length", [4097, 8000, 1 << 20, (1 << 32) - 1])
def test_export_name_too_long_drops_the_connection_unread(length: int) -> None:
    """10; CVE-2022-26495: there is no error to answer it with."""
    found = feed(start(), [client_flags(), option(Option.EXPORT_NAME, length=length)])
    assert isinstance(found.outcome, Closed)


def test_too_many_options_drop_the_connection() -> None:
    found = feed(start(), [client_flags(), option(99) * 20])
    assert found.outcome is None
    found = feed(start(), [client_flags(), option(99) * 21])
    assert isinstance(found.outcome, Closed)
    assert len(found.replies) == 20


def test_client_that_does_not_read_gets_no_more_replies_made() -> None:
    """Rule 5 of the design: memory does not grow with what is pipelined."""
    negotiation = start(limits=Limits(options_max=1 << 20))
    negotiation.receive_data(client_flags() + LIST * 10_000)
    assert len(negotiation.data_to_send()) == 18
    replies = 0
    while sent := negotiation.data_to_send():
        assert len(split_replies(sent)) == 2, "one option at a time"
        replies += 2
    assert replies == 20_000


# Leaving early


def test_client_may_leave_after_any_byte() -> None:
    """17; CVE-2013-7441, CVE-2017-9524: a reason for the log, clean only between options."""
    script = client_flags() + STRUCTURED + info() + go()
    for end in range(len(script)):
        negotiation = start()
        feed(negotiation, [script[:end]])
        negotiation.receive_eof()
        assert isinstance(negotiation.outcome, Closed)
        boundaries = (4, 20, 20 + len(info()))
        assert negotiation.outcome.clean == (end in boundaries), end


def test_client_may_leave_after_abort_without_reading() -> None:
    """17."""
    negotiation = start()
    drain(negotiation)
    negotiation.receive_data(client_flags() + ABORT)
    negotiation.receive_eof()
    assert negotiation.outcome == Closed("the client aborted the handshake", True)


# Noise


def outcome_is_sound(negotiation: Negotiation) -> bool:
    return isinstance(negotiation.outcome, (Negotiated, StartTls, Closed, type(None)))


@given(st.binary(max_size=300), st.sampled_from(TlsMode))
def test_noise_never_raises(noise: bytes, mode: TlsMode) -> None:
    """CVE-2017-7539: unexpected data in the negotiation."""
    negotiation = start(mode)
    feed(negotiation, [noise])
    assert outcome_is_sound(negotiation)


NAMES = st.sampled_from([b"disk", b"", b"secret", b"nobody", b"\xff\xfe", b"a\0b", b"x" * 4096])
QUERIES = st.lists(
    st.sampled_from([b"base:", b"base:allocation", b"qemu:", b"qemu:x", b"x-y:z", b"", b"\xc3"]),
    max_size=6,
)
GOOD_OPTIONS = st.one_of(
    st.sampled_from([ABORT, LIST, STARTTLS, STRUCTURED, EXTENDED]),
    st.builds(lambda name: option(Option.EXPORT_NAME, name), NAMES),
    st.builds(info, NAMES, st.lists(st.integers(0, 5), max_size=4)),
    st.builds(go, NAMES, st.lists(st.integers(0, 5), max_size=4)),
    st.builds(lambda name, queries: list_contexts(*queries, name=name), NAMES, QUERIES),
    st.builds(lambda name, queries: set_contexts(*queries, name=name), NAMES, QUERIES),
)
DATA = st.one_of(
    st.binary(max_size=60),
    st.builds(info_data, NAMES),
    st.builds(context_data, NAMES, QUERIES),
    st.builds(bytes, st.integers(4000, 9000)),
)
ODD_OPTIONS = st.builds(
    lambda number, data: option(number, data), st.integers(0, 13) | st.just(0xFFFFFFFF), DATA
)
LYING_OPTIONS = st.builds(
    lambda number, data, length: option(number, data, length=length),
    st.integers(0, 12),
    DATA,
    st.integers(0, 100) | st.integers(4000, 9000) | st.just((1 << 32) - 1),
)
FLAGS = st.sampled_from([0, 1, 2, 3, 3, 3, 4, 0xFFFFFFFF]).map(client_flags)


@settings(max_examples=300)
@given(
    FLAGS,
    st.lists(st.one_of(GOOD_OPTIONS, ODD_OPTIONS, LYING_OPTIONS), max_size=12),
    st.sampled_from(TlsMode),
    st.randoms(use_true_random=False),
)
def test_near_valid_options_never_raise_nor_pile_up(flags, options, mode, random) -> None:
    """Whatever comes, in whatever pieces, is answered or ends the connection."""
    data = flags + b"".join(options)
    negotiation = start(mode)
    sent = drain(negotiation)
    position = 0
    while position < len(data) and negotiation.outcome is None:
        piece = data[position : position + random.randint(1, 2000)]
        position += len(piece)
        negotiation.receive_data(piece)
        assert held_bytes(negotiation) <= LIMITS.option_length_max + 2000 + 1000 + 400
        sent += drain(negotiation)
    assert outcome_is_sound(negotiation)
    for reply in split_named_replies(sent, negotiation):
        assert len(reply.data) <= 900 or reply.reply < 1 << 31


def split_named_replies(sent: bytes, negotiation: Negotiation):
    """The option replies; EXPORT_NAME's has no header and comes last, if at all."""
    body = sent[18:]
    found = []
    while len(body) >= 20 and body.startswith(b"\x00\x03\xe8\x89\x04\x55\x65\xa9"):
        (length,) = struct.unpack_from(">I", body, 16)
        found += split_replies(body[: 20 + length])
        body = body[20 + length :]
    if body:
        assert isinstance(negotiation.outcome, Negotiated)
        assert len(body) in (10, 134)
    return found


@given(st.lists(GOOD_OPTIONS, min_size=1, max_size=6), st.sampled_from(TlsMode))
def test_cuts_do_not_matter(options: list[bytes], mode: TlsMode) -> None:
    """Any two cuts of a well-behaved conversation come to the same.

    A well-behaved client waits after STARTTLS: what follows it is left out.
    """
    end = options.index(STARTTLS) + 1 if STARTTLS in options else len(options)
    data = client_flags() + b"".join(options[:end])
    if len(data) > 3000:
        return
    whole = feed(start(mode), [data])
    for pieces in list(cuts(data, 20)):
        assert feed(start(mode), pieces) == whole


@given(st.lists(st.tuples(st.integers(0, 12), st.binary(max_size=20)), max_size=8))
def test_every_option_but_export_name_gets_one_final_reply(options) -> None:
    """13, 14: in order, each echoing its number, until the machine is done."""
    data = b"".join(option(number, data) for number, data in options)
    negotiation = Negotiation(EXPORTS)
    found = feed(negotiation, [client_flags() + data])
    if any(number == Option.EXPORT_NAME for number, _ in options):
        return
    final = [r.option for r in found.replies if r.reply == 1 or r.reply >= 1 << 31]
    assert final == [number for number, _ in options][: len(final)]
    assert found.outcome is not None or len(final) == len(options)


def test_option_magic_is_checked_before_anything_else() -> None:
    """A first request where an option should be: out of step, no answer."""
    noise = struct.pack(">QII", OPTION_MAGIC ^ 1, Option.LIST, 0)
    found = feed(start(), [client_flags() + noise])
    assert isinstance(found.outcome, Closed)
    assert found.replies == []
