"""Unknown commands and flags, the baseline (requirements 169, 171, 172)."""

from __future__ import annotations

from conformance.case import Server, expect_error, requirement
from conformance.cases.read import forms
from conformance.errors import expect, require
from conformance.wire import Cmd, CmdFlag, Errno, Flag, Option, Rep


@requirement(169)
def unknown_commands_are_einval(server: Server) -> str:
    """Commands without a meaning, and RESIZE where it is not offered, are EINVAL."""
    seen = []
    for form, client in forms(server):
        for command in (9, 77, 0xFFFF, Cmd.RESIZE):
            expect_error(client.call(command, 0, 0), Errno.EINVAL)
        client.read(0, 512)
        seen.append(form.value)
    return ", ".join(seen)


@requirement(169)
def unknown_flags_are_einval(server: Server) -> str:
    """Undefined command flags are EINVAL, and the connection goes on."""
    said = ""
    for _, client in forms(server):
        for flag in (1 << 6, 1 << 10, 1 << 15):
            said = expect_error(client.call(Cmd.READ, 0, 512, flag), Errno.EINVAL)
        client.read(0, 512)
    return said


_MISPLACED = [
    (Cmd.READ, CmdFlag.NO_HOLE),
    (Cmd.READ, CmdFlag.REQ_ONE),
    (Cmd.READ, CmdFlag.FAST_ZERO),
    (Cmd.FLUSH, CmdFlag.DF),
    (Cmd.FLUSH, CmdFlag.NO_HOLE),
    (Cmd.FLUSH, CmdFlag.REQ_ONE),
]


@requirement(169)
def misplaced_flags_are_einval(server: Server) -> str:
    """Flags that belong to other commands are EINVAL."""
    with server.enter(structured=True) as client:
        for command, flag in _MISPLACED:
            if command == Cmd.FLUSH and not client.export.flags & Flag.SEND_FLUSH:
                continue
            said = expect_error(
                client.call(command, 0, 512 if command == Cmd.READ else 0, flag), Errno.EINVAL
            )
        client.read(0, 512)
    return said


@requirement(169)
def df_without_structured_replies_is_einval(server: Server) -> str:
    """DF is not for clients that have not agreed structured replies."""
    with server.enter() as client:
        require(not client.export.flags & Flag.SEND_DF, "SEND_DF is offered")
        said = expect_error(client.call(Cmd.READ, 0, 512, CmdFlag.DF), Errno.EINVAL)
        client.read(0, 512)
    return said


@requirement(171)
def baseline_is_there(server: Server) -> None:
    """Fixed newstyle, LIST, INFO, GO, READ, DISC, ABORT: each is known."""
    with server.haggle() as client:
        expect(client.option(Option.LIST).type != Rep.ERR_UNSUP, "LIST is not supported")
        expect(client.info(server.export.name).acknowledged, "INFO failed")
        expect(client.go(server.export.name).acknowledged, "GO failed")
        client.read(0, 512)
        client.disconnect()
        expect(client.stream.closed(), "not closed after DISC")


@requirement(172)
def flush_and_fua_are_offered(server: Server) -> str:
    """FLUSH and FUA should be supported."""
    with server.enter() as client:
        flags = client.export.flags
        expect(flags & Flag.SEND_FLUSH, f"no FLUSH: {flags!r}")
        expect(flags & Flag.SEND_FUA, f"no FUA: {flags!r}")
    return f"{flags!r}"


@requirement(172)
def starttls_is_known(server: Server) -> str:
    """STARTTLS should at least be known."""
    with server.haggle(tls=False) as client:
        answer = client.option(Option.STARTTLS)
        expect(answer.type != Rep.ERR_UNSUP, str(answer))
    return str(answer)
