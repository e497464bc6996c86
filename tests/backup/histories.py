"""A small backup of several points, for tests of what is done with backups."""

from __future__ import annotations

import random
from pathlib import Path

from nbdfleece.backup import BackupDirectory, DiskRequest, PullOptions, pull
from nbdfleece.backup.manifest import BLOCK_BYTES, Compression

from .fake_server import BITMAP, Script, serving, truthful
from .programs import qemu_io

BLOCK = 4096
SIZE = 2 * BLOCK_BYTES + 3 * BLOCK
"""Three blocks of checksums, the last one a short one."""


_Built = tuple[dict[str, bytes], dict[str, bytes]]
"""The files of a backup by name, and the contents of its points."""

_built: dict[tuple[int, Compression | None, int, int], _Built] = {}
"""What was built once is copied from then on."""


class History:
    """Restore points ``p0`` (full) to ``pN``, and what each contains."""

    def __init__(self, folder: Path, seed: int = 0, compression: Compression | None = None) -> None:
        self.directory = BackupDirectory(folder / "backup")
        self.contents: dict[str, bytes] = {}
        self._folder = folder
        self._seed = seed
        self._random = random.Random(seed)
        self._options = PullOptions(compression=compression)

    async def build(self, count: int, writes: int = 20) -> None:
        """Make a full point and increments on one another."""
        key = (self._seed, self._options.compression, count, writes)
        path = self.directory.path
        if key in _built:
            files, self.contents = _built[key][0], dict(_built[key][1])
            path.mkdir()
            for name, content in files.items():
                (path / name).write_bytes(content)
            return
        await self._pull(count, writes)
        files = {file.name: file.read_bytes() for file in path.iterdir()}
        _built[key] = files, dict(self.contents)

    async def _pull(self, count: int, writes: int) -> None:
        content = bytearray(SIZE)
        parent = None
        for number in range(count):
            dirty = self._change(content, writes if number else 40)
            zero = {
                block
                for block in range(SIZE // BLOCK)
                if not any(content[block * BLOCK : (block + 1) * BLOCK])
            }
            script = Script(content, truthful(dirty, zero, SIZE, BLOCK))
            async with serving(script, self._folder) as uri:
                request = DiskRequest(
                    name="vda", uri=uri, bitmap=BITMAP if parent else None, parent=parent
                )
                name = f"p{number}"
                parent = await pull([request], self.directory, point=name, options=self._options)
            self.contents[parent.name] = bytes(content)

    def damage(self, name: str, after: int = 0) -> int:
        """Overwrite some data of a point, within a sound image.

        Returns:
            Where; the first data from ``after`` on.
        """
        entry = self.directory.point(name).disks[0]
        offset = 0
        for length, status in entry.extents:
            if status == 1 and offset >= after:
                qemu_io(self.directory.file_path(entry), f"write -q -P 99 {offset} 512")
                return offset
            offset += length
        raise AssertionError("no data there")

    def _change(self, content: bytearray, writes: int) -> set[int]:
        """Write and zero here and there; which blocks were touched."""
        dirty: set[int] = set()
        for _ in range(writes):
            first = self._random.randrange(SIZE // BLOCK)
            count = min(self._random.choice([1, 1, 3, 40]), SIZE // BLOCK - first)
            new = self._random.randbytes(BLOCK // 8) * 8 * count
            if self._random.random() < 0.3:
                new = bytes(len(new))
            content[first * BLOCK : (first + count) * BLOCK] = new
            dirty.update(range(first, first + count))
        return dirty
