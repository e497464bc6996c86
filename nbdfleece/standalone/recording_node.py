"""A qcow2 image that is written by guests and records into its bitmaps."""

from __future__ import annotations

import tempfile

from ..block.copy_before_write import CopyBeforeWrite
from ..block.guest import GuestNode
from ..qcow2.bitmap_store import BitmapStore
from ..qcow2.image import Qcow2Image
from ..qcow2.recording import Recording


class RecordingNode(GuestNode):
    """The top of an image that is open for writing. Made by :meth:`begin`.

    Attributes:
        image: What is written.
        store: Its bitmaps as they are stored.
        record: Those that record.
    """

    def __init__(self, image: Qcow2Image, store: BitmapStore, record: Recording) -> None:
        # There are never snapshots here, so nothing is ever put into the folder.
        super().__init__(image, CopyBeforeWrite(image, tempfile.gettempdir()))
        self.image = image
        self.store = store
        self.record = record
        self.recording = tuple(record.bitmaps.values())

    @classmethod
    async def begin(cls, image: Qcow2Image) -> RecordingNode:
        """Take an image over, which is closed with this node, also when this fails.

        Raises:
            StateError, OSError: As for :meth:`Recording.begin`.
        """
        try:
            store = await BitmapStore.load(image)
            return cls(image, store, await Recording.begin(image, store))
        except BaseException:
            await image.close()
            raise

    async def close(self) -> None:
        """Wait for writes in flight, store the bitmaps, and close the image."""
        await self.drain()
        try:
            await self.record.end()
        finally:
            await self.image.close()
