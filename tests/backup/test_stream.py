"""Restore points through a pipe: whole, or known not to be."""

from __future__ import annotations

import errno
import io
import random
from pathlib import Path
from typing import Any, BinaryIO

import pytest

from nbdfleece.backup import (
    BackupDirectory,
    BackupError,
    PullOptions,
    StreamRequest,
    Target,
    import_stream,
    open_target,
    pull_stream,
    restore_stream,
    verify,
)
from nbdfleece.backup.manifest import BLOCK_BYTES, Compression
from nbdfleece.backup.stream import StreamHead
from nbdfleece.errors import StateError, UsageError

from .fake_server import BITMAP, Script, serving, truthful
from .programs import content_of, run

BLOCK = 4096
SIZE = 3 * BLOCK_BYTES + 5 * BLOCK


class Disk:
    """A disk that changes, and streams of it."""

    def __init__(self, folder: Path, seed: int = 1, size: int = SIZE) -> None:
        self._folder = folder
        self._random = random.Random(seed)
        self.content = bytearray(size)
        self._dirty: set[int] = set()
        self.change(60)

    def change(self, writes: int) -> None:
        count = len(self.content) // BLOCK
        for _ in range(writes):
            first = self._random.randrange(count)
            text = self._random.randbytes(512) * 8 if self._random.random() < 0.7 else bytes(BLOCK)
            self.content[first * BLOCK : (first + 1) * BLOCK] = text
            self._dirty.add(first)

    async def stream(
        self, point: str, parent: str | None = None, compression: Compression | None = None,
        created: float | None = None, **request: Any,
    ) -> bytes:  # fmt: skip
        """A stream of what the disk is now; of an increment what changed since the last one."""
        blocks = range(len(self.content) // BLOCK)
        zero = {n for n in blocks if not any(self.content[n * BLOCK : (n + 1) * BLOCK])}
        script = Script(self.content, truthful(self._dirty, zero, len(self.content), BLOCK))
        file = io.BytesIO()
        async with serving(script, self._folder) as uri:
            bitmap = None if parent is None else BITMAP
            wanted = StreamRequest(name="vda", uri=uri, bitmap=bitmap, parent=parent, **request)
            options = PullOptions(compression=compression)
            done = await pull_stream(
                [wanted],
                file,
                point=point,
                checkpoint=point,
                checkpoint_created=created,
                options=options,
            )
        assert [(each.disk, each.size, each.parent) for each in done] == [
            ("vda", len(self.content), parent)
        ]
        assert done[0].read_bytes == sum(length for _, length in script.reads)
        self._dirty = set()
        return file.getvalue()


@pytest.fixture
def disk(tmp_path: Path) -> Disk:
    return Disk(tmp_path)


@pytest.fixture
def directory(tmp_path: Path) -> BackupDirectory:
    return BackupDirectory(tmp_path / "backup")


def stored(directory: BackupDirectory, point: str) -> bytes:
    image = directory.file_path(directory.point(point).disks[0])
    run("qemu-img", "check", image)
    return content_of(image)


@pytest.mark.parametrize("compression", [None, "zlib", "zstd"])
async def test_imported_points_are_what_the_disk_was(
    disk: Disk, directory: BackupDirectory, compression: Compression | None
) -> None:
    contents, streams = {}, []
    previous = None
    for name in ("p0", "p1", "p2"):
        contents[name] = bytes(disk.content)
        streams.append(await disk.stream(name, previous, compression))
        previous = name
        disk.change(20)
    points = await import_stream(directory, io.BytesIO(streams[0]), compression=compression)
    points += await import_stream(directory, io.BytesIO(streams[1] + streams[2]))
    assert [(point.name, point.parent) for point in points] == [
        ("p0", None), ("p1", "p0"), ("p2", "p1"),
    ]  # fmt: skip
    assert not (await verify(directory)).problems
    for name, content in contents.items():
        assert stored(directory, name) == content
    if compression is not None:
        assert len(streams[0]) < points[0].disks[0].data_bytes() / 2
    assert directory.cut_pulls() == []


def to(folder: Path, ending: str = "raw") -> Any:
    async def choose(head: StreamHead) -> tuple[Target, str]:
        return await open_target(str(folder / f"restored.{ending}"), head.disks[0].size), "vda"

    return choose


@pytest.mark.parametrize("ending", ["raw", "qcow2"])
async def test_streams_one_after_another_are_restored(
    tmp_path: Path, disk: Disk, ending: str
) -> None:
    streams = await disk.stream("p0")
    for number in (1, 2):
        disk.change(20)
        streams += await disk.stream(f"p{number}", f"p{number - 1}", "zstd")
    done = await restore_stream(io.BytesIO(streams), to(tmp_path, ending))
    assert (done.point, done.disk, done.size) == ("p2", "vda", SIZE)
    restored = tmp_path / f"restored.{ending}"
    assert content_of(restored, ending) == disk.content


async def test_stream_cut_anywhere_leaves_nothing(
    tmp_path: Path, disk: Disk, directory: BackupDirectory
) -> None:
    stream = await disk.stream("p0", compression="zstd")
    ends = random.Random(2).sample(range(len(stream)), 25)
    for end in [0, 1, *ends, len(stream) - 1]:
        with pytest.raises(BackupError, match=r"cut|no stream|damaged"):
            await import_stream(directory, io.BytesIO(stream[:end]))
        assert [path.name for path in directory.path.iterdir()] == [".lock"]
        with pytest.raises(BackupError, match=r"cut|no stream|damaged"):
            await restore_stream(io.BytesIO(stream[:end]), to(tmp_path))
        assert not list(tmp_path.glob("restored*"))


async def test_every_byte_of_a_stream_counts(disk: Disk, directory: BackupDirectory) -> None:
    stream = bytearray(await disk.stream("p0", compression="zlib"))
    source = random.Random(3)
    for position in source.sample(range(len(stream)), 40):
        byte = stream[position]
        stream[position] ^= source.randrange(1, 256)
        with pytest.raises(BackupError):
            await import_stream(directory, io.BytesIO(stream))
        stream[position] = byte
        assert [path.name for path in directory.path.iterdir()] == [".lock"]
    await import_stream(directory, io.BytesIO(stream))


async def test_increment_needs_what_it_builds_on(
    tmp_path: Path, disk: Disk, directory: BackupDirectory
) -> None:
    full = await disk.stream("p0")
    disk.change(5)
    increment = await disk.stream("p1", "p0")
    with pytest.raises(BackupError, match="no restore point or checkpoint 'p0'"):
        await import_stream(directory, io.BytesIO(increment))
    with pytest.raises(BackupError, match="must come before it"):
        await restore_stream(io.BytesIO(increment), to(tmp_path))
    with pytest.raises(BackupError, match="does not build on 'p1'"):
        await restore_stream(io.BytesIO(full + increment + increment), to(tmp_path))
    await import_stream(directory, io.BytesIO(full))
    with pytest.raises(StateError, match="exists already"):
        await import_stream(directory, io.BytesIO(full))


async def test_checkpoint_of_the_same_name_made_later_is_not_built_on(
    tmp_path: Path, disk: Disk, directory: BackupDirectory
) -> None:
    full = await disk.stream("p0", created=100.5)
    disk.change(5)
    other = await disk.stream("p1", "p0", parent_created=101.5)
    same = await disk.stream("p1", "p0", parent_created=100.5)
    with pytest.raises(BackupError, match="another checkpoint 'p0'"):
        await import_stream(directory, io.BytesIO(full + other))
    with pytest.raises(BackupError, match="another checkpoint 'p0'"):
        await restore_stream(io.BytesIO(full + other), to(tmp_path))
    assert directory.point_names() == ["p0"]
    await import_stream(directory, io.BytesIO(same))


@pytest.mark.parametrize(("known", "is_refused"), [(None, True), (SIZE, False)])
async def test_disk_that_has_grown_is_refused_unless_all_that_is_new_is_there(
    disk: Disk, directory: BackupDirectory, known: int | None, is_refused: bool
) -> None:
    """QEMU's bitmap leaves what is new clean: who does not know the old size misses it."""
    await import_stream(directory, io.BytesIO(await disk.stream("p0")))
    disk.content += b"\7" * (2 * BLOCK_BYTES)
    increment = await disk.stream("p1", "p0", parent_size=known)
    if is_refused:
        with pytest.raises(BackupError, match="has grown"):
            await import_stream(directory, io.BytesIO(increment))
        assert directory.point_names() == ["p0"]
    else:
        await import_stream(directory, io.BytesIO(increment))
        assert stored(directory, "p1") == disk.content


class FullPipe(io.BytesIO):
    """A pipe whose other end goes away."""

    def write(self, data: Any) -> int:
        if self.tell() > 2 * BLOCK_BYTES:
            raise BrokenPipeError(errno.EPIPE, "Broken pipe")
        return super().write(data)


async def test_pipe_that_breaks_is_an_error(tmp_path: Path) -> None:
    content = bytearray(random.Random(1).randbytes(4 * BLOCK_BYTES))
    script = Script(content, truthful(set(), set(), len(content), BLOCK))
    file: BinaryIO = FullPipe()
    async with serving(script, tmp_path) as uri:
        with pytest.raises(BackupError, match=r"was cut, and cannot go on: .*Broken pipe"):
            await pull_stream([StreamRequest(name="vda", uri=uri)], file, point="p")
        with pytest.raises(UsageError, match="name of its own"):
            await pull_stream([StreamRequest(name="vda", uri=uri)] * 2, file, point="p")
