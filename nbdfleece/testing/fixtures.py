"""The pytest fixture."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack
from typing import ParamSpec

import pytest

from .live_server import LiveServer

P = ParamSpec("P")


@pytest.fixture
def nbd_server() -> Iterator[Callable[..., LiveServer]]:
    """Make servers that end with the test; takes what :class:`LiveServer` takes."""
    with ExitStack() as running:
        yield _entered(LiveServer, running)


def _entered(make: Callable[P, LiveServer], running: ExitStack) -> Callable[P, LiveServer]:
    def serve(*args: P.args, **settings: P.kwargs) -> LiveServer:
        return running.enter_context(make(*args, **settings))

    return serve
