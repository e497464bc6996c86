"""Compressed clusters are inflated alike by every library, and by threads."""

from __future__ import annotations

import errno
import random
import sys
import zlib
from pathlib import Path

import pytest
from isal import isal_zlib

if sys.version_info >= (3, 14):
    from compression import zstd
else:
    from backports import zstd

from nbdfleece.qcow2 import compressed
from nbdfleece.qcow2.compressed import ZLIB, ZSTD, Decompressor, inflate
from nbdfleece.qcow2.image import Qcow2Image
from tests.qcow2.guest import qemu_img

CLUSTER = 65536
NOISE = random.Random(1)
TEXT = (b"some text that compresses well, number %d. " * 3000)[:CLUSTER]


def deflated(content: bytes) -> bytes:
    packer = zlib.compressobj(wbits=-12)
    return packer.compress(content) + packer.flush()


@pytest.fixture(params=[zlib.decompressobj, isal_zlib.decompressobj], ids=["zlib", "isal"])
def decompressor(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Decompressor:
    made: Decompressor = request.param
    monkeypatch.setattr(compressed, "_decompressor", made)
    return made


@pytest.mark.usefixtures("decompressor")
def test_what_follows_in_the_last_sector_is_not_inflated() -> None:
    """The length is in whole sectors: what follows is another cluster's."""
    assert inflate(deflated(TEXT) + NOISE.randbytes(400), CLUSTER, ZLIB) == TEXT


@pytest.mark.usefixtures("decompressor")
@pytest.mark.parametrize(
    "data", [NOISE.randbytes(600), deflated(TEXT)[:50], deflated(TEXT[:-1]), b"", b"\xff" * 600]
)
@pytest.mark.parametrize("kind", [ZLIB, ZSTD])
def test_damaged_cluster_is_an_io_error(data: bytes, kind: int) -> None:
    with pytest.raises(OSError, match="compressed cluster") as caught:
        inflate(data, CLUSTER, kind)
    assert caught.value.errno == errno.EIO


@pytest.mark.usefixtures("decompressor")
def test_cluster_that_inflates_without_end_is_cut() -> None:
    """One cluster's bytes and no more: a few KiB must not become gigabytes."""
    assert inflate(deflated(bytes(100 * CLUSTER)), CLUSTER, ZLIB) == bytes(CLUSTER)


@pytest.fixture(params=["library", "module"])
def zstd_library(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """With the system's libzstd, which Debian always has, and without it."""
    assert compressed._zstd_library is not None
    if request.param == "module":
        monkeypatch.setattr(compressed, "_zstd_library", None)


@pytest.mark.usefixtures("zstd_library")
def test_cluster_of_several_frames_is_inflated_in_place() -> None:
    data = zstd.compress(TEXT[:1000]) + zstd.compress(TEXT[1000:]) + NOISE.randbytes(400)
    view = memoryview(bytearray(CLUSTER))
    compressed.inflate_into(memoryview(bytearray(data)), view, ZSTD)
    assert view == TEXT


@pytest.mark.usefixtures("zstd_library")
@pytest.mark.parametrize(
    "data",
    [
        NOISE.randbytes(600),
        zstd.compress(TEXT)[:50],
        zstd.compress(TEXT[:-1]),
        b"",
        zstd.compress(TEXT)[:-1] + b"!",
    ],
)
def test_damaged_zstd_cluster_is_an_io_error(data: bytes) -> None:
    with pytest.raises(OSError, match="compressed cluster") as caught:
        compressed.inflate_into(memoryview(bytearray(data)), memoryview(bytearray(CLUSTER)), ZSTD)
    assert caught.value.errno == errno.EIO


@pytest.mark.usefixtures("zstd_library")
@pytest.mark.parametrize("compression", ["zlib", "zstd"])
async def test_any_part_of_compressed_clusters_is_read(tmp_path: Path, compression: str) -> None:
    """Whole ones by a thread, parts of one inline and kept for the next part."""
    raw, path = tmp_path / "raw", tmp_path / "disk.qcow2"
    content = b"".join(NOISE.randbytes(1000) + TEXT for _ in range(12))
    content += bytes(-len(content) % CLUSTER)
    raw.write_bytes(content)
    qemu_img(
        "convert", "-q", "-c", "-f", "raw", "-O", "qcow2",
        "-o", f"compression_type={compression}", raw, path,
    )  # fmt: skip
    image = await Qcow2Image.open(path, read_only=True)
    for offset, length in ((0, len(content)), (5 * CLUSTER - 7, 4 * CLUSTER), (CLUSTER + 1, 100)):
        for _ in range(2):
            view = memoryview(bytearray(length))
            await image.read_into(offset, view)
            assert view == content[offset : offset + length]
    await image.close()
