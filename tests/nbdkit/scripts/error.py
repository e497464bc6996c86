"""As nbdkit's error.py is: every other call of the data path fails."""

import itertools
import os

API_VERSION = 2
path = None
calls = itertools.count(1)


def config(key, value):
    global path
    assert key == "file"
    path = value


def open(readonly):
    return os.open(path, os.O_RDONLY if readonly else os.O_RDWR)


def get_size(h):
    return os.fstat(h).st_size


def can_extents(h):
    return True


def stumble(what):
    if next(calls) % 2:
        raise RuntimeError(what)


def extents(h, count, offset, flags):
    stumble("extents")
    return [(offset, count, 0)]


def pread(h, buf, offset, flags):
    stumble("pread")
    os.preadv(h, [buf], offset)


def pwrite(h, buf, offset, flags):
    stumble("pwrite")
    os.pwritev(h, [buf], offset)
