"""A file on a web server as a read-only disk, read by ranges.

    nbdkit --filter=cache python examples/http_range.py url=http://server/disk.img

Parameters:
    url        http or https; the server must answer Range requests
    timeout    seconds for one answer; 30 if it is not given
"""

from __future__ import annotations

import errno
import http.client
import urllib.parse

import nbdkit

API_VERSION = 2

url = urllib.parse.urlsplit("")
timeout = 30.0


class Remote:
    """One client's connection to the web server, opened again where that has closed it."""

    def __init__(self) -> None:
        self._connection = self._connect()
        self.size = self._find_size()

    def _connect(self) -> http.client.HTTPConnection:
        kind = http.client.HTTPSConnection if url.scheme == "https" else http.client.HTTPConnection
        return kind(url.netloc, timeout=timeout)

    def _find_size(self) -> int:
        answer = self._ask("HEAD", {})
        length = answer.getheader("Content-Length")
        answer.read()
        if answer.status != 200 or length is None:
            raise OSError(errno.EIO, f"{url.geturl()}: {answer.status} {answer.reason}, no length")
        if answer.getheader("Accept-Ranges") != "bytes":
            raise OSError(errno.EOPNOTSUPP, f"{url.geturl()}: the server has no byte ranges")
        return int(length)

    def _ask(self, method: str, headers: dict[str, str]) -> http.client.HTTPResponse:
        """Ask; once more if the server has closed the idle connection meanwhile."""
        name = urllib.parse.urlunsplit(("", "", url.path or "/", url.query, ""))
        for is_last in (False, True):
            try:
                self._connection.request(method, name, headers=headers)
                return self._connection.getresponse()
            except (http.client.HTTPException, ConnectionError):
                self._connection.close()
                if is_last:
                    raise
        raise AssertionError("not reached")

    def read_into(self, buf: memoryview, offset: int) -> None:
        """Fill a buffer."""
        last = offset + len(buf) - 1
        answer = self._ask("GET", {"Range": f"bytes={offset}-{last}"})
        data = answer.read()
        if answer.status != 206 or len(data) != len(buf):
            raise OSError(errno.EIO, f"bytes {offset} to {last}: {answer.status} {answer.reason}")
        buf[:] = data

    def close(self) -> None:
        """Hang up."""
        self._connection.close()


def config(key: str, value: str) -> None:
    """Take a parameter."""
    global url, timeout
    if key == "url":
        url = urllib.parse.urlsplit(value)
    elif key == "timeout":
        timeout = float(value)
    else:
        raise ValueError(f"unknown parameter {key!r}: there are url and timeout")


def config_complete() -> None:
    """See whether all is there."""
    if url.scheme not in ("http", "https") or not url.netloc:
        raise ValueError("parameter url is missing, or is no http or https URL")


def thread_model() -> int:
    """One request at a time on each client's connection; clients side by side."""
    return nbdkit.THREAD_MODEL_SERIALIZE_REQUESTS


def open(readonly: bool) -> Remote:
    """Ask for the size."""
    return Remote()


def close(h: Remote) -> None:
    """Hang up."""
    h.close()


def get_size(h: Remote) -> int:
    """Bytes of the file."""
    return h.size


def can_multi_conn(h: Remote) -> bool:
    """Nobody writes."""
    return True


def block_size(h: Remote) -> tuple[int, int, int]:
    """Every request is a round trip: large ones are best."""
    return 1, 256 << 10, 0xFFFFFFFF


def pread(h: Remote, buf: memoryview, offset: int, flags: int) -> None:
    """Read a range."""
    try:
        h.read_into(buf, offset)
    except OSError as error:
        nbdkit.set_error(error.errno or errno.EIO)
        raise
