"""What the command's exit status says."""

from __future__ import annotations

from enum import IntEnum
from typing import Final


class ExitStatus(IntEnum):
    """Exit statuses of every command; 128 + N means ended by signal N."""

    OK = 0
    ERROR = 1
    USAGE = 2
    DIFFERS = 3
    FULL_INSTEAD = 4
    SNAPSHOT_BROKEN = 5
    TEMPORARY = 75


MEANINGS: Final = {
    ExitStatus.OK: "done",
    ExitStatus.ERROR: "failed; nothing was changed unless the message says so",
    ExitStatus.USAGE: "the command line cannot be meant",
    ExitStatus.DIFFERS: "data differs, or was found to be damaged",
    ExitStatus.FULL_INSTEAD: "done, but in full: the changes asked for are not known",
    ExitStatus.SNAPSHOT_BROKEN: "the snapshot is broken; the disk is not",
    ExitStatus.TEMPORARY: "the server is ending or busy; try again later",
}


def describe() -> str:
    """All statuses, one per line, for ``--help``."""
    return "\n".join(f"  {status:3d}  {meaning}" for status, meaning in MEANINGS.items())
