from __future__ import annotations

import hashlib
import json
import os
import subprocess
from datetime import UTC, datetime
from pathlib import Path

import pytest

from nbdfleece.backup.errors import BackupError
from nbdfleece.backup.manifest import (
    BLOCK_BYTES,
    DiskEntry,
    Point,
    checksum,
    decode_manifest,
    encode_manifest,
    file_checksum,
    write_atomically,
)


def make_point(**changes: object) -> Point:
    disk = DiskEntry(
        name="vda",
        size=100,
        kind="incremental",
        parent="monday",
        reason=None,
        uri="nbd://host/vda",
        bitmap="qemu:dirty-bitmap:monday",
        file="tuesday.vda.qcow2",
        file_size=12,
        file_blake2b="00" * 32,
        block_size=BLOCK_BYTES,
        blocks=[(0, "11" * 32)],
        extents=[(60, 0), (30, 1), (10, 3)],
        read_bytes=30,
    )
    for key, value in changes.items():
        setattr(disk, key, value)
    moment = datetime(2026, 11, 23, 4, 5, 6, tzinfo=UTC)
    return Point(
        name="tuesday",
        parent="monday",
        checkpoint="tuesday",
        checkpoint_created=1.5,
        started=moment,
        finished=moment,
        tool="nbdfleece 0",
        disks=[disk],
    )


def test_manifest_decodes_to_what_was_encoded() -> None:
    point = make_point()
    assert decode_manifest(encode_manifest(point), "x") == point
    assert (point.disks[0].changed_bytes(), point.disks[0].data_bytes()) == (40, 30)


def test_manifest_is_json_with_format_and_version() -> None:
    document = json.loads(encode_manifest(make_point()))
    assert (document["format"], document["version"]) == ("nbdfleece-backup", 1)
    assert document["point"]["disks"][0]["file-blake2b"] == "00" * 32


@pytest.mark.parametrize("mask", [0x01, 0x20, 0x80, 0xFF])
def test_every_byte_of_a_manifest_counts(mask: int) -> None:
    data = encode_manifest(make_point())
    for position in range(len(data)):
        damaged = bytearray(data)
        damaged[position] ^= mask
        with pytest.raises(BackupError):
            decode_manifest(bytes(damaged), "x")


def test_manifest_cut_or_extended_anywhere_is_refused() -> None:
    data = encode_manifest(make_point())
    for length in range(len(data)):
        with pytest.raises(BackupError):
            decode_manifest(data[:length], "x")
    with pytest.raises(BackupError):
        decode_manifest(data + b"\n", "x")


def test_manifest_of_another_version_says_so() -> None:
    data = encode_manifest(make_point()).replace(b'"version":1', b'"version":7')
    with pytest.raises(BackupError, match="version 7"):
        decode_manifest(data, "x")


@pytest.mark.parametrize(
    "changes",
    [
        {"extents": [(60, 0), (41, 1)]},
        {"extents": [(100, 1), (0, 3)]},
        {"extents": [(200, 1), (-100, 0)]},
        {"file": "../other.qcow2"},
        {"block_size": 0},
    ],
)
def test_manifest_that_cannot_be_meant_is_refused(changes: dict[str, object]) -> None:
    with pytest.raises(BackupError):
        decode_manifest(encode_manifest(make_point(**changes)), "x")


def test_checksums_are_those_of_b2sum(tmp_path: Path) -> None:
    path = tmp_path / "file"
    content = os.urandom(5 << 20)
    path.write_bytes(content)
    out = subprocess.run(["b2sum", "-l", "256", path], capture_output=True, text=True, check=True)
    assert out.stdout.split()[0] == file_checksum(path) == checksum([content[:9], content[9:]])
    assert file_checksum(path) == hashlib.blake2b(content, digest_size=32).hexdigest()


def test_write_that_fails_leaves_the_old_content(tmp_path: Path) -> None:
    path = tmp_path / "file"
    write_atomically(path, b"old")
    (tmp_path / "file.tmp").mkdir()
    with pytest.raises(IsADirectoryError):
        write_atomically(path, b"new")
    assert path.read_bytes() == b"old"
