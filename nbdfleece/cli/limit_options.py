"""``--limit NAME=VALUE``: everything that bounds what clients may take of a server.

Names are those of :class:`nbdfleece.server.limits.Limits` and
:class:`nbdfleece.nbd.limits.Limits`, with dashes.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Final

from ..errors import UsageError
from .sizes import parse_size

if TYPE_CHECKING:
    from ..server.limits import Limits

_SECONDS: Final = "_seconds"
_NOT_LIMITS: Final = ("wire", "excess_waits")


def parse_limits(words: Sequence[str]) -> Limits:
    """Read ``NAME=VALUE``, the rest are defaults.

    Values are numbers or sizes from 1 on; seconds may have a fraction, and 0 is no limit.

    Raises:
        UsageError: A name is unknown, a value is none, or they do not go together.
    """
    from ..nbd.limits import Limits as WireLimits
    from ..server.limits import Limits

    server: dict[str, Any] = {}
    wire: dict[str, Any] = {}
    for word in words:
        name, _, text = word.partition("=")
        field = name.replace("-", "_")
        target = next(
            (d for d, kind in ((server, Limits), (wire, WireLimits)) if _has(kind, field)), None
        )
        if target is None or "_" in name:
            known = ", ".join(limit_names())
            raise UsageError(f"--limit: there is no '{name}'; there are: {known}")
        target[field] = (
            _parse_seconds(name, text) if field.endswith(_SECONDS) else _parse(name, text)
        )
    return Limits(**server, wire=WireLimits(**wire))


def limit_names() -> list[str]:
    """All that can be limited, as it is written."""
    from ..nbd.limits import Limits as WireLimits
    from ..server.limits import Limits

    return [
        field.name.replace("_", "-")
        for kind in (Limits, WireLimits)
        for field in dataclasses.fields(kind)
        if field.name not in _NOT_LIMITS
    ]


def _has(kind: type[Any], field: str) -> bool:
    return field not in _NOT_LIMITS and field in kind.__dataclass_fields__


def _parse_seconds(name: str, text: str) -> float:
    try:
        seconds = float(text)
    except ValueError:
        seconds = math.nan
    if not 0 <= seconds < math.inf:
        raise UsageError(f"--limit: {name} is a number of seconds, or 0 for no limit, not '{text}'")
    return seconds


def _parse(name: str, text: str) -> int:
    size = parse_size(text)
    if not size:
        raise UsageError(f"--limit: {name} is at least 1")
    return size
