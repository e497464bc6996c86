"""WRITE, FLUSH, TRIM, CACHE and WRITE_ZEROES (requirements 102, 103, 137 to 152)."""

from __future__ import annotations

from collections.abc import Callable

from conformance.case import (
    BLOCK_SIZES,
    READ_ONLY,
    WRITABLE,
    Server,
    expect_error,
    has_flag,
    requirement,
    security,
)
from conformance.client import Client
from conformance.content import KIB, SCRATCH
from conformance.errors import NotApplicable, expect, require
from conformance.wire import Cmd, CmdFlag, Errno, Flag

AREA = SCRATCH[0]
PIECE = 64 * KIB


def zero_length(server: Server, flag: Flag | None, command: Cmd) -> str:
    """A request of length 0 is answered somehow, and the connection goes on."""
    with server.enter() as client:
        if flag is not None:
            has_flag(client, flag)
        reply = client.call(command, AREA, 0)
        client.read(0, 512)
    return str(reply)


@requirement(137, on=WRITABLE)
def write_of_length_zero_does_not_disconnect(server: Server) -> str:
    """WRITE of length 0."""
    return zero_length(server, None, Cmd.WRITE)


@requirement(143, on=WRITABLE)
def trim_of_length_zero_does_not_disconnect(server: Server) -> str:
    """TRIM of length 0."""
    return zero_length(server, Flag.SEND_TRIM, Cmd.TRIM)


@requirement(147, on=WRITABLE)
def write_zeroes_of_length_zero_does_not_disconnect(server: Server) -> str:
    """WRITE_ZEROES of length 0."""
    return zero_length(server, Flag.SEND_WRITE_ZEROES, Cmd.WRITE_ZEROES)


@requirement(144, on=WRITABLE, level="N")
def cache_of_length_zero_does_not_disconnect(server: Server) -> str:
    """CACHE of length 0."""
    return zero_length(server, Flag.SEND_CACHE, Cmd.CACHE)


@requirement(138, 171, on=WRITABLE)
def written_bytes_are_read_back(server: Server) -> None:
    """Writes of all alignments are read back, and touch nothing else."""
    spans = [(0, 512), (1, 1), (1023, 70001), (PIECE - 1, 2), (3 * PIECE, 4 * PIECE)]
    with server.enter() as client:
        client.write(AREA, b"o" * (8 * PIECE))
        wanted = bytearray(b"o" * (8 * PIECE))
        for number, (offset, length) in enumerate(spans):
            data = bytes([65 + number]) * length
            client.write(AREA + offset, data)
            wanted[offset : offset + length] = data
            expect(client.read(AREA, 8 * PIECE) == wanted, f"after {offset}+{length}")


@requirement(138, on=WRITABLE)
def pipelined_writes_are_all_done(server: Server) -> None:
    """64 writes in one segment are all replied to, then all are there."""
    with server.enter() as client:
        requests = [
            client.request(Cmd.WRITE, AREA + n * 4096, payload=bytes([n]) * 4096) for n in range(64)
        ]
        client.send(*requests)
        for _ in range(64):
            reply = client.receive()
            expect(not reply.error, str(reply))
        for n in range(64):
            expect(client.read(AREA + n * 4096, 4096) == bytes([n]) * 4096, f"block {n}")


def _drains(server: Server, offset: int, flags: int) -> str:
    said = ""
    for structured in (False, True):
        try:
            client = server.enter(structured=structured)
        except NotApplicable:
            continue
        with client:
            at = offset if offset >= 0 else client.export.size
            for size in (1, 512, 100_000):
                reply = client.call(Cmd.WRITE, at, size, flags, b"\x25" * size)
                said = expect_error(reply)
                client.read(0, 512)
    return said


@requirement(139, on=READ_ONLY)
def payload_is_taken_when_read_only(server: Server) -> str:
    """A WRITE refused as the export is read-only leaves the stream in step."""
    with server.enter() as client:
        has_flag(client, Flag.READ_ONLY)
    return _drains(server, 0, 0)


@requirement(139, on=WRITABLE)
def payload_is_taken_when_past_the_end(server: Server) -> str:
    """A WRITE refused as it leaves the export leaves the stream in step."""
    return _drains(server, -1, 0)


@requirement(139, on=WRITABLE)
def payload_is_taken_when_flag_is_unknown(server: Server) -> str:
    """A WRITE refused for its flags leaves the stream in step."""
    return _drains(server, AREA, 1 << 13)


@requirement(141, on=WRITABLE)
def flush_with_offset_or_length_is_consistent(server: Server) -> str:
    """FLUSH with offset or length: always EINVAL, or always a success."""
    with server.enter() as client:
        has_flag(client, Flag.SEND_FLUSH)
        spans = ((4096, 0), (0, 4096), (4096, 4096), (0, 4096))
        replies = [client.call(Cmd.FLUSH, offset, length) for offset, length in spans]
        errors = {reply.error for reply in replies}
        expect(len(errors) == 1, "; ".join(map(str, replies)))
        expect(errors <= {0, Errno.EINVAL}, "; ".join(map(str, replies)))
        expect(not client.call(Cmd.FLUSH).error, "FLUSH failed afterwards")
    return str(replies[0])


def _around(client: Client, act: Callable[[int, int], None]) -> None:
    """``act`` on unaligned ranges leaves the bytes before and after them alone."""
    for offset, length in ((PIECE, PIECE), (PIECE + 1, PIECE - 2), (100, 8000), (5000, 200_000)):
        client.write(AREA, b"o" * (4 * PIECE))
        act(AREA + offset, length)
        before = client.read(AREA, offset)
        after = client.read(AREA + offset + length, 4 * PIECE - offset - length)
        expect(set(before + after) <= {ord("o")}, f"bytes outside {offset}+{length} changed")


@requirement(142, on=WRITABLE)
def trim_touches_only_its_range(server: Server) -> None:
    """TRIM never changes a byte outside its range, however it is aligned."""

    def trim(offset: int, length: int) -> None:
        reply = client.call(Cmd.TRIM, offset, length)
        expect(not reply.error, str(reply))

    with server.enter() as client:
        has_flag(client, Flag.SEND_TRIM)
        _around(client, trim)


@requirement(144, on=WRITABLE)
def cache_changes_nothing(server: Server) -> str:
    """CACHE is answered, and later reads and writes mean what they did."""
    with server.enter() as client:
        has_flag(client, Flag.SEND_CACHE)
        client.write(AREA, b"1" * 4096)
        reply = client.call(Cmd.CACHE, AREA, 1 << 20)
        expect(not reply.error, str(reply))
        expect(client.read(AREA, 4096) == b"1" * 4096, "content changed")
        client.write(AREA, b"2" * 4096)
        expect(client.read(AREA, 4096) == b"2" * 4096, "stale content after CACHE")
        return expect_error(client.call(Cmd.CACHE, client.export.size, 4096))


@requirement(145)
def unknown_flags_of_cache_are_refused(server: Server) -> str:
    """CACHE with a flag that does not exist is EINVAL."""
    with server.enter() as client:
        has_flag(client, Flag.SEND_CACHE)
        return expect_error(client.call(Cmd.CACHE, 0, 4096, 1 << 12), Errno.EINVAL)


def _zeroes(server: Server, flags: int) -> None:
    def zero(offset: int, length: int) -> None:
        reply = client.call(Cmd.WRITE_ZEROES, offset, length, flags)
        expect(not reply.error, str(reply))
        expect(not any(client.read(offset, length)), f"{reply}: not zero")

    with server.enter() as client:
        has_flag(client, Flag.SEND_WRITE_ZEROES)
        _around(client, zero)


@requirement(146, 149, on=WRITABLE)
def write_zeroes_reads_back_as_zero(server: Server) -> None:
    """WRITE_ZEROES of any alignment reads back as zero, and touches nothing else."""
    _zeroes(server, 0)


@requirement(146, 149, 71, on=WRITABLE)
def write_zeroes_without_hole_reads_back_as_zero(server: Server) -> None:
    """The same with NO_HOLE."""
    _zeroes(server, CmdFlag.NO_HOLE)


@requirement(148, on=WRITABLE)
def no_hole_leaves_no_hole(server: Server) -> str:
    """NO_HOLE: base:allocation does not call the range a hole."""
    with server.enter(structured=True, contexts=("base:allocation",)) as client:
        has_flag(client, Flag.SEND_WRITE_ZEROES)
        client.call(Cmd.TRIM, AREA + 8 * PIECE, 4 * PIECE)
        reply = client.call(Cmd.WRITE_ZEROES, AREA + 8 * PIECE, 4 * PIECE, CmdFlag.NO_HOLE)
        expect(not reply.error, str(reply))
        status = client.call(Cmd.BLOCK_STATUS, AREA + 8 * PIECE, 4 * PIECE)
        (extents,) = status.extents.values()
        expect(not any(state & 1 for _, state in extents), f"holes in {extents}")
    return f"{extents}"


@requirement(150, on=WRITABLE)
def fast_zero_zeroes_or_alters_nothing(server: Server) -> str:
    """FAST_ZERO: zeroes, or ENOTSUP and the bytes are as before."""
    said = []
    with server.enter() as client:
        has_flag(client, Flag.SEND_FAST_ZERO)
        for offset, length in ((0, 16 * PIECE), (512, 512), (1, PIECE)):
            client.write(AREA + offset, b"o" * length)
            flags = CmdFlag.FAST_ZERO
            reply = client.call(Cmd.WRITE_ZEROES, AREA + offset, length, flags)
            expect(reply.error in (0, Errno.ENOTSUP), str(reply))
            wanted = b"o" * length if reply.error else bytes(length)
            expect(client.read(AREA + offset, length) == wanted, f"{reply}: content is neither")
            said.append(str(reply))
    return "; ".join(said)


@requirement(151, on=READ_ONLY, ours_only=True)
def fast_zero_that_was_not_offered_is_einval(server: Server) -> str:
    """FAST_ZERO set although it was not offered is EINVAL, not ENOTSUP."""
    with server.enter() as client:
        require(not client.export.flags & Flag.SEND_FAST_ZERO, "FAST_ZERO is offered")
        reply = client.call(Cmd.WRITE_ZEROES, 0, 512, CmdFlag.FAST_ZERO)
        said = expect_error(reply, Errno.EINVAL, Errno.EPERM)
        client.read(0, 512)
    return said


def _past_the_end(server: Server, command: Cmd, *wanted: Errno) -> str:
    with server.enter() as client:
        size = client.export.size
        for offset, length in ((size, 512), (size - 512, 1024), (size - 1, 2)):
            payload = b"w" * length if command == Cmd.WRITE else b""
            before = client.read(size - 512, 512)
            reply = client.call(command, offset, length, payload=payload)
            said = expect_error(reply, *wanted)
            expect(client.read(size - 512, 512) == before, f"{reply}: written in part")
    return said


@requirement(164, on=WRITABLE)
def write_past_the_end_is_enospc(server: Server) -> str:
    """WRITE that leaves the export is ENOSPC, and writes nothing."""
    return _past_the_end(server, Cmd.WRITE, Errno.ENOSPC)


@requirement(152, 164, on=WRITABLE)
def write_zeroes_past_the_end_is_enospc(server: Server) -> str:
    """WRITE_ZEROES that leaves the export is ENOSPC."""
    with server.enter() as client:
        has_flag(client, Flag.SEND_WRITE_ZEROES)
    return _past_the_end(server, Cmd.WRITE_ZEROES, Errno.ENOSPC)


@requirement(165, on=WRITABLE)
def trim_past_the_end_is_einval(server: Server) -> str:
    """TRIM that leaves the export is EINVAL."""
    with server.enter() as client:
        has_flag(client, Flag.SEND_TRIM)
    return _past_the_end(server, Cmd.TRIM, Errno.EINVAL)


@requirement(166, 68)
def write_to_read_only_export_is_eperm(server: Server) -> str:
    """WRITE to a read-only export is EPERM."""
    with server.enter() as client:
        has_flag(client, Flag.READ_ONLY)
        return expect_error(client.call(Cmd.WRITE, 0, 512, payload=b"w" * 512), Errno.EPERM)


@requirement(152, 166)
def write_zeroes_on_read_only_export_is_eperm(server: Server) -> str:
    """WRITE_ZEROES on a read-only export is EPERM."""
    with server.enter() as client:
        has_flag(client, Flag.READ_ONLY)
        return expect_error(client.call(Cmd.WRITE_ZEROES, 0, 512), Errno.EPERM)


@requirement(166, on=READ_ONLY, private=True)
def trim_on_read_only_export_is_eperm(server: Server) -> str:
    """TRIM on a read-only export is EPERM."""
    with server.enter() as client:
        has_flag(client, Flag.READ_ONLY)
        return expect_error(client.call(Cmd.TRIM, AREA, 65536), Errno.EPERM)


def _killed(server: Server, write: Callable[[Client], None]) -> None:
    """Kill the server after ``write`` was replied to; a new one must have the bytes."""
    require(server.process, "the suite did not start this server")
    assert server.process is not None
    with server.enter() as client:
        write(client)
        server.process.kill()
    server.process.restart()
    with server.enter() as client:
        expect(client.read(AREA, PIECE) == b"D" * PIECE, "acknowledged bytes are lost")
        expect(not any(client.read(AREA + PIECE, PIECE)), "acknowledged zeroes are lost")


@requirement(102, 140, on=WRITABLE, private=True)
def flushed_bytes_survive_sigkill(server: Server) -> None:
    """What was written before a FLUSH is there after SIGKILL of the server."""

    def write(client: Client) -> None:
        has_flag(client, Flag.SEND_FLUSH)
        client.write(AREA, b"D" * PIECE + b"x" * PIECE)
        client.write(AREA + PIECE, bytes(PIECE))
        expect(not client.call(Cmd.FLUSH).error, "FLUSH failed")

    _killed(server, write)


@requirement(103, on=WRITABLE, private=True)
def fua_bytes_survive_sigkill(server: Server) -> None:
    """What was written with FUA is there after SIGKILL of the server."""

    def write(client: Client) -> None:
        has_flag(client, Flag.SEND_FUA)
        client.write(AREA, b"D" * PIECE, CmdFlag.FUA)
        client.write(AREA + PIECE, b"x" * PIECE)
        client.write(AREA + PIECE, bytes(PIECE), CmdFlag.FUA)

    _killed(server, write)


@security("own", on=BLOCK_SIZES, level="S")
def aligned_requests_work_with_coarse_sizes(server: Server) -> None:
    """Where the minimum is 4096, requests of 4096 bytes work."""
    with server.enter() as client:
        client.write(8192, b"c" * 4096)
        expect(client.read(8192, 4096) == b"c" * 4096, "wrong content")
