"""The images that ``nbdfleece serve`` only shows, and the bitmaps that it shows with them."""

from __future__ import annotations

from collections.abc import Container, Iterable, Mapping
from pathlib import Path
from typing import Final

import click

from ..errors import UsageError
from .disk_options import parse_files
from .options import option_group

PROCESSES_MAX: Final = 1024
NICE_MAX: Final = 19

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
    click.option(
        "--since",
        multiple=True,
        metavar="NAME=CHECKPOINT",
        help="Show what has changed in a --read-only image since a checkpoint of it, as "
        "qemu:dirty-bitmap:CHECKPOINT; may be repeated.",
    ),
    click.option(
        "--processes",
        type=click.IntRange(min=0, max=PROCESSES_MAX),
        default=0,
        show_default=True,
        metavar="N",
        help="Serve the --read-only images and the snapshots by N more processes: with more than "
        "one processor they are faster, and a pull does not delay guests and other clients. "
        "Clients with TLS stay with the server's own process.",
    ),
    click.option(
        "--processes-nice",
        type=click.IntRange(min=-NICE_MAX, max=NICE_MAX),
        default=0,
        show_default=True,
        metavar="N",
        help="Let those processes have a lower priority than the server, as of nice: where "
        "processors are short, guests wait less for pulls, and pulls take longer. Below 0 it is "
        "the server that has the lower one.",
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
    return _parse("--bitmap", "BITMAP", words, images)


def parse_since(
    words: Iterable[str], bitmaps: Mapping[str, Container[str]]
) -> dict[str, list[str]]:
    """Read ``NAME=CHECKPOINT``: names of checkpoints by the image's name.

    Args:
        words: What ``--since`` says.
        bitmaps: What ``--bitmap`` says, of all images.

    Raises:
        UsageError: One is not of that form, there is no such image, a checkpoint is named twice,
            or a bitmap would be called as it is.
    """
    since = _parse("--since", "CHECKPOINT", words, bitmaps)
    for name, checkpoints in since.items():
        for each in checkpoints:
            if each in bitmaps[name]:
                raise UsageError(f"--bitmap and --since both name '{each}' of '{name}': leave one")
    return since


def _parse(
    option: str, what: str, words: Iterable[str], images: Iterable[str]
) -> dict[str, list[str]]:
    found: dict[str, list[str]] = {name: [] for name in images}
    for word in words:
        name, equals, value = word.partition("=")
        if not (name and equals and value):
            raise UsageError(f"{option} is NAME={what}, '{word}' is not")
        if name not in found:
            raise UsageError(f"{option}: there is no image '{name}' of --read-only")
        if value in found[name]:
            raise UsageError(f"{option} names '{value}' of '{name}' twice")
        found[name].append(value)
    return found
