"""Choosing the event loop: uvloop where it is installed, asyncio's own where asked for."""

from __future__ import annotations

import asyncio
import gc
import importlib
import importlib.util
from collections.abc import Callable, Coroutine
from typing import Any, Literal, TypeVar

from ..errors import UsageError

T = TypeVar("T")

LoopChoice = Literal["auto", "uvloop", "asyncio"]


def loop_factory(choice: LoopChoice = "auto") -> Callable[[], asyncio.AbstractEventLoop]:
    """What makes the event loop.

    Args:
        choice: "auto" takes uvloop if it is installed.

    Raises:
        UsageError: uvloop was asked for and is not installed.
    """
    if choice == "asyncio":
        return asyncio.new_event_loop
    if importlib.util.find_spec("uvloop") is not None:
        import uvloop

        return uvloop.new_event_loop
    if choice == "uvloop":
        raise UsageError("uvloop is not installed: install it, or choose the loop 'asyncio'")
    return asyncio.new_event_loop


def settle() -> None:
    """A server is complete: what it has imported stays as long as it lives.

    The garbage collector need not look at 40,000 objects again, 15 ms at a time (rule 5).
    """
    importlib.import_module("numpy.ma")  # np.unique would, when a guest is waiting
    gc.collect()
    gc.freeze()


def run(main: Coroutine[Any, Any, T], choice: LoopChoice = "auto", *, debug: bool = False) -> T:
    """Run ``main`` to its end in a new event loop, as ``asyncio.run`` does."""
    with asyncio.Runner(debug=debug or None, loop_factory=loop_factory(choice)) as runner:
        return runner.run(main)
