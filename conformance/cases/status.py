"""NBD_CMD_BLOCK_STATUS and QEMU's contexts (requirements 153 to 162, 189 to 193)."""

from __future__ import annotations

from collections.abc import Iterator

from conformance import content
from conformance.case import (
    BAD_STATUS,
    WRITABLE,
    Server,
    expect_error,
    requirement,
)
from conformance.client import Client
from conformance.content import GIB, MIB, SCRATCH, Content
from conformance.errors import expect, require
from conformance.wire import Cmd, CmdFlag, Errno

BASE = "base:allocation"
DEPTH = "qemu:allocation-depth"
HOLE, ZERO = 1, 2
Extent = tuple[int, int, int]


def walk(client: Client, start: int, end: int, step: int = GIB, flags: int = 0) -> list[Extent]:
    """(start, end, status) of the one selected context over a range, request by request."""
    found: list[Extent] = []
    position = start
    for _ in range(100_000):
        if position >= end:
            return found
        reply = client.call(Cmd.BLOCK_STATUS, position, min(step, end - position), flags)
        expect(not reply.error, str(reply))
        (extents,) = reply.extents.values()
        for length, status in extents:
            found.append((position, position + length, status))
            position += length
    raise AssertionError("a walk of a disk this size has fewer requests")


def bitmap_client(server: Server, name: str) -> Client:
    return server.enter(structured=True, contexts=(f"qemu:dirty-bitmap:{name}",))


@requirement(154, 155)
def one_chunk_per_context(server: Server) -> str:
    """With all contexts selected each BLOCK_STATUS has one chunk of each."""
    with server.haggle() as client:
        require(client.agree_structured(), "no structured replies")
        names = sorted(client.list_contexts(server.export.name).names)
        require(names, "no metadata contexts")
        client.set_contexts(server.export.name, names)
        client.go(server.export.name)
        for offset, length in ((0, 512), (0, 64 * MIB), (4 * MIB, 2 * MIB)):
            reply = client.call(Cmd.BLOCK_STATUS, offset, length)
            expect(not reply.error and not reply.simple, str(reply))
            expect(set(reply.extents) == set(client.contexts), f"{reply.extents}")
            expect(all(reply.extents.values()), f"no descriptor: {reply.extents}")
    return ", ".join(names)


@requirement(156, 155)
def walk_covers_the_export(server: Server) -> str:
    """Going on where each reply ends, the whole export is described, in every step size."""
    with server.enter(structured=True, contexts=(BASE,)) as client:
        size = client.export.size
        counts = []
        for end, step, flags in (
            (size, GIB, 0),
            (8 * MIB, 96 * 1024, 0),
            (8 * MIB, GIB, CmdFlag.REQ_ONE),
        ):
            found = walk(client, 0, min(end, size), step, flags)
            expect(found[-1][1] >= min(end, size), f"ends at {found[-1][1]:#x}")
            counts.append(len(found))
    return f"{counts} extents"


def _untrue(disk: Content, extents: list[Extent]) -> Iterator[str]:
    for start, end, status in extents:
        if status & ZERO and any(
            first < end and start < last for first, last in disk.data_ranges()
        ):
            yield f"{start:#x}-{end:#x} is called zero, but has data"


@requirement(158, level="M")
def zero_is_never_a_lie(server: Server) -> str:
    """base:allocation calls nothing zero that has data."""
    disk = server.export.content
    require(disk, "the content is not known")
    assert disk is not None
    with server.enter(structured=True, contexts=(BASE,)) as client:
        extents = walk(client, 0, client.export.size)
    wrong = list(_untrue(disk, extents))
    expect(not wrong, "; ".join(wrong[:3]))
    return f"{len(extents)} extents"


@requirement(158)
def holes_are_told(server: Server) -> str:
    """A hole of several GiB is seen as zero by a client that wants to skip it."""
    require(server.export.content, "the content is not known")
    with server.enter(structured=True, contexts=(BASE,)) as client:
        require(client.export.size > 5 * GIB, "the export is small")
        extents = walk(client, GIB, 4 * GIB)
    expect(all(status & ZERO for _, _, status in extents), f"{extents[:3]}")
    return f"{len(extents)} extents"


@requirement(161, on=WRITABLE, level="X")
def writing_where_there_is_no_hole_does_not_fail(server: Server) -> None:
    """Where HOLE is clear a write does not fail for want of space."""
    with server.enter(structured=True, contexts=(BASE,)) as client:
        client.write(SCRATCH[0], b"x" * 65536)
        for start, end, status in walk(client, SCRATCH[0], SCRATCH[0] + 65536):
            if not status & HOLE:
                client.write(start, b"y" * min(end - start, 65536))


@requirement(159, 154, on=BAD_STATUS)
def failing_block_status_is_an_error_chunk(server: Server) -> str:
    """A map that cannot be read is an error chunk, or status 0; the connection goes on."""
    with server.enter(structured=True, contexts=(BASE,)) as client:
        reply = client.call(Cmd.BLOCK_STATUS, 0, 65536)
        expect(not reply.simple, f"a simple reply: {reply}")
        if not reply.error:
            (extents,) = reply.extents.values()
            expect(not any(status for _, status in extents), f"failed, but {extents}")
        client.call(Cmd.READ, 0, 512)
    return str(reply)


@requirement(160)
def block_status_beyond_the_end_is_einval(server: Server) -> str:
    """BLOCK_STATUS that begins or ends beyond the export is EINVAL."""
    with server.enter(structured=True, contexts=(BASE,)) as client:
        size = client.export.size
        for offset, length in ((size, 512), (size - 512, 1024), (1 << 62, 512)):
            said = expect_error(client.call(Cmd.BLOCK_STATUS, offset, length), Errno.EINVAL)
        client.read(0, 512)
    return said


@requirement(162)
def block_status_of_length_zero_does_not_disconnect(server: Server) -> str:
    """BLOCK_STATUS of length 0 is answered, and the connection goes on."""
    with server.enter(structured=True, contexts=(BASE,)) as client:
        reply = client.call(Cmd.BLOCK_STATUS, 0, 0)
        client.read(0, 512)
    return str(reply)


@requirement(189, 192)
def bitmaps_show_what_is_dirty(server: Server) -> str:
    """Each dirty bitmap shows exactly the ranges that were written, in every step size."""
    require(server.export.dirty, "no dirty bitmaps")
    for name, dirty in server.export.dirty.items():
        with bitmap_client(server, name) as client:
            for step, flags in ((GIB, 0), (0xFFFF0000, 0), (GIB, CmdFlag.REQ_ONE)):
                extents = walk(client, 0, client.export.size, step, flags)
                got = merged(extents)
                expect(got == list(dirty), f"{name}: {got}, should be {list(dirty)}")
    return f"{len(server.export.dirty)} bitmaps"


def merged(extents: list[Extent]) -> list[tuple[int, int]]:
    """The ranges whose bit 0 is set, neighbours joined."""
    found: list[tuple[int, int]] = []
    for start, end, status in extents:
        if status & 1 and found and found[-1][1] == start:
            found[-1] = (found[-1][0], end)
        elif status & 1:
            found.append((start, end))
    return found


@requirement(189)
def several_bitmaps_at_once(server: Server) -> str:
    """All bitmaps and base:allocation in one request give what each gives alone."""
    names = [f"qemu:dirty-bitmap:{name}" for name in server.export.dirty]
    require(len(names) > 1, "fewer than two dirty bitmaps")
    with server.enter(structured=True, contexts=(BASE, *names)) as client:
        reply = client.call(Cmd.BLOCK_STATUS, 0, 8 * MIB)
        for number, name in client.contexts.items():
            if name in names:
                dirty = server.export.dirty[name.rpartition(":")[2]]
                got = merged(_positions(0, reply.extents[number]))
                expect(got == list(dirty), f"{name}: {got}, should be {list(dirty)}")
    return ", ".join(names)


def _positions(start: int, extents: list[tuple[int, int]]) -> list[Extent]:
    found = []
    for length, status in extents:
        found.append((start, start + length, status))
        start += length
    return found


@requirement(190)
def allocation_depth_counts_layers(server: Server) -> str:
    """allocation-depth: 1 in the image, 2 in its backing image, 0 where neither has it."""
    require(server.export.depth, "no allocation depth")
    with server.enter(structured=True, contexts=(DEPTH,)) as client:
        probes = {0: 1, content.BACKED[0]: 2, content.HOLE[0]: 0, content.ZEROES[0]: 1}
        for offset, wanted in probes.items():
            reply = client.call(Cmd.BLOCK_STATUS, offset, 65536, CmdFlag.REQ_ONE)
            ((extent,),) = reply.extents.values()
            expect(extent[1] == wanted, f"depth {extent[1]} at {offset:#x}, should be {wanted}")
    return f"{sorted(probes.values())}"


@requirement(192)
def long_clean_runs_are_below_4_gib(server: Server) -> str:
    """In compact mode a clean run of more than 4 GiB comes in pieces that fit."""
    require(server.export.dirty, "no dirty bitmaps")
    name = list(server.export.dirty)[-1]
    with bitmap_client(server, name) as client:
        require(client.export.size > 5 * GIB, "the export is small")
        reply = client.call(Cmd.BLOCK_STATUS, 512 * MIB, 0xFFFFFFFF)
        expect(not reply.error, str(reply))
        (extents,) = reply.extents.values()
        covered = sum(length for length, _ in extents)
        expect(covered >= 0xFFFF0000, f"{covered:#x} of {0xFFFFFFFF:#x} described")
        expect(not any(status for _, status in extents), f"dirty: {extents}")
    return f"{extents}"


@requirement(193, on=WRITABLE)
def exported_bitmap_stands_still(server: Server) -> str:
    """Writes to the export do not change the bitmap that it shows."""
    require(server.export.dirty, "no dirty bitmaps")
    name = next(iter(server.export.dirty))
    with bitmap_client(server, name) as client:
        before = merged(walk(client, 0, client.export.size))
        client.write(SCRATCH[0] + 16 * MIB, b"dirty" * 1000)
        client.call(Cmd.FLUSH)
        after = merged(walk(client, 0, client.export.size))
        expect(before == after, f"before {before}, after a write {after}")
    return f"{before}"
