"""``nbdfleece checkpoint`` on images that no server has open: the engine, without a server."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

if TYPE_CHECKING:
    from ..engine.engine import Engine

images_option = click.option(
    "--image",
    "images",
    multiple=True,
    type=click.Path(path_type=Path),
    metavar="FILE",
    help="Ask no server, use this image; may be repeated: all or nothing.",
)


def create_checkpoint(images: Sequence[Path], name: str, owner: str) -> None:
    """Make a checkpoint on all images or on none."""

    async def run() -> None:
        async with _engine(images) as engine:
            await engine.create_checkpoint(name, owner=owner)

    asyncio.run(run())


def delete_checkpoint(images: Sequence[Path], name: str) -> None:
    """Delete a checkpoint on all images that have it."""

    async def run() -> None:
        async with _engine(images) as engine:
            await engine.delete_checkpoint(name)

    asyncio.run(run())


def query_checkpoints(images: Sequence[Path]) -> list[dict[str, Any]]:
    """The checkpoints of images, as a server tells them; nothing is written."""
    import msgspec

    from ..engine.offline import list_checkpoints

    found: list[dict[str, Any]] = msgspec.to_builtins(asyncio.run(list_checkpoints(images)))
    return found


@asynccontextmanager
async def _engine(images: Sequence[Path]) -> AsyncIterator[Engine]:
    """An engine over images, each a disk of its file's name; what was left open is settled."""
    from ..engine.engine import Engine
    from ..export.export import ExportTable

    engine = Engine(ExportTable())
    try:
        for path in images:
            await engine.open_disk(str(path), path)
        await engine.recover()
        yield engine
    finally:
        await engine.close()
