"""The ``key=value`` parameters of the nbdkit plugin."""

from __future__ import annotations

import os
from dataclasses import dataclass
from typing import Final

from ..errors import UsageError
from ..qcow2.backing import BackingPolicy
from ..standalone.disk import DiskOptions
from ..standalone.opening import SnapshotChoice

FORMATS: Final = ("qcow2", "raw")
KEYS: Final = ("image", "format", "snapshot", "bitmap", "checkpoint", "backing-files")
_VIEWS: Final = ("snapshot", "bitmap", "checkpoint")


@dataclass(frozen=True, slots=True, kw_only=True)
class ImageParameters:
    """What to serve.

    Attributes:
        image: Absolute path.
        format: None for what the image looks like.
        snapshot: Id or name of an internal snapshot to show instead of the disk.
        bitmap: A dirty bitmap: shown is what it marks.
        checkpoint: A checkpoint: shown is what has changed since.
        policy: Which files the image may name.
    """

    image: str
    format: str | None = None
    snapshot: str | None = None
    bitmap: str | None = None
    checkpoint: str | None = None
    policy: BackingPolicy = BackingPolicy.SAME_FOLDER

    @property
    def is_view(self) -> bool:
        """Something else is shown than the disk, so that it cannot be written."""
        return any((self.snapshot, self.bitmap, self.checkpoint))

    def disk_options(self, *, read_only: bool) -> DiskOptions:
        """How to open the image."""
        return DiskOptions(
            name=self.image,
            format=self.format,
            read_only=read_only or self.is_view,
            snapshot=None if self.snapshot is None else SnapshotChoice(either=self.snapshot),
            discard=True,
            policy=self.policy,
        )

    def describe(self) -> str:
        """What is shown, for people."""
        name = os.path.basename(self.image)
        if self.checkpoint is not None:
            return f"{name}: changes since checkpoint '{self.checkpoint}'"
        if self.bitmap is not None:
            return f"{name}: changes in bitmap '{self.bitmap}'"
        return name if self.snapshot is None else f"{name}: snapshot '{self.snapshot}'"


class ParameterReader:
    """Takes the parameters one by one, in nbdkit's order."""

    def __init__(self) -> None:
        self._given: dict[str, str] = {}

    def add(self, key: str, value: str) -> None:
        """Take one.

        Raises:
            UsageError: It is unknown, given twice, or empty.
        """
        if key not in KEYS:
            raise UsageError(f"unknown parameter '{key}': there are {', '.join(KEYS)}")
        if key in self._given:
            raise UsageError(f"parameter '{key}' is given twice")
        if not value:
            raise UsageError(f"parameter '{key}' has no value")
        # nbdkit changes its folder later.
        self._given[key] = os.path.abspath(value) if key == "image" else value

    def finish(self) -> ImageParameters:
        """All of them.

        Raises:
            UsageError: The image is missing, or they cannot be meant together.
        """
        given = dict(self._given)
        if "image" not in given:
            raise UsageError("parameter 'image' is missing: image=FILE is what to serve")
        views = [key for key in _VIEWS if key in given]
        if len(views) > 1:
            raise UsageError(f"parameters {' and '.join(views)} exclude one another")
        _check_choice(given, "format", FORMATS)
        _check_choice(given, "backing-files", [policy.value for policy in BackingPolicy])
        policy = BackingPolicy(given.pop("backing-files", BackingPolicy.SAME_FOLDER.value))
        return ImageParameters(**given, policy=policy)


def _check_choice(given: dict[str, str], key: str, choices: tuple[str, ...] | list[str]) -> None:
    if given.get(key, choices[0]) not in choices:
        raise UsageError(f"parameter '{key}' is one of {', '.join(choices)}, not '{given[key]}'")
