"""Requests as QEMU's drafts had them, in the form that they have now.

The pull-backup API was proposed, in 2018, on commands that QEMU had only as drafts, under
names with ``x-`` or a vendor's ``x-vz-`` before them and with some arguments named otherwise.
Such requests are accepted, alone and in transactions. Names that begin with ``x-`` now, such as
``x-debug-block-dirty-bitmap-sha256``, are not touched.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Final

_PREFIXES: Final = ("x-vz-", "x-")

_MERGE: Final = "block-dirty-bitmap-merge"
_ADD: Final = "block-dirty-bitmap-add"

DRAFTED: Final = frozenset(
    {
        _ADD,
        _MERGE,
        "block-dirty-bitmap-remove",
        "block-dirty-bitmap-clear",
        "block-dirty-bitmap-enable",
        "block-dirty-bitmap-disable",
        "nbd-server-add-bitmap",
        "nbd-server-start",
        "nbd-server-stop",
        "nbd-server-add",
        "nbd-server-remove",
        "blockdev-add",
        "blockdev-del",
        "blockdev-backup",
        "blockdev-reopen",
    }
)
"""Commands that have their draft names, too."""


def final_form(name: str, arguments: Mapping[str, Any]) -> tuple[str, Mapping[str, Any]]:
    """The command's final name, and its arguments under their final names.

    Args:
        name: Of the command or the action, final or a draft's.
        arguments: As they were sent.
    """
    for prefix in _PREFIXES:
        if name.removeprefix(prefix) in DRAFTED:
            name = name.removeprefix(prefix)
    if name == _MERGE and "src_name" in arguments:
        return name, _merge(arguments)
    if name == _ADD:
        return name, _add(arguments)
    return name, arguments


def _merge(arguments: Mapping[str, Any]) -> dict[str, Any]:
    """``src_name`` and ``dst_name`` were one source and the target."""
    found = dict(arguments)
    found["bitmaps"] = [found.pop("src_name")]
    if "dst_name" in found:
        found["target"] = found.pop("dst_name")
    return found


def _add(arguments: Mapping[str, Any]) -> Mapping[str, Any]:
    """``x-disabled`` was ``disabled``; ``autoload`` had no effect from QEMU 2.12 on."""
    found = {key: value for key, value in arguments.items() if key != "autoload"}
    if "x-disabled" in found:
        found["disabled"] = found.pop("x-disabled")
    return found
