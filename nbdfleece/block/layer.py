"""One snapshot of a disk, as copy-before-write keeps it."""

from __future__ import annotations

from ..bitmaps.bitmap import Bitmap
from ..errors import SnapshotError
from .copy_failure import CopyFailure
from .granule_map import GranuleMap
from .shared_codes import SharedCodes


class Layer:
    """One snapshot of the disk.

    Attributes:
        error: Why the snapshot is broken; None while it is good.
        failure: When a copy that it needs has failed, and what that breaks.
        is_removed: Whether the layer was given up.
        shared: What other processes see of it; None if none is to.
    """

    __slots__ = ("access", "error", "failure", "is_removed", "map", "shared")

    def __init__(self, access: Bitmap | None, failure: CopyFailure) -> None:
        self.failure = failure
        self.map = GranuleMap()
        self.access = access
        self.error: str | None = None
        self.is_removed = False
        self.shared: SharedCodes | None = None

    @property
    def is_good(self) -> bool:
        """Whether the snapshot can still be read."""
        return self.error is None and not self.is_removed

    def withdraw(self) -> None:
        """Have other processes ask from now on what they may read."""
        if self.shared is not None:
            self.shared.withdraw()

    def check(self) -> None:
        """Refuse a snapshot that is broken or gone.

        Raises:
            SnapshotError: It is.
        """
        if self.error is not None:
            raise SnapshotError(f"the snapshot is broken: {self.error}")
        if self.is_removed:
            raise SnapshotError("the snapshot has been dropped")
