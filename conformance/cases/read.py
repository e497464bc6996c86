"""NBD_CMD_READ (requirements 126 to 136)."""

from __future__ import annotations

from collections.abc import Iterator

from conformance import content
from conformance.case import BAD_SECTOR, Server, expect_error, requirement
from conformance.client import Client
from conformance.content import BLOCK, Content
from conformance.errors import Disconnected, Failed, Finding, NotApplicable, expect, require
from conformance.replies import Form
from conformance.wire import Chunk, Cmd, CmdFlag, Errno, Flag

SPANS = [
    (0, 1),
    (511, 2),
    (0, 2 << 20),
    (1000, 70000),
    (960 << 10, 128 << 10),
    ((2 << 20) - 100, 200),
    (3 << 20, 1 << 20),
    (4 << 20, 2 << 20),
    (4 * 1048576 + BLOCK - 7, BLOCK + 14),
    (6 << 20, 2 << 20),
    (content.FAR - 4096, BLOCK + 8192),
]


def known(server: Server) -> Content:
    require(server.export.content, "the content is not known")
    assert server.export.content is not None
    return server.export.content


def forms(server: Server) -> Iterator[tuple[Form, Client]]:
    """A client in transmission for each form that the server speaks."""
    for form in Form:
        try:
            client = server.enter(
                structured=form is Form.STRUCTURED, extended=form is Form.EXTENDED
            )
        except NotApplicable:
            continue
        with client:
            yield form, client


@requirement(133, 138)
def content_is_right(server: Server) -> str:
    """Data, zeroes, holes, the backing image, the end: READ gives what the disk holds."""
    disk, seen = known(server), []
    for form, client in forms(server):
        seen.append(form.value)
        spans = [span for span in SPANS if sum(span) <= disk.size]
        for offset, length in [*spans, (disk.size - 5000, 5000), (disk.size - 1, 1)]:
            got = client.read(offset, length)
            expect(got == disk.read(offset, length), f"{form.value}: {offset:#x}+{length:#x}")
    return ", ".join(seen)


@requirement(127)
def read_of_length_zero_does_not_disconnect(server: Server) -> str:
    """READ of length 0 is a success or an error, and the connection goes on."""
    said = []
    for form, client in forms(server):
        said.append(f"{form.value} {client.call(Cmd.READ, 0, 0)}")
        client.read(0, 512)
    return "; ".join(said)


@requirement(128)
def failing_simple_read_has_no_payload(server: Server) -> str:
    """A simple reply with an error is its header alone: the next reply is in step."""
    with server.enter() as client:
        reply = client.call(Cmd.READ, client.export.size, 4096)
        said = expect_error(reply)
        client.read(0, 512)
    return said


@requirement(128, on=BAD_SECTOR)
def bad_sector_is_an_error_of_a_simple_reply(server: Server) -> str:
    """An I/O error is reported by the simple reply, and the connection goes on."""
    with server.enter() as client:
        said = expect_error(client.call(Cmd.READ, content.BAD_SECTOR, 512), Errno.EIO)
        client.read(0, 512)
    return said


@requirement(130, level="S")
def chunks_are_multiples_of_512(server: Server) -> str:
    """Content chunks of an aligned READ are multiples of 512 bytes."""
    with server.enter(structured=True) as client:
        reply = client.call(Cmd.READ, 0, 8 << 20)
        expect(not reply.error, str(reply))
        odd = [len(data) for _, data in reply.content if len(data) % 512]
        expect(not odd, f"chunks of {odd[:5]} bytes")
        return f"{len(reply.content)} chunks"


def _read_over_bad_sector(server: Server, flags: int) -> str:
    disk = known(server)
    start, length = content.BAD_SECTOR - BLOCK, 2 * BLOCK
    with server.enter(structured=True) as client:
        require(not flags or client.export.flags & Flag.SEND_DF, "SEND_DF is not offered")
        reply = client.call(Cmd.READ, start, length, flags)
        said = expect_error(reply, Errno.EIO)
        for offset, data in reply.content:
            if offset + len(data) <= content.BAD_SECTOR:
                expect(data == disk.read(offset, len(data)), f"wrong data at {offset:#x}")
        client.read(0, 512)
    kinds = [Chunk(chunk.type).name for chunk in reply.chunks]
    return f"{said}, chunks {', '.join(kinds)}"


@requirement(134, 135, 114, on=BAD_SECTOR)
def bad_sector_is_an_error_chunk(server: Server) -> str:
    """An I/O error part-way through a structured READ is an error chunk, no disconnect."""
    return _read_over_bad_sector(server, 0)


@requirement(134, 136, on=BAD_SECTOR)
def bad_sector_is_an_error_chunk_with_df(server: Server) -> str:
    """The same with DF."""
    return _read_over_bad_sector(server, CmdFlag.DF)


@requirement(135, 124, on=BAD_SECTOR)
def error_chunks_of_bad_sector_are_sound(server: Server) -> str:
    """One ERROR, or ERROR_OFFSETs that name the bad sector and not the good ones."""
    start, length = content.BAD_SECTOR - BLOCK, 2 * BLOCK
    with server.enter(structured=True) as client:
        try:
            reply = client.call(Cmd.READ, start, length)
        except Disconnected as end:
            raise NotApplicable(f"no error chunk to look at: {end}") from end
        kinds = [chunk.type for chunk in reply.chunks if chunk.is_error]
        expect(kinds.count(Chunk.ERROR) <= 1, f"{len(kinds)} error chunks")
        expect(len(set(kinds)) == 1, f"error chunks of types {kinds}")
        for offset in reply.error_offsets:
            inside = start <= offset < start + length
            expect(inside, f"ERROR_OFFSET at {offset:#x} of {reply.request}")
    return f"{reply}, offsets {[hex(offset) for offset in reply.error_offsets]}"


@requirement(136)
def df_is_supported_up_to_64_kib(server: Server) -> None:
    """DF up to 65536 bytes succeeds, over data and over the border of a hole."""
    disk = known(server)
    with server.enter(structured=True) as client:
        require(client.export.flags & Flag.SEND_DF, "SEND_DF is not offered")
        for offset in (0, (1 << 20) - 32768, (4 << 20) + 32768):
            reply = client.call(Cmd.READ, offset, 65536, CmdFlag.DF)
            expect(not reply.error, str(reply))
            expect(len(reply.content) == 1, f"{len(reply.content)} content chunks")
            expect(reply.data == disk.read(offset, 65536), f"wrong content at {offset:#x}")


@requirement(136, level="M")
def df_beyond_64_kib_is_whole_or_eoverflow(server: Server) -> str:
    """A long READ with DF is one chunk, or EOVERFLOW without content."""
    with server.enter(structured=True) as client:
        require(client.export.flags & Flag.SEND_DF, "SEND_DF is not offered")
        reply = client.call(Cmd.READ, 0, 8 << 20, CmdFlag.DF)
        if reply.error:
            expect(reply.error == Errno.EOVERFLOW and not reply.content, str(reply))
        else:
            expect(len(reply.content) == 1, f"{len(reply.content)} content chunks")
    return str(reply)


@requirement(165, 160, 99)
def read_past_the_end_is_einval(server: Server) -> str:
    """READ that begins or ends beyond the export is EINVAL in every form."""
    said = ""
    for form, client in forms(server):
        size = client.export.size
        for offset, length in ((size, 1), (size - 1, 2), (size + (1 << 40), 512)):
            try:
                reply = client.call(Cmd.READ, offset, length)
            except Finding as finding:
                raise Failed(f"{form.value} {offset:#x}+{length}: {finding}") from finding
            said = expect_error(reply, Errno.EINVAL)
        client.read(0, 512)
    return said
