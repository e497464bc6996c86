"""The workloads, in the order of the table."""

from __future__ import annotations

from ..images import Images
from .base import Row
from .maps import AlternatingStatus, IncrementalPull
from .reads import (
    ColdRead,
    CompressedRead,
    NeighbourLatency,
    PullTcp,
    PullTls,
    PullUnix,
    PullUnixByFour,
    RandomReads,
    ReadLatency,
)
from .resources import BeginPause, Memory
from .snapshots import FirstTouch, PullBesideSteadyWriter, PullWhileWriting
from .writes import AllocatingWrites, RandomWrites

__all__ = ["Row", "all_rows"]


def all_rows(images: Images) -> list[Row]:
    """Every row."""
    return [
        PullUnix(images),
        PullUnixByFour(images),
        PullTcp(images),
        PullTls(images),
        RandomReads(images),
        ReadLatency(images),
        RandomWrites(images, 1),
        RandomWrites(images, 100),
        AllocatingWrites(images),
        FirstTouch(images, 1),
        FirstTouch(images, 10),
        PullWhileWriting(images),
        PullBesideSteadyWriter(images),
        IncrementalPull(images),
        AlternatingStatus(images),
        CompressedRead(images, "zstd"),
        CompressedRead(images, "zlib"),
        ColdRead(images),
        NeighbourLatency(images),
        BeginPause(images),
        Memory(images),
    ]
