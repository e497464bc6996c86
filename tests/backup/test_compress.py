"""Clusters that are compressed on their way into an image."""

from __future__ import annotations

import random
from itertools import pairwise
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from nbdfleece.backup import PullOptions, compare, open_target, pull, restore, verify
from nbdfleece.backup.blocks import ABSENT, CLUSTER_BYTES, DATA, ZEROES
from nbdfleece.backup.building import compression_type
from nbdfleece.backup.compress import ImageWriter, Part
from nbdfleece.backup.manifest import Compression
from nbdfleece.errors import StateError
from nbdfleece.qcow2.create import create_image
from nbdfleece.qcow2.image import Qcow2Image

from .fake_server import Script, serving, truthful
from .histories import BLOCK, SIZE, History
from .programs import content_of, run
from .test_pull import cut_pull, full

KINDS: list[Compression] = ["zlib", "zstd"]


def make_parts(
    cuts: list[int], statuses: list[int], size: int, source: random.Random
) -> list[Part]:
    """All of a small disk in parts; half of the data does not become smaller."""
    edges = sorted({0, size, *(cut % size for cut in cuts)})
    parts = []
    for number, (start, end) in enumerate(pairwise(edges)):
        status = statuses[number % len(statuses)]
        length = end - start
        text = source.randbytes(length) if number % 2 else b"ab" * (length // 2 + 1)
        data = memoryview(text)[:length] if status == DATA else None
        parts.append(Part(start, length, status, data))
    return parts


@pytest.mark.parametrize("is_full", [True, False])
@given(
    cuts=st.lists(st.integers(0, 1 << 20), max_size=8),
    statuses=st.lists(st.sampled_from([ABSENT, DATA, ZEROES]), min_size=1, max_size=5),
    seed=st.integers(0, 3),
)
async def test_parts_are_in_the_image_whatever_becomes_smaller(
    tmp_path_factory: pytest.TempPathFactory,
    is_full: bool,
    cuts: list[int],
    statuses: list[int],
    seed: int,
) -> None:
    folder = tmp_path_factory.mktemp("images")
    size = 3 * CLUSTER_BYTES + 512 * seed
    below = bytes(size) if is_full else b"\5" * size
    (folder / "below.raw").write_bytes(below)
    kind = KINDS[seed % 2]
    backing = {} if is_full else {"backing_file": "below.raw", "backing_format": "raw"}
    await create_image(
        folder / "image.qcow2", size, compression_type=compression_type(kind), **backing
    )
    parts = make_parts(cuts, statuses, size, random.Random(seed))
    image = await Qcow2Image.open(folder / "image.qcow2", read_only=False)
    writer = ImageWriter(image, kind, is_full=is_full, disk_size=size)
    await writer.prepare(parts)()
    found = bytearray(size)
    await image.read_into(0, memoryview(found))
    await image.close()
    expected = bytearray(below)
    for part in parts:
        if part.status != ABSENT:
            expected[part.offset : part.offset + part.length] = part.data or bytes(part.length)
    assert found == expected


@pytest.mark.parametrize("kind", KINDS)
async def test_compressed_chain_is_what_the_disk_was_and_smaller(
    tmp_path: Path, kind: Compression
) -> None:
    plain, packed = History(tmp_path / "plain"), History(tmp_path / "packed", compression=kind)
    for history in (plain, packed):
        history.directory.path.parent.mkdir()
        await history.build(4)
    assert not (await verify(packed.directory)).problems
    for name, content in packed.contents.items():
        point = packed.directory.point(name)
        image = packed.directory.file_path(point.disks[0])
        assert "% compressed" in run("qemu-img", "check", image)
        assert content_of(image)[:SIZE] == content == plain.contents[name]
        restored = tmp_path / f"{name}.raw"
        await restore(packed.directory, point, "vda", await open_target(str(restored), SIZE))
        assert restored.read_bytes() == content
        script = Script(bytearray(content), truthful(set(), set(), SIZE, BLOCK))
        async with serving(script, tmp_path) as uri:
            assert not (await compare(packed.directory, point, "vda", uri)).ranges
    sizes = [history.directory.point("p0").disks[0].file_size for history in (packed, plain)]
    assert sizes[0] < sizes[1] * 2 / 3


async def test_cut_pull_goes_on_compressed_as_it_began_or_not_at_all(tmp_path: Path) -> None:
    history = History(tmp_path)
    directory = history.directory
    content = bytearray(random.Random(7).randbytes(1024) * (96 << 10))
    count = len(content) // BLOCK
    script = Script(content, truthful(set(range(count)), set(), len(content), BLOCK))
    await cut_pull(script, tmp_path, directory, "view", "zstd")
    async with serving(script, tmp_path) as uri:
        with pytest.raises(StateError, match="compression of disk 'vda' is not what it was"):
            await pull(full(uri, "view"), directory, point="first")
        options = PullOptions(compression="zstd")
        point = await pull(full(uri, "view"), directory, point="first", options=options)
    image = directory.file_path(point.disks[0])
    run("qemu-img", "check", image)
    assert content_of(image) == content
    assert not (await verify(directory)).problems
