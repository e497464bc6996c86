"""The loop is the one that was chosen."""

from __future__ import annotations

import asyncio
import importlib.util

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
