"""The scripts in ``examples`` do in a real nbdkit what they say."""

from __future__ import annotations

import errno
import os
import re
import shutil
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import nbd
import pytest

from .real import Nbdkit
from .test_nbdfleece_plugin import HOLE, KIB, MIB, ZERO, connected, map_of

EXAMPLES = Path(__file__).resolve().parents[3] / "examples"


def script(nbdkit: Nbdkit, name: str) -> Path:
    """An example where this nbdkit sees it."""
    return Path(shutil.copy(EXAMPLES / name, nbdkit.folder))


def test_ramdisk_keeps_what_is_written_and_has_holes(nbdkit: Nbdkit) -> None:
    words = ("python", script(nbdkit, "ramdisk.py"), "size=2M")
    with nbdkit.running(*words) as running, connected(running.uri) as client:
        assert client.get_size() == 2 * MIB
        assert client.can_multi_conn()
        client.pwrite(b"x" * 5000, 10_000, nbd.CMD_FLAG_FUA)
        client.pwrite(b"y" * 4096, MIB)
        client.zero(4096, MIB)
        client.pwrite(b"z" * 4096, MIB + 8192)
        client.trim(4096, MIB + 8192)
        client.flush()
        assert client.pread(5002, 9999) == b"\0" + b"x" * 5000 + b"\0"
        begin, end = 8 * KIB, 16 * KIB
        wanted = [(begin, HOLE | ZERO), (end - begin, 0), (2 * MIB - end, HOLE | ZERO)]
        assert map_of(client) == wanted
    assert "there is only size" in nbdkit.fail(*words, "colour=red")


def test_file_is_served_with_its_holes_and_written(nbdkit: Nbdkit) -> None:
    path = nbdkit.folder / "disk.raw"
    path.touch()
    os.truncate(path, MIB)
    with path.open("rb+") as file:
        file.seek(64 * KIB)
        file.write(b"x" * 64 * KIB)
    words = ("python", script(nbdkit, "file.py"), f"file={path}")
    with nbdkit.running(*words) as running, connected(running.uri) as client:
        assert client.pread(64 * KIB, 64 * KIB) == b"x" * 64 * KIB
        rest = (MIB - 128 * KIB, HOLE | ZERO)
        assert map_of(client) == [(64 * KIB, HOLE | ZERO), (64 * KIB, 0), rest]
        client.pwrite(b"durable", 0, nbd.CMD_FLAG_FUA)
        client.flush()
        assert path.read_bytes()[:7] == b"durable"
    with nbdkit.running("-r", *words) as running, connected(running.uri) as client:
        assert client.is_read_only()
    assert "parameter file is missing" in nbdkit.fail(*words[:2])


class Ranges(BaseHTTPRequestHandler):
    """Serves one content, by ranges; ``requests`` are the ranges asked for."""

    protocol_version = "HTTP/1.1"
    content = bytes(range(256)) * 4096
    requests: list[str]

    def do_HEAD(self) -> None:
        self._answer(200, b"", len(self.content))

    def do_GET(self) -> None:
        self.requests.append(self.headers["Range"])
        found = re.fullmatch(r"bytes=(\d+)-(\d+)", self.headers["Range"])
        assert found is not None
        data = self.content[int(found[1]) : int(found[2]) + 1]
        self._answer(404 if self.path != "/disk" else 206, data, len(data))

    def _answer(self, status: int, data: bytes, length: int) -> None:
        self.send_response(status)
        self.send_header("Content-Length", str(length))
        if self.path == "/disk":
            self.send_header("Accept-Ranges", "bytes")
        self.end_headers()
        self.wfile.write(data)

    def log_message(self, *words: object) -> None:
        pass


@pytest.fixture
def web() -> Iterator[str]:
    handler = type("Handler", (Ranges,), {"requests": []})
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        server.daemon_threads = True
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        yield f"http://127.0.0.1:{server.server_address[1]}"
        server.shutdown()
        thread.join()


def test_http_server_is_read_by_ranges(nbdkit: Nbdkit, web: str) -> None:
    words = ("python", script(nbdkit, "http_range.py"))
    with nbdkit.running(*words, f"url={web}/disk") as running, connected(running.uri) as client:
        assert client.is_read_only()
        assert client.get_size() == MIB
        assert client.pread(1000, 777) == Ranges.content[777:1777]
        assert client.pread(MIB, 0) == Ranges.content
    with nbdkit.running(*words, f"url={web}/other") as running:
        with pytest.raises(nbd.Error), connected(running.uri):
            pass
        assert "the server has no byte ranges" in running.log.read_text()
    assert "is no http or https URL" in nbdkit.fail(*words, "url=ftp://x/y")


def test_errors_are_injected_where_and_as_often_as_was_said(nbdkit: Nbdkit) -> None:
    path = script(nbdkit, "error_injector.py")
    faults = ("fail=pread:4096-8191:EIO", "fail=pwrite::ENOSPC:1")
    with (
        nbdkit.running("python", path, "size=64k", *faults) as running,
        connected(running.uri) as client,
    ):
        client.pread(4096, 0)
        for _ in range(2):
            with pytest.raises(nbd.Error) as caught:
                client.pread(2, 4095)
            assert caught.value.errnum == errno.EIO
        client.pread(4096, 8192)
        with pytest.raises(nbd.Error) as caught:
            client.pwrite(b"x", 0)
        assert caught.value.errnum == errno.ENOSPC
        client.pwrite(b"x", 0)
        assert client.pread(1, 0) == b"x"
    assert "the operation is one of" in nbdkit.fail("python", path, "fail=read::EIO")
