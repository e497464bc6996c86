"""A hypothesis machine: an image against a plain bytearray, with reopening and QEMU."""

from __future__ import annotations

import asyncio
import tempfile
from pathlib import Path

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

from nbdfleece.block.node import BlockStatus
from nbdfleece.qcow2.create import create_image
from nbdfleece.qcow2.image import Qcow2Image
from tests.qcow2.guest import check, qemu_content

SIZE = 200_000 + 77
BACKING_SIZE = 120_001


class ImageMachine(RuleBasedStateMachine):
    def __init__(self) -> None:
        super().__init__()
        self.loop = asyncio.new_event_loop()
        self.folder = tempfile.TemporaryDirectory(dir="/dev/shm")
        self.path = Path(self.folder.name) / "disk.qcow2"

    @initialize(
        cluster_size=st.sampled_from([512, 1024, 4096, 65536]),
        refcount_bits=st.sampled_from([1, 2, 4, 8, 16, 32, 64]),
        has_backing=st.booleans(),
        extended_l2=st.booleans(),
    )
    def create(
        self, cluster_size: int, refcount_bits: int, has_backing: bool, extended_l2: bool
    ) -> None:
        self.content = bytearray(SIZE)
        backing: dict[str, str] = {}
        if has_backing:
            base = bytes(range(1, 252)) * 500
            (self.path.parent / "base.raw").write_bytes(base[:BACKING_SIZE])
            self.content[:BACKING_SIZE] = base[:BACKING_SIZE]
            backing = {"backing_file": "base.raw", "backing_format": "raw"}
        self.has_backing = has_backing
        extended_l2 = extended_l2 and cluster_size >= 16384
        creation = create_image(
            self.path,
            SIZE,
            cluster_size=cluster_size,
            refcount_bits=refcount_bits,
            extended_l2=extended_l2,
            **backing,
        )
        self.loop.run_until_complete(creation)
        self.open()

    def open(self) -> None:
        self.image = self.loop.run_until_complete(Qcow2Image.open(self.path, read_only=False))

    @rule(offset=st.integers(0, SIZE - 1), length=st.integers(1, 70_000), byte=st.integers(0, 255))
    def write(self, offset: int, length: int, byte: int) -> None:
        data = bytes([byte]) * min(length, SIZE - offset)
        self.loop.run_until_complete(self.image.write(offset, memoryview(data)))
        self.content[offset : offset + len(data)] = data

    @rule(offset=st.integers(0, SIZE - 1), length=st.integers(1, SIZE), unmap=st.booleans())
    def write_zeroes(self, offset: int, length: int, unmap: bool) -> None:
        length = min(length, SIZE - offset)
        zeroing = self.image.write_zeroes(offset, length, unmap=unmap)
        self.loop.run_until_complete(zeroing)
        self.content[offset : offset + length] = bytes(length)

    @rule(offset=st.integers(0, SIZE - 1), length=st.integers(1, SIZE))
    def trim(self, offset: int, length: int) -> None:
        size = self.image.cluster_size
        end = min(SIZE, offset + length)
        self.loop.run_until_complete(self.image.trim(offset, end - offset))
        first, last = -(-offset // size) * size, end if end == SIZE else end // size * size
        self.content[first : max(first, last)] = bytes(max(0, last - first))

    @rule()
    def flush(self) -> None:
        self.loop.run_until_complete(self.image.flush())

    @rule()
    def reopen_after_a_check_by_qemu(self) -> None:
        self.loop.run_until_complete(self.image.close())
        check(self.path)
        whole_sectors = SIZE // 512 * 512  # QEMU does not show the rest
        assert qemu_content(self.path) == self.content[:whole_sectors]
        self.open()

    @invariant()
    def content_and_status_agree(self) -> None:
        if not hasattr(self, "image"):
            return
        buffer = bytearray(SIZE)
        self.loop.run_until_complete(self.image.read_into(0, memoryview(buffer)))
        assert buffer == self.content
        status = self.loop.run_until_complete(self.image.block_status(0, SIZE))
        assert status.total() == SIZE
        offset = 0
        for length, word in status.pairs():
            if word & BlockStatus.ZERO:
                assert not any(self.content[offset : offset + length])
            offset += length

    def teardown(self) -> None:
        if hasattr(self, "image"):
            self.loop.run_until_complete(self.image.close())
            check(self.path)
        self.loop.close()
        self.folder.cleanup()


TestImageMachine = ImageMachine.TestCase
TestImageMachine.settings = settings(max_examples=40, stateful_step_count=20)
