"""What L2 tables and refcount blocks have in common while they are in memory."""

from __future__ import annotations


class CachedTable:
    """A table of one cluster; entries ``[dirty_first, dirty_end)`` differ from the file."""

    __slots__ = ("dirty_end", "dirty_first", "host_offset", "is_recent", "pins")

    def __init__(self, host_offset: int) -> None:
        self.host_offset = host_offset
        self.dirty_first = 0
        self.dirty_end = 0
        self.is_recent = True
        self.pins = 0
        """Operations and flushes that rely on the table's staying in memory."""

    @property
    def is_dirty(self) -> bool:
        """Whether the file does not have the table's content yet."""
        return self.dirty_end > self.dirty_first

    def mark_dirty(self, first: int, end: int) -> None:
        """Entries ``[first, end)`` have changed."""
        if self.is_dirty:
            self.dirty_first = min(self.dirty_first, first)
            self.dirty_end = max(self.dirty_end, end)
        else:
            self.dirty_first, self.dirty_end = first, end
