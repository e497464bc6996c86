"""Whether a server listens on a Unix socket, without being a client of it."""

from __future__ import annotations

from pathlib import Path

_SO_ACCEPTCON = 1 << 16


def is_listening(socket: Path) -> bool:
    """Whether listen(2) was called; the socket's file is there from bind(2) on, a moment before.

    Args:
        socket: As the server calls it.
    """
    for line in Path("/proc/net/unix").read_text().splitlines():
        fields = line.split()
        if fields[-1] == str(socket) and int(fields[3], 16) & _SO_ACCEPTCON:
            return True
    return False
