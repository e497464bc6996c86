"""What a deputy asks of the snapshots that the server keeps: both ends of a link.

A deputy reads a snapshot by itself most of the time (:mod:`~..block.shared_fleece`). The rest it
asks, a few questions at a time and no more than a piece of data in each, so that neither
end has to hold much (rule 5).
"""

from __future__ import annotations

import asyncio
import errno
import logging
from collections.abc import Callable
from itertools import count
from typing import Final

import numpy as np

from ..block.host_file import Places
from ..block.snapshot_access import SnapshotAccess
from ..errors import SnapshotError
from ..extents import Extents
from . import messages

QUESTIONS_MAX: Final = 4
"""Questions of a deputy under way at a time."""

Tell = Callable[[messages.Message], None]

logger = logging.getLogger("nbdfleece.server")


class Questions:
    """A deputy's questions, and what became of them.

    Args:
        tell: Sends a message to the server.
    """

    def __init__(self, tell: Tell) -> None:
        self._tell = tell
        self._numbers = count()
        self._waiters: dict[int, asyncio.Future[tuple[bytes, ...]]] = {}
        self._room = asyncio.Semaphore(QUESTIONS_MAX)

    async def ask(self, make: Callable[[int], messages.Question]) -> tuple[bytes, ...]:
        """Ask, and wait for the answer.

        Args:
            make: Makes the question from its number.

        Raises:
            OSError, SnapshotError: It was refused.
        """
        async with self._room:
            number = next(self._numbers)
            waiter: asyncio.Future[tuple[bytes, ...]] = asyncio.get_running_loop().create_future()
            self._waiters[number] = waiter
            try:
                self._tell(make(number))
                return await waiter
            finally:
                del self._waiters[number]

    def settle(self, message: messages.Answer | messages.Refusal) -> None:
        """The server has answered, perhaps somebody who does not wait any more."""
        waiter = self._waiters.get(message.question)
        if waiter is None or waiter.done():
            return
        if isinstance(message, messages.Answer):
            waiter.set_result(message.parts)
        elif message.error:
            waiter.set_exception(OSError(message.error, message.reason))
        else:
            waiter.set_exception(SnapshotError(message.reason))


class AskedKeeper:
    """The server as the keeper of a snapshot; a :class:`~..block.shared_fleece.Keeper`.

    Args:
        questions: The process's.
        export: The number of the snapshot's export.
    """

    def __init__(self, questions: Questions, export: int) -> None:
        self._ask = questions.ask
        self._export = export

    async def locate(self, part: int) -> Places:
        """The places of the clusters of a part of the disk."""
        (places,) = await self._ask(
            lambda number: messages.Locate(question=number, export=self._export, part=part)
        )
        return np.frombuffer(places, dtype=np.uint64)

    async def read_into(self, offset: int, view: memoryview) -> None:
        """Fill ``view`` with the snapshot's bytes from ``offset`` on."""
        step = messages.READ_BYTES_MAX
        for begin in range(0, len(view), step):
            piece = view[begin : begin + step]
            await self._read_piece(offset + begin, piece)

    async def _read_piece(self, offset: int, view: memoryview) -> None:
        (data,) = await self._ask(
            lambda number: messages.Read(
                question=number, export=self._export, offset=offset, length=len(view)
            )
        )
        view[:] = data

    async def block_status(self, offset: int, length: int, extents_max: int) -> Extents:
        """Describe a range of the snapshot."""
        lengths, status = await self._ask(
            lambda number: messages.Describe(
                question=number,
                export=self._export,
                offset=offset,
                length=length,
                extents_max=extents_max,
            )
        )
        return Extents(
            np.frombuffer(lengths, dtype=np.int64), np.frombuffer(status, dtype=np.uint32)
        )


async def answer(
    question: messages.AnyQuestion, node: SnapshotAccess
) -> messages.Answer | messages.Refusal:
    """Find what is asked of a snapshot, or why it cannot be told."""
    number = question.question
    try:
        return messages.Answer(question=number, parts=await _parts(question, node))
    except SnapshotError as error:
        return messages.Refusal(question=number, error=0, reason=str(error))
    except OSError as error:
        reason = error.strerror or str(error)
        return messages.Refusal(question=number, error=error.errno or errno.EIO, reason=reason)
    except Exception:  # a bug of ours: who asks must not wait for ever
        logger.exception("internal error")
        return messages.Refusal(question=number, error=errno.EIO, reason="internal error")


async def _parts(question: messages.AnyQuestion, node: SnapshotAccess) -> tuple[bytes, ...]:
    match question:
        case messages.Locate():
            return ((await node.locate(question.part)).tobytes(),)
        case messages.Read():
            data = bytearray(question.length)
            await node.read_into(question.offset, memoryview(data))
            return (bytes(data),)
        case messages.Describe():
            found = await node.block_status(
                question.offset, question.length, extents_max=question.extents_max
            )
            return found.lengths.tobytes(), found.status.tobytes()
