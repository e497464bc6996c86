"""Transmission flags and block size constraints (requirements 66 to 71, 89 to 99)."""

from __future__ import annotations

from conformance.case import BLOCK_SIZES, WRITABLE, Server, expect_error, has_flag, requirement
from conformance.checks import survey
from conformance.client import Client
from conformance.content import GIB, MIB, SCRATCH
from conformance.errors import Failed, expect, require
from conformance.replies import Reply
from conformance.wire import Cmd, CmdFlag, Errno, Flag

AREA = SCRATCH[0]


@requirement(66)
def has_flags_is_set(server: Server) -> None:
    """Bit 0 of the transmission flags is 1, by GO and by EXPORT_NAME."""
    with server.enter() as by_go, server.haggle() as by_name:
        by_name.enter_by_name(server.export.name)
        for client in (by_go, by_name):
            expect(client.export.flags & Flag.HAS_FLAGS, f"{client.export.flags!r}")


@requirement(67)
def no_undefined_flag(server: Server) -> None:
    """Flags that no released protocol gives a meaning are clear."""
    with server.enter() as client:
        flags = int(client.export.flags)
        expect(not flags & (0xE000 | Flag.SEND_RESIZE), f"flags {flags:#x}")


@requirement(67)
def read_only_export_offers_no_writing(server: Server) -> None:
    """WRITE_ZEROES and FAST_ZERO are not offered with READ_ONLY; TRIM is a case of its own."""
    writing = Flag.SEND_WRITE_ZEROES | Flag.SEND_FAST_ZERO
    with server.enter() as client:
        has_flag(client, Flag.READ_ONLY)
        expect(not client.export.flags & writing, f"{client.export.flags!r}")


_OFFERED = [
    (Flag.SEND_FLUSH, Cmd.FLUSH, 0),
    (Flag.SEND_TRIM, Cmd.TRIM, 65536),
    (Flag.SEND_WRITE_ZEROES, Cmd.WRITE_ZEROES, 65536),
    (Flag.SEND_CACHE, Cmd.CACHE, 65536),
]


@requirement(67, on=WRITABLE)
def offered_commands_work(server: Server) -> str:
    """Each command whose flag is set succeeds."""
    done = []
    with server.enter() as client:
        for flag, command, length in _OFFERED:
            if client.export.flags & flag:
                reply = client.call(command, AREA if length else 0, length)
                expect(not reply.error, str(reply))
                done.append(command.name)
    return ", ".join(done)


@requirement(68)
def read_only_export_is_not_written(server: Server) -> str:
    """READ_ONLY: all that writes fails, and nothing changes."""
    with server.enter() as client:
        has_flag(client, Flag.READ_ONLY)
        before = client.read(0, 4096)
        for command in (Cmd.WRITE, Cmd.WRITE_ZEROES):
            payload = b"w" * 4096 if command == Cmd.WRITE else b""
            said = expect_error(client.call(command, 0, 4096, payload=payload))
        expect(client.read(0, 4096) == before, "content changed")
    return said


@requirement(69, on=WRITABLE)
def flush_and_fua_are_seen_on_all_connections(server: Server) -> None:
    """CAN_MULTI_CONN: what was flushed on one connection is read on another."""
    with server.enter() as one, server.enter() as two:
        has_flag(one, Flag.CAN_MULTI_CONN)
        two.read(AREA, 8192)
        one.write(AREA, b"1" * 4096)
        one.call(Cmd.FLUSH)
        expect(two.read(AREA, 4096) == b"1" * 4096, "flushed write is not seen")
        has_flag(one, Flag.SEND_FUA)
        two.write(AREA + 4096, b"2" * 4096, CmdFlag.FUA)
        expect(one.read(AREA + 4096, 4096) == b"2" * 4096, "FUA write is not seen")


@requirement(70, on=WRITABLE)
def fast_zero_comes_with_write_zeroes(server: Server) -> None:
    """FAST_ZERO is not offered without WRITE_ZEROES."""
    with server.enter() as client:
        has_flag(client, Flag.SEND_FAST_ZERO)
        expect(client.export.flags & Flag.SEND_WRITE_ZEROES, f"{client.export.flags!r}")


@requirement(71, 146, on=WRITABLE)
def no_hole_is_taken(server: Server) -> None:
    """WRITE_ZEROES offered: NO_HOLE is accepted, and the range reads as zero."""
    with server.enter() as client:
        has_flag(client, Flag.SEND_WRITE_ZEROES)
        client.write(AREA, b"x" * 65536)
        reply = client.call(Cmd.WRITE_ZEROES, AREA, 65536, CmdFlag.NO_HOLE)
        expect(not reply.error, str(reply))
        expect(client.read(AREA, 65536) == bytes(65536), "not zero")


def _sizes(client: Client) -> tuple[int, int, int]:
    require(client.export.block_sizes, "BLOCK_SIZE is not told")
    assert client.export.block_sizes is not None
    return client.export.block_sizes


def _sizes_are_sound(server: Server) -> str:
    with server.enter() as client:
        minimum, preferred, largest = _sizes(client)
        size = client.export.size
    told = f"minimum {minimum}, preferred {preferred}, maximum {largest}"
    power = minimum > 0 and not minimum & (minimum - 1)
    expect(power and minimum <= 65536, told)
    expect(not size % minimum, f"{told}, size {size}")
    expect(preferred > 0 and not preferred & (preferred - 1), told)
    expect(preferred >= max(minimum, 512), told)
    expect(largest >= preferred, told)
    expect(largest == 0xFFFFFFFF or not largest % minimum, told)
    return told


@requirement(93, 94, 95)
def sizes_are_sound(server: Server) -> str:
    """Minimum, preferred and maximum are what the protocol allows."""
    return _sizes_are_sound(server)


@requirement(93, 94, 95, on=BLOCK_SIZES)
def coarse_sizes_are_sound(server: Server) -> str:
    """The same where the minimum is 4096."""
    return _sizes_are_sound(server)


@requirement(95, level="S")
def maximum_payload_is_a_mebibyte_or_more(server: Server) -> str:
    """The maximum payload should be 1 MiB or more."""
    with server.enter() as client:
        expect(_sizes(client)[2] >= MIB, f"{_sizes(client)}")
        return f"{_sizes(client)[2]}"


@requirement(90, 91, 172)
def client_that_asks_no_sizes_is_served(server: Server) -> None:
    """GO without BLOCK_SIZE works, and reads of one byte up to 32 MiB do."""
    with server.haggle() as client:
        answer = client.go(server.export.name, ())
        expect(answer.acknowledged, str(answer))
        for offset, length in ((1, 1), (511, 2), (0, min(32 * MIB, client.export.size))):
            expect(len(client.read(offset, length)) == length, "short read")


def _unharmed(client: Client, reply: Reply, offset: int, data: bytes) -> None:
    """After a write of ``data`` at ``offset`` into bytes of ``o``, replied by ``reply``."""
    around = client.read(0, 16384)
    wanted = bytearray(b"o" * 16384)
    if not reply.error:
        wanted[offset : offset + len(data)] = data
    expect(around == bytes(wanted), f"{reply}: content is neither old nor new")


@requirement(92, on=BLOCK_SIZES)
def unaligned_write_does_not_corrupt(server: Server) -> str:
    """A write below the minimum is refused, or done exactly; never something between."""
    said = []
    with server.enter() as client:
        for offset, size in ((512, 512), (4096, 1024), (1, 4096)):
            client.write(0, b"o" * 16384)
            reply = client.call(Cmd.WRITE, offset, size, payload=b"n" * size)
            _unharmed(client, reply, offset, b"n" * size)
            said.append(str(reply))
    return "; ".join(said)


@requirement(99, on=BLOCK_SIZES)
def unaligned_requests_are_einval(server: Server) -> str:
    """Requests below the advertised minimum are EINVAL."""
    with server.enter() as client:
        require(client.export.minimum > 512, f"minimum is {client.export.minimum}")
        for offset, length in ((512, 4096), (0, 512), (4096, 4097)):
            said = expect_error(client.call(Cmd.READ, offset, length), Errno.EINVAL)
        payload = b"n" * 512
        return (
            said
            + "; "
            + expect_error(client.call(Cmd.WRITE, 512, 512, payload=payload), Errno.EINVAL)
        )


@requirement(96, on=WRITABLE)
def payload_of_32_mib_is_no_attack(server: Server) -> None:
    """WRITE and READ of exactly 32 MiB do not end the connection, and work."""
    size = 32 * MIB
    with server.enter() as client:
        reply = client.call(Cmd.WRITE, AREA, size, payload=b"\xa5" * size)
        expect(not reply.error, str(reply))
        expect(client.read(AREA, size) == b"\xa5" * size, "wrong content")
        client.call(Cmd.TRIM, AREA, size)


@requirement(97)
def chunks_keep_to_the_maximum(server: Server) -> None:
    """No data chunk is longer than the advertised maximum."""
    found = survey(server).of(97)
    expect(not found, "; ".join(found[:3]))


@requirement(97, 134, level="N")
def read_beyond_the_maximum_is_answered(server: Server) -> str:
    """READ of more than the maximum payload is split or an error, never a disconnect."""
    with server.enter(structured=True) as client:
        size = client.export.payload_max + 4 * MIB
        require(client.export.size >= size, "the export is small")
        reply = client.call(Cmd.READ, 0, size)
        largest = max(len(chunk.payload) for chunk in reply.chunks)
        if not reply.error and client.export.block_sizes:
            expect(largest <= client.export.payload_max + 8, f"chunk of {largest} bytes")
        client.read(0, 512)
    return f"{reply}, {len(reply.chunks)} chunks"


@requirement(98, on=WRITABLE)
def long_effects_do_not_disconnect(server: Server) -> str:
    """TRIM and WRITE_ZEROES of 1 GiB succeed, or are EOVERFLOW or EINVAL."""
    said = []
    with server.enter() as client:
        require(client.export.size > 3 * GIB, "the export is small")
        for flag, command in ((Flag.SEND_TRIM, Cmd.TRIM), (Flag.SEND_WRITE_ZEROES, 6)):
            if client.export.flags & flag:
                reply = client.call(command, 2 * GIB, GIB)
                expect(reply.error in (0, Errno.EOVERFLOW, Errno.EINVAL), str(reply))
                said.append(str(reply))
        client.read(0, 512)
    if not said:
        raise Failed("neither TRIM nor WRITE_ZEROES is offered")
    return "; ".join(said)
