"""Newstyle negotiation: the greeting, client flags, EXPORT_NAME (requirements 1 to 12)."""

from __future__ import annotations

from conformance import wire
from conformance.case import READ_ONLY, TCP, Server, requirement, still_serves
from conformance.client import Client
from conformance.errors import Disconnected, Failed, expect, require
from conformance.wire import Cmd, HandshakeFlag, Option

PADDING_BYTES = 124


@requirement(1)
def strings_are_utf8_without_nul(server: Server) -> str:
    """Names, descriptions, contexts and error texts are valid strings."""
    with server.haggle() as client:
        found = [reply.data for reply in client.option(77).replies if reply.is_error]
        found += [name.encode() for name, _ in client.option(Option.LIST).exports]
        found += [name.encode() for name in client.list_contexts(server.export.name).names]
        for kind, payload in client.go(server.export.name, (0, 1, 2, 3)).infos:
            found += [payload] if kind in (wire.Info.NAME, wire.Info.DESCRIPTION) else []
    for text in found:
        expect(b"\0" not in text, f"NUL in {text!r}")
        expect(len(text) <= wire.STRING_BYTES_MAX, f"string of {len(text)} bytes")
        text.decode()
    return f"{len(found)} strings"


@requirement(3, 11)
def greeting_comes_first_and_is_newstyle(server: Server) -> str:
    """The greeting arrives although the client has sent nothing."""
    with server.connect() as client:
        return f"flags {client.greet()!r}"


@requirement(3, on=TCP)
def greeting_comes_first_over_tcp(server: Server) -> str | None:
    """The same over TCP."""
    return greeting_comes_first_and_is_newstyle(server)


@requirement(4)
def fixed_newstyle_is_offered(server: Server) -> None:
    """A server that answers options sets FIXED_NEWSTYLE."""
    with server.connect() as client:
        expect(client.greet() & HandshakeFlag.FIXED_NEWSTYLE, f"{client.handshake_flags!r}")


@requirement(5)
def no_other_handshake_flag(server: Server) -> None:
    """Only bits 0 and 1 of the handshake flags are ever set."""
    with server.connect() as client:
        flags = int(client.greet())
        expect(not flags & ~3, f"handshake flags {flags:#x}")


@requirement(6)
def client_without_flags_is_served_plainly(server: Server) -> str:
    """A client that sets no flag gets EXPORT_NAME with its padding, and simple replies."""
    with server.connect().handshake(0) as client:
        padding = client.enter_by_name(server.export.name)
        expect(padding == bytes(PADDING_BYTES), f"padding {padding!r}")
        reply = client.call(Cmd.READ, 0, 512)
        expect(reply.simple and not reply.error, str(reply))
    return "EXPORT_NAME with 124 zeroes, simple replies"


def _refuses_flags(server: Server, flags: int) -> str:
    with server.connect() as client:
        client.greet()
        try:
            client.send_client_flags(flags)
            answer = client.option(Option.LIST)
        except Disconnected as end:
            return f"flags {flags:#x}: {end}"
    raise Failed(f"flags {flags:#x} accepted: LIST answered {answer}")


@requirement(7)
def unknown_client_flag_drops_connection(server: Server) -> str:
    """A client flag that the server cannot know ends the connection."""
    return _refuses_flags(server, 3 | 1 << 30)


@requirement(7)
def lowest_unknown_client_flag_drops_connection(server: Server) -> str:
    """So does the lowest undefined one."""
    return _refuses_flags(server, 3 | 1 << 2)


@requirement(7)
def client_flag_that_was_not_offered_drops_connection(server: Server) -> str:
    """So does a flag that exists but was not offered."""
    with server.connect() as client:
        require(client.greet() != 3, "the server offers both flags")
        refused = 3 & ~int(client.handshake_flags)
    return _refuses_flags(server, refused | int(client.handshake_flags))


@requirement(8, 172)
def no_padding_after_export_name_when_agreed(server: Server) -> None:
    """With NO_ZEROES agreed the reply to EXPORT_NAME is ten bytes."""
    with server.connect().handshake() as client:
        require(client.handshake_flags & HandshakeFlag.NO_ZEROES, "NO_ZEROES is not offered")
        client.enter_by_name(server.export.name)
        client.read(0, 512)


@requirement(8)
def padding_after_export_name_when_not_agreed(server: Server) -> None:
    """Without NO_ZEROES it is followed by 124 bytes of zero."""
    with server.connect().handshake(HandshakeFlag.FIXED_NEWSTYLE) as client:
        padding = client.enter_by_name(server.export.name)
        expect(padding == bytes(PADDING_BYTES), f"padding {padding!r}")
        client.read(0, 512)


@requirement(9, 14)
def data_of_unknown_option_is_skipped(server: Server) -> str:
    """An unknown option with data, zero bytes up to 60 KiB, leaves the stream in step."""
    with server.haggle() as client:
        for size in (0, 1, 1000, 60 << 10):
            answer = client.option(0x6E6F6E65, bytes(size))
            expect(answer.type == wire.Rep.ERR_UNSUP, f"{size} bytes: {answer}")
        expect(client.go(server.export.name).acknowledged, "GO failed afterwards")
    return "ERR_UNSUP, then GO works"


@requirement(10)
def unknown_name_in_export_name_ends_session(server: Server) -> None:
    """EXPORT_NAME of an export that is not there is not answered; the connection ends."""
    require(server.strict_names, "the server takes any name")
    with server.haggle() as client:
        client.send_option(Option.EXPORT_NAME, b"there is no such export")
        expect(client.stream.closed(), "not closed, or answered")
    still_serves(server)


def _not_fixed(server: Server) -> Client:
    return server.connect().handshake(0)


@requirement(12)
def options_of_client_that_is_not_fixed_are_refused(server: Server) -> str:
    """Without FIXED_NEWSTYLE from the client, LIST is not served."""
    with _not_fixed(server) as client:
        try:
            answer = client.option(Option.LIST)
        except Disconnected as end:
            return str(end)
    expect(answer.final.is_error, f"LIST answered {answer}")
    return str(answer)


@requirement(14, 12)
def refused_option_of_client_that_is_not_fixed_keeps_step(server: Server) -> str:
    """If such an option is answered with an error, its data is taken off the stream."""
    with _not_fixed(server) as client:
        try:
            answer = client.option(0x6E6F6E65, b"A" * 64)
        except Disconnected as end:
            return str(end)
        padding = client.enter_by_name(server.export.name)
        expect(padding == bytes(PADDING_BYTES), f"padding {padding!r}")
    return f"{answer}, then EXPORT_NAME works"


@requirement(172, on=READ_ONLY, level="S")
def export_name_is_served(server: Server) -> None:
    """EXPORT_NAME is supported, and tells the same size as GO."""
    with server.haggle() as by_go, server.haggle() as by_name:
        by_go.go(server.export.name)
        by_name.enter_by_name(server.export.name)
        told = by_name.export.size, by_go.export.size
        expect(told[0] == told[1], f"EXPORT_NAME {told[0]}, GO {told[1]}")
        by_name.read(0, 512)
