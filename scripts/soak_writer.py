"""A writer at full speed on a live export, in a process of its own."""

from __future__ import annotations

import random
import time
from multiprocessing.connection import Connection
from typing import Any

import nbd
import numpy as np
from soak_stamps import BLOCK, Operation, stamped

REGION_BLOCKS = 8
"""Writers take turns in regions of half a cluster, so that every cluster has two writers."""

DEPTH = 16
BARRIER_OPERATIONS = 300
POLL_MS = 1000


class ConnectionLostError(Exception):
    """The server is gone."""


class Writer:
    """Writes stamps and zeroes with many operations in flight.

    Args:
        pipe: Where to be told what to do, and to report to.
        index: Which writer.
        writers: How many there are.
        blocks: How many the disk has.
        seed: For what is random.
    """

    def __init__(self, pipe: Connection, index: int, writers: int, blocks: int, seed: int) -> None:
        self._pipe = pipe
        self._random = random.Random(f"{seed}-{index}")
        self._regions = range(index, blocks // REGION_BLOCKS, writers)
        self._number = index + writers
        self._step = writers
        self._epoch = 0
        self._done: list[Operation] = []
        self._in_flight: dict[int, Operation] = {}
        self._data: dict[int, bytearray] = {}
        """What libnbd still reads, by cookie."""
        self._handle: Any = None

    def run(self) -> None:
        """Do what the pipe says, until it says ``end``.

        ``(go, URI)``: connect, say so, and write. ``(report, )``: send the operations since
        the last report. ``(pause, )``: complete and flush everything, report, and hang up.
        When the server goes away, a report is sent as if it had been asked for.
        """
        while (message := self._pipe.recv())[0] != "end":
            assert message[0] == "go", message
            try:
                self._connect(message[1])
                self._write_until_paused()
            except ConnectionLostError:
                self._report()
                self._in_flight.clear()
                self._data.clear()

    def _connect(self, uri: str) -> None:
        self._handle = nbd.NBD()
        self._handle.connect_uri(uri)
        self._pipe.send("connected")

    def _report(self) -> None:
        self._pipe.send(self._done + list(self._in_flight.values()))
        self._done = []

    def _write_until_paused(self) -> None:
        while True:
            for _ in range(BARRIER_OPERATIONS):
                while len(self._in_flight) >= DEPTH:
                    self._wait()
                self._issue()
                if self._pipe.poll():
                    message = self._pipe.recv()
                    if message[0] == "pause":
                        self._barrier()
                        self._report()
                        self._handle.shutdown()
                        return
                    self._report()
            self._barrier()

    def _issue(self) -> None:
        """Write stamps to some blocks of a region that is not busy, or zeroes."""
        busy = {each.first // REGION_BLOCKS for each in self._in_flight.values()}
        region = self._random.choice(self._regions)
        if region in busy:
            return
        count = self._random.randint(1, REGION_BLOCKS)
        first = region * REGION_BLOCKS + self._random.randint(0, REGION_BLOCKS - count)
        self._start(self._random.random() < 0.15, first, count)

    def _start(self, is_zero: bool, first: int, count: int) -> None:
        number, self._number = self._number, self._number + self._step
        operation = Operation(number, self._epoch, is_zero, first, count, time.monotonic())
        try:
            if not count:
                cookie = self._handle.aio_flush()
            elif is_zero:
                flags = self._random.choice([0, nbd.CMD_FLAG_NO_HOLE])
                cookie = self._handle.aio_zero(count * BLOCK, first * BLOCK, flags=flags)
            else:
                numbers = np.full(count, number)
                words = stamped(first, numbers, np.full(count, self._epoch))
                # Not nbd.Buffer: libnbd 1.14 never frees one that was written from.
                data = bytearray(words)
                cookie = self._handle.aio_pwrite(data, first * BLOCK)
                self._data[cookie] = data
        except nbd.Error as error:
            self._in_flight[-number] = operation
            raise self._lost(error) from error
        self._in_flight[cookie] = operation

    def _lost(self, error: Any) -> Exception:
        """What an error means: the server is gone, or it has refused a good request."""
        is_gone = self._handle.aio_is_dead() or self._handle.aio_is_closed()
        if is_gone or error.errno == "ESHUTDOWN":
            return ConnectionLostError()
        return AssertionError(f"the server answered an error: {error}")

    def _wait(self) -> None:
        """Wait for something to be acknowledged."""
        try:
            self._handle.poll(POLL_MS)
            now = time.monotonic()
            for cookie in list(self._in_flight):
                if self._handle.aio_command_completed(cookie):
                    operation = self._in_flight.pop(cookie)
                    self._data.pop(cookie, None)
                    self._done.append(operation._replace(acknowledged=now))
        except nbd.Error as error:
            raise self._lost(error) from error

    def _barrier(self) -> None:
        """Let everything be acknowledged, flush, and begin a new epoch."""
        while self._in_flight:
            self._wait()
        self._start(False, 0, 0)
        while self._in_flight:
            self._wait()
        self._epoch += 1


def write(pipe: Connection, *arguments: int) -> None:
    """The process."""
    Writer(pipe, *arguments).run()
