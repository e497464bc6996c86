"""Properties and maps of images, against ``qemu-img info`` and ``qemu-img map``."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path
from typing import Any

import pytest

from nbdfleece.qcow2.backing import BackingPolicy
from nbdfleece.qcow2.describe import describe_image, map_image

from .test_check import OPTIONS, make, qemu


def qemu_json(verb: str, image: Path) -> Any:
    return json.loads(subprocess.check_output(["qemu-img", verb, "--output=json", image]))


async def our_map(image: Path) -> list[dict[str, Any]]:
    """As QEMU 7.2 prints it, which does not tell what is compressed."""
    entries = [each async for each in map_image(image, backing_policy=BackingPolicy.SAME_FOLDER)]
    names = ("start", "length", "depth", "present", "zero", "data", "offset")
    return [
        {name: getattr(each, name) for name in names if getattr(each, name) is not None}
        for each in entries
    ]


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("options", OPTIONS)
async def test_info_and_map_are_those_of_qemu(folder: Path, options: str, seed: int) -> None:
    image = make(folder, options, seed)
    assert await describe_image(image) == qemu_json("info", image)
    assert await our_map(image) == qemu_json("map", image)


@pytest.mark.parametrize("extended", ["on", "off"])
@pytest.mark.parametrize("image_format", ["raw", "qcow2"])
@pytest.mark.parametrize("size", ["300k", "2M"])
async def test_overlay_has_info_and_map_of_qemu(
    folder: Path, extended: str, image_format: str, size: str
) -> None:
    base, image = folder / "base", folder / "image.qcow2"
    qemu("qemu-img", "create", "-q", "-f", image_format, base, size)
    qemu("qemu-io", "-f", image_format, "-c", "write 20k 40k", "-c", "write -z 64k 64k", base)
    options = f"extended_l2={extended}"
    words = ("-b", "base", "-F", image_format, "-o", options, image, "1M")
    qemu("qemu-img", "create", "-q", "-f", "qcow2", *words)
    qemu("qemu-io", "-c", "write 6k 2k", "-c", "write -z 200k 9k", "-c", "discard 512k 64k", image)
    assert await describe_image(image) == qemu_json("info", image)
    assert await our_map(image) == qemu_json("map", image)


@pytest.mark.parametrize("extended", ["on", "off"])
@pytest.mark.parametrize("raw", ["on", "off"])
async def test_external_data_file_is_named_and_mapped(
    folder: Path, raw: str, extended: str
) -> None:
    """A part of the first cluster, which lies at offset 0 of the data file, and all of another."""
    image = folder / "image.qcow2"
    options = f"data_file={folder}/data,data_file_raw={raw},extended_l2={extended}"
    qemu("qemu-img", "create", "-q", "-f", "qcow2", "-o", options, image, "1M")
    qemu("qemu-io", "-c", "write 4k 4k", "-c", "write 64k 64k", image)
    assert await describe_image(image) == qemu_json("info", image)
    assert await our_map(image) == qemu_json("map", image)
    qemu("qemu-io", "-c", "write -z 0 64k", "-c", "write -z 64k 64k", image)
    assert await our_map(image) == qemu_json("map", image)


async def test_raw_file_is_described(folder: Path) -> None:
    image = folder / "disk"
    qemu("qemu-img", "create", "-q", "-f", "raw", image, "1M")
    qemu("qemu-io", "-f", "raw", "-c", "write 64k 64k", image)
    assert await describe_image(image) == qemu_json("info", image)
    assert await our_map(image) == qemu_json("map", image)


async def test_info_of_a_damaged_bitmap_directory_tells_the_damage(folder: Path) -> None:
    image = make(folder, "cluster_size=64k", 1)
    data = bytearray(image.read_bytes())
    extension = data.index(b"\x23\x85\x28\x75") + 8
    directory = int.from_bytes(data[extension + 16 : extension + 24], "big")
    data[directory + 16] = 9  # the type
    image.write_bytes(data)
    shown = (await describe_image(image))["format-specific"]["data"]
    assert shown["bitmaps"] == []
    assert shown["damaged-bitmaps"] == [{"name": "b", "reason": "is of the unknown type 9"}]
