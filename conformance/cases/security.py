"""Security of servers: what CVEs of NBD servers were about, and more of the kind."""

from __future__ import annotations

import contextlib
import random
import struct
import time

from conformance import wire
from conformance.case import (
    READ_ONLY,
    TCP,
    TLS_FORCED,
    WRITABLE,
    Server,
    expect_error,
    requirement,
    security,
    still_serves,
)
from conformance.client import Client, pack_info, pack_queries, pack_string
from conformance.content import GIB, MIB, SCRATCH
from conformance.errors import Disconnected, Failed, Finding, Stalled, expect, require
from conformance.wire import Cmd, CmdFlag, Errno, Option, Rep

AREA = SCRATCH[0]


@security("CVE-2005-3534", on=WRITABLE)
def write_lengths_around_the_maximum(server: Server) -> str:
    """WRITE of the maximum payload and around it: written, an error, or the end of one client."""
    said = []
    for length in (32 * MIB - 1, 32 * MIB + 1):
        with server.enter() as client:
            try:
                said.append(str(client.call(Cmd.WRITE, AREA, length, payload=bytes(length))))
                client.read(0, 512)
            except Disconnected as end:
                said.append(f"{length:#x}: {end}")
        still_serves(server)
    return "; ".join(said)


@security("CVE-2011-0530", on=WRITABLE)
def write_lengths_beyond_memory(server: Server) -> str:
    """WRITE that announces 2^31 or 2^32-1 bytes and sends few harms nobody else."""
    for length in (1 << 31, 0xFFFFFFFF):
        with server.enter() as client:
            # The server may close as soon as it has read the length, before the rest is sent.
            with contextlib.suppress(Disconnected):
                client.send(client.request(Cmd.WRITE, 0, length, payload=bytes(100_000)))
            still_serves(server)
            client.stream.reset()
    still_serves(server)
    return "other clients are served"


@security("CVE-2011-1925")
def failed_negotiation_harms_nobody(server: Server) -> None:
    """Unknown names, and clients that leave after them, harm nobody."""
    for option in (Option.EXPORT_NAME, Option.INFO, Option.GO):
        with server.haggle() as client:
            name = "there is no such export"
            raw = name.encode() if option == Option.EXPORT_NAME else pack_info(name)
            client.send_option(option, raw)
    still_serves(server)


def _whole_handshake(server: Server) -> bytes:
    """A client's bytes from its flags to a READ."""
    go = pack_info(server.export.name, (0, 3))
    option = struct.pack(">QII", wire.IHAVEOPT, Option.GO, len(go)) + go
    read = struct.pack(">IHHQQI", wire.REQUEST_MAGIC, 0, Cmd.READ, 1, 0, 512)
    return struct.pack(">I", 3) + option + read


@security("CVE-2013-7441")
def client_that_leaves_after_each_byte(server: Server) -> str:
    """A client that closes after 0, 1, 2 … bytes of its handshake harms nobody."""
    whole = _whole_handshake(server)
    for length in range(len(whole) + 1):
        client = server.connect()
        client.stream.send(whole[:length])
        client.stream.reset()
    still_serves(server)
    return f"{len(whole) + 1} clients"


@security("CVE-2017-9524", on=TCP)
def port_scan_over_tcp(server: Server) -> str:
    """The same over TCP, with RST: a port scanner harms nobody."""
    return client_that_leaves_after_each_byte(server) or ""


@security("CVE-2017-10664", on=TCP)
def client_that_closes_with_replies_pending(server: Server) -> None:
    """A client that asks for 64 MiB and is gone harms nobody."""
    for _ in range(4):
        client = server.enter()
        client.send(*(client.request(Cmd.READ, 0, MIB) for _ in range(64)))
        client.stream.reset()
    still_serves(server)


@security("CVE-2017-7539")
def random_bytes_end_one_connection_only(server: Server) -> None:
    """Random bytes for client flags, options or requests harm no other client."""
    noise = random.Random(7539)
    for stage in (server.connect, server.haggle, server.enter):
        for _ in range(8):
            client = stage()
            try:
                client.stream.send(noise.randbytes(noise.randint(1, 3000)))
                client.stream.half_close()
                client.stream.remainder(1.0)
            except Disconnected:
                pass  # the server may end this connection at any byte of it
            client.stream.close()
    still_serves(server)


@security("CVE-2017-7539", level="S")
def wrong_magic_ends_the_connection(server: Server) -> None:
    """A request or an option with the wrong magic cannot be in step: the connection ends."""
    for stage in (server.haggle, server.enter):
        with stage() as client:
            # The server may close as soon as it has read the magic, before the rest is sent.
            with contextlib.suppress(Disconnected):
                client.stream.send(b"\xff" * 4096)
            sent = client.stream.remainder()
            expect(sent is not None, f"{stage.__name__}: connection stays open")


def _named(server: Server, name: str) -> str:
    with server.haggle() as client:
        try:
            answer = client.go(name)
        except Disconnected as end:
            raise Failed(f"GO with a name of {len(name)} bytes: {end}") from end
        return f"{len(name)}: {answer.final}"


@security("CVE-2017-15118")
def names_of_3000_and_4096_bytes_are_answered(server: Server) -> str:
    """Names up to 4096 bytes are legal: they are answered, not crashed on."""
    said = [_named(server, "n" * length) for length in (256, 257, 1024, 3000, 4096)]
    still_serves(server)
    return "; ".join(said)


@security("CVE-2022-26496")
def names_beyond_4096_bytes_are_survived(server: Server) -> str:
    """Names of 4097 bytes to 1 MiB are an error, or the end of one connection."""
    said = []
    for length in (4097, 65536, MIB):
        for option in (Option.INFO, Option.GO, Option.EXPORT_NAME):
            name = "n" * length
            data = name.encode() if option == Option.EXPORT_NAME else pack_info(name)
            with server.haggle() as client:
                try:
                    answer = client.option(option, data)
                    expect(answer.final.is_error, f"{option.name} {length}: {answer}")
                    said.append(f"{option.name} {length}: {answer}"[:60])
                except Disconnected:
                    said.append(f"{option.name} {length}: closed")
            still_serves(server)
    return "; ".join(said)


@security("CVE-2022-26495")
def name_lengths_that_wrap_are_survived(server: Server) -> None:
    """Name lengths of 0xffffffff and around, in every option that has one."""
    options = (Option.INFO, Option.GO, Option.LIST_META_CONTEXT, Option.SET_META_CONTEXT)
    for length in (0xFFFFFFFF, 0xFFFFFFFE, 0xFFFFFFFC, 0x80000000):
        for option in options:
            with server.haggle() as client:
                client.agree_structured()
                answer = client.option(option, struct.pack(">I", length) + b"abcdefgh")
                expect(answer.final.is_error, f"{option.name} {length:#x}: {answer}")
    with server.haggle() as client:
        client.send_option(Option.EXPORT_NAME, b"x", length=0xFFFFFFFF)
        client.stream.half_close()
        client.stream.remainder(1.0)
    still_serves(server)


@security("CVE-2017-15119", level="S")
def huge_options_are_cut_short(server: Server) -> str:
    """An option of 4 GiB is not read to its end: the connection is dropped early."""
    with server.haggle() as client:
        client.send_option(77, length=0xFFFFFFFF)
        sent = 0
        try:
            while sent < 256 * MIB:
                client.stream.send(bytes(MIB))
                sent += MIB
        except Disconnected:
            return f"dropped after {sent >> 20} MiB at most"
    raise Failed(f"{sent >> 20} MiB of one option were read")


@security("CVE-2020-10761")
def error_text_for_a_long_name_is_short(server: Server) -> str:
    """The text of an error about a name of 4096 bytes is within a string's limit."""
    with server.haggle() as client:
        for ask in (client.info, client.go):
            answer = ask("n" * 4096, (0, 1, 2, 3))
            expect(len(answer.final.data) <= wire.STRING_BYTES_MAX, f"{len(answer.final.data)}")
        client.agree_structured()
        queries = pack_queries("n" * 4096, ["base:allocation"])
        answer = client.option(Option.SET_META_CONTEXT, queries)
        expect(len(answer.final.data) <= wire.STRING_BYTES_MAX, f"{len(answer.final.data)}")
    still_serves(server)
    return f"{len(answer.final.data)} bytes"


@security("CVE-2024-7409", on=READ_ONLY, private=True, level="S")
def stop_with_clients_in_the_handshake(server: Server) -> str:
    """A server that is stopped with 50 clients in the handshake ends."""
    require(server.process, "the suite did not start this server")
    assert server.process is not None
    clients = [server.connect() for _ in range(50)]
    for number, client in enumerate(clients):
        if number % 2:
            client.handshake()
    server.process.terminate()
    has_ended = server.process.wait_end()
    for client in clients:
        client.stream.close()
    expect(has_ended, "still running long after SIGTERM")
    return "ended"


@security("CVE-2024-7409", on=READ_ONLY, private=True, level="S")
def many_idle_connections_do_not_lock_out(server: Server) -> str:
    """With 90 connections that say nothing, another client is served."""
    idle = [server.connect() for _ in range(90)]
    try:
        still_serves(server)
    finally:
        for client in idle:
            client.stream.close()
    return "served"


@security("CVE-2024-7409", on=READ_ONLY, level="S")
def slow_handshake_is_cut_short(server: Server) -> str:
    """A client that sends nothing is dropped within 15 seconds."""
    started = time.monotonic()
    with server.connect() as client:
        client.greet()
        expect(client.stream.closed(15.0), "still connected after 15 s without a byte")
    return f"dropped after {time.monotonic() - started:.0f} s"


@security("CVE-2019-14851")
def commands_in_odd_orders(server: Server) -> None:
    """INFO, LIST, contexts and GO in odd orders; INFO then ABORT or leaving."""
    name = server.export.name
    with server.haggle() as client:
        for _ in range(3):
            client.info(name)
        client.option(Option.LIST)
        client.list_contexts(name)
        client.info(name)
        client.agree_structured()
        client.info(name)
        expect(client.go(name).acknowledged, "GO failed")
        client.read(0, 512)
    for _ in range(4):
        with server.haggle() as client:
            client.info(name)
            client.send_option(Option.ABORT)
    still_serves(server)


@security("CVE-2019-14850", on=TLS_FORCED)
def nothing_of_the_export_is_told_before_tls(server: Server) -> None:
    """Before TLS neither size nor names are told, whatever is asked."""
    with server.haggle(tls=False) as client:
        for option in (Option.LIST, Option.INFO, Option.GO, Option.LIST_META_CONTEXT):
            answer = client.option(option, pack_info(server.export.name))
            expect(len(answer.replies) == 1, f"{Option(option).name}: {answer}")


@security("CVE-2025-47711")
def block_status_of_the_longest_length(server: Server) -> str:
    """BLOCK_STATUS of 2^32-1 bytes over a run of more than 4 GiB."""
    with server.enter(structured=True, contexts=("base:allocation",)) as client:
        require(client.export.size > 5 * GIB, "the export is small")
        for offset, length in ((MIB, 0xFFFFFFFF), (512 * MIB, 0xFFFFFFFF), (0, 0xFFFFFFFE)):
            for flags in (0, CmdFlag.REQ_ONE):
                reply = client.call(Cmd.BLOCK_STATUS, offset, length, flags)
                expect(not reply.error and reply.extents, str(reply))
        client.read(0, 512)
    still_serves(server)
    return str(reply)


@security("CVE-2025-47712")
def block_status_near_the_integer_limits(server: Server) -> str:
    """BLOCK_STATUS whose end wraps 2^32 or 2^64 is EINVAL."""
    said = ""
    with server.enter(structured=True, contexts=("base:allocation",)) as client:
        for offset, length in (
            ((1 << 64) - 512, 512),
            ((1 << 64) - 1, 0xFFFFFFFF),
            ((1 << 63) - 1, 1),
            (client.export.size - 1, 0xFFFFFFFF),
        ):
            said = expect_error(client.call(Cmd.BLOCK_STATUS, offset, length), Errno.EINVAL)
        reply = client.call(Cmd.BLOCK_STATUS, 0xFFFFFFFF & -512, 1024)
        expect(not reply.error or reply.error == Errno.EINVAL, str(reply))
        client.read(0, 512)
    return said


@security("CVE-2017-2630")
def export_sizes_are_below_2_to_the_63(server: Server) -> None:
    """No export has a size that clients would take for negative."""
    for export in server.exports:
        with server.enter(export=export) as client:
            expect(client.export.size < 1 << 63, f"{export.name}: {client.export.size:#x}")


# --- own additions


@security("own", ours_only=True)
def bytes_after_the_last_query_are_invalid(server: Server) -> None:
    """LIST and SET_META_CONTEXT with bytes after the last query: ERR_INVALID, then GO works."""
    with server.haggle() as client:
        client.agree_structured()
        for option in (Option.LIST_META_CONTEXT, Option.SET_META_CONTEXT):
            data = pack_queries(server.export.name, ["base:allocation"])
            answer = client.option(option, data + b"trailing")
            expect(answer.type == Rep.ERR_INVALID, f"{option.name}: {answer}")
        expect(client.go(server.export.name).acknowledged, "GO failed afterwards")


@security("own")
def sixty_five_thousand_queries(server: Server) -> str:
    """65536 queries in one option are answered, refused, or the end of one connection."""
    said = []
    for option in (Option.LIST_META_CONTEXT, Option.SET_META_CONTEXT):
        data = pack_string(server.export.name) + struct.pack(">I", 1 << 16)
        data += pack_string("x-nobody:thing") * (1 << 16)
        with server.haggle() as client:
            client.agree_structured()
            try:
                answer = client.option(option, data)
                expect(answer.final.is_error or not answer.names, f"{answer.names}")
                said.append(str(answer.final))
            except Disconnected as end:
                said.append(str(end))
        still_serves(server)
    return "; ".join(said)


@security("own")
def query_of_5000_bytes_is_harmless(server: Server) -> str:
    """A query longer than a string may be is skipped or refused, and haggling goes on."""
    with server.haggle() as client:
        client.agree_structured()
        answer = client.set_contexts(server.export.name, ["x-a:" + "q" * 5000])
        expect(not answer.names, f"{answer.names}")
        expect(client.go(server.export.name).acknowledged, "GO failed afterwards")
    return str(answer)


@security("own")
def names_that_are_not_utf_8_are_refused(server: Server) -> str:
    """A name that is not UTF-8 names nothing: an error, and haggling goes on."""
    require(server.strict_names, "the server takes any name")
    with server.haggle() as client:
        for option in (Option.INFO, Option.GO):
            answer = client.option(option, struct.pack(">I3sH", 3, b"\xff\xfe\x80", 0))
            expect(answer.final.is_error, str(answer))
            answer.final.data.decode()
        expect(client.go(server.export.name).acknowledged, "GO failed afterwards")
    return str(answer)


@requirement(99, 165, on=WRITABLE)
def ends_beyond_2_to_the_64_are_errors(server: Server) -> str:
    """offset + length that wraps is an error for every command, never an access."""
    said = ""
    with server.enter() as client:
        before = client.read(0, 4096)
        for command in (Cmd.READ, Cmd.WRITE, Cmd.TRIM, Cmd.WRITE_ZEROES, Cmd.CACHE):
            payload = b"w" * 4096 if command == Cmd.WRITE else b""
            for offset in ((1 << 64) - 2048, (1 << 64) - 4096, 1 << 63):
                said = expect_error(client.call(command, offset, 4096, payload=payload))
        expect(client.read(0, 4096) == before, "content changed")
    return said


@security("own")
def client_that_never_reads_stalls_nobody(server: Server) -> None:
    """A client that asks for a GiB and reads nothing: another is served meanwhile."""
    with server.enter() as deaf:
        requests = [deaf.request(Cmd.READ, 0, MIB) for _ in range(1024)]
        deaf.stream.timeout = 1.0
        with contextlib.suppress(Stalled):  # the server may stop reading requests
            deaf.send(*requests)
        for _ in range(4):
            still_serves(server)
    time.sleep(0.2)  # its end is when a server may trip
    still_serves(server)


@security("own")
def bytes_that_trickle_are_understood(server: Server) -> None:
    """A handshake and a READ, one byte at a time, are what they are in one piece."""
    with server.connect() as client:
        client.greet()
        for byte in _whole_handshake(server):
            client.stream.send(bytes([byte]))
            time.sleep(0.001)
        answer = client.receive_answer(Option.GO)
        expect(answer.acknowledged, str(answer))
        head = client.stream.receive(16, "reply")
        expect(head == struct.pack(">IIQ", wire.SIMPLE_REPLY_MAGIC, 0, 1), f"{head!r}")


@security("own")
def options_in_one_segment_are_answered_in_order(server: Server) -> None:
    """Flags, options, GO and a READ in one segment: each is answered, in order."""
    with server.connect() as client:
        flags, rest = _whole_handshake(server)[:4], _whole_handshake(server)[4:]
        unknown = struct.pack(">QII", wire.IHAVEOPT, 77, 3) + b"abc"
        client.stream.send(flags + unknown * 3 + rest)
        client.greet()
        for _ in range(3):
            expect(client.receive_answer(77).type == Rep.ERR_UNSUP, "unknown option")
        expect(client.receive_answer(Option.GO).acknowledged, "GO failed")
        client.stream.receive(16 + 512, "reply to READ")


@security("own", on=READ_ONLY)
def half_closed_client_gets_its_replies(server: Server) -> str:
    """A client that shuts its sending side gets the replies to what it asked."""
    with server.enter() as client:
        client.send(*(client.request(Cmd.READ, 0, 65536) for _ in range(4)))
        client.stream.half_close()
        got = 0
        try:
            for _ in range(4):
                client.receive()
                got += 1
        except Finding as end:
            return f"{got} of 4 replies, then {end}"
        expect(client.stream.remainder() == b"", "not closed after the last reply")
    return "4 of 4 replies"


def _cut_requests(client: Client) -> bytes:
    return client.pack(client.request(Cmd.WRITE, AREA, 4096, payload=b"w" * 4096))


@security("own", on=WRITABLE)
def client_that_leaves_in_a_payload_writes_nothing_wrong(server: Server) -> None:
    """A WRITE whose payload is cut short is not done in part, and harms nobody."""
    with server.enter() as client:
        client.write(AREA, b"o" * 4096)
    for cut in (10, 27, 28, 29, 2000, 4096 + 27):
        with server.enter() as client:
            client.stream.send(_cut_requests(client)[:cut])
            client.stream.half_close()
            client.stream.remainder(5.0)  # then it has done with it what it will do
    with server.enter() as client:
        expect(client.read(AREA, 4096) == b"o" * 4096, "part of a cut payload was written")
