"""What all rows share."""

from __future__ import annotations

import resource
from abc import ABC, abstractmethod
from pathlib import Path
from typing import ClassVar

from ..clients import check_content
from ..images import Images
from ..measure import Metric
from ..place import Place, warm
from ..servers import Running, Server, Setup


class Row(ABC):
    """One workload.

    Attributes:
        name: For the command line and files.
        title: For tables.
        metrics: What one run gives.
        notes: What a reader must know to read the figures.
    """

    name: str
    title: str
    metrics: tuple[Metric, ...]
    notes: ClassVar[list[str]] = []

    def __init__(self, images: Images) -> None:
        self.images = images

    @property
    def place(self) -> Place:
        """Where the run works."""
        return self.images.place

    @abstractmethod
    def setup(self) -> Setup:
        """What servers serve."""

    def ready(self, setup: Setup) -> None:
        """Bring what is served into the page cache, or out of it, before a run."""
        bare = [] if setup.bare is None else [setup.bare]
        for path in (*setup.disks.values(), *setup.raw.values(), *bare):
            warm(path)

    def prepare(self, running: Running) -> None:
        """What the workload needs of a running server, and is no part of it."""

    @abstractmethod
    def measure(self, server: Server, running: Running) -> dict[str, float]:
        """Run the workload once.

        Returns:
            The metrics' values. With ``operations``, the processor time that the server and the
            clients have used, which every row's results have beside its metrics, is for each of
            them. A row may measure its client's by itself: ``client-cpu``.
        """

    def contents(self) -> dict[str, Path]:
        """Raw files by the names of the exports that must have their bytes."""
        return {}

    def check(self, server: Server) -> None:
        """Look, outside the measured time, that a server's data are right.

        Raises:
            WrongContent: They are not.
        """
        if contents := self.contents():
            with server.serve(self.setup()) as running:
                for name, raw in contents.items():
                    check_content(self.place, running.uri(name), self.images.content_hash(raw))

    def sample(self, server: Server) -> dict[str, float]:
        """Start the server, run the workload once, end the server."""
        setup = self.setup()
        self.ready(setup)
        with server.serve(setup) as running:
            self.prepare(running)
            before = sum(running.process.user_and_system_seconds())
            clients_before = _seconds_of_ended()
            values = self.measure(server, running)
            clients_used = _seconds_of_ended() - clients_before
            used = sum(running.process.user_and_system_seconds()) - before
        operations = values.pop("operations", 1)
        values["server-cpu"] = used / operations
        values.setdefault("client-cpu", clients_used / operations)
        return values


def _seconds_of_ended() -> float:
    """Processor time of all processes that have been waited for: clients, and servers before."""
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def throughput(bytes_done: int, seconds: float) -> float:
    """MB/s."""
    return bytes_done / seconds / 1e6
