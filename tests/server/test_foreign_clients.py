"""libnbd, nbdcopy, qemu-img and fio as clients."""

from __future__ import annotations

import asyncio
import json
import os
import random
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from nbdfleece.block.file import FileNode
from nbdfleece.nbd.constants import Command
from nbdfleece.server.channel import PipeChannel, SocketChannel
from nbdfleece.server.listener import listen_tcp
from nbdfleece.testing.memory_node import MemoryNode

from .harness import Client, Serve, Served, export_of, pack_request

MIB = 1 << 20
nbd: Any = pytest.importorskip("nbd", reason="libnbd's Python binding is not installed")


async def run(*command: str) -> str:
    """A program's output; it must succeed."""
    process = await asyncio.create_subprocess_exec(
        *command, stdout=subprocess.PIPE, stderr=subprocess.PIPE
    )
    output, errors = await process.communicate()
    assert process.returncode == 0, errors.decode()
    return output.decode()


@pytest.fixture
def content() -> bytes:
    rng = random.Random(7)
    return b"".join(rng.choice([rng.randbytes(65536), bytes(65536)]) for _ in range(200))


async def test_nbdinfo_sees_what_the_export_offers(serve: Serve) -> None:
    served = serve([export_of(MemoryNode(MIB), description="a disk")])
    (found,) = json.loads(await run("nbdinfo", "--json", served.uri()))["exports"]
    assert found["export-size"] == MIB
    assert found["description"] == "a disk"
    assert set(found["contexts"]) == {"base:allocation", "qemu:allocation-depth"}
    can = {name for name, value in found.items() if value is True}
    assert can == {
        "can_cache", "can_df", "can_fast_zero", "can_flush", "can_fua", "can_multi_conn",
        "can_trim", "can_zero",
    }  # fmt: skip


@pytest.mark.parametrize("size", ["4096", "262144", "33554432"])
async def test_nbdcopy_copies_both_ways(
    serve: Serve, content: bytes, tmp_path: Path, size: str
) -> None:
    node = MemoryNode(content)
    served = serve(node)
    image = tmp_path / "image"
    await run("nbdcopy", "--request-size", size, served.uri(), str(image))
    assert image.read_bytes() == content
    node.content[:] = b"\xff" * len(content)
    await run("nbdcopy", "--request-size", size, "--flush", str(image), served.uri())
    assert node.content == content
    assert node.flushes


async def test_qemu_img_converts_and_compares(serve: Serve, content: bytes, tmp_path: Path) -> None:
    served = serve(MemoryNode(content))
    target = str(tmp_path / "copy.qcow2")
    await run("qemu-img", "convert", "-f", "raw", "-O", "qcow2", "-W", served.uri(), target)
    await run("qemu-img", "compare", "-f", "raw", "-F", "qcow2", served.uri(), target)
    await run("qemu-img", "convert", "-n", "-f", "qcow2", "-O", "raw", target, served.uri())
    await run("qemu-img", "compare", "-f", "raw", "-F", "qcow2", served.uri(), target)


async def test_fio_verifies_what_it_wrote(serve: Serve, tmp_path: Path) -> None:
    path = tmp_path / "disk"
    path.write_bytes(b"")
    os.truncate(path, 32 * MIB)
    node = FileNode.open(path, read_only=False, locking=False)
    served = serve(node)
    await run(
        "fio", "--name=v", "--ioengine=nbd", f"--uri={served.uri()}", "--rw=randwrite",
        "--bs=4k-64k", "--size=16m", "--iodepth=32", "--verify=crc32c", "--do_verify=1",
        "--verify_fatal=1", f"--aux-path={tmp_path}", "--verify_state_save=0",
    )  # fmt: skip
    await served.close()
    await node.close()


def use_libnbd(uri: str, content: bytes) -> None:
    """Many requests at once, answered in any order."""
    handle = nbd.NBD()
    handle.connect_uri(uri)
    buffers = [nbd.Buffer(65536) for _ in range(64)]
    cookies = [handle.aio_pread(buffer, index * 65536) for index, buffer in enumerate(buffers)]
    while cookies:
        handle.poll(1000)
        cookies = [cookie for cookie in cookies if not handle.aio_command_completed(cookie)]
    for index, buffer in enumerate(buffers):
        assert buffer.to_bytearray() == content[index * 65536 : (index + 1) * 65536]
    handle.zero(MIB, 0)
    handle.trim(MIB, MIB)
    handle.cache(MIB, 0)
    handle.flush()
    handle.shutdown()


async def test_libnbd_reads_in_parallel(serve: Serve, content: bytes) -> None:
    served = serve(MemoryNode(content))
    await asyncio.to_thread(use_libnbd, served.uri(), content)


async def test_libnbd_gets_errors_as_errors(serve: Serve) -> None:
    node = MemoryNode(MIB)

    def fail(operation: str, offset: int) -> None:
        raise OSError(28, "full") if operation == "write" else OSError(5, "bad")

    node.fail = fail

    def use(uri: str) -> list[int]:
        handle = nbd.NBD()
        handle.connect_uri(uri)
        found = []
        for call in (
            lambda: handle.pwrite(b"x" * 512, 0),
            lambda: handle.pread(512, 0),
            handle.flush,
        ):
            with pytest.raises(nbd.Error) as caught:
                call()
            found.append(caught.value.errnum)
        handle.shutdown()
        return found

    assert await asyncio.to_thread(use, serve(node).uri()) == [28, 5, 5]


async def test_client_over_tcp_is_served(serve: Serve, content: bytes) -> None:
    served = serve(MemoryNode(content))
    for listener in listen_tcp("localhost", 0):
        served.server.add_listener(listener)
        uri = str(listener.uri("x"))
        if listener.sock.family == socket.AF_INET:
            await asyncio.to_thread(use_libnbd, uri, content)
        else:
            await run("nbdinfo", uri)


async def test_one_connection_on_two_descriptors_is_served(serve: Serve) -> None:
    """As on stdin and stdout."""
    served = serve(MemoryNode(MIB))
    ours, theirs = socket.socketpair()
    theirs.setblocking(False)
    reader, writer = os.dup(ours.fileno()), os.dup(ours.fileno())
    ours.close()
    served.server.add_channel(PipeChannel(reader, writer))
    await use_by_hand(served, theirs)


async def test_one_connection_on_a_socket_pair_is_served(serve: Serve) -> None:
    """As libnbd and inetd start servers."""
    served = serve(MemoryNode(MIB))
    ours, theirs = socket.socketpair()
    theirs.setblocking(False)
    served.server.add_channel(SocketChannel(ours, "stdin"))
    await use_by_hand(served, theirs)


ON_STDIN = """
import sys
from nbdfleece.export.export import Export, ExportTable
from nbdfleece.server.channel import open_standard_channel
from nbdfleece.server.loop import run
from nbdfleece.server.server import NbdServer
from nbdfleece.testing.memory_node import MemoryNode

async def main():
    server = NbdServer(ExportTable([Export(name="x", node=MemoryNode(1 << 20))]))
    server.add_channel(open_standard_channel())
    await server.wait_idle()

run(main(), sys.argv[1])
"""


@pytest.mark.parametrize("loop", ["auto", "uvloop", "asyncio"])
def test_server_on_stdin_ends_with_its_client(loop: str) -> None:
    handle = nbd.NBD()
    handle.set_export_name("x")
    handle.connect_command([sys.executable, "-c", ON_STDIN, loop])
    assert handle.pread(4096, 0) == bytes(4096)
    handle.shutdown()


async def test_client_that_is_gone_is_no_signal(tmp_path: Path) -> None:
    """CVE-2017-10664: also where SIGPIPE has its default, as command lines like it."""
    script = "import signal; signal.signal(signal.SIGPIPE, signal.SIG_DFL)\n" + ON_STDIN
    ours, theirs = socket.socketpair()
    ours.setblocking(False)
    process = await asyncio.create_subprocess_exec(
        sys.executable, "-c", script, "auto", stdin=theirs, stdout=theirs
    )
    theirs.close()
    client = Client(ours)
    await client.negotiate()
    await client.send(pack_request(Command.READ, 0, MIB) * 50)
    client.close()
    assert await process.wait() == 0


async def use_by_hand(served: Served, sock: socket.socket) -> None:
    client = Client(sock)
    served.clients.append(client)
    await client.negotiate()
    await client.perform(Command.WRITE, 0, payload=b"p" * 70_000)
    assert await client.read(0, 70_000) == b"p" * 70_000
    await client.request(Command.DISC)
    await served.server.wait_idle()
