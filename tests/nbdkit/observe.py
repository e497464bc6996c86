"""What a client sees of a server, as plain values that can be compared."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import pytest

nbd: Any = pytest.importorskip("nbd", reason="needs python3-libnbd")

Action = tuple[Any, ...]
"""A method of the client below, and its arguments."""

FUA, NO_HOLE, REQ_ONE, FAST_ZERO, DF = (
    nbd.CMD_FLAG_FUA,
    nbd.CMD_FLAG_NO_HOLE,
    nbd.CMD_FLAG_REQ_ONE,
    nbd.CMD_FLAG_FAST_ZERO,
    nbd.CMD_FLAG_DF,
)
_QUESTIONS = (
    "get_size",
    "is_read_only",
    "is_rotational",
    "can_flush",
    "can_fua",
    "can_trim",
    "can_zero",
    "can_fast_zero",
    "can_cache",
    "can_multi_conn",
    "can_df",
)


class Observer:
    """A client that checks nothing itself and notes all that it is told."""

    def __init__(self, socket: Path, *, opts: bool = False, structured: bool = True) -> None:
        self.seen: list[Any] = []
        self._client = client = nbd.NBD()
        client.set_strict_mode(0)
        client.set_request_structured_replies(structured)
        client.add_meta_context("base:allocation")
        client.set_opt_mode(opts)
        client.set_full_info(opts)
        self._socket = str(socket)

    def act(self, actions: Iterable[Action]) -> list[Any]:
        for name, *arguments in [("connect",), *actions]:
            try:
                seen = getattr(self, name)(*arguments)
            except nbd.Error as error:
                seen = f"error {error.errno}"
            self.seen.append((name, *arguments[:2], seen))
        return self.seen

    def connect(self) -> Any:
        self._client.connect_unix(self._socket)
        return None if self._client.aio_is_negotiating() else self.describe()

    def describe(self) -> Any:
        client = self._client
        answers = {question: self._ask(getattr(client, question)) for question in _QUESTIONS}
        answers["sizes"] = [self._ask(lambda: client.get_block_size(which)) for which in range(3)]  # noqa: B023
        return answers

    def _ask(self, question: Callable[[], Any]) -> Any:
        try:
            return question()
        except nbd.Error as error:
            return f"error {error.errno}"

    def list(self) -> Any:
        found: list[tuple[str, str]] = []
        self._client.opt_list(lambda name, text: found.append((name, text)) or 0)
        return found

    def info(self, name: str) -> Any:
        self._client.set_export_name(name)
        self._client.opt_info()
        return self._named()

    def go(self, name: str) -> Any:
        self._client.set_export_name(name)
        self._client.opt_go()
        return self._named()

    def _named(self) -> Any:
        client = self._client
        names = [
            self._ask(client.get_canonical_export_name),
            self._ask(client.get_export_description),
        ]
        return names, self.describe()

    def pread(self, length: int, offset: int, flags: int = 0) -> Any:
        return bytes(self._client.pread(length, offset, flags))

    def pwrite(self, data: bytes, offset: int, flags: int = 0) -> Any:
        return self._client.pwrite(data, offset, flags)

    def zero(self, length: int, offset: int, flags: int = 0) -> Any:
        if flags & FAST_ZERO and not self._client.can_fast_zero():
            return "not offered"  # nbdkit 1.32 dies of it
        return self._client.zero(length, offset, flags)

    def trim(self, length: int, offset: int, flags: int = 0) -> Any:
        return self._client.trim(length, offset, flags)

    def flush(self) -> Any:
        return self._client.flush()

    def cache(self, length: int, offset: int) -> Any:
        return self._client.cache(length, offset, 0)

    def status(self, length: int, offset: int, flags: int = 0) -> Any:
        """Extents, the last one cut at the end of the range: servers may go further."""
        found: list[tuple[int, int]] = []

        def note(context: str, begin: int, entries: Any, error: Any) -> int:
            left = length
            for piece, state in zip(entries[::2], entries[1::2], strict=True):
                if left > 0:
                    found.append((min(piece, left), state))
                left -= piece
            return 0

        self._client.block_status(length, offset, note, flags)
        return found

    def two_reads(self) -> None:
        """Two requests in flight at a time."""
        buffers = [nbd.Buffer(512), nbd.Buffer(512)]
        pending = {self._client.aio_pread(buffer, 0) for buffer in buffers}
        while pending:
            self._client.poll(1000)
            pending = {c for c in pending if not self._client.aio_command_completed(c)}

    def contexts(self, names: list[str]) -> Any:
        """The whole export in several contexts."""
        client = self._client
        for name in names:
            client.add_meta_context(name)
        client.set_export_name("any")
        client.opt_go()
        size, found = client.get_size(), {}

        def note(context: str, begin: int, entries: Any, error: Any) -> int:
            found[context] = list(zip(entries[::2], entries[1::2], strict=True))
            return 0

        client.block_status(size, 0, note)
        return found

    def shutdown(self) -> Any:
        return self._client.shutdown()
