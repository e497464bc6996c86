"""What all rows share."""

from __future__ import annotations

from abc import ABC, abstractmethod
from pathlib import Path
from typing import ClassVar

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

    @abstractmethod
    def measure(self, server: Server, running: Running) -> dict[str, float]:
        """Run the workload once.

        Returns:
            The metrics' values. With ``operations``, the processor time that the server has
            used, which every row's results have beside its metrics, is for each of them.
        """

    def check(self, server: Server) -> None:
        """Look, outside the measured time, that a server's data are right."""

    def sample(self, server: Server) -> dict[str, float]:
        """Start the server, run the workload once, end the server."""
        setup = self.setup()
        for path in self.warm_files(setup):
            warm(path)
        with server.serve(setup) as running:
            before = running.process.cpu_seconds()
            values = self.measure(server, running)
            used = running.process.cpu_seconds() - before
        values["server-cpu"] = used / values.pop("operations", 1)
        return values

    def warm_files(self, setup: Setup) -> list[Path]:
        """What has to be in the page cache when a run begins."""
        return [*setup.disks.values(), *setup.raw.values()]


def throughput(bytes_done: int, seconds: float) -> float:
    """MB/s."""
    return bytes_done / seconds / 1e6
