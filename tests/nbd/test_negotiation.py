"""The handshake without TLS. Numbers are those of the conformance requirements."""

from __future__ import annotations

import struct
from collections.abc import Sequence

import pytest

from nbdfleece.nbd.constants import InfoType, Option, OptionReply, TransmissionFlag
from nbdfleece.nbd.export_info import ExportInfo
from nbdfleece.nbd.limits import DEFAULT_LIMITS, Limits
from nbdfleece.nbd.negotiation import MayAccess, Negotiation
from nbdfleece.nbd.outcomes import Closed, Negotiated, SelectedContext

from .wire import (
    ABORT,
    EXTENDED,
    GREETING,
    LIST,
    MIB,
    STARTTLS,
    STRUCTURED,
    Exports,
    Talk,
    client_flags,
    context_data,
    drain,
    feed,
    go,
    info,
    info_data,
    list_contexts,
    option,
    request,
    set_contexts,
    string,
    talk,
)

CONTEXTS = (
    "base:allocation",
    "qemu:allocation-depth",
    "qemu:dirty-bitmap:backup.0",
    "qemu:dirty-bitmap:a b",
)
DISK = ExportInfo(name="disk", size=10 * MIB + 1, description="the guest's disk", contexts=CONTEXTS)
OTHER = ExportInfo(name="other", size=512, read_only=True, contexts=("base:allocation",))


def converse(
    *messages: bytes,
    flags: int = 3,
    exports: Sequence[ExportInfo] = (DISK, OTHER),
    limits: Limits = DEFAULT_LIMITS,
    may_access: MayAccess = lambda info: None,
) -> Talk:
    def make() -> Negotiation:
        return Negotiation(Exports(exports), limits, may_access=may_access)

    return talk(make, client_flags(flags), *messages)


def infos(found: Talk) -> dict[int, bytes]:
    """The INFO replies by type, each type once."""
    pairs = [
        (struct.unpack(">H", r.data[:2])[0], r.data[2:])
        for r in found.replies
        if r.reply == OptionReply.INFO
    ]
    assert len(dict(pairs)) == len(pairs)
    return dict(pairs)


def contexts_of(found: Talk) -> list[tuple[int, str]]:
    return [
        (struct.unpack(">I", r.data[:4])[0], r.data[4:].decode())
        for r in found.replies
        if r.reply == OptionReply.META_CONTEXT
    ]


def sent_flags(found: Talk) -> TransmissionFlag:
    _, flags = struct.unpack(">QH", infos(found)[InfoType.EXPORT])
    return TransmissionFlag(flags)


# 2.2 Newstyle handshake


def test_greeting_comes_first_with_both_handshake_flags() -> None:
    """3, 4, 5: NBDMAGIC, IHAVEOPT, FIXED_NEWSTYLE and NO_ZEROES and no other flag."""
    assert drain(Negotiation(Exports([DISK]))) == GREETING


@pytest.mark.parametrize("flags", [4, 8, 0x80000000, 0xFFFFFFFF])
def test_unknown_client_flag_drops_the_connection(flags: int) -> None:
    """7: "the server MUST drop the TCP connection if the client sets an unknown flag"."""
    found = converse(LIST, flags=flags)
    assert isinstance(found.outcome, Closed)
    assert not found.outcome.clean
    assert found.sent == GREETING


@pytest.mark.parametrize(("flags", "padding"), [(1, 124), (3, 0), (0, 124), (2, 0)])
def test_export_name_padding_depends_on_no_zeroes(flags: int, padding: int) -> None:
    """6, 8: 124 zero bytes unless NO_ZEROES was negotiated."""
    found = converse(option(Option.EXPORT_NAME, b"disk"), flags=flags)
    head = struct.pack(">QH", DISK.size, 1 | 4 | 8)
    assert found.sent == GREETING + head + bytes(padding)
    assert found.negotiated.export is DISK
    assert not found.negotiated.structured_replies


@pytest.mark.parametrize("name", [b"nobody", b"\xff", b"di\0sk", b"x" * 4096])
def test_export_name_that_cannot_be_granted_drops_the_connection(name: bytes) -> None:
    """10; CVE-2011-1925, CVE-2013-7441: "the server MUST terminate the session"."""
    found = converse(option(Option.EXPORT_NAME, name))
    assert isinstance(found.outcome, Closed)
    assert found.sent == GREETING
    assert len(found.outcome.reason) < 300


def test_empty_export_name_is_the_default_export() -> None:
    """39."""
    assert converse(option(Option.EXPORT_NAME)).negotiated.export is DISK
    assert converse(go("")).negotiated.export is DISK


@pytest.mark.parametrize("number", [n for n in (*Option, 99) if n != Option.EXPORT_NAME])
def test_client_without_fixed_newstyle_may_only_name_an_export(number: int) -> None:
    """12: any other option drops the connection, so that nothing gets out of step."""
    found = converse(option(number, b"data"), flags=0)
    assert isinstance(found.outcome, Closed)
    assert found.sent == GREETING


# 2.3 Option haggling


@pytest.mark.parametrize("number", [0, Option.PEEK_EXPORT, 12, 0xFFFFFFFF])
@pytest.mark.parametrize("length", [0, 1, 5000])
def test_unknown_option_is_skipped_and_answered_unsup(number: int, length: int) -> None:
    """9, 13, 14: skipped by its length; the next message is in step."""
    found = converse(option(number, b"\xaa" * length), LIST)
    assert found.replies[0][:2] == (number, OptionReply.ERR_UNSUP)
    assert found.replies[0].data
    assert found.kinds[-1] == OptionReply.ACK


@pytest.mark.parametrize("data", [b"", b"ignored"])
def test_abort_is_acknowledged_whatever_data_it_has(data: bytes) -> None:
    """15, 16."""
    found = converse(option(Option.ABORT, data))
    assert found.replies == [(Option.ABORT, OptionReply.ACK, b"")]
    assert found.outcome == Closed("the client aborted the handshake", True)


@pytest.mark.parametrize(
    "number",
    [Option.LIST, Option.STARTTLS, Option.STRUCTURED_REPLY, Option.EXTENDED_HEADERS],
)
@pytest.mark.parametrize("length", [1, 300_000])
def test_option_without_data_refuses_data(number: int, length: int) -> None:
    """18, 40, 86, 173: ERR_INVALID, whatever the length."""
    found = converse(option(number, bytes(length)), LIST)
    assert found.kinds[0] == OptionReply.ERR_INVALID
    assert found.kinds[-1] == OptionReply.ACK


def test_list_names_each_export_with_its_description() -> None:
    """19, 20."""
    found = converse(LIST)
    assert found.replies == [
        (Option.LIST, OptionReply.SERVER, string("disk") + b"the guest's disk"),
        (Option.LIST, OptionReply.SERVER, string("other")),
        (Option.LIST, OptionReply.ACK, b""),
    ]


def test_list_of_no_exports_is_just_acknowledged() -> None:
    """19: zero or more SERVER replies."""
    assert converse(LIST, exports=()).kinds == [OptionReply.ACK]


def test_options_after_shut_down_get_err_shutdown_but_abort_its_ack() -> None:
    """23: "SHOULD error further options received (other than an NBD_OPT_ABORT)"."""
    negotiation = Negotiation(Exports([DISK]))
    feed(negotiation, [client_flags(), STRUCTURED])
    negotiation.shut_down()
    sent = feed(negotiation, [LIST, go(), STARTTLS, option(99), ABORT])
    assert sent.kinds == [OptionReply.ERR_SHUTDOWN] * 4 + [OptionReply.ACK]


def test_export_name_after_shut_down_drops_the_connection() -> None:
    """23: it has no way to be answered with an error."""
    negotiation = Negotiation(Exports([DISK]))
    negotiation.shut_down()
    found = feed(negotiation, [client_flags(), option(Option.EXPORT_NAME, b"disk")])
    assert isinstance(found.outcome, Closed)


def test_repeated_stateful_options_are_acknowledged_again() -> None:
    """25: a server MAY refuse them; nothing speaks for it."""
    assert converse(STRUCTURED, STRUCTURED).kinds == [OptionReply.ACK] * 2
    assert converse(EXTENDED, EXTENDED).kinds == [OptionReply.ACK] * 2


def test_wrong_option_magic_drops_the_connection() -> None:
    """21: the stream is out of step, there is nothing left to answer."""
    found = converse(b"IHAVEOPS" + bytes(8))
    assert isinstance(found.outcome, Closed)
    assert found.sent == GREETING


# 2.4 INFO and GO


@pytest.mark.parametrize("message", [info, go])
def test_info_tells_export_and_block_size_before_ack(message: type) -> None:
    """29, 36, 37: EXPORT of 12 bytes and BLOCK_SIZE of 14, types included."""
    found = converse(message())
    told = infos(found)
    assert told[InfoType.EXPORT] == struct.pack(">QH", DISK.size, 1 | 4 | 8)
    assert told[InfoType.BLOCK_SIZE] == struct.pack(">III", 1, 4096, 32 * MIB)
    assert set(told) == {InfoType.EXPORT, InfoType.BLOCK_SIZE}
    assert found.kinds[-1] == OptionReply.ACK


def test_info_tells_name_and_description_when_asked() -> None:
    """36, 37: each once although asked twice; the name is the canonical one."""
    wanted = [InfoType.NAME, InfoType.DESCRIPTION, InfoType.NAME]
    told = infos(converse(info("", wanted)))
    assert told[InfoType.NAME] == b"disk"
    assert told[InfoType.DESCRIPTION] == b"the guest's disk"


def test_description_is_left_out_where_there_is_none() -> None:
    assert InfoType.DESCRIPTION not in infos(converse(info("other", [InfoType.DESCRIPTION])))


def test_unknown_information_requests_are_ignored() -> None:
    """27."""
    assert converse(go("disk", [4, 99, 65535])).kinds[-1] == OptionReply.ACK


@pytest.mark.parametrize("name", ["nobody", "DISK", "disk ", "x" * 4096])
@pytest.mark.parametrize("message", [info, go])
def test_unknown_export_gets_err_unknown_alone(message: type, name: str) -> None:
    """30; CVE-2017-15118, CVE-2020-10761: the text is short whatever the name."""
    found = converse(message(name))
    assert found.kinds == [OptionReply.ERR_UNKNOWN]
    assert 0 < len(found.replies[0].data) <= 900
    assert found.outcome is None


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"\0\0\0\0",
        b"\0\0\0\4disk",
        b"\0\0\0\5disk\0\0",
        b"\0\0\0\4disk\0\1",
        b"\0\0\0\4disk\0\0\0",
        b"\xff\xff\xff\xffdisk\0\0",
        b"\xff\xff\xff\xfedisk\0\0",
        b"\0\0\0\4disk\xff\xff",
        b"\0\0\0\4di\0k\0\0",
        b"\0\0\0\4di\xffk\0\0",
        info_data(b"x" * 4097),
        info_data(b"x" * 200_000),
    ],
)
@pytest.mark.parametrize("number", [Option.INFO, Option.GO])
def test_malformed_info_gets_err_invalid(number: int, data: bytes) -> None:
    """1, 26; CVE-2022-26495, CVE-2022-26496: lengths that do not add up, bad names."""
    found = converse(option(number, data), LIST)
    assert found.kinds[0] == OptionReply.ERR_INVALID
    assert found.kinds[-1] == OptionReply.ACK


@pytest.mark.parametrize("length", [1024, 3000, 4096])
def test_long_legal_names_work(length: int) -> None:
    """1; CVE-2017-15118, CVE-2022-26496."""
    export = ExportInfo(name="x" * length, size=1)
    assert converse(go(export.name), exports=[export]).negotiated.export is export


def test_non_ascii_name_counts_bytes() -> None:
    """1: "4096 bytes"."""
    export = ExportInfo(name="ü" * 2048, size=1)
    assert converse(go(export.name), exports=[export]).negotiated.export is export
    assert converse(info("ü" * 2049)).kinds == [OptionReply.ERR_INVALID]


@pytest.mark.parametrize(
    "before", [b"", STRUCTURED, STRUCTURED + set_contexts("base:allocation"), EXTENDED]
)
@pytest.mark.parametrize("types", [(), (0, 1, 2, 3)])
def test_go_replies_like_the_info_before_it(before: bytes, types: Sequence[int]) -> None:
    """34: "the server MUST reply with the same set of information"."""
    found = converse(before, info("disk", types), go("disk", types))
    told = {
        number: [reply[1:] for reply in found.replies if reply.option == number]
        for number in (Option.INFO, Option.GO)
    }
    assert told[Option.INFO] == told[Option.GO]


@pytest.mark.parametrize("flags", [1, 3])
def test_go_ends_with_its_ack(flags: int) -> None:
    """35: no padding after GO's ACK, whatever NO_ZEROES."""
    found = converse(go(), flags=flags)
    assert found.replies[-1] == (Option.GO, OptionReply.ACK, b"")


def test_bytes_after_go_are_handed_on() -> None:
    """A client may send its first requests without waiting."""
    follow = request(0, 0, 512) + request(2)
    assert converse(go(), follow).rest == follow


REQUIRING = ExportInfo(name="big", size=1 << 20, minimum_block_size=4096, requires_block_size=True)


@pytest.mark.parametrize("message", [info, go])
def test_block_size_required_is_told_with_the_error(message: type) -> None:
    """32: "SHOULD ensure it first sends an NBD_INFO_BLOCK_SIZE information reply"."""
    found = converse(message("big"), exports=[REQUIRING])
    assert found.kinds == [OptionReply.INFO, OptionReply.ERR_BLOCK_SIZE_REQD]
    assert infos(found)[InfoType.BLOCK_SIZE] == struct.pack(">III", 4096, 4096, 32 * MIB)
    assert found.outcome is None


@pytest.mark.parametrize("message", [info, go])
def test_block_size_required_is_no_error_for_a_client_that_asks(message: type) -> None:
    """32, 38."""
    found = converse(message("big", [InfoType.BLOCK_SIZE]), exports=[REQUIRING])
    assert found.kinds[-1] == OptionReply.ACK


def test_block_size_is_not_required_with_default_sizes_or_unless_wanted() -> None:
    """32, 91: "SHOULD NOT send this error if it is using default size constraints"."""
    plain = ExportInfo(name="disk", size=1, requires_block_size=True)
    lenient = ExportInfo(name="disk", size=512, minimum_block_size=512)
    for export in plain, lenient:
        assert converse(go(), exports=[export]).negotiated.export is export


def test_export_name_of_an_export_that_requires_block_size_drops_the_connection() -> None:
    """10: "requirements for the chosen export are not met"."""
    found = converse(option(Option.EXPORT_NAME, b"big"), exports=[REQUIRING])
    assert isinstance(found.outcome, Closed)


def test_small_maximum_payload_can_be_required() -> None:
    """32: constraints other than the defaults."""
    small = ExportInfo(name="disk", size=1, maximum_payload=65536, requires_block_size=True)
    assert converse(go(), exports=[small]).kinds[-1] == OptionReply.ERR_BLOCK_SIZE_REQD


# 2.5 Structured replies; 2.7 transmission flags


def test_df_only_with_structured_replies() -> None:
    """42, 43."""
    assert not sent_flags(converse(info())) & TransmissionFlag.SEND_DF
    assert sent_flags(converse(STRUCTURED, info())) & TransmissionFlag.SEND_DF
    assert sent_flags(converse(EXTENDED, info())) & TransmissionFlag.SEND_DF


def test_structured_replies_are_remembered() -> None:
    """41."""
    assert converse(STRUCTURED, go()).negotiated.structured_replies
    assert not converse(go()).negotiated.structured_replies


def test_flags_do_not_change_with_the_order_of_options() -> None:
    """CVE-2019-14851: INFO, LIST, INFO, STRUCTURED_REPLY in any order keep the server well."""
    found = converse(info(), LIST, info("other"), STRUCTURED, LIST, go())
    assert found.negotiated.transmission_flags & TransmissionFlag.SEND_DF
    assert OptionReply.ERR_INVALID not in found.kinds


# 2.6 Metadata contexts


def test_set_without_structured_replies_gets_err_invalid() -> None:
    """48."""
    assert converse(set_contexts("base:allocation")).kinds == [OptionReply.ERR_INVALID]


def test_list_without_structured_replies_works() -> None:
    """48: "MAY"; every peer answers it."""
    assert contexts_of(converse(list_contexts())) == [(0, name) for name in CONTEXTS]


@pytest.mark.parametrize(
    "data",
    [
        b"",
        string("disk"),
        string("disk") + b"\0\0\0",
        string("disk") + b"\0\0\0\1",
        string("disk") + b"\0\0\0\1\0\0\0\5base",
        string("disk") + b"\0\0\0\1" + b"\xff\xff\xff\xff",
        string("disk") + b"\xff\xff\xff\xff",
        context_data("disk", ["base:"]) + b"\0",
        context_data("disk", ["base:", "x" * 4097]),
        context_data("disk", [b"base:\xff"]),
        context_data("disk", [b"base:\0"]),
        context_data(b"\xff", ["base:"]),
        b"\xff\xff\xff\xffdisk",
    ],
)
@pytest.mark.parametrize("number", [Option.LIST_META_CONTEXT, Option.SET_META_CONTEXT])
def test_malformed_context_option_gets_err_invalid(number: int, data: bytes) -> None:
    """1, 49, 64; trailing bytes and a count of 2^32-1 too; the next option is in step."""
    found = converse(STRUCTURED, option(number, data), LIST)
    assert found.kinds[1] == OptionReply.ERR_INVALID
    assert found.kinds[-1] == OptionReply.ACK


@pytest.mark.parametrize(
    "query",
    ["x-nobody:thing", "thing", "", ":", ":allocation", "base", "base:nothing", "Base:allocation"],
)
@pytest.mark.parametrize("message", [list_contexts, set_contexts])
def test_queries_that_find_nothing_are_acknowledged(message: type, query: str) -> None:
    """50, 51, 58: ignored, a single ACK."""
    assert converse(STRUCTURED, message(query)).kinds[1:] == [OptionReply.ACK]


def test_list_of_everything_and_wildcards() -> None:
    """53, 54, 55, 56, 57, 191."""
    for queries, expected in {
        (): CONTEXTS,
        ("base:",): CONTEXTS[:1],
        ("qemu:",): CONTEXTS[1:],
        ("qemu:dirty-bitmap:",): CONTEXTS[2:],
        ("base:", "qemu:"): CONTEXTS,
        ("qemu:dirty-bitmap:", "qemu:dirty-bitmap:a b"): CONTEXTS[2:],
        ("qemu:dirty-bitmap:backup.0",): CONTEXTS[2:3],
        ("qemu:dirty-bitmap:backup",): (),
        ("qemu:allocation-depth", "base:allocation"): CONTEXTS[:2],
    }.items():
        found = converse(list_contexts(*queries))
        assert contexts_of(found) == [(0, name) for name in expected], queries
        assert found.kinds[-1] == OptionReply.ACK


@pytest.mark.parametrize("query", ["base:", "qemu:", "qemu:dirty-bitmap:"])
def test_set_does_not_know_wildcards(query: str) -> None:
    """57, 59, 191."""
    assert converse(STRUCTURED, set_contexts(query)).kinds[1:] == [OptionReply.ACK]


def test_set_of_no_queries_selects_nothing() -> None:
    """60."""
    found = converse(STRUCTURED, set_contexts("base:allocation"), set_contexts(), go())
    assert found.negotiated.contexts == ()


def test_set_selects_each_context_once_with_its_own_id() -> None:
    """61, 189: duplicates too; nbdkit answers them twice."""
    queries = [CONTEXTS[3], CONTEXTS[0], CONTEXTS[3], CONTEXTS[0]]
    found = converse(STRUCTURED, set_contexts(*queries), go())
    assert contexts_of(found) == [(0, CONTEXTS[0]), (3, CONTEXTS[3])]
    assert found.negotiated.contexts == (
        SelectedContext(0, CONTEXTS[0]),
        SelectedContext(3, CONTEXTS[3]),
    )


@pytest.mark.parametrize(
    "failing",
    [
        set_contexts("base:allocation", name="nobody"),
        option(Option.SET_META_CONTEXT, b"\0"),
        option(Option.SET_META_CONTEXT, bytes(300_000)),
        set_contexts(*["base:allocation"] * 2000),
    ],
)
def test_failing_set_forgets_what_was_selected(failing: bytes) -> None:
    """62: "replaces all previously-set metadata contexts (including when this command fails)"."""
    found = converse(STRUCTURED, set_contexts("base:allocation"), failing, go())
    assert found.negotiated.contexts == ()


def test_contexts_hold_only_for_the_export_that_was_named() -> None:
    """63."""
    found = converse(STRUCTURED, set_contexts("base:allocation", name="other"), go())
    assert found.negotiated.contexts == ()
    found = converse(STRUCTURED, set_contexts("base:allocation"), info("other"), go())
    assert len(found.negotiated.contexts) == 1


def test_contexts_of_the_default_export_hold_for_its_name() -> None:
    """63: the same export by either name."""
    found = converse(STRUCTURED, set_contexts("base:allocation", name=""), go("disk"))
    assert len(found.negotiated.contexts) == 1


def test_contexts_work_with_export_name() -> None:
    """63: "NBD_OPT_GO (or NBD_OPT_EXPORT_NAME)"."""
    found = converse(
        STRUCTURED, set_contexts("base:allocation"), option(Option.EXPORT_NAME, b"disk"), flags=1
    )
    assert isinstance(found.outcome, Negotiated)
    assert len(found.outcome.contexts) == 1
    assert found.outcome.structured_replies


def test_context_that_is_no_longer_offered_is_not_selected() -> None:
    """67: between SET and GO the export was made anew with other bitmaps."""
    exports = Exports([DISK])
    negotiation = Negotiation(exports)
    feed(negotiation, [client_flags(), STRUCTURED, set_contexts(*CONTEXTS)])
    exports.infos = [ExportInfo(name="disk", size=1, contexts=CONTEXTS[:2] + CONTEXTS[3:])]
    found = feed(negotiation, [go()])
    assert [context.name for context in found.negotiated.contexts] == list(CONTEXTS[:2])


def test_unknown_export_gets_err_unknown_from_context_options() -> None:
    for message in list_contexts, set_contexts:
        found = converse(STRUCTURED, message("base:", name="nobody"))
        assert found.kinds[1:] == [OptionReply.ERR_UNKNOWN]


@pytest.mark.parametrize("count", [1025, 60_000])
def test_too_many_queries_get_err_too_big(count: int) -> None:
    """53: only for queries that were sent; 2^16 of them do no harm."""
    data = string("disk") + struct.pack(">I", count) + bytes(4 * count)
    found = converse(STRUCTURED, option(Option.LIST_META_CONTEXT, data), LIST)
    assert found.kinds[1] == OptionReply.ERR_TOO_BIG
    assert found.kinds[-1] == OptionReply.ACK


# 2.18 Extended headers


def test_extended_headers_do_not_need_structured_replies() -> None:
    """175; they imply what structured replies allow."""
    found = converse(EXTENDED, set_contexts("base:allocation"), go())
    assert found.negotiated.extended_headers
    assert found.negotiated.structured_replies
    assert len(found.negotiated.contexts) == 1


def test_structured_reply_after_extended_headers_is_refused() -> None:
    """174, 175: ERR_EXT_HEADER_REQD; extended headers stay, and GO works."""
    found = converse(EXTENDED, STRUCTURED, go())
    assert found.kinds[1] == OptionReply.ERR_EXT_HEADER_REQD
    assert found.negotiated.extended_headers


def test_extended_headers_after_structured_replies_take_precedence() -> None:
    """175."""
    assert converse(STRUCTURED, EXTENDED, go()).negotiated.extended_headers


def test_export_name_after_extended_headers_drops_the_connection() -> None:
    """174: "a client MUST NOT use NBD_OPT_EXPORT_NAME"."""
    found = converse(EXTENDED, option(Option.EXPORT_NAME, b"disk"))
    assert isinstance(found.outcome, Closed)


def test_compact_clients_are_still_served() -> None:
    """186, 188: no ERR_EXT_HEADER_REQD on GO or SET."""
    found = converse(STRUCTURED, set_contexts(*CONTEXTS), list_contexts(), go())
    assert OptionReply.ERR_EXT_HEADER_REQD not in found.kinds
    assert len(found.negotiated.contexts) == len(CONTEXTS)


def test_block_status_payload_needs_extended_headers_and_contexts() -> None:
    """184."""
    bit = TransmissionFlag.BLOCK_STATUS_PAYLOAD
    chosen = set_contexts("base:allocation")
    assert converse(EXTENDED, chosen, go()).negotiated.transmission_flags & bit
    assert not converse(STRUCTURED, chosen, go()).negotiated.transmission_flags & bit
    assert not converse(EXTENDED, go()).negotiated.transmission_flags & bit
    assert not converse(EXTENDED, chosen, go("other")).negotiated.transmission_flags & bit


# Access


def test_refused_export_gets_err_policy_with_the_reason() -> None:
    """21, 22: an error, not a disconnect; LIST leaves the export out."""
    found = converse(
        LIST,
        info(),
        STRUCTURED,
        set_contexts("base:allocation"),
        list_contexts(),
        go(),
        may_access=lambda export: "not you" if export.name == "disk" else None,
    )
    refused = OptionReply.ERR_POLICY
    assert [kind for kind in found.kinds if kind == refused] == [refused] * 4
    assert [r.data for r in found.replies if r.reply == refused] == [b"not you"] * 4
    assert [r.data for r in found.replies if r.reply == OptionReply.SERVER] == [string("other")]
    assert found.outcome is None


def test_refused_export_by_export_name_drops_the_connection() -> None:
    found = converse(option(Option.EXPORT_NAME, b"disk"), may_access=lambda export: "not you")
    assert isinstance(found.outcome, Closed)
    assert "not you" in found.outcome.reason
