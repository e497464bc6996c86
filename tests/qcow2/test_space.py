"""Deflating and inflating clusters: places, several frames, garbage behind the data, damage."""

from __future__ import annotations

import itertools
import random
import sys
import zlib

import pytest

from nbdfleece.qcow2.compressed import (
    ZLIB,
    ZSTD,
    compressed_entry,
    compressed_range,
    deflate,
    inflate,
)

if sys.version_info >= (3, 14):
    from compression import zstd
else:
    from backports import zstd

SIZE = 65536


def deflated(data: bytes) -> bytes:
    """As QEMU does it: no header, and a window of 4 KiB."""
    packer = zlib.compressobj(wbits=-12)
    return packer.compress(data) + packer.flush()


def some_text(seed: int, length: int = SIZE) -> bytes:
    return bytes(random.Random(seed).choices(b"abcdefgh", k=length))


@pytest.mark.parametrize("garbage", [b"", b"\0" * 511, b"\xff" * 300])
@pytest.mark.parametrize(("pack", "kind"), [(deflated, ZLIB), (zstd.compress, ZSTD)])
def test_what_is_behind_a_cluster_in_its_last_sector_does_not_matter(
    pack: object, kind: int, garbage: bytes
) -> None:
    data = some_text(1)
    assert callable(pack)
    assert inflate(pack(data) + garbage, SIZE, kind) == data


@pytest.mark.parametrize("cuts", [[1], [30_000], [10, 20, 40_000]])
def test_cluster_may_be_several_frames_in_a_row(cuts: list[int]) -> None:
    """Spec: qcow2.txt, "Compressed Clusters": zstd frames follow one another."""
    data = some_text(2)
    bounds = [0, *cuts, SIZE]
    frames = [zstd.compress(data[start:end]) for start, end in itertools.pairwise(bounds)]
    assert inflate(b"".join(frames) + b"\0" * 100, SIZE, ZSTD) == data


@pytest.mark.parametrize(("pack", "kind"), [(deflated, ZLIB), (zstd.compress, ZSTD)])
def test_cluster_that_is_too_short_or_damaged_is_an_input_output_error(
    pack: object, kind: int
) -> None:
    assert callable(pack)
    for data in (pack(some_text(3, SIZE - 1)), pack(some_text(3))[:-9], b"\xff" * 512, b""):
        with pytest.raises(OSError, match="compressed cluster"):
            inflate(data, SIZE, kind)


@pytest.mark.parametrize(("pack", "kind"), [(deflated, ZLIB), (zstd.compress, ZSTD)])
def test_no_more_than_a_cluster_is_inflated(pack: object, kind: int) -> None:
    """A few bytes must not become gigabytes."""
    assert callable(pack)
    assert inflate(pack(bytes(64 << 20)), SIZE, kind) == bytes(SIZE)


@pytest.mark.parametrize("cluster_bits", [9, 12, 16, 21])
def test_entry_says_where_the_bytes_are(cluster_bits: int) -> None:
    source = random.Random(cluster_bits)
    for _ in range(200):
        host = source.randrange(1 << 40)
        length = source.randrange(1, 1 << cluster_bits)
        offset, bytes_to_sector_end = compressed_range(
            compressed_entry(host, length, cluster_bits), cluster_bits
        )
        assert offset == host
        assert 0 <= bytes_to_sector_end - length < 512


@pytest.mark.parametrize("kind", [ZLIB, ZSTD])
def test_what_was_deflated_inflates(kind: int) -> None:
    cluster = b"some text that compresses well " * 2114 + b"\0\1"
    packed = deflate(memoryview(cluster), kind)
    assert packed is not None
    assert inflate(packed + b"what follows", len(cluster), kind) == cluster
    assert deflate(random.Random(1).randbytes(65536), kind) is None
