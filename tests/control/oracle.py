"""A real qemu-storage-daemon with the same disks, told the same."""

from __future__ import annotations

import asyncio
import contextlib
import json
import subprocess
import time
from collections.abc import AsyncIterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from qemu.qmp import ExecuteError, QMPClient

from .conftest import make_image

Step = tuple[str, dict[str, Any]]
SECONDS_MAX = 120


def storage_daemon(
    folder: Path, disks: Sequence[str]
) -> contextlib.AbstractAsyncContextManager[QMPClient]:
    """QEMU's storage daemon with new images as block nodes of these names."""
    return daemon_of(folder, {name: make_image(folder / f"qemu-{name}.qcow2") for name in disks})


@contextlib.asynccontextmanager
async def daemon_of(folder: Path, images: Mapping[str, Path]) -> AsyncIterator[QMPClient]:
    """QEMU's storage daemon with these images as block nodes."""
    client = QMPClient()
    listening = str(folder / "qemu.sock")
    await client.start_server(listening)
    words = ["--chardev", f"socket,id=c,path={listening}", "--monitor", "chardev=c"]
    for name, image in images.items():
        words += ["--blockdev", f"driver=file,node-name={name}-file,discard=unmap,filename={image}"]
        words += ["--blockdev", f"driver=qcow2,node-name={name},discard=unmap,file={name}-file"]
    process = subprocess.Popen(["qemu-storage-daemon", *words])
    try:
        await client.accept()
        yield client
    finally:
        process.terminate()
        with contextlib.suppress(EOFError, ConnectionError):
            await client.disconnect()
        process.wait(SECONDS_MAX)


async def reply(client: QMPClient, command: str, arguments: Mapping[str, Any]) -> Any:
    """What came back: the result, or class and description of the error."""
    try:
        return await client.execute(command, dict(arguments))
    except ExecuteError as error:
        return (error.error_class, str(error))


async def settled_reply(client: QMPClient, command: str, arguments: Mapping[str, Any]) -> Any:
    """As :func:`reply`, but an export is in use only if it still is after a while.

    A client that has ended may be so to a server some turns of its loop later: QEMU's reads
    commands in a thread of their own.
    """
    deadline = time.monotonic() + SECONDS_MAX
    while True:
        found = await reply(client, command, arguments)
        if "still in use" not in str(found) or time.monotonic() > deadline:
            return found
        await asyncio.sleep(0.01)


async def qemu_io(uri: str, *commands: str, read_only: bool = False) -> None:
    """Carry out commands on an export, all of which must succeed."""
    words = [word for command in commands for word in ("-c", command)]
    options = ["-r"] if read_only else []
    process = await asyncio.create_subprocess_exec(
        "qemu-io",
        "-f",
        "raw",
        *options,
        *words,
        uri,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
    )
    output, _ = await process.communicate()
    assert process.returncode == 0, output
    assert b"failed" not in output, output


async def bitmaps_of(client: QMPClient, node: str) -> list[dict[str, Any]]:
    """The dirty bitmaps of a node, sorted by name; without those of QEMU's own, that have none."""
    nodes = await client.execute("query-named-block-nodes", {"flat": True})
    assert isinstance(nodes, list)
    found = next(each for each in nodes if each["node-name"] == node)
    named = [each for each in found.get("dirty-bitmaps", []) if "name" in each]
    return sorted(named, key=lambda bitmap: bitmap["name"])


async def compare(ours: QMPClient, qemus: QMPClient, steps: Sequence[Step], folder: Path) -> None:
    """Every step has the same reply here and there; ``SOCKET`` and ``FILE`` are each one's own."""
    for number, (command, arguments) in enumerate(steps):
        found = await settled_reply(ours, command, _placed(arguments, folder / "ours"))
        expected = await settled_reply(qemus, command, _placed(arguments, folder / "qemus"))
        assert found == expected, (number, command, arguments, found, expected)


def _placed(value: Any, where: Path) -> Any:
    if isinstance(value, dict):
        return {key: _placed(inner, where) for key, inner in value.items()}
    if isinstance(value, list):
        return [_placed(inner, where) for inner in value]
    places = {"SOCKET": f"{where}.sock", "FILE": f"{where}.qcow2"}
    return places.get(value, value) if isinstance(value, str) else value


def export_uri(folder: Path, side: str, export: str) -> str:
    """An export on the socket that a stream had opened."""
    return f"nbd+unix:///{export}?socket={folder / side}.sock"


async def dirty_map(uri: str, context: str) -> list[tuple[int, int, int]]:
    """Offset, length and flags of a metadata context's extents, by nbdinfo."""
    process = await asyncio.create_subprocess_exec(
        "nbdinfo", f"--map={context}", "--json", uri, stdout=subprocess.PIPE
    )
    output, _ = await process.communicate()
    assert process.returncode == 0
    return [(each["offset"], each["length"], each["type"]) for each in json.loads(output)]


async def content(uri: str) -> bytes:
    """All that an export reads as, by nbdcopy."""
    process = await asyncio.create_subprocess_exec(
        "nbdcopy", uri, "-", stdout=subprocess.PIPE, stderr=subprocess.PIPE
    )
    output, errors = await process.communicate()
    assert process.returncode == 0, errors
    return output
