"""What threads do for the event loop."""

from __future__ import annotations

import asyncio
import gc
import time
import weakref

from nbdfleece.block.threads import in_thread

SECONDS_MAX = 20.0


class Held:
    """Something that is to go when nobody uses it any more, such as an image with its locks."""

    def fail(self) -> None:
        raise OSError(5, "bad sector")


async def test_what_failed_in_a_thread_is_let_go_without_the_garbage_collector() -> None:
    held = Held()
    gone = weakref.ref(held)
    gc.disable()
    try:
        try:
            await in_thread(held.fail)
        except OSError:
            del held
        deadline = time.monotonic() + SECONDS_MAX
        # The thread has it a little longer.
        while gone() is not None and time.monotonic() < deadline:
            await asyncio.sleep(0.01)
        assert gone() is None
    finally:
        gc.enable()
