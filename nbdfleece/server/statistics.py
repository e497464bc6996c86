"""What connections have done, counted."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(slots=True)
class Statistics:
    """Counts since the beginning of a connection.

    Attributes:
        requests: Requests that were received.
        errors: Requests that were answered with an error.
        read_bytes: Data sent in answer to READ.
        written_bytes: Data of WRITEs that succeeded.
    """

    requests: int = 0
    errors: int = 0
    read_bytes: int = 0
    written_bytes: int = 0
