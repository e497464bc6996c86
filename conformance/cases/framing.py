"""Message framing and ordering in the transmission phase (requirements 100 to 125)."""

from __future__ import annotations

from conformance.case import (
    BAD_STATUS,
    READ_ONLY,
    TCP,
    TLS_FORCED,
    WRITABLE,
    Server,
    draining,
    has_flag,
    requirement,
    still_serves,
)
from conformance.checks import survey
from conformance.content import MIB, SCRATCH
from conformance.errors import Disconnected, Failed, Violation, expect, require
from conformance.replies import Form
from conformance.wire import Chunk, Cmd, CmdFlag, Errno, Flag

AREA = SCRATCH[0]


def clean(server: Server, number: int, *kinds: Chunk) -> str:
    """The survey found nothing against requirement ``number``, and saw chunks of ``kinds``."""
    found = survey(server)
    problems = found.of(number)
    expect(not problems, f"{len(problems)} times: " + "; ".join(problems[:3]))
    if kinds:
        seen = found.chunks(*kinds)
        require(seen, f"no {' or '.join(kind.name for kind in kinds)} chunk was seen")
        return f"{seen} chunks"
    expect(found.replies, f"no replies: {found.broken}")
    return f"{len(found.replies)} replies"


def clean_in(server: Server, number: int, form: Form) -> str:
    """The same, for replies of one form, which must have been agreed."""
    clean(server, number)
    seen = sum(setting.form is form for setting, _ in survey(server).replies)
    require(seen, f"no {form.value} replies")
    return f"{seen} replies"


@requirement(100, 105)
def replies_are_simple_unless_agreed(server: Server) -> str:
    """Without agreement every reply is simple."""
    return clean_in(server, 105, Form.SIMPLE)


@requirement(101)
def cookies_are_echoed(server: Server) -> None:
    """Any 64 bits come back as they were sent."""
    with server.enter() as client:
        for cookie in (0, 1, 0xFFFFFFFFFFFFFFFF, 0x8000000000000000, 0x67446698668E33EF):
            client.send(client.request(Cmd.READ, 0, 512, cookie=cookie))
            client.receive()


@requirement(101)
def one_cookie_for_64_requests_at_once(server: Server) -> None:
    """A client that gives all its requests one cookie gets all its replies."""
    with server.enter() as client:
        client.send(*(client.request(Cmd.READ, 0, 512, cookie=7) for _ in range(64)))
        replies = [client.receive() for _ in range(64)]
        expect(not any(reply.error for reply in replies), "some failed")
        client.read(0, 512)


@requirement(101, level="M")
def each_reply_belongs_to_its_request(server: Server) -> None:
    """128 reads in flight: each reply has the bytes of its own request."""
    content = server.export.content
    require(content, "the content is not known")
    assert content is not None
    with server.enter() as client:
        client.send(*(client.request(Cmd.READ, n * 4096, 4096 - n) for n in range(128)))
        for _ in range(128):
            reply = client.receive()
            offset, length = reply.request.offset, reply.request.length
            expect(reply.data == content.read(offset, length), f"wrong bytes: {reply}")


@requirement(104, on=WRITABLE)
def fua_is_taken_on_every_command(server: Server) -> str:
    """SEND_FUA: each command may carry FUA."""
    commands = [(Cmd.READ, 512), (Cmd.FLUSH, 0), (Cmd.WRITE, 512)]
    optional = [
        (Flag.SEND_TRIM, Cmd.TRIM),
        (Flag.SEND_CACHE, Cmd.CACHE),
        (Flag.SEND_WRITE_ZEROES, Cmd.WRITE_ZEROES),
    ]
    with server.enter() as client:
        has_flag(client, Flag.SEND_FUA)
        commands += [(kind, 4096) for flag, kind in optional if client.export.flags & flag]
        for kind, length in commands:
            payload = b"f" * length if kind == Cmd.WRITE else b""
            offset = AREA if length else 0
            reply = client.call(kind, offset, length, CmdFlag.FUA, payload)
            expect(not reply.error, str(reply))
    return ", ".join(kind.name for kind, _ in commands)


@requirement(104, on=READ_ONLY)
def fua_is_taken_on_block_status(server: Server) -> None:
    """SEND_FUA: BLOCK_STATUS may carry FUA."""
    with server.enter(structured=True, contexts=("base:allocation",)) as client:
        has_flag(client, Flag.SEND_FUA)
        reply = client.call(Cmd.BLOCK_STATUS, 0, 65536, CmdFlag.FUA)
        expect(not reply.error, str(reply))


@requirement(106)
def no_simple_reply_to_read_after_agreement(server: Server) -> str:
    """After agreement READ's replies are structured, errors too."""
    return clean_in(server, 106, Form.STRUCTURED)


@requirement(107)
def structured_errors_have_text(server: Server) -> str:
    """An error chunk says what went wrong."""
    return clean(server, 107, Chunk.ERROR, Chunk.ERROR_OFFSET)


@requirement(108)
def done_is_on_the_last_chunk(server: Server) -> None:
    """Nothing follows the chunk that says DONE, and DONE comes."""
    found = [text for text in survey(server).broken if "not due" in text or "no chunk" in text]
    expect(not found, "; ".join(found))
    clean_in(server, 108, Form.STRUCTURED)


@requirement(108, 159, 154, on=BAD_STATUS)
def nothing_follows_a_failed_block_status(server: Server) -> str:
    """A BLOCK_STATUS of several contexts that fails ends with one chunk that says DONE."""
    with server.haggle() as client:
        require(client.agree_structured(), "no structured replies")
        names = sorted(client.list_contexts(server.export.name).names)
        require(names, "no metadata contexts")
        client.set_contexts(server.export.name, names)
        client.go(server.export.name)
        reply = client.call(Cmd.BLOCK_STATUS, 0, 65536)
        try:
            client.call(Cmd.READ, 0, 512)
        except Violation as violation:
            raise Failed(f"after {reply}: {violation}") from violation
    return f"{', '.join(names)}: {reply}"


@requirement(109)
def plain_data_comes_in_few_chunks(server: Server) -> str:
    """64 KiB of data are no more than four chunks."""
    with server.enter(structured=True) as client:
        reply = client.call(Cmd.READ, 0, 65536)
        expect(len(reply.chunks) <= 4, f"{len(reply.chunks)} chunks")
        return f"{len(reply.chunks)} chunks"


@requirement(111)
def only_known_reply_flags_and_types(server: Server) -> str:
    """No reply flag but DONE, no chunk of unknown type."""
    return clean_in(server, 111, Form.STRUCTURED)


def _disconnect_with_reads_in_flight(server: Server) -> str:
    with server.enter() as client:
        reads = [client.request(Cmd.READ, n << 16, 65536) for n in range(8)]
        client.send(*reads, client.request(Cmd.DISC))
        for number in range(8):
            try:
                client.receive()
            except Disconnected as end:
                raise Failed(f"{number} of 8 replies, then {end}") from end
        rest = client.stream.remainder()
        expect(rest == b"", "not closed" if rest is None else f"after the last reply: {rest!r}")
    return "8 replies, then the end"


@requirement(112, 114)
def outstanding_requests_are_finished_before_the_end(server: Server) -> str:
    """DISC behind eight reads: eight replies, no reply to DISC, then the end."""
    for _ in range(4):  # what a server loses here depends on timing
        said = _disconnect_with_reads_in_flight(server)
    return said


@requirement(112, 114, on=TCP)
def outstanding_requests_are_finished_before_the_end_over_tcp(server: Server) -> str:
    """The same over TCP."""
    for _ in range(4):  # what a server loses here depends on timing
        said = _disconnect_with_reads_in_flight(server)
    return said


@requirement(112, 24, on=TLS_FORCED)
def tls_is_closed_before_the_connection(server: Server) -> None:
    """DISC over TLS: the server says goodbye in TLS, then closes."""
    with server.enter() as client:
        client.disconnect()
        expect(client.stream.closed(), "not closed, or a reply to DISC")
        expect(not client.stream.reset_by_server, "closed without close_notify")


@requirement(113, on=READ_ONLY, private=True)
def requests_in_flight_are_finished_at_shutdown(server: Server) -> str:
    """A stopping server answers what is in flight, with data or ESHUTDOWN, before it closes."""
    require(server.process, "the suite did not start this server")
    assert server.process is not None
    with server.enter() as client:
        client.read(0, 512)
        client.send(*(client.request(Cmd.READ, n << 20, MIB) for n in range(8)))
        client.receive()  # they have arrived
        server.process.terminate()
        replies = []
        for number in range(1, 8):
            try:
                replies.append(client.receive().error)
            except Disconnected as end:
                raise Failed(f"{number} of 8 requests in flight answered, then {end}") from end
        expect(set(replies) <= {0, Errno.ESHUTDOWN}, f"errors {replies}")
    return f"{replies.count(0)} data, {len(replies) - replies.count(0)} ESHUTDOWN"


@requirement(113, on=READ_ONLY, private=True)
def requests_during_shutdown_get_eshutdown(server: Server) -> str:
    """A new request on a connection where others are being finished: ESHUTDOWN."""
    with draining(server) as client:
        late = client.request(Cmd.READ, 0, 512)
        try:
            client.send(late)
            replies = [client.receive() for _ in range(16)]
        except Disconnected as end:
            raise Failed(f"no ESHUTDOWN for a new request: {end}") from end
    (reply,) = (reply for reply in replies if reply.request == late)
    expect(reply.error == Errno.ESHUTDOWN, str(reply))
    return str(reply)


@requirement(114, 21)
def survey_is_never_disconnected(server: Server) -> str:
    """Reads, status requests and wrong requests in every form: no disconnect."""
    found = survey(server)
    expect(not found.broken, "; ".join(found.broken))
    return f"{len(found.replies)} replies"


@requirement(114)
def client_that_waits_is_not_disconnected(server: Server) -> None:
    """A connection without traffic for two seconds still works."""
    with server.enter() as client:
        client.read(0, 512)
        expect(client.stream.silent(2.0), "closed, or unasked bytes")
        client.read(0, 512)
    still_serves(server)


@requirement(115)
def none_chunks_are_empty_and_last(server: Server) -> str:
    """A NONE chunk has no payload and says DONE."""
    return clean(server, 115, Chunk.NONE)


@requirement(116, 130)
def data_chunks_are_sound(server: Server) -> str:
    """OFFSET_DATA has a byte or more, inside the request."""
    return clean(server, 116, Chunk.OFFSET_DATA)


@requirement(117, 130)
def hole_chunks_are_sound(server: Server) -> str:
    """OFFSET_HOLE has 12 bytes, inside the request, and is not empty."""
    return clean(server, 117, Chunk.OFFSET_HOLE)


@requirement(118)
def status_chunks_are_sound(server: Server) -> str:
    """BLOCK_STATUS has 4+8n bytes, n of 1 or more, of a selected context."""
    return clean(server, 118, Chunk.BLOCK_STATUS)


@requirement(119)
def extents_are_not_empty(server: Server) -> str:
    """No extent has length 0."""
    return clean(server, 119, Chunk.BLOCK_STATUS, Chunk.BLOCK_STATUS_EXT)


@requirement(120)
def req_one_gives_one_extent(server: Server) -> str:
    """REQ_ONE gives one extent, not longer than the request."""
    return clean(server, 120, Chunk.BLOCK_STATUS, Chunk.BLOCK_STATUS_EXT)


@requirement(121)
def only_the_last_extent_leaves_the_request(server: Server) -> str:
    """All extents but the last end inside the request."""
    return clean(server, 121, Chunk.BLOCK_STATUS, Chunk.BLOCK_STATUS_EXT)


@requirement(122)
def chunks_have_a_million_extents_at_most(server: Server) -> str:
    """No chunk has more than 2^20 extents."""
    return clean(server, 122, Chunk.BLOCK_STATUS, Chunk.BLOCK_STATUS_EXT)


@requirement(123)
def error_chunks_are_sound(server: Server) -> str:
    """ERROR has its length, an error, a bounded text, and comes once."""
    return clean(server, 123, Chunk.ERROR)


@requirement(124)
def error_offset_chunks_are_sound(server: Server) -> str:
    """ERROR_OFFSET has its length and an offset inside the request."""
    return clean(server, 124, Chunk.ERROR_OFFSET)


@requirement(125)
def error_and_error_offset_are_not_mixed(server: Server) -> str:
    """A reply has ERROR or ERROR_OFFSET."""
    return clean(server, 125, Chunk.ERROR, Chunk.ERROR_OFFSET)


@requirement(131)
def content_chunks_do_not_overlap(server: Server) -> str:
    """No two content chunks of a reply overlap."""
    return clean(server, 131, Chunk.OFFSET_DATA)


@requirement(133)
def content_chunks_cover_the_request(server: Server) -> str:
    """Without an error the content is as long as the request."""
    return clean(server, 133, Chunk.OFFSET_DATA)


@requirement(136, level="M")
def df_gives_one_data_chunk(server: Server) -> str:
    """DF gives one OFFSET_DATA chunk, also over holes."""
    surveyed = any(
        reply.request.flags & CmdFlag.DF and not reply.error
        for _, reply in survey(server).replies
        if reply.request.type == Cmd.READ
    )
    said = clean(server, 136, Chunk.OFFSET_DATA)
    require(surveyed, "no READ with DF succeeded")
    return said


@requirement(163, 167, 168)
def error_numbers_are_known_and_used_rightly(server: Server) -> str:
    """Only the protocol's errors, EOVERFLOW and ENOTSUP only where they belong."""
    for number in (163, 167, 168):
        said = clean(server, number)
    errors = {reply.error_name for _, reply in survey(server).replies if reply.error}
    return f"{said}: {', '.join(sorted(errors))}"


@requirement(170)
def enomem_is_not_used(server: Server) -> str:
    """No request is answered ENOMEM."""
    return clean(server, 170)


@requirement(65, 161)
def base_allocation_has_no_reserved_bits(server: Server) -> str:
    """base:allocation has bits 0 and 1 only, and fits 32 bits."""
    clean(server, 182)
    return clean(server, 161, Chunk.BLOCK_STATUS, Chunk.BLOCK_STATUS_EXT)


@requirement(156)
def extents_end_with_the_export(server: Server) -> str:
    """No extent goes beyond the export's end."""
    return clean(server, 156, Chunk.BLOCK_STATUS, Chunk.BLOCK_STATUS_EXT)


@requirement(157)
def equal_neighbours_are_merged(server: Server) -> str:
    """Neighbours differ in their status; lengths are multiples of 512."""
    return clean(server, 157, Chunk.BLOCK_STATUS, Chunk.BLOCK_STATUS_EXT)


@requirement(176)
def headers_are_extended_after_agreement(server: Server) -> str:
    """After EXTENDED_HEADERS each reply has the 32 byte header, errors too."""
    return clean_in(server, 176, Form.EXTENDED)


@requirement(177)
def extended_replies_echo_offset(server: Server) -> str:
    """Each chunk of an extended reply has the request's offset."""
    return clean_in(server, 177, Form.EXTENDED)


@requirement(181)
def extended_status_chunks_are_sound(server: Server) -> str:
    """Only BLOCK_STATUS_EXT, 8+16n bytes, with the right count."""
    clean_in(server, 181, Form.EXTENDED)
    return clean(server, 181, Chunk.BLOCK_STATUS_EXT)


@requirement(182)
def upper_half_of_extended_status_is_zero(server: Server) -> str:
    """Status of 32 bit contexts has nothing in its upper half."""
    return clean(server, 182, Chunk.BLOCK_STATUS_EXT)


@requirement(183)
def no_extended_status_without_extended_headers(server: Server) -> str:
    """Compact replies have no BLOCK_STATUS_EXT."""
    return clean(server, 183, Chunk.BLOCK_STATUS)
