"""Pulling into a stream instead of a backup directory.

There is no journal, so a stream that was cut cannot go on: it is thrown away by whoever reads
it, and pulled again.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Sequence
from contextlib import AsyncExitStack
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import partial
from typing import BinaryIO, NamedTuple

from .. import __version__
from ..errors import UsageError
from ..extents import Extents
from .blocks import DATA, Digest, cut_blocks
from .directory import check_point_name
from .errors import BackupError, ServerError
from .journal import DoneBlock
from .manifest import Compression
from .pull import PullOptions, survey, teller
from .source import Source
from .stream import StreamBlock, StreamDisk, StreamHead, StreamWriter, encode
from .transfer import Transfer


@dataclass(frozen=True, slots=True, kw_only=True)
class StreamRequest:
    """A disk to pull into a stream.

    Attributes:
        name: What to call it.
        uri: The export.
        bitmap: The context that tells what changed since ``parent`` (by its full name); None
            for everything.
        parent: The restore point to build on, by its name or that of its checkpoint; None for
            a full one.
        parent_size: Bytes that the disk had then. Without it a disk that has grown cannot be
            imported unless the bitmap has all that is new.
        parent_created: When the server made the checkpoint that ``parent`` names, if known.
        reason: Why it is to be full although an increment was asked for.
    """

    name: str
    uri: str
    bitmap: str | None = None
    parent: str | None = None
    parent_size: int | None = None
    parent_created: float | None = None
    reason: str | None = None

    def __post_init__(self) -> None:
        if (self.bitmap is None) != (self.parent is None):
            raise UsageError(f"disk {self.name!r}: an increment needs a bitmap and a parent")


class Streamed(NamedTuple):
    """A disk that was pulled into a stream; sizes are bytes."""

    disk: str
    size: int
    parent: str | None
    reason: str | None
    read_bytes: int


async def pull_stream(
    requests: Sequence[StreamRequest],
    file: BinaryIO,
    *,
    point: str,
    checkpoint: str | None = None,
    checkpoint_created: float | None = None,
    options: PullOptions | None = None,
) -> list[Streamed]:
    """Pull disks into a stream.

    Args:
        requests: The disks; all exports must show the same instant.
        file: Where to; written in a thread.
        point: What to call the restore point.
        checkpoint: The server's checkpoint made with the snapshot.
        checkpoint_created: When the server made it, in seconds since the epoch, if known.
        options: How; ``resume`` and ``journal_seconds`` do not matter here.

    Returns:
        What is in the stream, which is whole.

    Raises:
        BackupError: The stream was cut, or cannot be written.
        ServerError: A server fails or cannot be trusted, and nothing was written.
    """
    options = options or PullOptions()
    check_point_name(point)
    if not requests or len({request.name for request in requests}) != len(requests):
        raise UsageError("a pull needs at least one disk, and every disk a name of its own")
    async with AsyncExitStack() as stack:
        found = [
            await survey(stack, each.uri, each.bitmap, each.parent_size, options)
            for each in requests
        ]
        head = StreamHead(
            point=point,
            checkpoint=checkpoint,
            checkpoint_created=checkpoint_created,
            started=datetime.now(UTC),
            tool=f"nbdfleece {__version__}",
            disks=[
                _describe(request, source)
                for request, (source, _) in zip(requests, found, strict=True)
            ],
        )
        try:
            return await _write(StreamWriter(file, head), head, found, options)
        except (ServerError, OSError) as error:
            raise BackupError(
                f"the stream of {point!r} was cut, and cannot go on: {error}"
            ) from error


def _describe(request: StreamRequest, source: Source) -> StreamDisk:
    return StreamDisk(
        name=request.name,
        size=source.size,
        kind="full" if request.parent is None else "incremental",
        parent=request.parent,
        parent_size=request.parent_size,
        parent_created=request.parent_created,
        reason=request.reason,
        uri=request.uri,
        bitmap=request.bitmap,
    )


async def _write(
    writer: StreamWriter,
    head: StreamHead,
    found: Sequence[tuple[Source, Extents]],
    options: PullOptions,
) -> list[Streamed]:
    await writer.begin()
    streamed = []
    for number, (disk, (source, layer)) in enumerate(zip(head.disks, found, strict=True)):
        done = Streamed(disk.name, disk.size, disk.parent, disk.reason, 0)
        read_bytes = 0
        tell = teller(disk.name, layer, (), options.progress)

        def on_done(block: DoneBlock, tell: Callable[[DoneBlock], None] = tell) -> None:
            nonlocal read_bytes
            read_bytes += block.read_bytes
            tell(block)

        sink = StreamSink(writer, options.compression)
        await Transfer(source, sink, number, options.limit, on_done).run(cut_blocks(layer))
        streamed.append(done._replace(read_bytes=read_bytes))
    await writer.finish()
    return streamed


class StreamSink:
    """Blocks go into a stream.

    Args:
        writer: The stream.
        compression: How to compress them; None for not at all.
    """

    def __init__(self, writer: StreamWriter, compression: Compression | None) -> None:
        self._writer = writer
        self._compression = compression

    def prepare(
        self, block: DoneBlock, found: Digest, content: memoryview
    ) -> Callable[[], Awaitable[None]]:
        """Compress the data."""
        data = [
            content[piece.position : piece.position + piece.length]
            for piece in found.pieces
            if piece.status == DATA
        ]
        encoding, payload = encode(data, self._compression)
        record = StreamBlock(
            disk=block.disk,
            number=block.number,
            checksum=block.checksum,
            extents=block.extents,
            read_bytes=block.read_bytes,
            encoding=encoding,
            length=sum(map(len, payload)),
        )
        return partial(self._writer.write, record, payload)
