"""Where a disk's clusters lie in its file, for another process to read what holds still there.

Who reads is told once where a cluster lies, and of no changes. That is enough for a reader of
a snapshot: a write that moves or frees a cluster displaces, before it does, every granule of it
whose content goes with it (:mod:`.shared_codes`). What is left UNTOUCHED reads the same at the
old place, unless that can be freed by a write to another granule, as a compressed cluster's can. Of
such clusters no place is told.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Final, NamedTuple

import numpy as np
import numpy.typing as npt

if TYPE_CHECKING:
    from .node import BlockNode

Places = npt.NDArray[np.uint64]
"""For each of consecutive clusters of a disk the offset in bytes in its file, or one of these:"""

ZEROES: Final = 1 << 63
"""The cluster reads as zeroes and has no place; no place in a file is so large."""
BELOW: Final = 5 << 61
"""It reads as what is below the file."""
ELSEWHERE: Final = 6 << 61
"""None of this, or not for as long as its content stays."""


class HostFile(NamedTuple):
    """The file of a disk.

    Attributes:
        descriptor: Of the file.
        cluster_bits: Bits of an offset within a cluster.
        map_bits: Bits of an offset within a part of the disk whose clusters are located together.
        below: What the disk shows where the file has nothing, as far as it reaches; nobody writes
            it. None for zeroes.
    """

    descriptor: int
    cluster_bits: int
    map_bits: int
    below: BlockNode | None = None
