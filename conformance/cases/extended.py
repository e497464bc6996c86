"""Extended headers (requirements 173 to 188)."""

from __future__ import annotations

import struct

from conformance.case import WRITABLE, Server, closing_on_error, expect_error, has_flag, requirement
from conformance.client import Client
from conformance.content import GIB, MIB, SCRATCH
from conformance.errors import Disconnected, expect, require
from conformance.wire import Cmd, CmdFlag, Errno, Flag, Option, Rep

AREA = SCRATCH[0]
BASE = "base:allocation"


def has_extended(server: Server) -> None:
    """The case is not applicable to servers without extended headers."""
    with server.haggle() as client:
        require(client.agree_extended(), "no extended headers")


@requirement(173)
def extended_headers_with_data_is_invalid(server: Server) -> None:
    """EXTENDED_HEADERS has no data: ERR_INVALID, and nothing is agreed."""
    has_extended(server)
    with server.haggle() as client:
        answer = client.option(Option.EXTENDED_HEADERS, b"x")
        expect(answer.type == Rep.ERR_INVALID, str(answer))
        client.go(server.export.name)
        client.read(0, 512)


@requirement(174)
def go_works_after_extended_headers(server: Server) -> None:
    """GO is supported after EXTENDED_HEADERS."""
    with server.enter(extended=True) as client:
        client.read(0, 512)


@requirement(174, level="S")
def export_name_after_extended_headers_is_dropped(server: Server) -> None:
    """A client with extended headers must use GO: EXPORT_NAME ends the session."""
    has_extended(server)
    with server.haggle() as client:
        client.agree_extended()
        client.send_option(Option.EXPORT_NAME, server.export.name.encode())
        expect(client.stream.closed(), "EXPORT_NAME answered")


@requirement(175)
def structured_reply_after_extended_headers_is_refused(server: Server) -> None:
    """STRUCTURED_REPLY after EXTENDED_HEADERS is ERR_EXT_HEADER_REQD."""
    has_extended(server)
    with server.haggle() as client:
        client.agree_extended()
        answer = client.option(Option.STRUCTURED_REPLY)
        expect(answer.type == Rep.ERR_EXT_HEADER_REQD, str(answer))


@requirement(175)
def extended_headers_take_precedence(server: Server) -> None:
    """STRUCTURED_REPLY, then EXTENDED_HEADERS: headers are extended. Twice: answered."""
    has_extended(server)
    with server.haggle() as client:
        client.agree_structured()
        expect(client.agree_extended(), "refused after STRUCTURED_REPLY")
        again = client.option(Option.EXTENDED_HEADERS)
        expect(again.type in (Rep.ACK, Rep.ERR_INVALID), str(again))
        client.go(server.export.name)
        client.read(0, 512)


@requirement(175)
def contexts_work_with_extended_headers_alone(server: Server) -> None:
    """SET_META_CONTEXT needs no STRUCTURED_REPLY when headers are extended."""
    with server.enter(extended=True, contexts=(BASE,)) as client:
        reply = client.call(Cmd.BLOCK_STATUS, 0, MIB)
        expect(not reply.error and reply.extents, str(reply))


@requirement(178, on=WRITABLE)
def extended_writes_work(server: Server) -> None:
    """WRITE with PAYLOAD_LEN writes its payload; all other commands work too."""
    with server.enter(extended=True) as client:
        client.write(AREA, b"e" * 70000)
        expect(client.read(AREA, 70000) == b"e" * 70000, "wrong content")
        for command in (Cmd.TRIM, Cmd.WRITE_ZEROES):
            expect(not client.call(command, AREA, 65536).error, f"{command.name} failed")
        expect(not client.call(Cmd.FLUSH).error, "FLUSH failed")


@requirement(179, on=WRITABLE)
def oversize_payload_is_refused(server: Server) -> str:
    """A payload that is announced as 2^62 bytes ends the connection, or is an error."""
    with server.enter(extended=True) as client:
        request = client.request(Cmd.WRITE, 0, 1 << 62, payload=b"w" * 4096)
        try:
            client.send(request)
            return expect_error(client.receive())
        except Disconnected as end:
            return str(end)


@requirement(180)
def unwanted_payload_is_consumed(server: Server) -> str:
    """PAYLOAD_LEN on a command that takes none: the payload is consumed, then EINVAL."""
    with server.enter(extended=True) as client:
        for command in (Cmd.READ, Cmd.FLUSH, Cmd.TRIM):
            reply = client.call(command, 0, 5000, CmdFlag.PAYLOAD_LEN, b"p" * 5000)
            said = expect_error(reply, Errno.EINVAL, Errno.EPERM)
            client.read(0, 512)
    return said


@requirement(176, 183)
def effect_beyond_4_gib_is_served(server: Server) -> str:
    """BLOCK_STATUS of more than 4 GiB is one request, its extents may be as long."""
    with server.enter(extended=True, contexts=(BASE,)) as client:
        size = client.export.size
        require(size > 5 * GIB, "the export is small")
        reply = client.call(Cmd.BLOCK_STATUS, 0, size)
        expect(not reply.error, str(reply))
        (extents,) = reply.extents.values()
        longest = max(length for length, _ in extents)
    return f"{len(extents)} extents, the longest of {longest:#x}"


@requirement(184, 67)
def status_payload_is_offered_with_contexts(server: Server) -> str:
    """GO offers BLOCK_STATUS_PAYLOAD only with contexts."""
    has_extended(server)
    with server.enter(extended=True) as client:
        bare = client.export.flags & Flag.BLOCK_STATUS_PAYLOAD
        expect(not bare, "offered without contexts")
    with server.enter(extended=True, contexts=(BASE,)) as client:
        return f"{client.export.flags!r}"


def _status_payload(client: Client, length: int, ids: tuple[int, ...], rest: bytes = b"") -> bytes:
    return struct.pack(f">Q{len(ids)}I", length, *ids) + rest


def _all_contexts(server: Server) -> Client:
    client = server.haggle()
    with closing_on_error(client):
        require(client.agree_extended(), "no extended headers")
        names = sorted(client.list_contexts(server.export.name).names)
        client.set_contexts(server.export.name, names)
        client.go(server.export.name)
        has_flag(client, Flag.BLOCK_STATUS_PAYLOAD)
    return client


@requirement(185)
def status_payload_chooses_contexts(server: Server) -> str:
    """BLOCK_STATUS with payload answers for the contexts that it names, and no other."""
    with _all_contexts(server) as client:
        ids = tuple(client.contexts)
        for chosen in (ids[:1], ids[1:], ids):
            payload = _status_payload(client, MIB, chosen)
            request = (0, len(payload), CmdFlag.PAYLOAD_LEN, payload)
            reply = client.call(Cmd.BLOCK_STATUS, *request)
            expect(not reply.error or not chosen, str(reply))
            expect(set(reply.extents) == set(chosen), f"{set(reply.extents)}, asked {chosen}")
    return f"{len(ids)} contexts"


@requirement(185)
def wrong_status_payload_is_einval(server: Server) -> str:
    """Unknown or repeated ids and payloads of a wrong size are EINVAL, and consumed."""
    with _all_contexts(server) as client:
        one = next(iter(client.contexts))
        wrong = [
            _status_payload(client, MIB, (one, one)),
            _status_payload(client, MIB, (0x7FFFFFFF,)),
            _status_payload(client, MIB, (one,), b"x"),
            b"\0\0\0\0",
        ]
        for payload in wrong:
            reply = client.call(Cmd.BLOCK_STATUS, 0, len(payload), CmdFlag.PAYLOAD_LEN, payload)
            said = expect_error(reply, Errno.EINVAL)
            client.read(0, 512)
    return said


@requirement(188)
def compact_clients_are_welcome(server: Server) -> None:
    """A server with extended headers serves clients that do not ask for them."""
    has_extended(server)
    with server.enter() as simple, server.enter(structured=True) as structured:
        simple.read(0, 512)
        structured.read(0, 512)
