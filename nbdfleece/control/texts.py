"""Cutting a stream of bytes into JSON texts.

QMP has no frames: clients may or may not end a command with a new line, so an object ends
where its last bracket closes. Only brackets, quotes and backslashes are looked at; whether the
text is JSON is for the decoder to say. What begins with no bracket ends with the line, and so
does a string that is never closed (JSON has no raw line ends inside strings): after noise, the
next line is a fresh start.

Spec: QEMU docs/interop/qmp-spec.rst, "General Definitions", "Capabilities Negotiation".
"""

from __future__ import annotations

import re
from typing import Final

from .errors import SessionError

TEXT_BYTES_MAX: Final = 1 << 20
"""Of one command; the longest that make sense (a transaction over hundreds of disks) have some
hundred kilobytes. QEMU takes 64 MiB."""

DEPTH_MAX: Final = 64
"""Brackets within brackets; no command needs ten. QEMU takes 1024."""

_SPACE: Final = b" \t\r\n"
_NO_SPACE: Final = re.compile(rb"[^ \t\r\n]")
_OPENING: Final = b"{["
_STRUCTURE: Final = re.compile(rb'["{}\[\]]')
_IN_STRING: Final = re.compile(rb'["\\\n]')
_LINE_END: Final = re.compile(rb"\n")


class TextSplitter:
    """Takes bytes as they come, gives JSON texts.

    State: ``_buffer`` begins with the text that is being looked at; ``_position`` is how far
    that was done, so that no byte is looked at twice; ``_depth`` is 0 before its first bracket.
    """

    def __init__(self) -> None:
        self._buffer = bytearray()
        self._position = 0
        self._depth = 0
        self._in_string = False

    def receive(self, data: bytes) -> None:
        """Take bytes."""
        self._buffer += data

    def next_text(self) -> bytes | None:
        """The next whole text, without the space around it; None if more bytes are needed.

        Raises:
            SessionError: A text that is too long or too deep.
        """
        if self._depth == 0 and not self._in_string:
            self._skip_space()
        end = self._find_end()
        if (len(self._buffer) if end is None else end) > TEXT_BYTES_MAX:
            raise SessionError(f"JSON text size limit exceeded: {TEXT_BYTES_MAX} bytes")
        return None if end is None else self._take(end)

    def _skip_space(self) -> None:
        match = _NO_SPACE.search(self._buffer)
        length = len(self._buffer) if match is None else match.start()
        del self._buffer[:length]
        self._position = max(0, self._position - length)

    def _take(self, end: int) -> bytes:
        text = bytes(self._buffer[:end])
        del self._buffer[:end]
        self._position = self._depth = 0
        self._in_string = False
        return text.rstrip(_SPACE)

    def _find_end(self) -> int | None:
        if self._depth == 0 and not self._buffer.startswith((b"{", b"[")):
            return self._search(_LINE_END)
        while True:
            found = self._search(_IN_STRING if self._in_string else _STRUCTURE)
            if found is None or self._step(self._buffer[found - 1]):
                return found

    def _search(self, pattern: re.Pattern[bytes]) -> int | None:
        """Go on to just after the next match; None, and to the end, if there is none."""
        match = pattern.search(self._buffer, self._position)
        if match is None:  # a backslash at the end may have set the position past it
            self._position = max(self._position, len(self._buffer))
            return None
        self._position = match.end()
        return match.end()

    def _step(self, byte: int) -> bool:
        """Take account of one byte of structure; whether the text ends with it."""
        if self._in_string:
            return self._step_in_string(byte)
        if byte == ord('"'):
            self._in_string = True
        elif byte in _OPENING:
            self._depth += 1
            if self._depth > DEPTH_MAX:
                raise SessionError(f"JSON nesting depth limit exceeded: {DEPTH_MAX}")
        else:
            self._depth -= 1
        return self._depth == 0

    def _step_in_string(self, byte: int) -> bool:
        if byte == ord("\\"):
            self._position += 1
        elif byte == ord('"'):
            self._in_string = False
        return byte == ord("\n")
