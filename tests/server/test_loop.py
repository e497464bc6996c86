"""The loop is the one that was chosen."""

from __future__ import annotations

import asyncio
import importlib.util
import subprocess
import sys

import pytest

from nbdfleece.errors import UsageError
from nbdfleece.server.loop import LoopChoice, loop_factory, run


async def running_loop() -> str:
    return type(asyncio.get_running_loop()).__module__.split(".")[0]


@pytest.mark.parametrize(
    ("choice", "expected"), [("uvloop", "uvloop"), ("auto", "uvloop"), ("asyncio", "asyncio")]
)
def test_loop_is_the_one_that_was_chosen(choice: LoopChoice, expected: str) -> None:
    assert run(running_loop(), choice) == expected


def test_missing_uvloop_is_told_only_if_it_was_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    assert loop_factory("auto") is asyncio.new_event_loop
    with pytest.raises(UsageError, match="uvloop is not installed"):
        loop_factory("uvloop")


def test_server_that_is_complete_is_no_work_for_the_garbage_collector() -> None:
    """Rule 5: looking at all that is imported takes 15 ms."""
    program = """
import gc, sys
import nbdfleece.daemon
from nbdfleece.server.loop import settle
imported = len(gc.get_objects())
settle()
assert len(gc.get_objects()) < imported / 10
before = set(sys.modules)
import numpy
numpy.unique(numpy.arange(3))
assert set(sys.modules) == before
"""
    subprocess.run([sys.executable, "-c", program], check=True, timeout=60)
