"""Bitmaps that belong to no checkpoint: the steps that QEMU has for them.

Each step is an :class:`~nbdfleece.engine.transaction.Action`; one alone or several together
are carried out by :meth:`Engine.transact`. The bitmaps of a chain are refused: what they mean
depends on one another.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Final

from ..bitmaps.bitmap import Bitmap
from ..errors import StateError
from .chain import check_name
from .disk_state import DiskBitmap
from .transaction import Action, BitmapNode, Draft

GRANULARITY_MIN: Final = 512
GRANULARITY_MAX: Final = 1 << 31
"""Bytes; QEMU's and the format's limits."""


@dataclass(frozen=True, slots=True, kw_only=True)
class AddBitmap(Action):
    """Add an empty bitmap.

    Attributes:
        node: Where.
        name: The bitmap's name.
        granularity: Bytes per bit; None for the usual.
        recording: Guest writes mark it.
        persistent: The image is to hold it.
    """

    node: BitmapNode
    name: str
    granularity: int | None
    recording: bool
    persistent: bool

    def nodes(self) -> Iterable[BitmapNode]:
        """The one."""
        return (self.node,)

    def stores(self) -> Iterable[BitmapNode]:
        """The one, if the image is to hold it."""
        return (self.node,) if self.persistent else ()

    def apply(self, draft: Draft) -> None:
        """Add it.

        Raises:
            StateError: The name is taken or cannot be, or the granularity cannot be, or the
                node has no image for a persistent one.
        """
        check_name(self.name, "bitmap")
        if self.name in draft.state(self.node).bitmaps:
            raise StateError(f"Bitmap already exists: {self.name}")
        if self.persistent and not self.node.can_persist:
            raise StateError(f"node '{self.node.name}' has no image for a persistent bitmap")
        size = self.node.default_granularity if self.granularity is None else self.granularity
        if size & (size - 1) or not GRANULARITY_MIN <= size <= GRANULARITY_MAX:
            raise StateError(f"Granularity must be power of 2 and at least {GRANULARITY_MIN}")
        fresh = DiskBitmap(
            self.name,
            size,
            self.recording,
            bits=Bitmap(self.node.size, size),
            in_image=False,
            persistent=self.persistent,
        )
        draft.put(self.node, fresh)


@dataclass(frozen=True, slots=True)
class _BitmapAction(Action):
    """A step with one bitmap that there is."""

    node: BitmapNode
    name: str

    def nodes(self) -> Iterable[BitmapNode]:
        """The one."""
        return (self.node,)

    def stores(self) -> Iterable[BitmapNode]:
        """The one, if its image holds the bitmap."""
        return _holder(self.node, self.name)


@dataclass(frozen=True, slots=True)
class RemoveBitmap(_BitmapAction):
    """Remove a bitmap, which may be inconsistent."""

    def apply(self, draft: Draft) -> None:
        """Remove it.

        Raises:
            StateError: There is none, or it is the chain's, or busy.
        """
        _own(draft, self.node, self.name)
        draft.remove(self.node, self.name)


@dataclass(frozen=True, slots=True)
class ClearBitmap(_BitmapAction):
    """Let a bitmap mark nothing."""

    def apply(self, draft: Draft) -> None:
        """Clear it.

        Raises:
            StateError: There is none, or it is the chain's, busy or inconsistent.
        """
        bitmap = _usable(draft, self.node, self.name)
        draft.put(self.node, _with_bits(bitmap, Bitmap(self.node.size, bitmap.granularity)))


@dataclass(frozen=True, slots=True)
class SetRecording(_BitmapAction):
    """Let guest writes mark a bitmap, or not."""

    enabled: bool

    def needs(self) -> Iterable[tuple[BitmapNode, str]]:
        """Its bits."""
        return ((self.node, self.name),)

    def apply(self, draft: Draft) -> None:
        """Change it; its bits become others, since the old state records until this one is stored.

        Raises:
            StateError: There is none, or it is the chain's, busy or inconsistent.
        """
        bitmap = _usable(draft, self.node, self.name)
        bits = draft.bits(self.node, self.name).copy()
        draft.put(self.node, _with_bits(bitmap, bits)._replace(recording=self.enabled))


@dataclass(frozen=True, slots=True)
class MergeBitmaps(Action):
    """Let a bitmap also mark what others mark, those of other nodes too."""

    node: BitmapNode
    target: str
    sources: Sequence[tuple[BitmapNode, str]]

    def nodes(self) -> Iterable[BitmapNode]:
        """The target's and the sources'."""
        return (self.node, *(node for node, _ in self.sources))

    def stores(self) -> Iterable[BitmapNode]:
        """The target's, if its image holds the bitmap."""
        return _holder(self.node, self.target)

    def needs(self) -> Iterable[tuple[BitmapNode, str]]:
        """The bits of all of them."""
        return ((self.node, self.target), *self.sources)

    def apply(self, draft: Draft) -> None:
        """Merge them.

        Raises:
            StateError: One is not there, busy, inconsistent or of a node of another size, or
                the target is the chain's.
        """
        target = _usable(draft, self.node, self.target)
        bits = draft.bits(self.node, self.target).copy()
        for node, name in self.sources:
            _consistent(draft, node, name)
            if node.size != self.node.size:
                raise StateError(
                    f"Bitmaps are of different sizes (destination size is {self.node.size})"
                    " and can't be merged"
                )
            bits.merge(draft.bits(node, name))
        draft.put(self.node, _with_bits(target, bits))


def _holder(node: BitmapNode, name: str) -> Iterable[BitmapNode]:
    """The node, if its image holds a bitmap; nothing otherwise."""
    bitmap = node.state.bitmaps.get(name)
    return (node,) if bitmap is not None and bitmap.persistent else ()


def _with_bits(bitmap: DiskBitmap, bits: Bitmap) -> DiskBitmap:
    """The bitmap with other bits, which neither the image nor its log has."""
    return bitmap._replace(bits=bits, in_image=False, log=None)


def find_bitmap(draft: Draft, node: BitmapNode, name: str) -> DiskBitmap:
    """A bitmap that nothing else uses.

    Raises:
        StateError: There is none, or it is busy.
    """
    bitmap = draft.state(node).bitmaps.get(name)
    if bitmap is None:
        raise StateError(f"Dirty bitmap '{name}' not found")
    if node.busy[name]:
        raise StateError(
            f"Bitmap '{name}' is currently in use by another operation and cannot be used"
        )
    return bitmap


def _own(draft: Draft, node: BitmapNode, name: str) -> DiskBitmap:
    """A bitmap that is nobody else's."""
    bitmap = find_bitmap(draft, node, name)
    for checkpoint in draft.state(node).chain.checkpoints:
        if checkpoint.bitmap_name == name:
            raise StateError(f"bitmap '{name}' belongs to checkpoint '{checkpoint.name}'")
    return bitmap


def _usable(draft: Draft, node: BitmapNode, name: str) -> DiskBitmap:
    """A bitmap that is nobody else's and consistent."""
    _own(draft, node, name)
    return _consistent(draft, node, name)


def _consistent(draft: Draft, node: BitmapNode, name: str) -> DiskBitmap:
    bitmap = find_bitmap(draft, node, name)
    if bitmap.inconsistent:
        raise StateError(f"Bitmap '{name}' is inconsistent and cannot be used; remove it")
    return bitmap
