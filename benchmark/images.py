"""What is served: disks with known content, made once for a run and not written to."""

from __future__ import annotations

import asyncio
import hashlib
import os
import shutil
import struct
import subprocess
import threading
from collections.abc import Callable
from functools import cached_property
from pathlib import Path

import numpy as np
import trustme

from nbdfleece.bitmaps.bitmap import Bitmap
from nbdfleece.qcow2.bitmap_store import BitmapStore, StoredBitmap
from nbdfleece.qcow2.image import Qcow2Image

from .place import Place, make_hole

GRANULE = 65536
_OFFSET_MASK = 0x00FFFFFFFFFFFE00
"""The bits of an L1 entry that are a table's host offset."""
TIB = 1 << 40


class Images:
    """The images of a run, each made when it is first asked for. Threads may share this."""

    def __init__(self, place: Place) -> None:
        self.place = place
        self.size = place.image_bytes
        self.text_size = self.size // 2  # compressing and inflating take their time
        self._hashes: dict[Path, str] = {}
        self._lock = threading.RLock()  # one image is made of another

    def _make(self, name: str, fill: Callable[[Path], object], folder: Path | None = None) -> Path:
        path = (folder or self.place.memory) / name
        with self._lock:
            if not path.exists():
                part = path.with_suffix(".part")
                part.unlink(missing_ok=True)
                fill(part)
                part.rename(path)
        return path

    @cached_property
    def raw(self) -> Path:
        """Random bytes: no server can save work on them."""
        return self._make(f"r{self.size >> 20}.raw", lambda path: _fill_random(path, self.size))

    @cached_property
    def full(self) -> Path:
        """The same as a qcow2 with every cluster allocated."""
        return self._make(f"f{self.size >> 20}.qcow2", lambda path: convert(self.raw, path))

    def fragmented(self, pieces: int) -> Path:
        """The same in so many pieces of equal length, which lie in random order in the file."""
        name = f"g{self.size >> 20}-{pieces}.qcow2"
        return self._make(name, lambda path: _fill_fragmented(path, self.full, pieces))

    @cached_property
    def empty(self) -> Path:
        """A qcow2 of the same size with nothing in it."""
        return self._make(f"e{self.size >> 20}.qcow2", lambda path: create(path, self.size))

    def sparse(self, size: int) -> Path:
        """A qcow2 of any size with nothing in it."""
        return self._make(f"s{size >> 30}.qcow2", lambda path: create(path, size))

    def sparse_raw(self, size: int) -> Path:
        """Raw bytes of any size, none of which takes room."""
        return self._make(f"s{size >> 30}.raw", lambda path: make_hole(path, size))

    @cached_property
    def text(self) -> Path:
        """Raw bytes that compress to about a third, unlike everywhere."""
        name = f"t{self.text_size >> 20}.raw"
        return self._make(name, lambda path: _fill_text(path, self.text_size))

    def compressed(self, kind: str) -> Path:
        """``text`` as a qcow2 with compressed clusters, ``zlib`` or ``zstd``."""
        options = ("-c", "-o", f"compression_type={kind}")
        name = f"{kind}{self.text_size >> 20}.qcow2"
        return self._make(name, lambda path: convert(self.text, path, *options))

    def cold(self, name: str) -> Path:
        """A full qcow2 on a disk, one for each contestant's name."""
        file = f"cold-{self.size >> 20}-{name}.qcow2"
        return self._make(file, lambda path: convert(self.raw, path), self.place.disk)

    @cached_property
    def cold_raw(self) -> Path:
        """The same bytes as a raw file, on that disk."""
        name = f"cold-{self.size >> 20}.raw"
        return self._make(name, lambda path: shutil.copyfile(self.raw, path), self.place.disk)

    @cached_property
    def alternating(self) -> Path:
        """A sparse 1 TiB qcow2 with a bitmap ``b0`` in which every other granule is dirty."""
        return self._make("alternating.qcow2", _fill_alternating)

    @cached_property
    def certificates(self) -> Path:
        """A folder as GnuTLS programs keep it, for client and server."""
        folder = self.place.memory / "certificates"
        if not folder.exists():
            _make_certificates(folder)
        return folder

    def content_hash(self, raw: Path) -> str:
        """SHA-256 of a raw file."""
        with self._lock:
            if raw not in self._hashes:
                with raw.open("rb") as file:
                    self._hashes[raw] = hashlib.file_digest(file, "sha256").hexdigest()
            return self._hashes[raw]


def _make_certificates(folder: Path) -> None:
    """A throw-away authority and a server certificate for 127.0.0.1."""
    folder.mkdir()
    authority = trustme.CA(key_type=trustme.KeyType.RSA)
    authority.cert_pem.write_to_path(folder / "ca-cert.pem")
    made = authority.issue_cert("localhost", "127.0.0.1", key_type=trustme.KeyType.RSA)
    for role in ("server", "client"):
        made.private_key_pem.write_to_path(folder / f"{role}-key.pem")
        for index, part in enumerate(made.cert_chain_pems):
            part.write_to_path(folder / f"{role}-cert.pem", append=index > 0)


def create(path: Path, size: int) -> None:
    """An empty qcow2, made by qemu-img."""
    subprocess.run(["qemu-img", "create", "-q", "-f", "qcow2", str(path), str(size)], check=True)


def convert(raw: Path, path: Path, *options: str) -> None:
    """A qcow2 of a raw file, made by qemu-img."""
    argv = ["qemu-img", "convert", "-q", "-f", "raw", "-O", "qcow2", *options]
    subprocess.run([*argv, str(raw), str(path)], check=True)


def _fill_random(path: Path, size: int) -> None:
    with path.open("wb") as file:
        for _ in range(0, size, 1 << 20):
            file.write(os.urandom(min(size, 1 << 20)))


def _fill_text(path: Path, size: int) -> None:
    """Random bytes of few kinds, with repeats: zlib and zstd both make about a third of them."""
    rng = np.random.default_rng(1)
    words = [bytes(rng.integers(97, 122, length, dtype=np.uint8)) for length in range(3, 90)] * 3
    with path.open("wb") as file:
        for _ in range(0, size, 1 << 20):
            chosen = rng.integers(0, len(words), 1 << 15).tolist()
            file.write(b" ".join(words[index] for index in chosen)[: 1 << 20])


def _fill_fragmented(path: Path, full: Path, pieces: int) -> None:
    """Exchange the L2 entries of a full image: where its data are, refcounts know nothing of."""
    if (full.stat().st_size // GRANULE) < pieces:
        raise ValueError(f"{full} has fewer clusters than {pieces}")
    shutil.copyfile(full, path)
    words = np.memmap(path, ">u8", "r+")
    with full.open("rb") as file:
        cluster_bits, size, _, l1_entries, l1_offset = struct.unpack_from(
            ">IQIIQ", file.read(48), 20
        )
    l1 = (words[l1_offset // 8 :][:l1_entries] & _OFFSET_MASK).astype(np.int64) // 8
    at = (l1[:, None] + np.arange((1 << cluster_bits) // 8)).ravel()[: size >> cluster_bits]
    order = np.random.default_rng(1).permutation(pieces)
    words[at] = words[at].reshape(pieces, -1)[order].ravel()
    words.flush()


def _fill_alternating(path: Path) -> None:
    create(path, TIB)
    asyncio.run(_store_alternating(path))
    subprocess.run(["qemu-img", "check", "-q", str(path)], check=True)


async def _store_alternating(path: Path) -> None:
    bitmap = Bitmap(TIB, GRANULE)
    bitmap.array()[:] = 0xAA
    image = await Qcow2Image.open(path, read_only=False)
    try:
        store = await BitmapStore.load(image)
        await store.replace([StoredBitmap("b0", GRANULE, False, False, bitmap)], None)
    finally:
        await image.close()
