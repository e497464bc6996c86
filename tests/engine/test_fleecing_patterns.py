"""What QEMU's image-fleecing test is about, on our engine: patterns, and what happens to them.

Four stretches of a disk are filled with patterns; a snapshot is taken; the guest writes over
all of a pattern, over its beginning, over its end, next to it, and with zeroes and discards;
what it left of a pattern is the remainder. The snapshot shows the patterns, the disk shows
what was done. Every byte is compared with a model of both.
"""

from __future__ import annotations

import itertools
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import NamedTuple

import pytest

from nbdfleece.block.node import BlockNode
from nbdfleece.engine.disk import ScratchOptions
from nbdfleece.engine.engine import Engine
from nbdfleece.engine.snapshot import Release
from nbdfleece.export.export import ExportTable

from .rig import make_image

KIB, MIB = 1 << 10, 1 << 20
SIZE = 8 * MIB
STRETCH = 64 * KIB
LAST = SIZE - STRETCH


class Change(NamedTuple):
    """A guest's write, write of zeroes (without a pattern) or discard."""

    offset: int
    length: int
    pattern: int | None = None
    discard: bool = False


PATTERNS = {0: 0x11, MIB: 0x22, 4 * MIB: 0x33, LAST: 0x44}
"""Byte by offset; each fills one stretch."""

WHOLE = [Change(0, STRETCH, 0xA1)]
BEGINNING = [Change(MIB - 32 * KIB, STRETCH, 0xA2)]
END = [Change(4 * MIB + 32 * KIB, STRETCH, 0xA3)]
BEFORE = [Change(LAST - STRETCH, STRETCH, 0xA4)]
OVERWRITES = WHOLE + BEGINNING + END + BEFORE
ZEROES = [Change(MIB, 32 * KIB), Change(4 * MIB + 16 * KIB, 8 * KIB), Change(LAST, STRETCH)]
DISCARDS = [change._replace(discard=True) for change in ZEROES]
ODD = [
    Change(513, 1, 0xA5),
    Change(4095, 4098, 0xA6),
    Change(MIB + STRETCH - 1, 2, 0xA7),
    Change(4 * MIB - 700, 1400),
    Change(SIZE - 512, 512, 0xA8),
    Change(LAST + 3 * 512, 9 * 512, discard=True),
]
HISTORIES = {
    "whole": WHOLE,
    "beginning": BEGINNING,
    "end": END,
    "before": BEFORE,
    "overwrites": OVERWRITES,
    "zeroes": ZEROES,
    "discards": DISCARDS,
    "odd": ODD,
    "overwrites-then-zeroes": OVERWRITES + ZEROES,
    "zeroes-then-overwrites": ZEROES + OVERWRITES,
    "discards-then-overwrites-then-discards": DISCARDS + OVERWRITES + DISCARDS,
    "all-twice": (ODD + DISCARDS + ZEROES + OVERWRITES) * 2,
    "one-over-all": [Change(0, SIZE)],
}


@pytest.fixture(params=["4k", "64k", "2M"])
def image(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    return make_image(tmp_path / "a.qcow2", SIZE, f"cluster_size={request.param}")


@pytest.fixture(params=[4 * KIB, 64 * KIB], ids=["granule-4k", "granule-64k"])
async def engine(
    request: pytest.FixtureRequest, tmp_path: Path, image: Path
) -> AsyncIterator[Engine]:
    """An engine over a disk with the patterns, and a checkpoint from before these."""
    scratch = ScratchOptions(directory=tmp_path, granularity=request.param)
    engine = Engine(ExportTable(), scratch)
    await engine.open_disk("a", image)
    await engine.create_checkpoint("empty")
    for offset, pattern in PATTERNS.items():
        await do(engine, Change(offset, STRETCH, pattern))
    yield engine
    await engine.close()


async def do(engine: Engine, change: Change) -> None:
    node = engine.disk("a").node
    if change.pattern is not None:
        await node.write(change.offset, memoryview(bytes([change.pattern]) * change.length))
    elif change.discard:
        await node.trim(change.offset, change.length)
    else:
        await node.write_zeroes(change.offset, change.length)


def model(changes: list[Change]) -> bytes:
    """The disk after the patterns and some changes; what is discarded reads as zeroes."""
    content = bytearray(SIZE)
    patterns = [Change(offset, STRETCH, pattern) for offset, pattern in PATTERNS.items()]
    for offset, length, pattern, _ in patterns + changes:
        content[offset : offset + length] = bytes([pattern or 0]) * length
    return bytes(content)


def probes() -> Iterator[tuple[int, int]]:
    """Ranges around every edge of a pattern or change, aligned and not, and the whole disk."""
    edges = {0, SIZE}
    changes = itertools.chain(*HISTORIES.values())
    for offset, length in ((change.offset, change.length) for change in changes):
        edges |= {offset, offset + length}
    for edge in sorted(edges):
        for before, after in ((STRETCH, STRETCH), (700, 1), (1, 4097), (0, STRETCH + 1)):
            begin, end = max(0, edge - before), min(SIZE, edge + after)
            if begin < end:
                yield begin, end - begin
    yield 0, SIZE


async def read(node: BlockNode, offset: int, length: int) -> bytes:
    buffer = bytearray(length)
    await node.read_into(offset, memoryview(buffer))
    return bytes(buffer)


def fleece(engine: Engine) -> BlockNode:
    return engine.snapshot("b").disks["a"].node


async def check_everywhere(node: BlockNode, content: bytes) -> None:
    for offset, length in probes():
        assert await read(node, offset, length) == content[offset : offset + length], offset


@pytest.mark.parametrize("history", HISTORIES)
async def test_fleece_shows_the_patterns_and_the_disk_what_was_done(
    engine: Engine, history: str
) -> None:
    """Rule 1; and the guest's remainders are where they were."""
    changes = HISTORIES[history]
    await engine.create_snapshot("b")
    for change in changes:
        await do(engine, change)
    await check_everywhere(fleece(engine), model([]))
    await check_everywhere(engine.disk("a").node, after(engine, changes))
    await engine.drop_snapshot("b")


def after(engine: Engine, changes: list[Change]) -> bytes:
    """As :func:`model`, but a discard changes whole clusters only."""
    cluster = engine.disk("a").image.cluster_size
    done = []
    for change in changes:
        if change.discard:
            begin = -(-change.offset // cluster) * cluster
            end = (change.offset + change.length) // cluster * cluster
            change = change._replace(offset=begin, length=max(0, end - begin))
        done.append(change)
    return model(done)


@pytest.mark.parametrize("history", HISTORIES)
async def test_limited_fleece_shows_the_patterns_and_refuses_the_rest(
    engine: Engine, history: str
) -> None:
    """Only what the bitmap marks is kept; elsewhere nothing may be read, touched or not."""
    await engine.begin_backup("b", checkpoint="c", since="empty", only_changes=True)
    for change in HISTORIES[history]:
        await do(engine, change)
    node = fleece(engine)
    for offset, pattern in PATTERNS.items():
        assert await read(node, offset, STRETCH) == bytes([pattern]) * STRETCH
        assert await read(node, offset + 700, 1) == bytes([pattern])
    for offset in (STRETCH, MIB - 1, 2 * MIB, LAST - STRETCH):
        with pytest.raises(PermissionError):
            await read(node, offset, 512)
    with pytest.raises(PermissionError):
        await read(node, MIB + STRETCH - 1, 2)
    assert engine.disk("a").copies.scratch_bytes <= len(PATTERNS) * STRETCH
    await engine.abort_backup("b")


@pytest.mark.parametrize("history", HISTORIES)
async def test_trimmed_pattern_is_given_up_and_the_others_are_exact(
    engine: Engine, history: str
) -> None:
    """TRIM between the guest's first and second round: its copies go and no new ones come."""
    copies = engine.disk("a").copies
    await engine.create_snapshot("b", release=Release.ON_TRIM)
    node = fleece(engine)
    for change in HISTORIES[history]:
        await do(engine, change)
    for given_up in PATTERNS:
        await node.trim(given_up, STRETCH)
        with pytest.raises(PermissionError):
            await read(node, given_up, STRETCH)
        held = copies.scratch_bytes
        await do(engine, Change(given_up, STRETCH, 0xFF))
        assert copies.scratch_bytes <= held
        for offset in [each for each in PATTERNS if each > given_up]:
            assert await read(node, offset, STRETCH) == bytes([PATTERNS[offset]]) * STRETCH
    await node.trim(0, SIZE)
    assert copies.scratch_bytes == 0
    await engine.drop_snapshot("b")


async def test_fleece_is_given_up_while_read_and_the_disk_stays(engine: Engine) -> None:
    """Read once: each range is released by its reader, whatever the guest does in between."""
    await engine.create_snapshot("b", release=Release.ON_READ)
    node = fleece(engine)
    frozen, done = model([]), list[Change]()
    changes = iter(OVERWRITES + ZEROES)
    for offset in range(0, SIZE, MIB):
        change = next(changes, None)
        if change is not None:
            await do(engine, change)
            done.append(change)
        assert await read(node, offset, MIB) == frozen[offset : offset + MIB]
        with pytest.raises(PermissionError):
            await read(node, offset, STRETCH)
    assert engine.disk("a").copies.scratch_bytes == 0
    await check_everywhere(engine.disk("a").node, after(engine, done))
    await engine.drop_snapshot("b")
