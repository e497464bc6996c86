"""What check, create, info and map say, against QEMU 10 of Debian 13.

The same as against this system's QEMU in ``test_check``, ``test_describe`` and
``tests/cli/test_images``; here for the one that reads and writes what we do tomorrow.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from nbdfleece.errors import ImageLockedError
from nbdfleece.qcow2.check import Repair, check_image
from nbdfleece.qcow2.compressed import ZSTD
from nbdfleece.qcow2.create import create_image
from nbdfleece.qcow2.describe import describe_image
from nbdfleece.qcow2.image import Qcow2Image
from nbdfleece.qcow2.preallocate import Preallocation
from tests.qcow2.qemu import Qemu, connect
from tests.qcow2.test_check import OPTIONS, damage, make, shown
from tests.qcow2.turns_campaign import json_map, our_map
from tests.tree import debian_13

MIB = 1 << 20


@pytest.fixture
def newer(tmp_path: Path) -> Qemu:
    return Qemu(tmp_path, debian_13())


def info(qemu: Qemu, image: Path) -> dict[str, Any]:
    """As QEMU 10 says, but for the files that make up the image, which QEMU 7.2 does not list."""
    found: dict[str, Any] = json.loads(qemu.img("info", "--output=json", image))
    del found["children"]
    return found


async def check_same(qemu: Qemu, image: Path) -> None:
    """Findings, properties and map are those of QEMU."""
    assert shown(await check_image(image)) == qemu.check(image)
    assert await describe_image(image) == info(qemu, image)
    theirs = json_map(qemu, image)
    assert await our_map(image, theirs) == theirs


async def test_locks_are_those_of_qemu(newer: Qemu) -> None:
    """Each refuses what the other holds for writing, and reads it if forced."""
    image = make(newer.folder, "cluster_size=64k", 0)
    ours = await Qcow2Image.open(image, read_only=False)
    refused = newer.run("qemu-img", "info", image, statuses=(1,))
    assert "lock" in refused.stderr
    assert "format: qcow2" in newer.img("info", "-U", image)
    await ours.close()
    with newer.nbd(image, read_only=False) as socket:
        client = connect(socket)
        for read_only in (False, True):
            with pytest.raises(ImageLockedError):
                await Qcow2Image.open(image, read_only=read_only)
        await (await Qcow2Image.open(image, read_only=True, force_share=True)).close()
        client.shutdown()


@pytest.mark.parametrize("options", OPTIONS)
async def test_image_with_a_history_is_the_same_to_both(newer: Qemu, options: str) -> None:
    await check_same(newer, make(newer.folder, options, OPTIONS.index(options)))


@pytest.mark.parametrize("options", OPTIONS)
async def test_damaged_image_has_the_same_findings_and_is_repaired_as_well(
    newer: Qemu, options: str
) -> None:
    seed = OPTIONS.index(options) + 10
    image, copy = make(newer.folder, options, seed), newer.folder / "copy"
    damage(image, seed)
    assert shown(await check_image(image)) == newer.check(image)
    shutil.copy(image, copy)
    newer.run("qemu-img", "check", "-q", "-r", "all", copy, statuses=(0, 2, 3))
    await check_image(image, repair=Repair.ALL)
    left = set(newer.check(image)) & {"corruptions", "leaks"}
    assert left <= set(newer.check(copy))


@pytest.mark.parametrize(
    ("options", "ours"),
    [
        ("cluster_size=512,refcount_bits=1", {"cluster_size": 512, "refcount_bits": 1}),
        ("compat=0.10", {"version": 2}),
        (
            "extended_l2=on,cluster_size=32k,lazy_refcounts=on",
            {"extended_l2": True, "cluster_size": 32768, "lazy_refcounts": True},
        ),
        ("compression_type=zstd", {"compression_type": ZSTD}),
        ("preallocation=metadata", {"preallocation": Preallocation.METADATA}),
        (
            "preallocation=falloc,refcount_bits=64",
            {"preallocation": Preallocation.FALLOC, "refcount_bits": 64},
        ),
        ("data_file={folder}/data", {"data_file": "{folder}/data"}),
        (
            "data_file={folder}/data,data_file_raw=on",
            {"data_file": "{folder}/data", "data_file_raw": True},
        ),
    ],
)
async def test_created_image_is_that_of_qemu(
    newer: Qemu, options: str, ours: dict[str, Any]
) -> None:
    made, theirs = newer.folder / "ours", newer.folder / "theirs"
    in_folder = {
        key: value.format(folder=newer.folder) if isinstance(value, str) else value
        for key, value in ours.items()
    }
    await create_image(made, 3 * MIB, **in_folder)
    our_info, our_check = info(newer, made), newer.check(made)
    await check_same(newer, made)
    (newer.folder / "data").unlink(missing_ok=True)
    words = ["create", "-q", "-f", "qcow2", "-o", options.format(folder=newer.folder)]
    newer.img(*words, theirs, 3 * MIB)
    their_info = info(newer, theirs)
    for name in ("virtual-size", "cluster-size", "format-specific"):
        assert our_info[name] == their_info[name]
    their_check = newer.check(theirs)
    assert our_check.get("allocated-clusters") == their_check.get("allocated-clusters")
