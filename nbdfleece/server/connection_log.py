"""What a connection writes into the log, so that no client can flood it."""

from __future__ import annotations

import logging
import time
from typing import Final

from ..errors import NbdfleeceError

logger = logging.getLogger("nbdfleece.server")

FAILURES_LOGGED_MAX: Final = 10
"""Failed requests that are logged for each connection and minute; a broken disk fails thousands."""

LIMITS_LOGGED_MAX: Final = 10
"""Lines about limits for each connection."""


class ConnectionLog:
    """The log lines of one connection that its client has a hand in.

    Args:
        peer: Who is at the other end.
    """

    def __init__(self, peer: str) -> None:
        self._peer = peer
        self._minute = 0
        self._logged = 0
        self._left_out = 0
        self._limits: set[str] = set()

    def failure(self, text: str, error: BaseException) -> None:
        """Note a failed request; with a traceback if the error is a bug of ours."""
        minute = int(time.monotonic() / 60)
        if minute != self._minute:
            self.close()
            self._minute, self._logged = minute, 0
        if self._logged >= FAILURES_LOGGED_MAX:
            self._left_out += 1
            return
        self._logged += 1
        known = isinstance(error, (OSError, NbdfleeceError))
        logger.error("%s: %s: %s", self._peer, text, error, exc_info=None if known else error)

    def limit(self, text: str, *, level: int) -> None:
        """Note that a limit was hit, the first time that this one is."""
        if text not in self._limits and len(self._limits) < LIMITS_LOGGED_MAX:
            self._limits.add(text)
            logger.log(level, "%s: %s", self._peer, text)

    def close(self) -> None:
        """Say how many lines were left out."""
        if self._left_out:
            logger.error("%s: %d more requests failed", self._peer, self._left_out)
            self._left_out = 0
