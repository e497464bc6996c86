"""Fixed newstyle option haggling (requirements 13 to 25)."""

from __future__ import annotations

from conformance.case import (
    MANY,
    READ_ONLY,
    TLS_FORCED,
    Server,
    draining,
    requirement,
    still_serves,
)
from conformance.errors import Disconnected, Failed, expect, require
from conformance.wire import Option, Rep


@requirement(13)
def replies_echo_the_option(server: Server) -> str:
    """Every option, known or not, is echoed with the reply magic."""
    options = (Option.LIST, Option.STRUCTURED_REPLY, 0, 12, 0x80000003, 0xFFFFFFFF)
    with server.haggle() as client:
        return "; ".join(f"{int(option):#x}: {client.option(option)}" for option in options)


@requirement(14)
def unknown_options_are_unsupported(server: Server) -> None:
    """Options without a meaning, and the withdrawn PEEK_EXPORT, are answered ERR_UNSUP."""
    with server.haggle() as client:
        for option in (0, Option.PEEK_EXPORT, 12, 77, 0x80000003, 0xFFFFFFFF):
            answer = client.option(option, b"some data")
            expect(answer.type == Rep.ERR_UNSUP, f"option {int(option):#x}: {answer}")
        expect(client.go(server.export.name).acknowledged, "GO failed afterwards")


@requirement(15)
def abort_is_acknowledged(server: Server) -> None:
    """ABORT gets ACK, then the server closes."""
    with server.haggle() as client:
        answer = client.option(Option.ABORT)
        expect(answer.acknowledged, str(answer))
        expect(client.stream.closed(), "server did not close after ABORT")


@requirement(16)
def data_of_abort_is_ignored(server: Server) -> None:
    """ABORT with data is the same as without."""
    with server.haggle() as client:
        answer = client.option(Option.ABORT, b"ignored")
        expect(answer.acknowledged, str(answer))
        expect(client.stream.closed(), "server did not close after ABORT")


@requirement(17)
def abort_of_client_that_does_not_wait(server: Server) -> None:
    """A client that sends ABORT and is gone harms nobody."""
    for _ in range(5):
        client = server.haggle()
        client.send_option(Option.ABORT)
        client.stream.reset()
    still_serves(server)


@requirement(18)
def list_with_data_is_invalid(server: Server) -> None:
    """LIST has no data: ERR_INVALID, and the next option works."""
    with server.haggle() as client:
        answer = client.option(Option.LIST, b"data")
        expect(answer.type == Rep.ERR_INVALID, str(answer))
        expect(client.go(server.export.name).acknowledged, "GO failed afterwards")


@requirement(19, 20)
def list_is_well_formed(server: Server) -> str:
    """LIST gives SERVER replies whose names fit, then ACK; or an error."""
    with server.haggle() as client:
        answer = client.option(Option.LIST)
        names = [name for name, _ in answer.exports]
        extra = [reply for reply in answer.replies[:-1] if reply.type != Rep.SERVER]
        expect(not extra, f"other replies: {answer}")
        expect(not (answer.final.is_error and names), f"an error after names: {answer}")
        expect(answer.final.is_error or not answer.final.data, f"ACK with data: {answer}")
    return f"{names}"


@requirement(19, 171, on=MANY)
def list_names_every_export(server: Server) -> str:
    """LIST names all exports, and each can be entered."""
    wanted = {export.name for export in server.exports}
    with server.haggle() as client:
        answer = client.option(Option.LIST)
        require(answer.acknowledged, f"LIST answered {answer}")
        names = {name for name, _ in answer.exports}
        expect(wanted <= names, f"listed {sorted(names)}, there are {sorted(wanted)}")
    for export in server.exports:
        with server.enter(export=export) as client:
            client.read(0, 512)
    return f"{sorted(names)}"


@requirement(21, 22)
def wrong_options_are_errors_not_disconnects(server: Server) -> str:
    """Malformed options are answered by errors, and the connection can still be used."""
    wrong = [
        (Option.INFO, b""),
        (Option.GO, b"\0\0\0"),
        (Option.GO, b"\0\0\0\0\0\5\0\0"),
        (Option.LIST_META_CONTEXT, b"\0"),
        (Option.LIST, b"x"),
        (Option.STRUCTURED_REPLY, b"x"),
        (78, b"x" * 100),
    ]
    with server.haggle() as client:
        for option, data in wrong:
            answer = client.option(option, data)
            expect(answer.final.is_error, f"option {option} with {data!r}: {answer}")
        expect(client.go(server.export.name).acknowledged, "GO failed afterwards")
    return f"{len(wrong)} errors, then GO works"


@requirement(22)
def many_errors_do_not_end_the_haggling(server: Server) -> None:
    """Twenty options in error are twenty errors, and GO works."""
    with server.haggle() as client:
        for _ in range(20):
            expect(client.option(79).final.is_error, "no error")
        expect(client.go(server.export.name).acknowledged, "GO failed afterwards")


@requirement(23, on=READ_ONLY, private=True)
def options_during_shutdown_get_err_shutdown(server: Server) -> str:
    """A client that haggles while the server finishes what is in flight: ERR_SHUTDOWN."""
    with server.haggle() as client:
        client.info(server.export.name)
        with draining(server):
            try:
                answer = client.option(Option.LIST)
            except Disconnected as end:
                raise Failed(f"no ERR_SHUTDOWN: {end}") from end
            expect(answer.type == Rep.ERR_SHUTDOWN, str(answer))
    return str(answer)


@requirement(24, on=TLS_FORCED)
def tls_says_goodbye_before_a_hard_disconnect(server: Server) -> None:
    """A session that the server ends over TLS ends with a TLS goodbye."""
    require(server.strict_names, "the server takes any name")
    with server.haggle() as client:
        client.send_option(Option.EXPORT_NAME, b"there is no such export")
        expect(client.stream.closed(), "not closed, or answered")
        expect(not client.stream.reset_by_server, "closed without close_notify")


@requirement(25)
def repeated_structured_reply_is_answered(server: Server) -> str:
    """STRUCTURED_REPLY twice gives ACK or ERR_INVALID, and READ stays structured."""
    with server.haggle() as client:
        require(client.agree_structured(), "no structured replies")
        answer = client.option(Option.STRUCTURED_REPLY)
        expect(answer.type in (Rep.ACK, Rep.ERR_INVALID), str(answer))
        client.go(server.export.name)
        client.read(0, 512)
    return str(answer)
