"""What an operator says of exports by their names, before there are any.

Exports come and go while a server runs; a policy is applied to each before it is offered.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase

from .contexts import ALLOCATION_DEPTH
from .export import Export


@dataclass(frozen=True, slots=True, kw_only=True)
class ExportRule:
    """What holds for the exports whose names fit a pattern; None leaves a thing as it is.

    Attributes:
        pattern: Of whole names: ``*``, ``?`` and ``[...]``.
        allocation_depth: False: ``qemu:allocation-depth`` is not offered.
        connections_max: Clients at a time.
        maximum_payload: Bytes of data in one message.
        minimum_block_size: Bytes; smaller or unaligned requests get EINVAL.
        multi_conn: Whether clients are told that they may have several connections.
        preferred_block_size: Bytes; what clients are told.
        require_block_size: Whether clients that do not ask for the block sizes are turned away.
        rotational: Whether clients are told that seeking is slow.
        tls_only: Whether TLS is needed, where it is the client's choice for others.
    """

    pattern: str
    allocation_depth: bool | None = None
    connections_max: int | None = None
    maximum_payload: int | None = None
    minimum_block_size: int | None = None
    multi_conn: bool | None = None
    preferred_block_size: int | None = None
    require_block_size: bool | None = None
    rotational: bool | None = None
    tls_only: bool | None = None

    def apply(self, export: Export) -> None:
        """Change an export as the rule says."""
        if self.allocation_depth is False:
            export.contexts = tuple(c for c in export.contexts if c.name != ALLOCATION_DEPTH)
        for name, value in (
            ("connections_max", self.connections_max),
            ("maximum_payload", self.maximum_payload),
            ("minimum_block_size", self.minimum_block_size),
            ("can_multi_conn", self.multi_conn),
            ("preferred_block_size", self.preferred_block_size),
            ("requires_block_size", self.require_block_size),
            ("rotational", self.rotational),
            ("tls_only", self.tls_only),
        ):
            if value is not None:
                setattr(export, name, value)


def apply_rules(rules: Sequence[ExportRule], export: Export) -> None:
    """Apply all rules that fit, in their order: a later one has the last word."""
    for rule in rules:
        if fnmatchcase(export.name, rule.pattern):
            rule.apply(export)
