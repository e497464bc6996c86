"""As nbdkit's ramdisk.py is: memory for all, and zeroes that may be refused."""

import errno

import nbdkit

API_VERSION = 2
memory = bytearray(1 << 20)


def config(key, value):
    nbdkit.debug(f"{key}={value}: not used")


def open(readonly):
    return "some handle"


def get_size(h):
    return len(memory)


def pread(h, buf, offset, flags):
    buf[:] = memory[offset : offset + len(buf)]


def pwrite(h, buf, offset, flags):
    memory[offset : offset + len(buf)] = buf


def zero(h, count, offset, flags):
    if not flags & nbdkit.FLAG_MAY_TRIM:
        nbdkit.set_error(errno.EOPNOTSUPP)
        raise Exception
    memory[offset : offset + count] = bytes(count)
