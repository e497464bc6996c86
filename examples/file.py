"""A file as a disk, with its holes.

    nbdkit python examples/file.py file=disk.raw

Parameters:
    file    the file; it must exist
"""

from __future__ import annotations

import errno
import fcntl
import os

import nbdkit

API_VERSION = 2

path = ""


def config(key: str, value: str) -> None:
    """Take a parameter; nbdkit goes to another folder later."""
    global path
    if key != "file":
        raise ValueError(f"unknown parameter {key!r}: there is only file")
    path = os.path.abspath(value)


def config_complete() -> None:
    """See whether all is there."""
    if not path:
        raise ValueError("parameter file is missing: file=NAME is what to serve")


def thread_model() -> int:
    """pread(2) and pwrite(2) need no lock: requests run side by side."""
    return nbdkit.THREAD_MODEL_PARALLEL


def open(readonly: bool) -> int:
    """The file's descriptor; for reading only if the file cannot be written."""
    can_be_written = not readonly and os.access(path, os.W_OK)
    return os.open(path, os.O_RDWR if can_be_written else os.O_RDONLY)


def close(h: int) -> None:
    """Give it up."""
    os.close(h)


def get_size(h: int) -> int:
    """Bytes of the file."""
    return os.stat(h).st_size


def can_write(h: int) -> bool:
    """Whether it was opened for writing."""
    return fcntl.fcntl(h, fcntl.F_GETFL) & os.O_ACCMODE == os.O_RDWR


def can_multi_conn(h: int) -> bool:
    """All descriptors show one page cache, and fdatasync(2) is for the whole file."""
    return True


def can_fua(h: int) -> int:
    """pwritev2(2) can do it."""
    return nbdkit.FUA_NATIVE


def pread(h: int, buf: memoryview, offset: int, flags: int) -> None:
    """Read all of it, in several goes if need be."""
    done = 0
    while done < len(buf):
        count = os.preadv(h, [buf[done:]], offset + done)
        if not count:
            nbdkit.set_error(errno.EIO)
            raise OSError(errno.EIO, "the file has become shorter")
        done += count


def pwrite(h: int, buf: memoryview, offset: int, flags: int) -> None:
    """Write all of it."""
    how = os.RWF_DSYNC if flags & nbdkit.FLAG_FUA else 0
    done = 0
    while done < len(buf):
        done += os.pwritev(h, [buf[done:]], offset + done, how)


def flush(h: int, flags: int) -> None:
    """Make it durable."""
    os.fdatasync(h)


def extents(h: int, count: int, offset: int, flags: int) -> list[tuple[int, int, int]]:
    """Ask the file system where data and holes are."""
    found: list[tuple[int, int, int]] = []
    end = offset + count
    while offset < end and not (found and flags & nbdkit.FLAG_REQ_ONE):
        try:
            data = os.lseek(h, offset, os.SEEK_DATA)
        except OSError as error:
            if error.errno != errno.ENXIO:
                raise
            data = end  # a hole up to the end of the file
        if data > offset:
            stop, kind = min(data, end), nbdkit.EXTENT_HOLE | nbdkit.EXTENT_ZERO
        else:
            stop, kind = min(os.lseek(h, offset, os.SEEK_HOLE), end), 0
        found.append((offset, stop - offset, kind))
        offset = stop
    return found
