from __future__ import annotations

import nbd
import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from nbdfleece.backup.blocks import (
    ABSENT,
    DATA,
    ZEROES,
    Block,
    Range,
    cut_blocks,
    digest,
    layer_extents,
)
from nbdfleece.backup.manifest import BLOCK_BYTES, checksum
from nbdfleece.extents import Extents

KIB64 = 65536


def digest_of(block: Block, content: bytes) -> list[tuple[int, int, int]]:
    view = memoryview(bytearray(content))
    found = digest(block, view, nbd.Buffer.from_buffer(view))
    data = b"".join(
        content[piece.position : piece.position + piece.length]
        for piece in found.pieces
        if piece.status == DATA
    )
    assert found.checksum == (checksum([data]) if data else None)
    return [(piece.offset, piece.length, piece.status) for piece in found.pieces]


def test_full_layer_leaves_zeroes_out_and_reads_the_rest() -> None:
    merged = Extents.from_pairs([(1, 1), (1, 3), (1, 1)])
    assert layer_extents(merged, is_full=True).status.tolist() == [DATA, ABSENT, DATA]


def test_incremental_layer_never_leaves_out_what_is_dirty_and_zero() -> None:
    merged = Extents.from_pairs([(1, 0), (1, 1), (1, 2), (1, 3)])
    layer = layer_extents(merged, is_full=False)
    assert layer.status.tolist() == [ABSENT, DATA, ABSENT, ZEROES]


@given(st.lists(st.tuples(st.integers(1, 3 * BLOCK_BYTES), st.sampled_from([0, 1, 3])), max_size=8))
def test_blocks_are_the_layer_cut(pairs: list[tuple[int, int]]) -> None:
    layer = Extents.from_pairs(pairs) if pairs else Extents.from_pairs([])
    found = []
    for block in cut_blocks(layer):
        assert block.ranges[0].offset == block.number * BLOCK_BYTES
        assert any(part.status for part in block.ranges)
        found += [part for part in block.ranges if part.status]
    expected = []
    ends = np.cumsum(layer.lengths).tolist()
    for end, (length, status) in zip(ends, layer.pairs(), strict=True):
        offset = end - length
        while status and offset < end:
            stop = min(end, (offset // BLOCK_BYTES + 1) * BLOCK_BYTES)
            expected.append(Range(offset, stop - offset, status))
            offset = stop
    assert found == expected


def test_digest_finds_zero_clusters_in_data() -> None:
    block = Block(0, [Range(0, 3 * KIB64, DATA), Range(3 * KIB64, KIB64, ABSENT)])
    content = b"x" * KIB64 + bytes(KIB64) + bytes(KIB64 - 1) + b"y"
    assert digest_of(block, content) == [
        (0, KIB64, DATA),
        (KIB64, KIB64, ZEROES),
        (2 * KIB64, KIB64, DATA),
        (3 * KIB64, KIB64, ABSENT),
    ]


def test_digest_of_nothing_but_zeroes_has_no_checksum() -> None:
    block = Block(0, [Range(512, 1024, DATA), Range(1536, 512, ZEROES), Range(4096, 512, DATA)])
    assert [status for *_, status in digest_of(block, bytes(1536))] == [ZEROES] * 3


@given(st.data())
def test_digest_says_the_same_of_every_byte(data: st.DataObject) -> None:
    ranges, offset = [], data.draw(st.integers(0, 200)) * 512
    for _ in range(data.draw(st.integers(1, 5))):
        length = data.draw(st.integers(1, 300)) * 512
        ranges.append(Range(offset, length, data.draw(st.sampled_from([ABSENT, DATA, ZEROES]))))
        offset += length
    block = Block(0, ranges)
    content = bytearray(block.data_bytes)
    for _ in range(3):
        if content:
            content[data.draw(st.integers(0, len(content) - 1))] = 1
    pieces = digest_of(block, bytes(content))
    assert pieces[0][0] == ranges[0].offset
    assert sum(length for _, length, _ in pieces) == sum(part.length for part in ranges)
