"""``--export PATTERN:KEY=VALUE,...``: what holds for exports by their names."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any, Final

from ..errors import UsageError
from .sizes import parse_size

if TYPE_CHECKING:
    from ..export.policy import ExportRule


def parse_export_rule(text: str) -> ExportRule:
    """Read one rule; its keys are the attributes of :class:`ExportRule`, with dashes.

    Raises:
        UsageError: It is none.
    """
    from ..export.policy import ExportRule

    pattern, colon, rest = text.rpartition(":")
    if not colon:
        raise UsageError(f"--export is PATTERN:KEY=VALUE,..., '{text}' is not")
    values: dict[str, Any] = {}
    for word in rest.split(","):
        key, _, value = word.partition("=")
        parse = _KEYS.get(key)
        if parse is None:
            raise UsageError(f"--export: there is no '{key}'; there are: {', '.join(_KEYS)}")
        values[key.replace("-", "_")] = parse(key, value)
    return ExportRule(pattern=pattern, **values)


def _switch(key: str, text: str) -> bool:
    if text not in ("on", "off"):
        raise UsageError(f"--export: {key} is on or off, not '{text}'")
    return text == "on"


def _size(key: str, text: str) -> int:
    size = parse_size(text)
    if not size:
        raise UsageError(f"--export: {key} is at least 1")
    return size


_KEYS: Final[dict[str, Callable[[str, str], Any]]] = {
    "allocation-depth": _switch,
    "connections-max": _size,
    "maximum-payload": _size,
    "minimum-block-size": _size,
    "multi-conn": _switch,
    "preferred-block-size": _size,
    "require-block-size": _switch,
    "rotational": _switch,
    "tls-only": _switch,
}
