"""One image from start to end: what fails leaves nothing behind, and the end stores everything."""

from __future__ import annotations

import asyncio
import socket
import subprocess
from pathlib import Path

import pytest

from nbdfleece.errors import StateError
from nbdfleece.server.listener import listen_unix
from nbdfleece.standalone.disk import Disk, DiskOptions
from nbdfleece.standalone.image_server import ImageServer, ServeOptions


@pytest.fixture
def image(tmp_path: Path) -> Path:
    path = tmp_path / "disk.qcow2"
    for words in (["create", "-q", "-f", "qcow2", path, "1M"], ["bitmap", "--add", path, "b0"]):
        subprocess.run(["qemu-img", *map(str, words)], check=True)
    return path


def options(image: Path, **more: object) -> ServeOptions:
    return ServeOptions(disk=DiskOptions(name=str(image)), **more)


async def test_start_that_fails_gives_up_socket_and_image(image: Path, tmp_path: Path) -> None:
    path = tmp_path / "s"
    with pytest.raises(StateError, match="Bitmap 'zz' is not found"):
        async with ImageServer(options(image, bitmaps=["b0", "zz"]), [listen_unix(str(path))]):
            pass
    assert not path.exists()
    disk = await Disk.open(DiskOptions(name=str(image)))  # nobody holds a lock on it
    await disk.bitmap("b0")  # nor was it left in use
    await disk.close()


async def test_stop_ends_clients_and_stores_what_was_recorded(image: Path, tmp_path: Path) -> None:
    path = str(tmp_path / "s")
    async with ImageServer(options(image, is_persistent=True), [listen_unix(path)]) as server:
        with socket.socket(socket.AF_UNIX) as client:
            client.setblocking(False)
            loop = asyncio.get_running_loop()
            await loop.sock_connect(client, path)
            await loop.sock_recv(client, 18)
            ending = asyncio.create_task(server.wait_end())
            await asyncio.sleep(0)
            assert not ending.done()
            server.request_stop()
            await ending
    subprocess.run(["qemu-img", "check", "-q", image], check=True)
    info = subprocess.run(["qemu-img", "info", image], check=True, capture_output=True, text=True)
    assert "auto" in info.stdout
    assert "in-use" not in info.stdout
