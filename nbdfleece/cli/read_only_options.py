"""The images that ``nbdfleece serve`` only shows, and which of their bitmaps it shows with them."""

from __future__ import annotations

from collections.abc import Container, Iterable
from pathlib import Path

import click

from ..errors import UsageError
from .disk_options import parse_files
from .options import option_group

read_only_options = option_group(
    click.option(
        "--read-only",
        "images",
        multiple=True,
        metavar="NAME=FILE",
        help="Serve a qcow2 image, for reading only, as export NAME; other programs may read it, "
        "too. May be repeated.",
    ),
    click.option(
        "--bitmap",
        "bitmaps",
        multiple=True,
        metavar="NAME=BITMAP",
        help="Show a dirty bitmap of a --read-only image as qemu:dirty-bitmap:BITMAP; may be "
        "repeated.",
    ),
)


def parse_images(words: Iterable[str], disks: Container[str]) -> dict[str, Path]:
    """Read ``NAME=FILE``.

    Args:
        words: What ``--read-only`` says.
        disks: Names that are taken.

    Raises:
        UsageError: One is not of that form, or a name is given twice.
    """
    images = parse_files("--read-only", words)
    for name in images:
        if name in disks:
            raise UsageError(f"'{name}' is a name of --disk and of --read-only: choose another")
    return images


def parse_bitmaps(words: Iterable[str], images: Iterable[str]) -> dict[str, list[str]]:
    """Read ``NAME=BITMAP``: names of bitmaps by the image's name.

    Raises:
        UsageError: One is not of that form, there is no such image, or a bitmap is named twice.
    """
    bitmaps: dict[str, list[str]] = {name: [] for name in images}
    for word in words:
        name, equals, bitmap = word.partition("=")
        if not (name and equals and bitmap):
            raise UsageError(f"--bitmap is NAME=BITMAP, '{word}' is not")
        if name not in bitmaps:
            raise UsageError(f"--bitmap: there is no image '{name}' of --read-only")
        if bitmap in bitmaps[name]:
            raise UsageError(f"--bitmap names '{bitmap}' of '{name}' twice")
        bitmaps[name].append(bitmap)
    return bitmaps
