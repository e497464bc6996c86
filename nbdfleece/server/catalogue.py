"""The exports as the wire sees them: an :class:`Export` becomes an ``ExportInfo``."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from ..export.export import Export, ExportTable
from ..nbd.export_info import ExportInfo
from ..nbd.limits import Limits as WireLimits


@dataclass(frozen=True, slots=True, kw_only=True)
class ServedExport(ExportInfo):
    """What negotiation is shown of an export, with the way back to it.

    Attributes:
        export: The export itself.
    """

    export: Export


def describe_export(export: Export, limits: WireLimits, *, is_single: bool = False) -> ServedExport:
    """Say to the wire what an export can do.

    All connections to an export share its one block node, and a flush of the node covers all
    that was written to it: CAN_MULTI_CONN would hold for every export. With ``is_single``
    there can be only one connection, so it is not told.
    """
    node = export.node
    read_only = export.read_only or node.read_only
    preferred = export.preferred_block_size or max(512, node.preferred_block_size)
    return ServedExport(
        export=export,
        name=export.name,
        description=export.description,
        size=export.size,
        read_only=read_only,
        can_multi_conn=export.can_multi_conn and not is_single,
        can_trim=export.can_trim,
        can_write_zeroes=not read_only,
        can_fast_zero=not read_only,
        can_cache=True,
        minimum_block_size=export.minimum_block_size,
        preferred_block_size=max(export.minimum_block_size, preferred),
        maximum_payload=export.maximum_payload or limits.payload_advertised_max,
        contexts=[context.name for context in export.contexts],
        tls_only=export.tls_only,
        rotational=export.rotational,
        requires_block_size=export.requires_block_size,
    )


class Catalogue:
    """An :class:`ExportTable` as negotiation asks for it; every answer is worked out anew."""

    def __init__(self, table: ExportTable, limits: WireLimits, *, is_single: bool = False) -> None:
        self._table = table
        self._limits = limits
        self._is_single = is_single

    def _describe(self, export: Export) -> ServedExport:
        return describe_export(export, self._limits, is_single=self._is_single)

    def exports(self) -> Iterable[ExportInfo]:
        """The exports in the table's order."""
        return [self._describe(export) for export in self._table]

    def find(self, name: str) -> ExportInfo | None:
        """The export that a client means by ``name``."""
        export = self._table.find(name)
        return None if export is None else self._describe(export)
