"""The disks of ``nbdfleece serve``, and what becomes of their guests' discards and zeroes."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Final

import click

from ..errors import UsageError
from .options import option_group

if TYPE_CHECKING:
    from ..block.guest_options import GuestPolicy

DISCARD_MODES: Final = ("unmap", "ignore")
DETECT_ZEROES_MODES: Final = ("off", "on", "unmap")

disk_options = option_group(
    click.option(
        "--disk",
        "disks",
        multiple=True,
        metavar="NAME=FILE",
        help="Serve a qcow2 image, read and write, as export NAME; may be repeated.",
    ),
    click.option(
        "--discard",
        multiple=True,
        metavar="[NAME=]MODE",
        help="Whether the discards of a disk's guest, or of all, have an effect: unmap or ignore. "
        "Default: unmap. May be repeated; the last word counts.",
    ),
    click.option(
        "--detect-zeroes",
        multiple=True,
        metavar="[NAME=]MODE",
        help="What becomes of zeroes that a guest writes as data: off (they are written), on "
        "(they become zeroes that keep their space) or unmap (that may give it up). Default: off. "
        "May be repeated; the last word counts.",
    ),
)


def parse_disks(words: Iterable[str]) -> dict[str, Path]:
    """What ``--disk`` says: images by the disk's name; errors as of :func:`parse_files`."""
    return parse_files("--disk", words)


def parse_files(option: str, words: Iterable[str]) -> dict[str, Path]:
    """Read ``NAME=FILE``.

    Raises:
        UsageError: One is not of that form, or a name is given twice.
    """
    files: dict[str, Path] = {}
    for word in words:
        name, equals, path = word.partition("=")
        if not (name and equals and path):
            raise UsageError(f"{option} is NAME=FILE, '{word}' is not")
        if name in files:
            raise UsageError(f"{option} names '{name}' twice")
        files[name] = Path(path)
    return files


def parse_policies(
    disks: Iterable[str], discard: Iterable[str], detect_zeroes: Iterable[str]
) -> dict[str, GuestPolicy]:
    """What was asked for, by the disk's name.

    Raises:
        UsageError: A disk or mode is unknown, or the modes do not go together.
    """
    from ..block.guest_options import DetectZeroes, GuestPolicy

    names = list(disks)
    discards = _modes("--discard", names, discard, DISCARD_MODES)
    detections = _modes("--detect-zeroes", names, detect_zeroes, DETECT_ZEROES_MODES)
    policies = {}
    for name in names:
        try:
            policies[name] = GuestPolicy(
                discard=discards[name] == "unmap", detect_zeroes=DetectZeroes(detections[name])
            )
        except UsageError as error:
            raise UsageError(f"disk '{name}': {error}") from None
    return policies


def _modes(
    option: str, names: Sequence[str], words: Iterable[str], modes: Sequence[str]
) -> dict[str, str]:
    """The mode of each disk; the first of ``modes`` where nothing is said."""
    found = dict.fromkeys(names, modes[0])
    for word in words:
        name, equals, mode = word.rpartition("=")
        if mode not in modes:
            raise UsageError(f"{option} is to be one of {', '.join(modes)}, not '{mode}'")
        if equals and name not in found:
            raise UsageError(f"{option}: there is no disk '{name}'")
        found.update(dict.fromkeys([name] if equals else names, mode))
    return found
