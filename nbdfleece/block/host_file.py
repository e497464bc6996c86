"""Where a disk's clusters lie in its file, for another process to read what holds still there.

Who reads is told once where a cluster lies, and of no changes. That is enough for a reader of
a snapshot: a write that moves or frees a cluster displaces, before it does, every granule of it
whose content goes with it (:mod:`.shared_codes`). What is left UNTOUCHED reads the same at the
old place, unless that can be freed by a write to another granule, as a compressed cluster's can. Of
such clusters no place is told.
"""

from __future__ import annotations

from typing import Final, NamedTuple

import numpy as np
import numpy.typing as npt

Places = npt.NDArray[np.uint64]
"""For each of consecutive clusters of a disk the offset in bytes in its file, or one of these:"""

ZEROES: Final = (1 << 64) - 1
"""The cluster reads as zeroes and has no place."""
ELSEWHERE: Final = (1 << 64) - 2
"""Not in the file, or not as it is read, or not for as long as its content stays."""


class HostFile(NamedTuple):
    """The file of a disk.

    Attributes:
        descriptor: Of the file.
        cluster_bits: Bits of an offset within a cluster.
        map_bits: Bits of an offset within a part of the disk whose clusters are located together.
    """

    descriptor: int
    cluster_bits: int
    map_bits: int
