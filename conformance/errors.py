"""What a case can find out: each ends the case, with its text as the evidence."""

from __future__ import annotations


class Finding(Exception):
    """Base of everything that a server can do wrong under the eyes of a case."""


class Failed(Finding):
    """A case's own expectation did not hold."""


class Violation(Finding):
    """Bytes that no server may send at this point: magic, length, cookie, type."""


class Disconnected(Finding):
    """The server closed the connection, or reset it."""


class Stalled(Finding):
    """The server sent nothing (or did not read) within the time limit."""


class NotApplicable(Exception):
    """The server does not have what the case needs; the text says what."""


def expect(holds: object, evidence: str) -> None:
    """Fail the running case with ``evidence`` unless ``holds`` is true."""
    if not holds:
        raise Failed(evidence)


def require(holds: object, reason: str) -> None:
    """End the running case as not applicable, for ``reason``, unless ``holds`` is true."""
    if not holds:
        raise NotApplicable(reason)
