"""TLS modes and STARTTLS (requirements 72 to 88, 187)."""

from __future__ import annotations

import ssl
import warnings

from conformance.case import (
    TLS_FORCED,
    TLS_SELECTIVE,
    Export,
    Server,
    requirement,
    security,
    still_serves,
)
from conformance.client import Client, pack_info, pack_queries
from conformance.errors import Disconnected, Failed, expect, require
from conformance.wire import Cmd, Errno, Flag, Option, Rep

REFUSALS = (Rep.ERR_POLICY, Rep.ERR_UNSUP, Rep.ERR_PLATFORM, Rep.ERR_INVALID, Rep.ERR_UNKNOWN)
NEEDS_TLS = (
    Option.LIST,
    Option.INFO,
    Option.GO,
    Option.STRUCTURED_REPLY,
    Option.LIST_META_CONTEXT,
    Option.SET_META_CONTEXT,
    Option.EXTENDED_HEADERS,
    Option.PEEK_EXPORT,
    77,
)


def sound_data(server: Server, option: int) -> bytes:
    """Data with which ``option`` is well-formed, but GO: its success would end the haggling."""
    name = server.export.name
    if option == Option.INFO:
        return pack_info(name)
    if option == Option.GO:
        return pack_info("there is no such export")
    metas = (Option.LIST_META_CONTEXT, Option.SET_META_CONTEXT)
    return pack_queries(name, []) if option in metas else b""


def plain(server: Server) -> Client:
    return server.haggle(tls=False)


def encrypted(server: Server) -> Client:
    return server.haggle(tls=True)


@requirement(72, 75)
def starttls_without_tls_is_refused(server: Server) -> str:
    """NOTLS: STARTTLS gets a permitted error, and haggling goes on."""
    require(server.tls == "off", "this server has TLS")
    with plain(server) as client:
        answer = client.option(Option.STARTTLS)
        require(not answer.acknowledged, "this server has TLS")
        expect(answer.type in REFUSALS, str(answer))
        expect(client.go(server.export.name).acknowledged, "GO failed afterwards")
    return str(answer)


@requirement(75)
def no_err_tls_reqd_without_tls(server: Server) -> None:
    """NOTLS: no option is answered ERR_TLS_REQD."""
    require(server.tls == "off", "this server has TLS")
    with plain(server) as client:
        for option in (*NEEDS_TLS, Option.STARTTLS):
            answer = client.option(option, sound_data(server, option))
            expect(answer.type != Rep.ERR_TLS_REQD, f"option {option}: {answer}")


@requirement(74, on=TLS_FORCED)
def client_that_is_not_fixed_gets_no_tls(server: Server) -> str:
    """STARTTLS of a client without FIXED_NEWSTYLE is not acknowledged."""
    with server.connect().handshake(0) as client:
        try:
            answer = client.option(Option.STARTTLS)
        except Disconnected as end:
            return str(end)
        expect(not answer.acknowledged, "STARTTLS acknowledged")
    return str(answer)


def _tls_works_once(server: Server) -> None:
    with encrypted(server) as client:
        answer = client.option(Option.STARTTLS)
        expect(answer.type == Rep.ERR_INVALID, f"second STARTTLS: {answer}")
        expect(client.go(server.export.name).acknowledged, "GO failed afterwards")
        client.read(0, 512)


@requirement(76, 77, on=TLS_FORCED)
def starttls_works_once_forced(server: Server) -> None:
    """FORCEDTLS: ACK, TLS, and a second STARTTLS is ERR_INVALID."""
    _tls_works_once(server)


@requirement(82, 77, on=TLS_SELECTIVE)
def starttls_works_once_selective(server: Server) -> None:
    """SELECTIVETLS: ACK, TLS, and a second STARTTLS is ERR_INVALID."""
    _tls_works_once(server)


@requirement(78, on=TLS_FORCED)
def failed_tls_handshake_ends_the_session(server: Server) -> None:
    """Bytes that are no TLS end the connection, and no other."""
    with plain(server) as client:
        expect(client.option(Option.STARTTLS).acknowledged, "STARTTLS refused")
        client.stream.send(b"this is not a ClientHello, by any means" * 20)
        expect(client.stream.remainder() is not None, "connection stays open")
    still_serves(server)


@requirement(79, on=TLS_FORCED)
def other_options_before_tls_need_tls(server: Server) -> None:
    """FORCEDTLS: each option but STARTTLS and ABORT is answered ERR_TLS_REQD."""
    with plain(server) as client:
        for option in NEEDS_TLS:
            answer = client.option(option, sound_data(server, option))
            expect(answer.type == Rep.ERR_TLS_REQD, f"option {int(option)}: {answer}")


@requirement(79, 15, on=TLS_FORCED)
def abort_before_tls_is_acknowledged(server: Server) -> None:
    """FORCEDTLS: ABORT needs no TLS."""
    with plain(server) as client:
        answer = client.option(Option.ABORT)
        expect(answer.acknowledged, str(answer))


@requirement(80, on=TLS_FORCED)
def export_name_before_tls_ends_the_session(server: Server) -> None:
    """FORCEDTLS: EXPORT_NAME before TLS ends the session, fixed newstyle or not."""
    for flags in (3, 0):
        with server.connect().handshake(flags) as client:
            client.send_option(Option.EXPORT_NAME, server.export.name.encode())
            sent = client.stream.remainder()
            expect(sent == b"", f"client flags {flags}: server sent {sent!r}")


def _no_tls_reqd_over_tls(server: Server) -> None:
    with encrypted(server) as client:
        for option in NEEDS_TLS:
            answer = client.option(option, sound_data(server, option))
            expect(answer.type != Rep.ERR_TLS_REQD, f"option {int(option)}: {answer}")


@requirement(81, on=TLS_FORCED)
def no_err_tls_reqd_over_tls_forced(server: Server) -> None:
    """FORCEDTLS: over TLS nothing is answered ERR_TLS_REQD."""
    _no_tls_reqd_over_tls(server)


@requirement(81, on=TLS_SELECTIVE)
def no_err_tls_reqd_over_tls_selective(server: Server) -> None:
    """SELECTIVETLS: over TLS nothing is answered ERR_TLS_REQD."""
    _no_tls_reqd_over_tls(server)


def _hidden(server: Server) -> Export:
    hidden = [export for export in server.exports if export.tls_only]
    require(hidden, "no TLS-only exports")
    return hidden[0]


@requirement(83, on=TLS_SELECTIVE)
def tls_only_export_needs_tls(server: Server) -> None:
    """A TLS-only export: ERR_TLS_REQD on INFO and GO, the end on EXPORT_NAME, then TLS works."""
    name = _hidden(server).name
    with plain(server) as client:
        for ask in (client.info, client.go):
            answer = ask(name)
            expect(answer.type == Rep.ERR_TLS_REQD, f"{ask.__name__}: {answer}")
        client.start_tls(server.tls_context())
        expect(client.go(name).acknowledged, "GO failed over TLS")
    with plain(server) as client:
        client.send_option(Option.EXPORT_NAME, name.encode())
        expect(client.stream.closed(), "EXPORT_NAME of a TLS-only export answered")


@requirement(84, on=TLS_SELECTIVE)
def other_options_need_no_tls_when_selective(server: Server) -> None:
    """SELECTIVETLS: ERR_TLS_REQD is for INFO and GO only; open exports need no TLS."""
    with plain(server) as client:
        for option in set(NEEDS_TLS) - {Option.INFO, Option.GO}:
            answer = client.option(option, sound_data(server, option))
            expect(answer.type != Rep.ERR_TLS_REQD, f"option {int(option)}: {answer}")
    with plain(server) as client:  # nothing but GO has been agreed with this one
        expect(client.go(server.export.name).acknowledged, "GO failed without TLS")
        client.read(0, 512)


@requirement(85, on=TLS_SELECTIVE)
def structured_replies_are_forgotten_by_starttls(server: Server) -> None:
    """STRUCTURED_REPLY agreed before STARTTLS is gone after it."""
    with plain(server) as client:
        require(client.agree_structured(), "no structured replies")
        client.start_tls(server.tls_context())
        expect(client.go(server.export.name).acknowledged, "GO failed")
        expect(not client.export.flags & Flag.SEND_DF, "SEND_DF survived STARTTLS")
        expect(client.call(Cmd.READ, 0, 512).simple, "structured replies survived STARTTLS")


@requirement(85, 63, on=TLS_SELECTIVE)
def contexts_are_forgotten_by_starttls(server: Server) -> None:
    """Contexts selected before STARTTLS are gone after it."""
    with plain(server) as client:
        require(client.agree_structured(), "no structured replies")
        answer = client.set_contexts(server.export.name, ["base:allocation"])
        require(answer.names, "no base:allocation")
        client.start_tls(server.tls_context())
        require(client.agree_structured(), "no structured replies")
        expect(client.go(server.export.name).acknowledged, "GO failed")
        reply = client.call(Cmd.BLOCK_STATUS, 0, 4096)
        expect(reply.error == Errno.EINVAL, f"contexts survived STARTTLS: {reply}")


@requirement(187, 85, on=TLS_SELECTIVE)
def extended_headers_are_forgotten_by_starttls(server: Server) -> None:
    """EXTENDED_HEADERS agreed before STARTTLS is gone after it."""
    with plain(server) as client:
        require(client.agree_extended(), "no extended headers")
        client.start_tls(server.tls_context())
        client.extended = False
        expect(client.go(server.export.name).acknowledged, "GO failed")
        client.read(0, 512)


def _starttls_with_data(server: Server) -> None:
    with plain(server) as client:
        answer = client.option(Option.STARTTLS, b"x")
        expect(answer.type == Rep.ERR_INVALID, str(answer))
        try:
            client.start_tls(server.tls_context())
        except Disconnected as end:
            raise Failed(f"{answer}, then {end}") from end
        expect(client.go(server.export.name).acknowledged, "GO failed")


@requirement(86, 21, on=TLS_FORCED)
def starttls_with_data_is_invalid_forced(server: Server) -> None:
    """FORCEDTLS: STARTTLS with data is ERR_INVALID, without data it works then."""
    _starttls_with_data(server)


@requirement(86, 21, on=TLS_SELECTIVE)
def starttls_with_data_is_invalid_selective(server: Server) -> None:
    """SELECTIVETLS: the same."""
    _starttls_with_data(server)


@requirement(87, on=TLS_FORCED)
def tls_1_2_is_spoken(server: Server) -> str:
    """A client with TLS 1.2 at most is served; a newer one gets what it has."""
    spoken = []
    for newest in (ssl.TLSVersion.TLSv1_2, ssl.TLSVersion.TLSv1_3):
        with plain(server) as client:
            client.start_tls(server.tls_context(newest))
            expect(client.go(server.export.name).acknowledged, "GO failed")
            assert isinstance(client.stream.socket, ssl.SSLSocket)
            spoken.append(str(client.stream.socket.version()))
    expect(spoken[0] == "TLSv1.2", f"spoken {spoken}")
    return ", ".join(spoken)


@requirement(87, on=TLS_FORCED, level="N")
def tls_1_1_is_refused(server: Server) -> str:
    """TLS 1.1 is not accepted by default."""
    context = server.tls_context(ssl.TLSVersion.TLSv1_2)
    context.set_ciphers("ALL:@SECLEVEL=0")
    with warnings.catch_warnings():
        # The deprecated version is what this case is about.
        warnings.simplefilter("ignore", DeprecationWarning)
        context.options |= ssl.OP_NO_TLSv1_2 | ssl.OP_NO_TLSv1_3
        context.minimum_version = ssl.TLSVersion.MINIMUM_SUPPORTED
    with plain(server) as client:
        try:
            client.start_tls(context)
        except Disconnected as end:
            return str(end)
        assert isinstance(client.stream.socket, ssl.SSLSocket)
        raise Failed(f"served over {client.stream.socket.version()}")


@requirement(139, on=TLS_FORCED)
def payload_of_refused_write_is_taken_from_tls(server: Server) -> None:
    """A WRITE refused over TLS leaves the TLS stream in step."""
    with server.enter() as client:
        require(client.export.flags & Flag.READ_ONLY, "the export is writable")
        for size in (512, 70000):
            reply = client.call(Cmd.WRITE, 0, size, payload=b"w" * size)
            expect(reply.error, "write to a read-only export succeeded")
            client.read(0, 512)


@requirement(133, on=TLS_FORCED)
def content_is_right_over_tls(server: Server) -> None:
    """What is read over TLS is what the disk holds, in small and large pieces."""
    content = server.export.content
    require(content, "the content is not known")
    assert content is not None
    with server.enter() as client:
        for offset, length in ((0, 1), (777, 70000), (0, 2 << 20)):
            expect(client.read(offset, length) == content.read(offset, length), f"at {offset}")


def _injection(server: Server) -> str:
    """Bytes that follow STARTTLS in plain text are never executed, nor answered over TLS."""
    with plain(server) as client:
        head = b"IHAVEOPT" + (5).to_bytes(4) + bytes(4)
        injected = b"IHAVEOPT" + (8).to_bytes(4) + bytes(4)
        client.stream.send(head + injected)
        answer = client.receive_answer(Option.STARTTLS)
        if not answer.acknowledged:
            return str(answer)
        try:
            client.stream.start_tls(server.tls_context())
            client.send_option(Option.LIST)
            answer = client.receive_answer(Option.LIST)
        except Disconnected as end:
            still_serves(server)
            return str(end)
        client.go(server.export.name)
        expect(client.call(Cmd.READ, 0, 512).simple, "STRUCTURED_REPLY in plain text was obeyed")
        return f"ignored: {answer}"


@security("CVE-2021-3716", on=TLS_FORCED)
def plaintext_after_starttls_is_not_obeyed_forced(server: Server) -> str:
    """FORCEDTLS: an option pipelined behind STARTTLS is not obeyed."""
    return _injection(server)


@security("CVE-2021-3716", on=TLS_SELECTIVE)
def plaintext_after_starttls_is_not_obeyed_selective(server: Server) -> str:
    """SELECTIVETLS: the same."""
    return _injection(server)


@security("own", on=TLS_FORCED)
def half_closed_tls_handshake_ends(server: Server) -> None:
    """A client that stops in the midst of the TLS handshake and half-closes is let go."""
    with plain(server) as client:
        expect(client.option(Option.STARTTLS).acknowledged, "STARTTLS refused")
        client.stream.send(b"\x16\x03\x01\x02\x00\x01")
        client.stream.half_close()
        expect(client.stream.remainder() is not None, "connection stays open")
    still_serves(server)
