"""The scripts in ``examples``, and of the shapes of nbdkit's own, under nbdkit and under us.

Debian packages none of nbdkit's examples, and they are not kept here. With
NBDFLEECE_NBDKIT_EXAMPLES naming the folder plugins/python/examples of nbdkit's sources, they
run too.
"""

from __future__ import annotations

import os
import random
import shutil
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from .conftest import NBDKITS, OURS, SCRIPTS, Host, need
from .observe import FUA, NO_HOLE, Action, Observer

SIZE = 1 << 20
CONTENT = random.Random(8).randbytes(SIZE)
NBDKIT = NBDKITS["nbdkit-1.32"]
ACTIONS: tuple[Action, ...] = (
    ("pread", 512, 0),
    ("pread", 512, 0),
    ("pread", 200000, 1000),
    ("pwrite", b"x" * 3000, 5000),
    ("pwrite", b"y" * 3000, 6000),
    ("pread", 10000, 0),
    ("pread", 10000, 0),
    ("zero", 4096, 5000),
    ("zero", 4096, 16384, NO_HOLE),
    ("pread", 20000, 0),
    ("pwrite", b"z" * 512, 0, FUA),
    ("flush",),
    ("status", 65536, 0),
    ("status", 65536, 0),
    ("pread", 512, SIZE - 512),
    ("shutdown",),
)


def found_examples() -> list[Path]:
    folder = os.environ.get("NBDFLEECE_NBDKIT_EXAMPLES")
    names = ("ramdisk", "file", "error", "url", "imageio")
    return [Path(folder) / f"{name}.py" for name in names] if folder else []


OUR_SHAPES = [SCRIPTS / f"{name}.py" for name in ("ramdisk", "diskfile", "error", "url")]
OUR_EXAMPLES = sorted(Path(__file__).resolve().parents[2].glob("examples/*.py"))


class Ranges(BaseHTTPRequestHandler):
    """Serves CONTENT and its ranges, whatever the method."""

    protocol_version = "HTTP/1.1"

    def do_HEAD(self) -> None:
        self.send_response(200)
        self.send_header("accept-ranges", "bytes")
        self.send_header("content-length", str(SIZE))
        self.end_headers()

    def do_POST(self) -> None:
        first, last = map(int, self.headers["range"].removeprefix("bytes=").split("-"))
        self.send_response(206)
        self.send_header("content-length", str(last + 1 - first))
        self.end_headers()
        self.wfile.write(CONTENT[first : last + 1])

    do_GET = do_POST

    def log_message(self, format: str, *args: Any) -> None:
        return


@contextmanager
def web() -> Iterator[str]:
    with ThreadingHTTPServer(("127.0.0.1", 0), Ranges) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        try:
            yield f"http://127.0.0.1:{server.server_address[1]}/disk"
        finally:
            server.shutdown()
            thread.join()


def observe(host: Host, script: Path, folder: Path, url: str) -> tuple[list[Any], bytes]:
    """What a client sees, and the file that is left."""
    folder.mkdir()
    disk = folder / "disk"
    disk.write_bytes(CONTENT)
    copy = Path(shutil.copy(script, folder))
    package = folder / "ovirt_imageio"
    package.mkdir()
    (package / "__init__.py").touch()
    shutil.copy(SCRIPTS / "imageio_client.py", package / "client.py")
    parameters = {
        "ramdisk": (),
        "url": (f"url={url}",),
        "http_range": (f"url={url}",),
        "error_injector": ("fail=pread:5000-6000:EIO:2", "fail=pwrite::ENOSPC:1"),
        "imageio": (f"transfer_url={disk}", "connections=2"),
    }.get(script.stem, (f"file={disk}",))
    with host.serve(folder, str(copy), *parameters) as running:
        seen = Observer(running.socket).act(ACTIONS)
        assert running.stop() == 0, running.errors
    return seen, disk.read_bytes()


@pytest.mark.parametrize(
    "script",
    OUR_SHAPES + OUR_EXAMPLES + found_examples(),
    ids=lambda path: path.parent.name + "-" + path.stem,
)
def test_example_behaves_as_under_nbdkit(
    script: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    need(NBDKIT, tmp_path)
    with web() as url, ThreadPoolExecutor() as both:
        jobs = []
        for host in (NBDKIT, OURS):
            folder = tmp_path / host.name
            monkeypatch.setenv("PYTHONPATH", f"{tmp_path / OURS.name}:{tmp_path / NBDKIT.name}")
            jobs.append(both.submit(observe, host, script, folder, url))
        theirs, ours = (job.result() for job in jobs)
    assert ours[0] == theirs[0]
    assert ours[1] == theirs[1]
