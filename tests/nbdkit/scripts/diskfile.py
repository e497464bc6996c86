"""A disk in a file, with all that a script can have."""

import os

import nbdkit

API_VERSION = 2
path = None


def config(key, value):
    global path
    assert key == "file"
    path = os.path.abspath(value)


def thread_model():
    return nbdkit.THREAD_MODEL_PARALLEL


def open(readonly):
    return os.open(path, os.O_RDWR)


def close(h):
    os.close(h)


def get_size(h):
    return os.fstat(h).st_size


def pread(h, buf, offset, flags):
    assert os.preadv(h, [buf], offset) == len(buf)


def pwrite(h, buf, offset, flags):
    assert os.pwritev(h, [buf], offset) == len(buf)


def flush(h, flags):
    os.fdatasync(h)
