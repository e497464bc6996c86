"""Refcount blocks of all seven widths, to and from native arrays.

Spec: qcow2.txt, "Refcount table", "Refcount block": widths below a byte are packed
with the lowest bits first, wider ones are big-endian.
"""

from __future__ import annotations

from typing import Any, Final

import numpy as np
import numpy.typing as npt

Counts = npt.NDArray[Any]
"""Refcounts in a native unsigned type wide enough for the width."""

_TYPES: Final = {8: ">u1", 16: ">u2", 32: ">u4", 64: ">u8"}


def counts_per_block(cluster_bits: int, refcount_order: int) -> int:
    """How many refcounts one block of a cluster's size holds."""
    return 1 << cluster_bits + 3 - refcount_order


def empty_counts(count: int, refcount_bits: int) -> Counts:
    """``count`` refcounts of zero."""
    return np.zeros(count, dtype=np.dtype(f"u{max(8, refcount_bits) // 8}"))


def unpack_counts(raw: bytes | bytearray, refcount_bits: int) -> Counts:
    """Decode a refcount block."""
    if refcount_bits >= 8:
        stored = np.frombuffer(raw, dtype=_TYPES[refcount_bits])
        return stored.astype(stored.dtype.newbyteorder("="))
    data = np.frombuffer(raw, dtype=np.uint8)
    shifts = np.arange(0, 8, refcount_bits, dtype=np.uint8)
    mask = np.uint8((1 << refcount_bits) - 1)
    return ((data[:, None] >> shifts) & mask).reshape(-1)


def pack_counts(counts: Counts, refcount_bits: int) -> bytes:
    """Encode refcounts; for widths below a byte their number must fill whole bytes."""
    if refcount_bits >= 8:
        return counts.astype(_TYPES[refcount_bits]).tobytes()
    shifts = np.arange(0, 8, refcount_bits, dtype=np.uint8)
    groups = counts.reshape(-1, 8 // refcount_bits) << shifts
    packed: npt.NDArray[np.uint8] = np.bitwise_or.reduce(groups, axis=1).astype(np.uint8)
    return packed.tobytes()
