"""INFO, GO and STRUCTURED_REPLY (requirements 26 to 43)."""

from __future__ import annotations

import struct

from conformance.case import BLOCK_SIZES, TLS_FORCED, TLS_SELECTIVE, Server, requirement
from conformance.errors import expect, require
from conformance.replies import Answer, ExportInfo
from conformance.wire import Cmd, CmdFlag, Errno, Flag, HandshakeFlag, Info, Option, Rep

ALL_INFOS = (Info.EXPORT, Info.NAME, Info.DESCRIPTION, Info.BLOCK_SIZE)


@requirement(26)
def name_longer_than_option_is_an_error(server: Server) -> None:
    """A name that does not fit its option is an error on INFO and GO, and no disconnect."""
    with server.haggle() as client:
        for option in (Option.INFO, Option.GO):
            for length in (5, 100, 4096, 0x7FFFFFFF):
                answer = client.option(option, struct.pack(">I4sH", length, b"nope", 0))
                expect(answer.final.is_error, f"{option.name} name of {length}: {answer}")
        expect(client.go(server.export.name).acknowledged, "GO failed afterwards")


@requirement(26, level="M")
def more_requests_than_option_holds_is_an_error(server: Server) -> None:
    """A count of information requests beyond the option's end is an error; so is a rest."""
    with server.haggle() as client:
        name = server.export.name.encode()
        head = struct.pack(f">I{len(name)}s", len(name), name)
        for tail in (b"\0\3\0\0", b"\0\0\0\0", b"\0\1"):
            answer = client.option(Option.INFO, head + tail)
            expect(answer.final.is_error, f"tail {tail!r}: {answer}")
        expect(client.go(server.export.name).acknowledged, "GO failed afterwards")


@requirement(27)
def unknown_information_requests_are_ignored(server: Server) -> None:
    """Requests for information that does not exist change nothing."""
    with server.haggle() as client:
        answer = client.info(server.export.name, (77, 0xFFFF, 0, 4))
        expect(answer.acknowledged, str(answer))
        expect(Info.EXPORT in dict(answer.infos), f"no INFO_EXPORT: {answer}")
        expect(not set(dict(answer.infos)) & {77, 0xFFFF, 4}, f"{dict(answer.infos)}")
        expect(client.go(server.export.name, (77, 0xFFFF)).acknowledged, "GO failed")


@requirement(29, 171)
def export_information_comes_before_ack(server: Server) -> str:
    """INFO and GO give INFO_EXPORT of 12 bytes, asked for or not."""
    for option in (Option.INFO, Option.GO):
        for asked in ((), (Info.NAME,)):
            with server.haggle() as client:
                answer = (client.info if option == Option.INFO else client.go)(
                    server.export.name, asked
                )
                expect(answer.acknowledged, f"{option.name}: {answer}")
                info = ExportInfo.of(answer)
                expect(info.size >= 0, f"{option.name}: no INFO_EXPORT: {answer}")
    size = server.export.size
    expect(size is None or info.size == size, f"size {info.size}, is {size}")
    return f"{info.size} bytes, {info.flags!r}"


@requirement(30)
def no_information_before_err_unknown(server: Server) -> str:
    """An unknown name on INFO and GO gives ERR_UNKNOWN alone, and haggling goes on."""
    require(server.strict_names, "the server takes any name")
    with server.haggle() as client:
        for option in (client.info, client.go):
            answer = option("there is no such export", (0, 1, 2, 3))
            expect(answer.type == Rep.ERR_UNKNOWN, str(answer))
            expect(len(answer.replies) == 1, f"more replies: {answer}")
        expect(client.go(server.export.name).acknowledged, "GO failed afterwards")
    return str(answer)


@requirement(31, on=TLS_FORCED)
def no_information_before_err_tls_reqd(server: Server) -> None:
    """Before TLS, INFO and GO tell nothing but ERR_TLS_REQD."""
    with server.haggle(tls=False) as client:
        for option in (client.info, client.go):
            answer = option(server.export.name, (0, 1, 2, 3))
            expect(len(answer.replies) == 1, f"more replies: {answer}")
            expect(answer.type == Rep.ERR_TLS_REQD, str(answer))


@requirement(32, on=BLOCK_SIZES)
def client_that_asks_block_sizes_is_not_sent_away(server: Server) -> None:
    """ERR_BLOCK_SIZE_REQD is not for a client that asks for BLOCK_SIZE."""
    with server.haggle() as client:
        for option in (client.info, client.go):
            answer = option(server.export.name, (Info.BLOCK_SIZE,))
            expect(answer.acknowledged, str(answer))


@requirement(32, on=BLOCK_SIZES, level="S")
def err_block_size_reqd_comes_with_the_sizes(server: Server) -> str:
    """If a client that does not ask is sent away, it is told the sizes first."""
    with server.haggle() as client:
        answer = client.go(server.export.name, ())
    if answer.type == Rep.ERR_BLOCK_SIZE_REQD:
        expect(Info.BLOCK_SIZE in dict(answer.infos), f"no BLOCK_SIZE before it: {answer}")
    else:
        expect(answer.acknowledged, str(answer))
    return str(answer)


@requirement(33, on=TLS_SELECTIVE)
def tls_only_export_tells_nothing(server: Server) -> None:
    """INFO of a TLS-only export gives no information before its error."""
    hidden = [export for export in server.exports if export.tls_only]
    require(hidden, "no TLS-only exports")
    with server.haggle(tls=False) as client:
        answer = client.info(hidden[0].name, (0, 1, 2, 3))
        expect(answer.final.is_error and len(answer.replies) == 1, str(answer))


def _bodies(answer: Answer) -> list[tuple[int, bytes]]:
    return sorted((reply.type, reply.data) for reply in answer.replies)


@requirement(34)
def info_tells_what_go_tells(server: Server) -> None:
    """INFO and the same GO right after it get the same replies."""
    for asked in ((), ALL_INFOS, (Info.BLOCK_SIZE,)):
        with server.haggle() as client:
            client.agree_structured()
            info, go = (ask(server.export.name, asked) for ask in (client.info, client.go))
            sizes = [ExportInfo.of(answer).size for answer in (info, go)]
            expect(sizes[0] == sizes[1], f"INFO tells {sizes[0]} bytes, GO {sizes[1]}")
            expect(_bodies(info) == _bodies(go), f"{_bodies(info)} != {_bodies(go)}")


@requirement(35)
def no_padding_after_go(server: Server) -> None:
    """GO's ACK has no zeroes after it, NO_ZEROES or not."""
    for flags in (HandshakeFlag.FIXED_NEWSTYLE, HandshakeFlag(3)):
        with server.connect().handshake(flags) as client:
            expect(client.go(server.export.name).acknowledged, "GO failed")
            client.read(0, 512)


@requirement(36)
def each_information_comes_once(server: Server) -> None:
    """Asked twice, a piece of information is still told once."""
    with server.haggle() as client:
        answer = client.info(server.export.name, ALL_INFOS + ALL_INFOS)
        kinds = [kind for kind, _ in answer.infos]
        expect(answer.acknowledged, str(answer))
        expect(len(kinds) == len(set(kinds)), f"information types {kinds}")


@requirement(37)
def information_has_its_length(server: Server) -> str:
    """NAME and DESCRIPTION say what they should, BLOCK_SIZE has 14 bytes."""
    with server.haggle() as client:
        answer = client.info(server.export.name, ALL_INFOS)
        info, known = ExportInfo.of(answer), server.export
        kinds = set(dict(answer.infos)) - {Info.EXPORT}
        require(kinds, "tells nothing but INFO_EXPORT")
        if info.description is not None and known.description is not None:
            expect(info.description.decode() == known.description, repr(info.description))
        expect(info.name in (None, known.name.encode()) or not known.name, repr(info.name))
    return f"name {info.name!r}, description {info.description!r}, {info.block_sizes}"


@requirement(38, 89, on=BLOCK_SIZES)
def enforced_sizes_are_told(server: Server) -> str:
    """If small requests are refused, BLOCK_SIZE was told to the client that asked."""
    with server.enter() as client:
        refused = client.call(Cmd.READ, 512, 512).error == Errno.EINVAL
        told = client.export.block_sizes
        expect(told or not refused, "requests of 512 bytes are refused, no BLOCK_SIZE was told")
        expect(not refused or client.export.minimum > 512, f"told {told}, 512 bytes are refused")
    return f"{told}, 512 bytes {'refused' if refused else 'served'}"


@requirement(39)
def empty_name_is_default_export(server: Server) -> str:
    """The empty name enters the default export, or is ERR_UNKNOWN where there is none."""
    with server.haggle() as client:
        answer = client.go("")
        if answer.acknowledged:
            client.read(0, min(4096, client.export.size))
            return f"default export of {client.export.size} bytes"
        expect(answer.type in (Rep.ERR_UNKNOWN, Rep.ERR_POLICY), str(answer))
    return str(answer)


@requirement(40)
def structured_reply_with_data_is_invalid(server: Server) -> None:
    """STRUCTURED_REPLY has no data: ERR_INVALID, and READ stays simple."""
    with server.haggle() as client:
        answer = client.option(Option.STRUCTURED_REPLY, b"x")
        require(answer.type != Rep.ERR_UNSUP, "no structured replies")
        expect(answer.type == Rep.ERR_INVALID, str(answer))
        client.go(server.export.name)
        expect(client.call(Cmd.READ, 0, 512).simple, "structured after a refused option")


@requirement(41, 126)
def reads_are_structured_after_agreement(server: Server) -> None:
    """READ's reply is structured if and only if STRUCTURED_REPLY was acknowledged."""
    with server.enter() as client:
        expect(client.call(Cmd.READ, 0, 512).simple, "structured without agreement")
    with server.enter(structured=True) as client:
        expect(not client.call(Cmd.READ, 0, 512).simple, "simple after agreement")


@requirement(42, 43, 184)
def reply_extensions_are_not_offered_before_agreement(server: Server) -> None:
    """Without structured replies SEND_DF and BLOCK_STATUS_PAYLOAD are clear."""
    with server.enter() as client:
        offered = client.export.flags & (Flag.SEND_DF | Flag.BLOCK_STATUS_PAYLOAD)
        expect(not offered, f"offered {offered!r}")
    with server.enter(structured=True) as client:
        offered = client.export.flags & Flag.BLOCK_STATUS_PAYLOAD
        expect(not offered, f"offered {offered!r}")


@requirement(43, level="M")
def df_works_when_it_is_offered(server: Server) -> None:
    """SEND_DF set: READ with DF succeeds; clear: it is EINVAL."""
    with server.enter(structured=True) as client:
        reply = client.call(Cmd.READ, 0, 4096, CmdFlag.DF)
        if client.export.flags & Flag.SEND_DF:
            expect(not reply.error and len(reply.data) == 4096, str(reply))
        else:
            expect(reply.error == Errno.EINVAL, f"not offered, but {reply}")
