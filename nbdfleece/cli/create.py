"""``nbdfleece create``: new qcow2 images, with the options of ``qemu-img create``."""

from __future__ import annotations

import asyncio
import os
from pathlib import Path
from typing import Any, Final

import click

from ..errors import UsageError
from .sizes import parse_size

_SWITCHES: Final = {"on": True, "yes": True, "true": True, "off": False, "no": False}
_VERSIONS: Final = {"0.10": 2, "v2": 2, "1.1": 3, "v3": 3}
_BOOLS: Final = ("extended_l2", "lazy_refcounts", "data_file_raw")
_TEXTS: Final = ("data_file", "preallocation", "compression_type")
_NAMES: Final = (
    *("backing_file", "backing_fmt", "cluster_size", "compat", "refcount_bits", "size"),
    *_BOOLS,
    *_TEXTS,
)


@click.command()
@click.argument("file", type=click.Path(path_type=Path))
@click.argument("size", required=False)
@click.option(
    "-o",
    "options",
    multiple=True,
    metavar="NAME=VALUE[,...]",
    help=f"Options of qemu-img create: {', '.join(sorted(_NAMES))}.",
)
@click.option("-b", "--backing", metavar="FILE", help="The backing file; as -o backing_file=.")
@click.option("-F", "--backing-format", metavar="FORMAT", help="Its format: qcow2 or raw.")
def create(
    file: Path,
    size: str | None,
    options: tuple[str, ...],
    backing: str | None,
    backing_format: str | None,
) -> None:
    """Make a new qcow2 image of SIZE bytes; with a backing file its size is the default.

    Unlike qemu-img, this never writes over an existing file, and an existing raw data file of
    the right size keeps its content.
    """
    given = _parse_options(options)
    for name, value in (("size", size), ("backing_file", backing), ("backing_fmt", backing_format)):
        if value is not None and given.setdefault(name, value) != value:
            raise UsageError(f"{name} is given twice")
    asyncio.run(_create(file, given))


def _parse_options(texts: tuple[str, ...]) -> dict[str, str]:
    """Options as QEMU reads them: a comma in a value is doubled."""
    found: dict[str, str] = {}
    for text in texts:
        for part in text.replace(",,", "\0").split(","):
            name, separator, value = part.replace("\0", ",").partition("=")
            if name not in _NAMES:
                raise UsageError(f"-o {name}: there is no such option; there are {sorted(_NAMES)}")
            found[name] = value if separator else "on"
    return found


async def _create(file: Path, given: dict[str, str]) -> None:
    from ..qcow2.create import create_image

    arguments = _arguments(given)
    size = parse_size(given["size"]) if "size" in given else None
    if "backing_file" in given:
        if "backing_fmt" not in given:
            raise UsageError("a backing file needs its format: -F qcow2 or -F raw")
        below = await _backing_size(file, given["backing_file"], given["backing_fmt"])
        size = below if size is None else size
    if size is None:
        raise UsageError("the size of the disk is missing")
    await create_image(file, -(-size // 512) * 512, **arguments)


def _arguments(given: dict[str, str]) -> dict[str, Any]:
    """What the options mean to :func:`create_image`."""
    from ..qcow2.compressed import ZLIB, ZSTD
    from ..qcow2.preallocate import Preallocation

    arguments: dict[str, Any] = {name: _switch(given, name) for name in _BOOLS if name in given}
    for name, choices in (
        ("compat", _VERSIONS),
        ("compression_type", {"zlib": ZLIB, "zstd": ZSTD}),
        ("preallocation", {str(mode): mode for mode in Preallocation}),
    ):
        if name in given:
            key = "version" if name == "compat" else name
            arguments[key] = _choice(name, given[name], choices)
    for name in ("cluster_size", "refcount_bits"):
        if name in given:
            arguments[name] = parse_size(given[name])
    for name, key in (("backing_file",) * 2, ("backing_fmt", "backing_format"), ("data_file",) * 2):
        if name in given:
            arguments[key] = given[name]
    return arguments


def _switch(given: dict[str, str], name: str) -> bool:
    return bool(_choice(name, given[name], _SWITCHES))


def _choice(name: str, value: str, choices: dict[str, Any]) -> Any:
    if value not in choices:
        raise UsageError(f"{name}={value}: must be one of {', '.join(choices)}")
    return choices[value]


async def _backing_size(file: Path, name: str, image_format: str) -> int:
    """Bytes of the disk in the backing file, which must be there."""
    from ..block.file import FileNode
    from ..qcow2.backing import BackingPolicy
    from ..qcow2.image import Qcow2Image

    path = os.path.join(os.path.dirname(file), name)
    if image_format not in ("qcow2", "raw"):
        raise UsageError(f"backing format '{image_format}': must be qcow2 or raw")
    node = FileNode.open(path, read_only=True, force_share=True)
    if image_format == "qcow2":
        image = await Qcow2Image.from_file(node, force_share=True, backing_policy=BackingPolicy.ANY)
        await image.close()
        return image.size
    await node.close()
    return node.size
