"""Scripts served inside the test's own process, so that a test can hold their callbacks up."""

from __future__ import annotations

import asyncio
import sys
import textwrap
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest

from nbdfleece.nbdkit import lifecycle
from nbdfleece.nbdkit.host import HostOptions, PluginServer
from nbdfleece.nbdkit.lifecycle import Plugin
from nbdfleece.nbdkit.module import Server
from nbdfleece.server.listener import listen_unix

from .observe import Action, Observer

SECONDS_MAX = 120
BASE = """
import threading
import nbdkit
API_VERSION = 2
disk = bytearray(65536)
go, begun = threading.Event(), threading.Event()
def open(readonly): return 1
def get_size(h): return len(disk)
def pread(h, buf, offset, flags): buf[:] = disk[offset:offset + len(buf)]
def pwrite(h, buf, offset, flags): disk[offset:offset + len(buf)] = buf
"""


class Inside:
    """Loads and serves scripts."""

    def __init__(self, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self.folder = folder
        self.socket = folder / "socket"
        monkeypatch.setitem(sys.modules, "__main__", sys.modules["__main__"])
        monkeypatch.setitem(sys.modules, "nbdkit", sys)  # put back at the end

    def load(self, text: str, *parameters: tuple[str, str], base: str = BASE) -> Plugin:
        path = self.folder / "script.py"
        path.write_text(base + textwrap.dedent(text))
        server = Server()
        script = lifecycle.load(str(path), parameters, server)
        plugin = lifecycle.prepare(script, server)
        lifecycle.after_fork(plugin)
        return plugin

    @asynccontextmanager
    async def serve(self, plugin: Plugin, **options: Any) -> AsyncIterator[PluginServer]:
        listener = listen_unix(str(self.socket))
        async with PluginServer(plugin, HostOptions(**options), [listener]) as server:
            yield server

    async def act(self, *actions: Action, opts: bool = False) -> list[Any]:
        """What a client sees that does this, without the arguments."""
        return await asyncio.to_thread(self._act, actions, opts)

    def _act(self, actions: tuple[Action, ...], opts: bool) -> list[Any]:
        return [seen for *_, seen in Observer(self.socket, opts=opts).act(actions)[1:]]


def value_of(plugin: Plugin, name: str) -> Any:
    """A global of the script."""
    return getattr(plugin.script._module, name)
