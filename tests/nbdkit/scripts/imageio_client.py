"""What nbdkit's imageio.py uses of ovirt_imageio.client, over a local file."""

import os


class ImageioClient:
    def __init__(self, url, cafile=None, secure=True):
        self.fd = os.open(url, os.O_RDWR)

    def size(self):
        return os.fstat(self.fd).st_size

    def read(self, offset, buf):
        return os.preadv(self.fd, [buf], offset)

    def write(self, offset, buf):
        return os.pwritev(self.fd, [buf], offset)

    def zero(self, offset, count):
        os.pwrite(self.fd, bytes(count), offset)

    def flush(self):
        os.fsync(self.fd)

    def close(self):
        os.close(self.fd)
