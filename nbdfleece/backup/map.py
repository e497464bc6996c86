"""Maps of an export: what its metadata contexts say, as ``nbdinfo --map`` prints it.

The text and JSON are nbdinfo's to the byte, so that what reads the one can read the other.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Final

import numpy as np

from ..extents import Extents
from .block_status import ALLOCATION, DIRTY_PREFIX, walk
from .connection import TIMEOUT_SECONDS, ConnectOptions, connect
from .errors import ServerError

DEPTH: Final = "qemu:allocation-depth"
MERGED: Final = "merged"
"""What the description of dirty and zero in one goes by; no server's context."""

_ALLOCATION_TEXTS: Final = {0: "data", 1: "hole", 2: "zero", 3: "hole,zero"}
_DIRTY_TEXTS: Final = {0: "clean", 1: "dirty"}
_DEPTH_TEXTS: Final = {0: "absent", 1: "local"}
_MERGED_TEXTS: Final = {0: "clean", 1: "dirty", 2: "zero", 3: "dirty,zero"}


async def read_contexts(
    uri: str, contexts: Sequence[str], *, timeout_seconds: float | None = TIMEOUT_SECONDS
) -> dict[str, Extents]:
    """What metadata contexts say of a whole export.

    Args:
        uri: The export.
        contexts: Their full names.
        timeout_seconds: How long the server may be silent; None for ever.

    Returns:
        Extents by context, neighbours merged; none for an export of no bytes.

    Raises:
        ServerError: The server fails, cannot be trusted, or does not offer one of them.
    """
    connection = await connect(uri, ConnectOptions(tuple(contexts), False, timeout_seconds))
    try:
        for name in contexts:
            if not connection.has_context(name):
                raise ServerError(f'{uri}: server does not support metadata context "{name}"')
        if not connection.size:
            return {name: Extents.from_pairs([]) for name in contexts}
        return await walk(connection, uri, connection.size, tuple(contexts))
    finally:
        connection.disconnect()


def describe(context: str, status: int) -> str | None:
    """What a status of a context means; None if that is not known."""
    if context == ALLOCATION:
        return _ALLOCATION_TEXTS.get(status)
    if context.startswith(DIRTY_PREFIX):
        return _DIRTY_TEXTS.get(status)
    if context == MERGED:
        return _MERGED_TEXTS.get(status)
    if context == DEPTH:
        return _DEPTH_TEXTS.get(status, f"backing depth {status}")
    return None


def format_map(context: str, extents: Extents, *, as_json: bool = False) -> str:
    """All extents, as ``nbdinfo --map`` or ``nbdinfo --map --json`` prints them."""
    row = _json_row if as_json else _text_row
    starts = np.cumsum(extents.lengths) - extents.lengths
    rows = [
        row(offset, length, status, describe(context, status))
        for offset, (length, status) in zip(starts.tolist(), extents.pairs(), strict=True)
    ]
    return _json_list(rows) if as_json else "".join(rows)


def format_totals(context: str, extents: Extents, *, as_json: bool = False) -> str:
    """Bytes of every status, as ``nbdinfo --map --totals`` prints them."""
    size = extents.total()
    rows = []
    for status in np.unique(extents.status).tolist():
        total = int(extents.lengths[extents.status == status].sum())
        row = _json_total if as_json else _text_total
        rows.append(row(total, 100 * total / size, status, describe(context, status)))
    if not rows and as_json:
        return "[]\n"  # nbdinfo: here, and only here
    return _json_list(rows) if as_json else "".join(rows)


def _text_row(offset: int, length: int, status: int, text: str | None) -> str:
    return f"{offset:10d}  {length:10d}  {status:3d}" + (f"  {text}\n" if text else "\n")


def _json_row(offset: int, length: int, status: int, text: str | None) -> str:
    row = f'{{ "offset": {offset}, "length": {length}, "type": {status}'
    return row + (f', "description": {json.dumps(text)}}}' if text else "}")


def _text_total(total: int, percent: float, status: int, text: str | None) -> str:
    return f"{total:10d} {percent:5.1f}% {status:3d}" + (f" {text}\n" if text else "\n")


def _json_total(total: int, percent: float, status: int, text: str | None) -> str:
    row = f'{{ "size": {total}, "percent": {percent:g}, "type": {status}'
    return row + (f', "description": {json.dumps(text)} }}' if text else " }")


def _json_list(rows: Sequence[str]) -> str:
    return "[\n" + ",\n".join(rows) + "\n]\n"
