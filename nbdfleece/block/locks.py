"""The byte locks by which QEMU's programs and we keep out of one another's images.

QEMU (block/file-posix.c) keeps, on the open file description, a *shared* lock on

* byte ``100 + i`` for every permission ``i`` that it uses, and
* byte ``200 + i`` for every permission ``i`` that it does not let others use,

and whoever opens the file sets its own locks first and then probes the
counterparts: the bytes ``200 + i`` of what it uses, and ``100 + i`` of what it
does not share. The locks vanish with the file descriptor, also by SIGKILL.
"""

from __future__ import annotations

import fcntl
import os
import struct
from enum import Enum, IntEnum
from typing import Final

from ..errors import ImageLockedError

_F_OFD_GETLK: Final = 36
_F_OFD_SETLK: Final = 37
_FLOCK: Final = struct.Struct("hhqqi4x")
"""``struct flock``: type, whence, start, length, pid."""

_USED_BASE: Final = 100
_UNSHARED_BASE: Final = 200


class Permission(IntEnum):
    """QEMU's block permissions, by their bit's number (include/block/block-common.h)."""

    CONSISTENT_READ = 0
    WRITE = 1
    WRITE_UNCHANGED = 2
    RESIZE = 3


class Access(Enum):
    """How a file is to be opened, as ``(permissions used, permissions not shared)``."""

    READ = ((Permission.CONSISTENT_READ,), (Permission.WRITE, Permission.RESIZE))
    """Reading something that must hold still: no writer beside us."""
    WRITE = (
        (Permission.CONSISTENT_READ, Permission.WRITE, Permission.RESIZE),
        (Permission.WRITE, Permission.RESIZE),
    )
    """Writing alone."""
    READ_SHARED = ((Permission.CONSISTENT_READ,), ())
    """Reading beside whoever writes (``--force-share``); what is read may be torn."""


def lock_file(fd: int, path: str | os.PathLike[str], access: Access) -> None:
    """Take the locks for ``access`` and make sure that nobody holds a counterpart.

    Args:
        fd: The open file; the locks last until its last duplicate is closed.
        path: The file's name, for the message.
        access: What the file is opened for.

    Raises:
        ImageLockedError: Another program uses the file in a way that excludes ours.
            No lock is left behind.
        OSError: The file system has no such locks.
    """
    used, unshared = access.value
    mine = [_USED_BASE + bit for bit in used] + [_UNSHARED_BASE + bit for bit in unshared]
    theirs = [_UNSHARED_BASE + bit for bit in used] + [_USED_BASE + bit for bit in unshared]
    if not all(_set_lock(fd, byte) for byte in mine) or any(_is_locked(fd, b) for b in theirs):
        _unlock(fd)
        raise ImageLockedError(path, _advice(access))


def _advice(access: Access) -> str:
    if access is Access.WRITE:
        return "in use by another program: stop it before opening the image for writing"
    if access is Access.READ:
        return "being written by another program: stop it, or read beside it with --force-share"
    return "another program excludes all readers: stop it first"


def _set_lock(fd: int, byte: int) -> bool:
    """Take the shared lock on one byte; False if somebody holds it exclusively."""
    try:
        fcntl.fcntl(fd, _F_OFD_SETLK, _FLOCK.pack(fcntl.F_RDLCK, os.SEEK_SET, byte, 1, 0))
    except (BlockingIOError, PermissionError):  # EAGAIN or EACCES, as the system likes
        return False
    return True


def _is_locked(fd: int, byte: int) -> bool:
    """Whether another open file description holds any lock on the byte."""
    probe = _FLOCK.pack(fcntl.F_WRLCK, os.SEEK_SET, byte, 1, 0)
    answer = fcntl.fcntl(fd, _F_OFD_GETLK, probe)
    return bool(_FLOCK.unpack(answer)[0] != fcntl.F_UNLCK)


def _unlock(fd: int) -> None:
    length = _UNSHARED_BASE + len(Permission) - _USED_BASE
    flock = _FLOCK.pack(fcntl.F_UNLCK, os.SEEK_SET, _USED_BASE, length, 0)
    fcntl.fcntl(fd, _F_OFD_SETLK, flock)
