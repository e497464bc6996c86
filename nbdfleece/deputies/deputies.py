"""Read-only images and snapshots served by processes of their own.

One process has one event loop and Python's one lock: a stream out of an image delays what others
ask of the same process, up to a millisecond when processors are short (rule 5). An image
that is only read has no state that its clients share with anybody, and a snapshot little
(:mod:`~..block.shared_fleece`), so that another process can serve them: the deputy of their export.
Who writes stays with the server.

All processes have all of them, so that any may serve any client. A client goes to the one that has
the fewest clients of other exports, and among those the fewest of its own: images stay apart as
long as there are processes enough, and the connections of one client are spread.

A deputy that ends by itself takes its clients with it, and the log says so. Those that come later
go to the others, or else the server serves them itself.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from itertools import count
from typing import Any, Final, Self

from ..block.file import FileNode
from ..block.node import BlockNode
from ..block.shared_codes import are_seen_in_order
from ..block.shared_fleece import Share
from ..block.snapshot_access import SnapshotAccess
from ..block.threads import in_thread
from ..errors import SnapshotError, StateError
from ..export.contexts import ALLOCATION_DEPTH, DIRTY_BITMAP_PREFIX, DirtyBitmap
from ..export.export import Export
from ..nbd.outcomes import Negotiated
from ..qcow2.image import Qcow2Image
from ..server.delegation import DelegatedClient, Ending
from ..server.limits import Limits
from ..server.loop import LoopChoice
from . import messages
from .link import Link
from .process import IGNORED_SIGNALS
from .questions import answer

END_SECONDS: Final = 10.0
"""How long a process may take to close a file or to end, once it has no clients, before it is
killed."""

START_SECONDS: Final = 60.0
"""The same for one that has just been started, and is importing."""

_SETTINGS: Final = ("name", "minimum_block_size", "preferred_block_size", "maximum_payload")

logger = logging.getLogger("nbdfleece.server")


class Deputies:
    """The processes of one server; used as a context, inside a running event loop.

    Args:
        processes: How many.
        limits: What clients may take.
        loop: The event loop of the processes.
        nice: How much lower their priority is than the server's, as of nice(2). If it is higher,
            the server's is lowered, which stays so: to raise theirs would take privileges.
    """

    def __init__(
        self, processes: int, limits: Limits, loop: LoopChoice = "auto", nice: int = 0
    ) -> None:
        self._wanted = processes
        self._limits = limits
        self._loop_choice = loop
        self._nice = nice
        self._processes: list[ProcessDeputy] = []
        self._changing = asyncio.Lock()
        """Held while the processes are told of a snapshot's export, or give one up: they know
        exports by their names, and an export that is removed at once may have a follower."""

    async def __aenter__(self) -> Self:
        """Start the processes.

        Raises:
            OSError: One cannot be started.
        """
        try:
            for _ in range(self._wanted):
                nice = max(0, self._nice)
                self._processes.append(ProcessDeputy(self._limits, self._loop_choice, nice))
        except BaseException:
            await self.__aexit__()
            raise
        if self._processes and self._nice < 0:
            os.nice(-self._nice)  # of this thread, which serves the guests, and those it begins
        return self

    async def __aexit__(self, *_: object) -> None:
        """End them, and what clients they have left."""
        await asyncio.gather(*(each.close() for each in self._processes))

    def of(self, export: Export) -> ProcessDeputy | None:
        """Who serves an export's clients; None for the server."""
        able = [each for each in self._processes if each.has(export)]
        return min(able, key=lambda each: each.load(export), default=None)

    async def add_image(self, export: Export, image: Qcow2Image) -> None:
        """Have the processes serve one more image.

        Raises:
            StateError: One cannot open the image, or has ended.
        """
        await asyncio.gather(*(each.open(export, image) for each in self._processes))

    async def add_snapshot(self, export: Export) -> None:
        """Have the processes serve an export of a snapshot, if they can; else the server does."""
        node = export.node
        able = [each for each in self._processes if not each.has_ended]
        if not able or not isinstance(node, SnapshotAccess):
            return
        if export.can_trim or not are_seen_in_order():
            return
        async with self._changing:
            try:
                share = await node.share()
                if share is None:
                    return
                with _reopened(share) as lent:
                    await asyncio.gather(*(each.share(export, lent) for each in able))
            except (OSError, SnapshotError) as error:
                logger.warning("export '%s' has no other processes: %s", export.name, error)

    async def remove(self, name: str, *, unless: Export | None) -> None:
        """No client of an export of that name is left: the processes give it up.

        Args:
            name: The export's.
            unless: But not this one, which has the name now.
        """
        async with self._changing:
            await asyncio.gather(*(each.close_export(name, unless) for each in self._processes))
        for each in self._processes:
            await each.wait_answered(name, unless)


@dataclass(eq=False, slots=True)
class _Served:
    """An export of a process.

    Attributes:
        export: The export.
        bitmaps: Those that the process has been told of.
    """

    export: Export
    bitmaps: list[DirtyBitmap] = field(default_factory=list)


class ProcessDeputy:
    """One process; a :class:`~..server.delegation.Deputy`.

    Raises:
        OSError: It cannot be started.
    """

    def __init__(self, limits: Limits, loop: LoopChoice, nice: int) -> None:
        ours, theirs = socket.socketpair()
        with theirs:
            try:
                self._process = _start(theirs.fileno(), loop, nice)
            except BaseException:
                ours.close()
                raise
        self._link = Link(ours, self._receive, self._end)
        self._numbers = count()
        self._has_answered = False
        self._exports: dict[int, _Served] = {}
        self._clients: dict[int, DelegatedClient] = {}
        self._waiters: dict[int, asyncio.Future[None]] = {}
        self._answering: dict[asyncio.Task[None], Export] = {}
        """What finds out what the process has asked of an export's snapshot, or had asked before
        it ended."""
        self._tell(messages.Begin(limits=limits, log_level=logging.getLogger().level))

    # What the server asks for.

    @property
    def has_ended(self) -> bool:
        """Whether nothing is heard of it any more."""
        return not self._link.is_open

    def load(self, export: Export) -> tuple[int, int]:
        """How many clients it has: of other exports, and of this one."""
        own = sum(each.export is export for each in self._clients.values())
        return len(self._clients) - own, own

    def has(self, export: Export) -> bool:
        """Whether it serves an export."""
        return self._number_of(export) is not None

    def _number_of(self, export: Export) -> int | None:
        for number, served in self._exports.items():
            if served.export is export:
                return number
        return None

    async def open(self, export: Export, image: Qcow2Image) -> None:
        """Serve one more export.

        Args:
            export: It shows an image, and no bitmaps but such that do not change.
            image: That image.

        Raises:
            StateError: The process cannot open the image, or has ended.
        """
        number = next(self._numbers)
        await self._ask(
            messages.Open(export=number, image=_image(image.file), settings=_settings(export))
        )
        self._exports[number] = _Served(export)

    async def share(self, export: Export, share: Share) -> None:
        """Serve one more export, of a snapshot; if that cannot be, the log says so.

        Args:
            export: It shows a :class:`~..block.snapshot_access.SnapshotAccess`.
            share: That of the snapshot; the descriptors stay the caller's.
        """
        number = next(self._numbers)
        message = messages.Share(
            export=number,
            geometry=share.geometry,
            below=None if share.below is None else _below(share.below),
            has_depth=export.context(ALLOCATION_DEPTH) is not None,
            settings=_settings(export),
        )
        with contextlib.suppress(OSError):  # the process will miss it, and say so
            self._tell(messages.Lend(what="file"), share.file)
            self._tell(messages.Lend(what="scratch"), share.scratch)
            self._tell(messages.Lend(what="codes"), share.codes)
        try:
            await self._ask_in_time(message)
        except StateError as error:
            logger.warning(
                "export '%s' not by process %d: %s", export.name, self._process.pid, error
            )
        else:
            self._exports[number] = _Served(export)

    async def close_export(self, name: str, unless: Export | None) -> None:
        """Serve an export no longer, of which no client is left; if it serves one of the name."""
        for number, served in list(self._exports.items()):
            if served.export.name == name and served.export is not unless:
                del self._exports[number]
                await self._close_file(number)

    async def wait_answered(self, name: str, unless: Export | None) -> None:
        """Return once nothing is read any more for who has given up an export, or has ended."""
        await _wait_all(
            task
            for task, export in self._answering.items()
            if export.name == name and export is not unless
        )

    async def _close_file(self, number: int) -> None:
        """Return once the process has no file of an export any more, and be it by its end."""
        with contextlib.suppress(StateError):
            await self._ask_in_time(messages.Close(export=number))
            return
        await in_thread(_wait, self._process)

    async def _ask_in_time(self, message: messages.Share | messages.Close) -> None:
        """As :meth:`_ask`; a process that does not answer is killed.

        Raises:
            StateError: It failed, or the process has ended.
        """
        limit = END_SECONDS if self._has_answered else START_SECONDS
        try:
            async with asyncio.timeout(limit):
                await self._ask(message)
        except TimeoutError:
            logger.error("process %d does not answer: killed", self._process.pid)
            self._process.kill()
            raise StateError("the process did not answer") from None

    async def close(self) -> None:
        """End the process, and the clients that it has."""
        self._exports.clear()
        self._link.close()
        self._lose("the server is shutting down")
        await in_thread(_wait, self._process)
        await _wait_all(self._answering)

    def serve(self, client: DelegatedClient, sock: socket.socket, negotiated: Negotiated) -> None:
        """See :class:`~..server.delegation.Deputy`."""
        export = self._number_of(client.export)
        assert export is not None, "only the clients of what it serves are given to it"
        contexts = [(each.context_id, each.name) for each in negotiated.contexts]
        self._tell_bits(export, [name for _, name in contexts])
        message = messages.Serve(
            client=client.number,
            export=export,
            peer=client.peer,
            transmission_flags=int(negotiated.transmission_flags),
            structured_replies=negotiated.structured_replies,
            extended_headers=negotiated.extended_headers,
            contexts=contexts,
            leftover=negotiated.leftover,
        )
        self._tell(message, sock.fileno())
        self._clients[client.number] = client

    def end(self, client: DelegatedClient, how: Ending, reason: str) -> None:
        """See :class:`~..server.delegation.Deputy`."""
        if client.number in self._clients:
            self._tell(messages.End(client=client.number, how=how, reason=reason))

    def _tell_bits(self, number: int, names: list[str]) -> None:
        """Tell the process of those bitmaps that it does not know yet: some are large."""
        served = self._exports[number]
        for context in served.export.contexts:
            if not isinstance(context, DirtyBitmap) or context.name not in names:
                continue
            if context in served.bitmaps:
                continue
            served.bitmaps.append(context)
            self._tell(
                messages.Bits(
                    export=number,
                    leaf=context.name.removeprefix(DIRTY_BITMAP_PREFIX),
                    size=context.bitmap.size,
                    granularity=context.bitmap.granularity,
                    data=bytes(context.bitmap.data),
                )
            )

    def _tell(self, message: messages.Message, descriptor: int | None = None) -> None:
        self._link.send(messages.encode(message), descriptor)

    async def _ask(self, message: messages.Open | messages.Share | messages.Close) -> None:
        """Send what is answered by :class:`~.messages.Done` or :class:`~.messages.Failed`.

        Raises:
            StateError: It failed, or the process has ended.
        """
        if self.has_ended:
            raise StateError("the process has ended")
        self._tell(message)
        waiter = self._waiters[message.export] = asyncio.get_running_loop().create_future()
        await waiter

    # What it says.

    def _receive(self, data: memoryview) -> None:
        message = messages.decode_of_deputy(data)
        match message:
            case messages.Done() | messages.Failed():
                self._has_answered = True
                waiter = self._waiters.pop(message.export)
                if waiter.done():
                    return  # nobody waits any more
                if isinstance(message, messages.Failed):
                    waiter.set_exception(StateError(message.reason))
                else:
                    waiter.set_result(None)
            case messages.Locate() | messages.Read() | messages.Describe():
                self._start_answer(message)
            case messages.Drained():
                self._clients[message.client].drained()
            case messages.Closed():
                self._clients.pop(message.client).closed()
            case messages.Logged():
                _log(message)

    def _start_answer(self, question: messages.AnyQuestion) -> None:
        served = self._exports.get(question.export)
        if served is None:
            return  # it is closing the export, so that nobody waits for this
        task = asyncio.create_task(self._answer(question, served.export))
        self._answering[task] = served.export
        task.add_done_callback(self._answering.pop)

    async def _answer(self, question: messages.AnyQuestion, export: Export) -> None:
        assert isinstance(export.node, SnapshotAccess), "nothing else is shared"
        self._tell(await answer(question, export.node))

    def _end(self) -> None:
        """The process has ended by itself."""
        logger.error(
            "process %d has ended: its %d clients are disconnected, and it serves no more",
            self._process.pid,
            len(self._clients),
        )
        self._exports.clear()
        self._lose(f"process {self._process.pid} has ended")

    def _lose(self, reason: str) -> None:
        """Nothing more is heard of the process."""
        for waiter in self._waiters.values():
            if not waiter.done():
                waiter.set_exception(StateError(reason))
        self._waiters.clear()
        clients = list(self._clients.values())
        self._clients.clear()
        for client in clients:
            client.closed()


async def _wait_all(tasks: Iterable[asyncio.Task[None]]) -> None:
    """Wait for the end of tasks, which no cancellation reaches."""
    if pending := set(tasks):
        await asyncio.wait(pending)


def _image(file: FileNode, *, is_raw: bool = False) -> messages.Image:
    return messages.Image(path=os.fsencode(file.path), identity=file.identity, is_raw=is_raw)


def _below(node: BlockNode) -> messages.Image:
    """How a process opens what is below a disk's file: a backing file."""
    if isinstance(node, FileNode):
        return _image(node, is_raw=True)
    assert isinstance(node, Qcow2Image), "there are no others"
    return _image(node.file)


def _settings(export: Export) -> dict[str, Any]:
    """What matters of an export once a client has been negotiated with."""
    return {name: getattr(export, name) for name in _SETTINGS}


@contextlib.contextmanager
def _reopened(share: Share) -> Iterator[Share]:
    """The share with descriptors for reading only, and without the locks of ours.

    Raises:
        OSError: They cannot be had.
    """
    with contextlib.ExitStack() as opened:

        def again(descriptor: int) -> int:
            fd = os.open(f"/proc/self/fd/{descriptor}", os.O_RDONLY | os.O_CLOEXEC)
            opened.callback(os.close, fd)
            return fd

        file, scratch, codes = again(share.file), again(share.scratch), again(share.codes)
        yield share._replace(file=file, scratch=scratch, codes=codes)


def _start(descriptor: int, loop: LoopChoice, nice: int) -> subprocess.Popen[bytes]:
    """Start a process that finds modules where this one does, and never where it happens to be.

    It begins with those signals blocked that it is going to ignore.
    """
    program = "import os, sys; os.nice(int(sys.argv[3])); sys.path = sys.argv[4:]; "
    program += f"from {__package__} import process; process.main(int(sys.argv[1]), sys.argv[2])"
    isolation = "-I" if sys.flags.isolated else "-P"
    blocked = signal.pthread_sigmask(signal.SIG_BLOCK, IGNORED_SIGNALS)
    try:
        return subprocess.Popen(
            [sys.executable, isolation, "-c", program, str(descriptor), loop, str(nice), *sys.path],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            pass_fds=[descriptor],
        )
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, blocked)


def _wait(process: subprocess.Popen[bytes]) -> None:
    """Wait for a process that is about to end, or kill it."""
    try:
        process.wait(END_SECONDS)
    except subprocess.TimeoutExpired:
        logger.error("process %d does not end: killed", process.pid)
        process.kill()
        process.wait()


def _log(message: messages.Logged) -> None:
    """Write a line of a process, unless nobody wants it."""
    target = logging.getLogger(message.logger)
    if target.isEnabledFor(message.level):
        level = logging.getLevelName(message.level)
        fields = {"levelno": message.level, "levelname": level, "msg": message.text}
        target.handle(logging.makeLogRecord({"name": message.logger, **fields}))
