"""A whole server in this process, and clients of its control socket."""

from __future__ import annotations

import asyncio
import json
import subprocess
from collections.abc import AsyncIterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
from qemu.qmp import QMPClient

from nbdfleece.daemon import Daemon, DaemonOptions
from nbdfleece.engine.disk import ScratchOptions
from nbdfleece.nbd.uri import NbdUri
from tests.backup.conftest import tmp_path as in_memory

tmp_path = in_memory
SIZE = 16 << 20
GRANULE = 65536
SCRATCH_QUOTA = 1 << 20


def make_image(path: Path, size: int = SIZE) -> Path:
    subprocess.run(["qemu-img", "create", "-q", "-f", "qcow2", path, str(size)], check=True)
    return path


class RawClient:
    """Bytes to and from the control socket."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.reader = reader
        self.writer = writer

    async def receive(self) -> Any:
        line = await self.reader.readline()
        return json.loads(line) if line else None

    async def ask(self, text: bytes) -> Any:
        self.writer.write(text)
        return await self.receive()

    async def receive_end(self) -> None:
        """The server has hung up, maybe while it still had something unread."""
        with suppress(ConnectionResetError):
            assert await self.reader.read() == b""

    async def close(self) -> None:
        self.writer.close()
        with suppress(ConnectionError):
            await self.writer.wait_closed()


@pytest.fixture
def options(tmp_path: Path) -> DaemonOptions:
    return DaemonOptions(
        disks={name: make_image(tmp_path / f"{name}.qcow2") for name in ("vda", "vdb")},
        listen=[NbdUri(transport="unix", socket=str(tmp_path / "nbd.sock"))],
        control=tmp_path / "control.sock",
        scratch=ScratchOptions(directory=tmp_path, quota=SCRATCH_QUOTA),
        grace_seconds=1.0,
    )


@pytest.fixture
async def daemon(options: DaemonOptions) -> AsyncIterator[Daemon]:
    async with Daemon(options) as running:
        yield running


@pytest.fixture
async def qmp(daemon: Daemon) -> AsyncIterator[QMPClient]:
    client = QMPClient("test")
    await client.connect(str(daemon.options.control))
    yield client
    await client.disconnect()


@pytest.fixture
async def raw(daemon: Daemon) -> AsyncIterator[RawClient]:
    streams = await asyncio.open_unix_connection(str(daemon.options.control))
    client = RawClient(*streams)
    assert "QMP" in await client.receive()
    yield client
    await client.close()
