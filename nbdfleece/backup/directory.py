"""A backup directory: restore points as qcow2 files with a manifest each.

Everything lies in one folder, so that a copy of the folder is a copy of the backup::

    monday.json                 manifest: the restore point is complete
    monday.vda.qcow2            full
    tuesday.json
    tuesday.vda.qcow2           overlay, its backing file is monday.vda.qcow2
    wednesday.vda.qcow2.partial a pull that is under way or was cut
    wednesday.journal           what it has done so far
    prune.journal               a prune that is under way or was cut
    .lock

**Who may do what at one time**: one pull or prune (``.lock``); any number of readers
beside a pull, for a pull only adds; no reader beside a prune (a lock on the folder).
The locks are flock(2)'s and vanish with the process.

**Replacing files all at once.** A prune makes its new files beside the old ones, as
``NAME.new``. Then it writes ``prune.journal``, which lists what is to be renamed and
removed: from that moment the prune has happened. Whoever takes a lock next carries out
what is left of a journal; without a journal the new files are nothing.
"""

from __future__ import annotations

import fcntl
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Final
from urllib.parse import quote

import msgspec

from ..errors import StateError, UsageError
from .errors import BackupError
from .manifest import (
    TEMPORARY_SUFFIX,
    DiskEntry,
    Point,
    decode_manifest,
    encode_manifest,
    sync_directory,
    write_atomically,
)

MANIFEST_SUFFIX: Final = ".json"
JOURNAL_SUFFIX: Final = ".journal"
PARTIAL_SUFFIX: Final = ".partial"
PRUNE_JOURNAL: Final = "prune" + JOURNAL_SUFFIX
NEW_SUFFIX: Final = ".new"

_NAME: Final = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.+-]{0,127}")
_RESERVED: Final = ("prune",)
_NAME_BYTES_MAX: Final = 100
"""A file is named after point and disk, and a name in a folder has 255 bytes at most."""


def check_point_name(name: str) -> str:
    """Return a name that can be a restore point's.

    Raises:
        UsageError: It cannot.
    """
    if not _NAME.fullmatch(name) or name in _RESERVED or name.endswith(MANIFEST_SUFFIX):
        raise UsageError(
            f"{name!r} cannot be a restore point's name: letters, digits and _ . + -,"
            " beginning with none of . + -"
        )
    return name


def disk_file_name(point: str, disk: str) -> str:
    """What the file of a disk of a restore point is called.

    Raises:
        UsageError: The disk's name is too long for one.
    """
    encoded = quote(disk, safe="").replace(".", "%2E")  # the last dot ends the point's name
    if len(encoded) > _NAME_BYTES_MAX:
        raise UsageError(f"disk name {disk!r} is too long for a file name: give it a shorter one")
    return f"{point}.{encoded}.qcow2"


class Replacement(msgspec.Struct):
    """A prune that has been decided: names of files in the directory.

    Attributes:
        rename: What is there as ``NAME.new`` and becomes ``NAME``.
        remove: What goes.
    """

    rename: list[str]
    remove: list[str]


class BackupDirectory:
    """The restore points in a folder.

    Args:
        path: The folder.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = Path(path)

    def create(self) -> None:
        """Make the folder if it is not there.

        Raises:
            OSError: It cannot be made.
        """
        self.path.mkdir(parents=True, exist_ok=True)

    def _check_exists(self) -> None:
        if not self.path.is_dir():
            raise BackupError(f"{self.path}: there is no such backup directory")

    def point_names(self) -> list[str]:
        """The names of the complete restore points, in the order of the alphabet."""
        self._check_exists()
        names = (name for name in os.listdir(self.path) if name.endswith(MANIFEST_SUFFIX))
        return sorted(name.removesuffix(MANIFEST_SUFFIX) for name in names)

    def points(self) -> list[Point]:
        """The complete restore points, oldest first.

        Raises:
            BackupError: A manifest is damaged, or there is no such folder.
        """
        found = [self.point(name) for name in self.point_names()]
        return sorted(found, key=lambda point: (point.started, point.finished))

    def point(self, name: str) -> Point:
        """A complete restore point.

        Raises:
            BackupError: There is none of this name, or its manifest is damaged.
        """
        check_point_name(name)
        path = self.manifest_path(name)
        try:
            data = path.read_bytes()
        except FileNotFoundError:
            self._check_exists()
            raise BackupError(f"{self.path}: there is no restore point {name!r}") from None
        point = decode_manifest(data, path)
        if point.name != name:
            raise BackupError(f"{path}: the manifest is that of {point.name!r}")
        return point

    def newest(self) -> Point:
        """The newest restore point.

        Raises:
            BackupError: There is none.
        """
        points = self.points()
        if not points:
            raise BackupError(f"{self.path}: there are no restore points")
        return points[-1]

    def find(self, name: str) -> Point:
        """The restore point of a name, or else the newest one made with a checkpoint of that name.

        Raises:
            BackupError: There is neither.
        """
        points = self.points()
        for point in points:
            if point.name == name:
                return point
        for point in reversed(points):
            if point.checkpoint == name:
                return point
        raise BackupError(f"{self.path}: there is no restore point or checkpoint {name!r}")

    def has(self, name: str) -> bool:
        """Whether there is a complete restore point of this name."""
        return self.manifest_path(name).exists()

    def chain(self, point: Point, disk: str) -> list[tuple[Point, DiskEntry]]:
        """What a disk of a restore point is made of, newest first, a full one last.

        Raises:
            BackupError: The chain is broken.
        """
        chain = [(point, point.disk(disk))]
        while (parent := chain[-1][1].parent) is not None:
            if any(parent == above.name for above, _ in chain):
                raise BackupError(f"{self.path}: the chain of {point.name!r} comes back on itself")
            below = self.point(parent)
            chain.append((below, below.disk(disk)))
        if chain[-1][1].kind != "full":
            raise BackupError(f"{self.path}: the chain of {point.name!r} ends without a full one")
        return chain

    def manifest_path(self, point: str) -> Path:
        """Where a restore point's manifest is, or is to be."""
        return self.path / (point + MANIFEST_SUFFIX)

    def journal_path(self, point: str) -> Path:
        """Where the journal of a pull is."""
        return self.path / (point + JOURNAL_SUFFIX)

    def file_path(self, entry: DiskEntry) -> Path:
        """Where a disk's file is."""
        return self.path / entry.file

    def cut_pulls(self) -> list[str]:
        """Names of points whose pull is under way or was cut."""
        self._check_exists()
        names = {path.stem for path in self.path.glob("*" + JOURNAL_SUFFIX)}
        return sorted(name for name in names - set(_RESERVED) if not self.has(name))

    def publish(self, point: Point) -> None:
        """Write a restore point's manifest: it is complete from now on."""
        write_atomically(self.manifest_path(point.name), encode_manifest(point))

    def replace(self, replacement: Replacement) -> None:
        """Carry out a prune, all or nothing; the new files are there and durable.

        Whoever calls this holds :meth:`writing` and :meth:`replacing`.
        """
        data = msgspec.json.encode(replacement)
        write_atomically(self.path / PRUNE_JOURNAL, data)
        self._carry_out()

    def _carry_out(self) -> None:
        """Do what is left of a prune that was decided. May be done again and again."""
        journal = self.path / PRUNE_JOURNAL
        try:
            replacement = msgspec.json.decode(journal.read_bytes(), type=Replacement)
        except FileNotFoundError:
            return
        except (msgspec.MsgspecError, UnicodeDecodeError) as error:
            raise BackupError(f"{journal}: the journal of a prune is damaged: {error}") from None
        for name in replacement.rename:
            new = self.path / (name + NEW_SUFFIX)
            if new.exists():  # else it was renamed before the prune was cut
                new.rename(self.path / name)
        for name in replacement.remove:
            (self.path / name).unlink(missing_ok=True)
        sync_directory(self.path)
        journal.unlink()

    @contextmanager
    def writing(self) -> Iterator[None]:
        """Keep other pulls and prunes out.

        Raises:
            StateError: There is one.
        """
        self._check_exists()
        fd = os.open(self.path / ".lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
        with _locked(fd, fcntl.LOCK_EX, f"{self.path}: another pull or prune is under way"):
            if self._has_decided_prune():
                with self.replacing():
                    self._carry_out()
            self._remove_leftovers()
            yield

    def _remove_leftovers(self) -> None:
        """Remove what was being written by one who is gone, and was never put in place."""
        for suffix in (NEW_SUFFIX, TEMPORARY_SUFFIX):
            for path in self.path.glob("*" + suffix):
                path.unlink()
        for path in self.path.glob("*" + JOURNAL_SUFFIX):
            if self.has(path.stem):  # complete, but its journal was not removed any more
                path.unlink()

    @contextmanager
    def reading(self) -> Iterator[None]:
        """Keep prunes out.

        Raises:
            StateError: There is one.
        """
        if self._has_decided_prune():
            with self.replacing():
                self._carry_out()
        with _locked(self._open(), fcntl.LOCK_SH, f"{self.path}: a prune is under way"):
            yield

    @contextmanager
    def replacing(self) -> Iterator[None]:
        """Keep readers out.

        Raises:
            StateError: There are some.
        """
        with _locked(self._open(), fcntl.LOCK_EX, f"{self.path}: a restore point is in use"):
            yield

    def _has_decided_prune(self) -> bool:
        return (self.path / PRUNE_JOURNAL).exists()

    def _open(self) -> int:
        self._check_exists()
        return os.open(self.path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)


@contextmanager
def _locked(fd: int, mode: int, refusal: str) -> Iterator[None]:
    """Hold a lock on ``fd``, which is closed at the end."""
    try:
        try:
            fcntl.flock(fd, mode | fcntl.LOCK_NB)
        except BlockingIOError:
            raise StateError(refusal) from None
        yield
    finally:
        os.close(fd)


def split_point(text: str) -> tuple[str, str | None]:
    """``DIR@POINT`` as folder and name; without ``@POINT`` the newest is meant.

    A folder that exists under the whole text is taken as it is.
    """
    folder, at, name = text.rpartition("@")
    if not at or os.path.isdir(text):
        return text, None
    return folder, name
