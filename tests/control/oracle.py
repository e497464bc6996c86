"""A real qemu-storage-daemon with the same disks, told the same."""

from __future__ import annotations

import asyncio
import contextlib
import subprocess
from collections.abc import AsyncIterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from qemu.qmp import ExecuteError, QMPClient

from .conftest import make_image

Step = tuple[str, dict[str, Any]]
SECONDS_MAX = 20


@contextlib.asynccontextmanager
async def storage_daemon(folder: Path, disks: Sequence[str]) -> AsyncIterator[QMPClient]:
    """QEMU's storage daemon with new images as block nodes of these names."""
    client = QMPClient()
    listening = str(folder / "qemu.sock")
    await client.start_server(listening)
    words = ["--chardev", f"socket,id=c,path={listening}", "--monitor", "chardev=c"]
    for name in disks:
        image = make_image(folder / f"qemu-{name}.qcow2")
        words += ["--blockdev", f"driver=file,node-name={name}-file,filename={image}"]
        words += ["--blockdev", f"driver=qcow2,node-name={name},file={name}-file"]
    process = subprocess.Popen(["qemu-storage-daemon", *words])
    try:
        await client.accept()
        yield client
    finally:
        process.terminate()
        with contextlib.suppress(EOFError):
            await client.disconnect()
        process.wait(SECONDS_MAX)


async def reply(client: QMPClient, command: str, arguments: Mapping[str, Any]) -> Any:
    """What came back: the result, or class and description of the error."""
    try:
        return await client.execute(command, dict(arguments))
    except ExecuteError as error:
        return (error.error_class, str(error))


async def qemu_io(uri: str, *commands: str) -> None:
    """Carry out commands on an export, all of which must succeed."""
    words = [word for command in commands for word in ("-c", command)]
    process = await asyncio.create_subprocess_exec(
        "qemu-io", "-f", "raw", *words, uri, stdout=subprocess.PIPE, stderr=subprocess.STDOUT
    )
    output, _ = await process.communicate()
    assert process.returncode == 0, output
    assert b"failed" not in output, output


async def bitmaps_of(client: QMPClient, node: str) -> list[dict[str, Any]]:
    """The dirty bitmaps of a node, sorted by name."""
    nodes = await client.execute("query-named-block-nodes", {"flat": True})
    assert isinstance(nodes, list)
    found = next(each for each in nodes if each["node-name"] == node)
    return sorted(found.get("dirty-bitmaps", []), key=lambda bitmap: bitmap["name"])
