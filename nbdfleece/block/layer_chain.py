"""The snapshots of a disk in the order in which they were taken, and what each of them sees."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from ..bitmaps.bitmap import Bitmap
from .granule_codes import COPIED, FORGOTTEN, UNTOUCHED, Mask
from .granule_map import PAGE_GRANULES, PAGE_SHIFT, Codes, page_end
from .layer import Layer


class LayerChain:
    """The layers, oldest first.

    A snapshot finds a granule where the first layer says that has a code for it, from its own
    on; if none has, the granule is in the disk itself.

    Args:
        shift: Bits of an offset within a granule.

    Attributes:
        newest: The layer in which the guest's next write is noted; None without layers.
    """

    def __init__(self, shift: int) -> None:
        self._shift = shift
        self._layers: list[Layer] = []
        self.newest: Layer | None = None

    def __iter__(self) -> Iterator[Layer]:
        return iter(self._layers)

    def add(self, layer: Layer) -> None:
        """Add the newest one."""
        self._layers.append(layer)
        self.newest = layer

    def remove(self, layer: Layer) -> None:
        """Forget one, of which the older ones have what they need."""
        self._layers.remove(layer)
        self.newest = self._layers[-1] if self._layers else None

    def since(self, layer: Layer) -> list[Layer]:
        """A layer and the newer ones."""
        return self._layers[self._layers.index(layer) :]

    def needed(self, first: int, end: int) -> Mask:
        """Which granules some snapshot still sees in the disk itself; shape (end - first,)."""
        unresolved = np.ones(end - first, dtype=np.bool_)
        needed = np.zeros(end - first, dtype=np.bool_)
        for layer in reversed(self._layers):
            unresolved &= layer.map.codes(first, end) == UNTOUCHED
            if not layer.is_good:
                continue
            if layer.access is None:
                return needed | unresolved
            needed |= unresolved & self.accessible(layer.access, first, end)
        return needed

    def needing(self, first: int, end: int) -> list[Layer]:
        """The good snapshots that see any of the granules in the disk itself."""
        found = []
        unresolved = np.ones(end - first, dtype=np.bool_)
        for layer in reversed(self._layers):
            unresolved &= layer.map.codes(first, end) == UNTOUCHED
            seen = unresolved
            if layer.access is not None:
                seen = unresolved & self.accessible(layer.access, first, end)
            if layer.is_good and seen.any():
                found.append(layer)
        return found

    def accessible(self, access: Bitmap, first: int, end: int) -> Mask:
        """Which granules an access bitmap marks; shape (end - first,)."""
        each = access.granularity >> self._shift
        begin, stop = first // each, -(-end // each)
        packed = access.array()[begin >> 3 : (stop + 7) >> 3]
        bits = np.unpackbits(packed, bitorder="little")[begin & 7 :][: stop - begin]
        return np.repeat(bits, each)[first - begin * each :][: end - first].astype(np.bool_)

    def resolve(self, layer: Layer, first: int, end: int) -> Codes:
        """Where a snapshot finds its granules ``[first, end)``; UNTOUCHED is the disk itself."""
        newer = iter(self.since(layer))
        codes = next(newer).map.codes(first, end)
        for other in newer:
            missing = codes == UNTOUCHED
            if not missing.any():
                break
            codes[missing] = other.map.codes(first, end)[missing]
        return codes

    def resolve_few(self, layer: Layer, first: int, end: int) -> list[int]:
        """As :meth:`resolve`, sooner for few granules."""
        codes: list[int] = []
        for newer in self.since(layer):
            own = newer.map.code_list(first, end)
            if any(codes):
                codes = [older or code for older, code in zip(codes, own, strict=True)]
            else:
                codes = own
        return codes

    def next_page(self, layer: Layer, first: int, end: int) -> int:
        """The first granule in a page that a snapshot may find something in, or ``end``."""
        return min(other.map.next_page(first, end) for other in self.since(layer))

    # -- giving up, a page of codes at each step: what is yielded, nobody needs any more ---------

    def hand_down(self, layer: Layer) -> Iterator[Codes]:
        """Move the codes of a removed layer to the next older one, where that has none.

        The last layer keeps them: its copies go all together.
        """
        if self._layers == [layer]:
            return
        for number in layer.map.pages():
            first = number << PAGE_SHIFT
            codes = layer.map.codes(first, first + PAGE_GRANULES)
            older = self._layers[: self._layers.index(layer)]
            if any(each.is_good for each in older):
                kept = older[-1].map.codes(first, first + PAGE_GRANULES)
                older[-1].map.set(first, np.where(kept == UNTOUCHED, codes, kept))
                codes = codes[kept != UNTOUCHED]
            layer.map.drop_page(number)
            yield codes

    def forget_all(self) -> Iterator[Codes]:
        """Forget the codes of all layers that there are now, none of which is good."""
        for layer in list(self._layers):
            for number in layer.map.pages():
                if layer not in self._layers:
                    break  # removed meanwhile, and the copies may belong to others
                first = number << PAGE_SHIFT
                codes = layer.map.codes(first, first + PAGE_GRANULES)
                layer.map.drop_page(number)
                yield codes

    def forget_unneeded(self, first: int, end: int) -> Iterator[Codes]:
        """Forget the copies of granules ``[first, end)`` that no snapshot may read."""
        while first < end and self._layers:
            first = min(layer.map.next_page(first, end) for layer in self._layers)
            stop = min(end, page_end(first))
            if first < stop:
                yield self._forget_unneeded(first, stop)
            first = stop

    def _forget_unneeded(self, first: int, end: int) -> Codes:
        given_up = [np.empty(0, dtype=np.uint32)]
        wanted = np.zeros(end - first, dtype=np.bool_)
        """Granules that some layer at or before the current one still looks for."""
        for layer in self._layers:
            if layer.is_good and layer.access is None:
                wanted[:] = True
            elif layer.is_good and layer.access is not None:
                wanted |= self.accessible(layer.access, first, end)
            codes = layer.map.codes(first, end)
            unneeded = (codes >= COPIED) & ~wanted
            if unneeded.any():
                given_up.append(codes[unneeded])
                codes[unneeded] = FORGOTTEN
                layer.map.set(first, codes)
            wanted &= codes == UNTOUCHED
        return np.concatenate(given_up)
