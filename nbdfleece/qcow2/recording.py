"""An image's recording bitmaps while the image is written, without checkpoints.

From :meth:`Recording.begin` to :meth:`Recording.end` every guest write must mark
:attr:`Recording.bitmaps` before it is issued (rule 2). In between these bitmaps are marked
in use on disk, so that a crash leaves them inconsistent, never incomplete; all others stay
as they are.
"""

from __future__ import annotations

from ..bitmaps.bitmap import Bitmap
from ..errors import StateError
from .bitmap_store import BitmapStore, StoredBitmap
from .image import Qcow2Image


class Recording:
    """The bitmaps that record into an image. Made by :meth:`begin`.

    Attributes:
        bitmaps: By name, with all that was recorded so far.
    """

    def __init__(self, store: BitmapStore, bitmaps: dict[str, Bitmap]) -> None:
        self.bitmaps = bitmaps
        self._store = store

    @classmethod
    async def begin(cls, image: Qcow2Image, store: BitmapStore) -> Recording:
        """Load what records, and mark it in use before the first write.

        Args:
            image: Open for writing.
            store: Its bitmaps.

        Raises:
            StateError: The bitmap directory is damaged, so that changes could be missed.
            OSError: It could not be read, or the marks may not be durable: do not write.
        """
        if store.damaged:
            raise StateError(
                f"{image.path}: the bitmap directory is damaged ({store.damaged[0].reason}):"
                " open the image read-only, or repair it first"
            )
        bitmaps = {
            entry.name: await store.load_bits(entry.name)
            for entry in store.entries
            if entry.recording and not entry.inconsistent
        }
        await store.mark_in_use()
        return cls(store, bitmaps)

    async def end(self) -> None:
        """Store what was recorded, as no longer in use; all writes are done.

        Raises:
            OSError: It could not be stored; on disk the bitmaps stay in use.
            StateError: There is no room for it; likewise.
        """
        if not self.bitmaps:
            return
        stored = [
            StoredBitmap(
                entry.name,
                entry.granularity,
                entry.recording,
                in_use=entry.inconsistent,
                content=self.bitmaps.get(entry.name),
            )
            for entry in self._store.entries
        ]
        await self._store.replace(stored, None)
