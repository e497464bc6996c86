from __future__ import annotations

import asyncio
import time
from pathlib import Path

import pytest

from nbdfleece.backup.rate import RateLimit, parse_size
from nbdfleece.errors import UsageError


@pytest.mark.parametrize(
    ("text", "size"), [("0", 0), ("512", 512), ("2s", 1024), ("64k", 65536), (" 10M\n", 10 << 20)]
)
def test_size_is_read_as_nbdkit_does(text: str, size: int) -> None:
    assert parse_size(text) == size


@pytest.mark.parametrize("text", ["", "x", "-1", "1.5M", "10MB", "10 M"])
def test_what_is_no_size_is_refused(text: str) -> None:
    with pytest.raises(UsageError, match="not a size"):
        parse_size(text)


async def test_no_limit_waits_for_nothing() -> None:
    limit = RateLimit()
    await asyncio.wait_for(limit.take(1 << 60), 60)
    await asyncio.wait_for(limit.take(1 << 60), 60)


async def test_limit_holds_over_many_small_amounts() -> None:
    limit = RateLimit(1_000_000)
    begun = time.monotonic()
    for _ in range(30):
        await limit.take(10_000)
    assert time.monotonic() - begun > 0.2


async def test_limit_that_is_lifted_lets_those_pass_who_wait() -> None:
    limit = RateLimit(1)
    await limit.take(1 << 30)
    waiting = asyncio.create_task(limit.take(1))
    await asyncio.sleep(0)
    assert not waiting.done()
    limit.bytes_per_second = 0
    await asyncio.wait_for(waiting, 60)


async def test_file_overrides_the_limit_and_rubbish_in_it_changes_nothing(tmp_path: Path) -> None:
    file = tmp_path / "rate"
    limit = RateLimit(5, file)
    await limit.take(1)
    assert limit.bytes_per_second == 5
    file.write_text("3M\n")
    limit = RateLimit(5, file)
    await limit.take(1)
    assert limit.bytes_per_second == 3 << 20
    file.write_text("fast")
    limit = RateLimit(5, file)
    await limit.take(1)
    assert limit.bytes_per_second == 5
