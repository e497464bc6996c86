"""STARTTLS and the three TLS modes. Numbers are those of the conformance requirements."""

from __future__ import annotations

from collections.abc import Sequence

import pytest

from nbdfleece.nbd.constants import ClientFlag, Option, OptionReply
from nbdfleece.nbd.export_info import ExportInfo
from nbdfleece.nbd.negotiation import MayAccess, Negotiation
from nbdfleece.nbd.outcomes import Closed, StartTls, TlsMode

from .wire import (
    ABORT,
    EXTENDED,
    GREETING,
    LIST,
    STARTTLS,
    STRUCTURED,
    Exports,
    Talk,
    client_flags,
    drain,
    feed,
    go,
    info,
    list_contexts,
    option,
    set_contexts,
    string,
    talk,
)

PUBLIC = ExportInfo(name="public", size=512, contexts=("base:allocation",))
SECRET = ExportInfo(name="secret", size=512, contexts=("base:allocation",), tls_only=True)
BOTH = ClientFlag.FIXED_NEWSTYLE | ClientFlag.NO_ZEROES

MODES_WITH_TLS = [TlsMode.FORCEDTLS, TlsMode.SELECTIVETLS]


def plain(
    mode: TlsMode,
    *messages: bytes,
    flags: int = 3,
    exports: Sequence[ExportInfo] = (PUBLIC, SECRET),
) -> Talk:
    return talk(lambda: Negotiation(Exports(exports), tls=mode), client_flags(flags), *messages)


def under_tls(
    mode: TlsMode,
    *messages: bytes,
    flags: ClientFlag = BOTH,
    may_access: MayAccess = lambda export: None,
) -> Talk:
    def make() -> Negotiation:
        catalogue = Exports([PUBLIC, SECRET])
        return Negotiation(catalogue, tls=mode, after=StartTls(flags), may_access=may_access)

    return talk(make, *messages)


# NOTLS


def test_notls_refuses_starttls_by_policy() -> None:
    """75."""
    assert plain(TlsMode.NOTLS, STARTTLS).kinds == [OptionReply.ERR_POLICY]


def test_notls_never_asks_for_tls() -> None:
    """75: not even for an export that is TLS-only; it does not exist."""
    found = plain(
        TlsMode.NOTLS,
        info("secret"),
        go("secret"),
        STRUCTURED,
        set_contexts("base:", name="secret"),
        LIST,
    )
    assert OptionReply.ERR_TLS_REQD not in found.kinds
    assert found.kinds[:2] == [OptionReply.ERR_UNKNOWN] * 2
    assert found.replies[-2].data == string("public")


# FORCEDTLS


@pytest.mark.parametrize(
    "message",
    [
        LIST,
        info("public"),
        info("nobody"),
        go("public"),
        STRUCTURED,
        EXTENDED,
        list_contexts(),
        set_contexts(),
        option(Option.PEEK_EXPORT),
        option(99, b"data"),
        option(Option.LIST, b"wrong"),
        option(Option.GO, bytes(300_000)),
    ],
)
def test_forcedtls_errors_everything_before_tls(message: bytes) -> None:
    """31, 79, 80: one ERR_TLS_REQD, no INFO before it."""
    found = plain(TlsMode.FORCEDTLS, message)
    assert found.kinds == [OptionReply.ERR_TLS_REQD]
    assert found.outcome is None


def test_forcedtls_acknowledges_abort_before_tls() -> None:
    """79: "other than NBD_OPT_STARTTLS or NBD_OPT_ABORT"; qemu errors it."""
    found = plain(TlsMode.FORCEDTLS, ABORT)
    assert found.kinds == [OptionReply.ACK]
    assert found.outcome == Closed("the client aborted the handshake", True)


def test_forcedtls_drops_export_name_before_tls() -> None:
    """80."""
    found = plain(TlsMode.FORCEDTLS, option(Option.EXPORT_NAME, b"public"))
    assert isinstance(found.outcome, Closed)
    assert found.sent == GREETING


@pytest.mark.parametrize("flags", [0, 2])
def test_client_without_fixed_newstyle_cannot_get_around_tls(flags: int) -> None:
    """74, 88: it is dropped, whatever it asks for."""
    for message in STARTTLS, option(Option.EXPORT_NAME, b"public"), LIST:
        found = plain(TlsMode.FORCEDTLS, message, flags=flags)
        assert isinstance(found.outcome, Closed)
        assert found.sent == GREETING


# STARTTLS


@pytest.mark.parametrize("mode", MODES_WITH_TLS)
@pytest.mark.parametrize("flags", [1, 3])
def test_starttls_is_acknowledged_before_tls(mode: TlsMode, flags: int) -> None:
    """76, 77, 82: the outcome comes with the ACK."""
    found = plain(mode, STARTTLS, flags=flags)
    assert found.replies == [(Option.STARTTLS, OptionReply.ACK, b"")]
    assert found.outcome == StartTls(ClientFlag(flags))


@pytest.mark.parametrize("mode", MODES_WITH_TLS)
def test_starttls_with_data_is_refused(mode: TlsMode) -> None:
    """86."""
    found = plain(mode, option(Option.STARTTLS, b"x"), STARTTLS)
    assert found.kinds == [OptionReply.ERR_INVALID, OptionReply.ACK]


@pytest.mark.parametrize("mode", MODES_WITH_TLS)
def test_starttls_under_tls_is_refused(mode: TlsMode) -> None:
    """76, 82."""
    assert under_tls(mode, STARTTLS).kinds == [OptionReply.ERR_INVALID]


@pytest.mark.parametrize("mode", MODES_WITH_TLS)
@pytest.mark.parametrize("follow", [b"\x16", go("public"), LIST * 5000])
def test_plaintext_after_starttls_drops_the_connection(mode: TlsMode, follow: bytes) -> None:
    """85; CVE-2021-3716: it is neither carried out nor taken over into TLS."""
    negotiation = Negotiation(Exports([PUBLIC]), tls=mode)
    found = feed(negotiation, [client_flags() + STARTTLS + follow])
    assert isinstance(found.outcome, Closed)
    assert not found.outcome.clean
    assert found.replies == [(Option.STARTTLS, OptionReply.ACK, b"")]


def test_no_bytes_are_taken_between_starttls_and_tls() -> None:
    """85; CVE-2021-3716: a driver that gives plaintext after the outcome has a bug."""
    negotiation = Negotiation(Exports([PUBLIC]), tls=TlsMode.FORCEDTLS)
    feed(negotiation, [client_flags() + STARTTLS])
    with pytest.raises(RuntimeError):
        negotiation.receive_data(LIST)


@pytest.mark.parametrize("before", [STRUCTURED, EXTENDED])
def test_nothing_negotiated_before_starttls_survives_it(before: bytes) -> None:
    """85, 187; CVE-2021-3716: the driver goes on with a new machine that knows only flags."""
    first = plain(
        TlsMode.SELECTIVETLS, before, set_contexts("base:allocation", name="public"), STARTTLS
    )
    assert isinstance(first.outcome, StartTls)
    catalogue = Exports([PUBLIC])
    second = Negotiation(catalogue, tls=TlsMode.SELECTIVETLS, after=first.outcome)
    found = feed(second, [set_contexts("base:allocation", name="public"), go("public")])
    assert found.kinds[0] == OptionReply.ERR_INVALID
    assert not found.negotiated.structured_replies
    assert not found.negotiated.extended_headers
    assert found.negotiated.contexts == ()


def test_under_tls_there_is_no_second_greeting() -> None:
    """77: options go on where they were; so do the client flags."""
    assert drain(Negotiation(Exports([PUBLIC]), after=StartTls(BOTH))) == b""
    for flags, length in ((ClientFlag.FIXED_NEWSTYLE, 134), (BOTH, 10)):
        found = under_tls(TlsMode.FORCEDTLS, option(Option.EXPORT_NAME, b"secret"), flags=flags)
        assert len(found.sent) == length
        assert found.negotiated.export is SECRET


@pytest.mark.parametrize("mode", MODES_WITH_TLS)
def test_under_tls_nothing_asks_for_tls_and_all_exports_are_there(mode: TlsMode) -> None:
    """81, 84."""
    found = under_tls(mode, LIST, info("nobody"), option(99), info("secret"), go("secret"))
    assert OptionReply.ERR_TLS_REQD not in found.kinds
    assert [r.data for r in found.replies if r.reply == OptionReply.SERVER] == [
        string("public"),
        string("secret"),
    ]
    assert found.negotiated.export is SECRET


def test_access_can_depend_on_who_the_client_is() -> None:
    """A distinguished name is known only under TLS, where the driver gives a new hook."""
    found = under_tls(
        TlsMode.FORCEDTLS,
        LIST,
        go("secret"),
        go("public"),
        may_access=lambda export: "CN=mallory may not" if export.tls_only else None,
    )
    assert found.kinds[:3] == [OptionReply.SERVER, OptionReply.ACK, OptionReply.ERR_POLICY]
    assert found.negotiated.export is PUBLIC


# SELECTIVETLS


@pytest.mark.parametrize("message", [info, go])
def test_selectivetls_asks_for_tls_for_a_tls_only_export(message: type) -> None:
    """33, 83: without any INFO."""
    found = plain(TlsMode.SELECTIVETLS, message("secret"))
    assert found.kinds == [OptionReply.ERR_TLS_REQD]


def test_selectivetls_does_not_tell_hidden_from_unknown_exports() -> None:
    """33: the same error for both, and LIST leaves the hidden ones out."""
    hidden = plain(TlsMode.SELECTIVETLS, info("secret")).replies
    unknown = plain(TlsMode.SELECTIVETLS, info("sesame")).replies
    assert [r.reply for r in hidden] == [r.reply for r in unknown]
    assert hidden[0].data.replace(b"secret", b"") == unknown[0].data.replace(b"sesame", b"")
    listed = plain(TlsMode.SELECTIVETLS, LIST).replies
    assert [r.data for r in listed] == [string("public"), b""]


def test_selectivetls_without_tls_only_exports_says_unknown() -> None:
    found = plain(TlsMode.SELECTIVETLS, info("nobody"), exports=[PUBLIC])
    assert found.kinds == [OptionReply.ERR_UNKNOWN]


@pytest.mark.parametrize("message", [list_contexts, set_contexts])
@pytest.mark.parametrize("name", ["secret", "nobody"])
def test_selectivetls_asks_for_tls_only_from_info_and_go(message: type, name: str) -> None:
    """84."""
    found = plain(TlsMode.SELECTIVETLS, STRUCTURED, message("base:", name=name))
    assert found.kinds[1:] == [OptionReply.ERR_UNKNOWN]


def test_selectivetls_drops_export_name_of_a_tls_only_export() -> None:
    """83."""
    found = plain(TlsMode.SELECTIVETLS, option(Option.EXPORT_NAME, b"secret"))
    assert isinstance(found.outcome, Closed)
    assert found.sent == GREETING


def test_selectivetls_serves_other_exports_without_tls() -> None:
    """72, 73, 82."""
    assert plain(TlsMode.SELECTIVETLS, go("public")).negotiated.export is PUBLIC
    named = option(Option.EXPORT_NAME, b"public")
    assert plain(TlsMode.SELECTIVETLS, named, flags=0).negotiated.export is PUBLIC
