"""The place of bitmaps in a raw file, which has none: everything persistent is refused by name."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NoReturn

from ..bitmaps.bitmap import Bitmap
from ..errors import StateError
from ..qcow2.activity_log import ActivityLog
from ..qcow2.bitmap_store import StoredBitmap


class RawStore:
    """Stands where a qcow2 image has its :class:`~nbdfleece.qcow2.bitmap_store.BitmapStore`.

    Args:
        path: The file, for messages.
    """

    record = None
    entries = ()

    def __init__(self, path: str) -> None:
        self._path = path

    async def mark_in_use(self) -> None:
        """Nothing is stored that could be."""

    async def load_bits(self, name: str) -> Bitmap:
        """Refuse; no bitmap is only in the file."""
        self._refuse()

    async def prepare_log(self, granularity: int, content: Bitmap | None = None) -> ActivityLog:
        """Refuse; no bitmap in the file needs a log."""
        self._refuse()

    def discard_log(self, log: ActivityLog) -> None:
        """Nothing: there is none."""

    async def replace(self, bitmaps: Sequence[StoredBitmap], record: bytes | None) -> None:
        """Refuse.

        Raises:
            StateError: Always.
        """
        self._refuse()

    def _refuse(self) -> NoReturn:
        raise StateError(
            f"{self._path} is a raw file, which holds no checkpoints and no persistent bitmaps"
        )
