"""Every CVE of an NBD server that is known: which test shows that it is none of ours.

Here are those that need a whole server, and the table of all.
"""

from __future__ import annotations

import ast
import asyncio
import json
import os
import signal
import socket
import struct
import subprocess
import sys
from pathlib import Path

import pytest

from nbdfleece.nbd.constants import Command, Option, OptionReply
from nbdfleece.testing.memory_node import MemoryNode

from .harness import Client, Serve, export_of, pack_request, settled

MIB = 1 << 20
ROOT = Path(__file__).parents[2]
HELLO = struct.pack(">I", 3)
PROGRAM = str(Path(sys.executable).with_name("nbdfleece"))

SHOWN_BY = {
    "CVE-2005-3534": "tests/server/test_connection.py::test_monstrous_write_ends_the_connection",
    "CVE-2011-0530": "tests/nbd/test_requests.py::test_large_compact_write",
    "CVE-2011-1925": "tests/server/test_cves.py::test_failed_negotiation_harms_nobody",
    "CVE-2013-6410": "tests/server/test_tls.py::test_authorization_compares_whole_names",
    "CVE-2013-7441": "tests/server/test_connection.py"
    "::test_client_that_leaves_after_any_byte_leaves_nothing",
    "CVE-2015-0847": "tests/server/test_cves.py"
    "::test_signals_under_load_stop_nothing_but_the_server",
    "CVE-2017-9524": "tests/server/test_connection.py"
    "::test_client_that_leaves_after_any_byte_leaves_nothing",
    "CVE-2017-10664": "tests/server/test_foreign_clients.py::test_client_that_is_gone_is_no_signal",
    "CVE-2017-15118": "tests/nbd/test_negotiation.py::test_long_legal_names_work",
    "CVE-2017-15119": "tests/nbd/test_negotiation_hostile.py"
    "::test_option_header_that_announces_too_much_drops_the_connection",
    "CVE-2017-2630": "tests/nbd/test_export_info.py::test_export_that_cannot_be_served_is_refused",
    "CVE-2017-7539": "tests/server/test_noise.py::test_noise_harms_nobody_and_leaves_nothing",
    "CVE-2019-14850": "tests/server/test_cves.py::test_disk_is_left_alone_before_go",
    "CVE-2019-14851": "tests/nbd/test_negotiation.py"
    "::test_flags_do_not_change_with_the_order_of_options",
    "CVE-2020-10761": "tests/nbd/test_negotiation.py::test_unknown_export_gets_err_unknown_alone",
    "CVE-2021-3716": "tests/server/test_tls.py::test_plaintext_behind_starttls_ends_the_connection",
    "CVE-2022-0485": "tests/server/test_cves.py::test_errors_reach_nbdcopy_as_errors",
    "CVE-2022-26495": "tests/nbd/test_negotiation_hostile.py"
    "::test_export_name_too_long_drops_the_connection_unread",
    "CVE-2022-26496": "tests/nbd/test_negotiation.py::test_long_legal_names_work",
    "CVE-2024-4467": "tests/server/test_cves.py::test_image_cannot_name_what_its_client_wants",
    "CVE-2024-7409": "tests/server/test_connection.py"
    "::test_thousand_clients_that_do_nothing_are_swept_away",
    "CVE-2025-47711": "tests/nbd/test_replies.py::test_extents_are_cut_to_the_request",
    "CVE-2025-47712": "tests/nbd/test_requests.py::test_past_the_end_is_refused",
}


@pytest.mark.parametrize(("cve", "test"), SHOWN_BY.items())
def test_table_names_tests_that_are_there(cve: str, test: str) -> None:
    path, _, name = test.partition("::")
    functions = {
        node.name: ast.get_docstring(node) or ""
        for node in ast.walk(ast.parse((ROOT / path).read_text()))
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
    }
    assert cve in functions[name]


async def test_failed_negotiation_harms_nobody(serve: Serve) -> None:
    """CVE-2011-1925: unknown exports by each option, and clients that leave in the midst of it."""
    served = serve(MemoryNode(MIB))
    other = await served.open()
    for option in (Option.EXPORT_NAME, Option.INFO, Option.GO, Option.LIST_META_CONTEXT):
        client = await served.connect()
        await client.receive(18)
        data = b"nope" if option == Option.EXPORT_NAME else b"\0\0\0\4nope\0\0\0\0"
        message = b"IHAVEOPT" + struct.pack(">II", option, len(data)) + data
        await client.send(HELLO + message)
        if option != Option.EXPORT_NAME:
            kind, _ = await client.option_reply()
            assert kind in (OptionReply.ERR_UNKNOWN, OptionReply.ERR_INVALID)
            await client.send(message[:-1])
        client.close()
    await settled()
    assert await other.read(0, 512) == bytes(512)
    assert len(served.server.connections) == 1


async def test_disk_is_left_alone_before_go(serve: Serve) -> None:
    """CVE-2019-14850: no client makes the server work on a disk before it has the export."""
    node = MemoryNode(MIB)
    touched: list[str] = []
    node.pause = lambda operation: touched.append(operation)
    served = serve(node)
    client = await served.connect()
    await client.receive(18)
    await client.send(HELLO)
    name = b"\0\0\0\1x"
    for option, data in (
        (Option.LIST, b""),
        (Option.STRUCTURED_REPLY, b""),
        (Option.INFO, name + b"\0\0"),
        (Option.SET_META_CONTEXT, name + b"\0\0\0\1\0\0\0\x0fbase:allocation"),
    ):
        await client.option(option, data)
        while (reply := await client.option_reply())[0] != OptionReply.ACK:
            assert reply[0] < 1 << 31, reply
    (export,) = served.server.exports
    assert (touched, export.connections) == ([], 0)


async def test_errors_reach_nbdcopy_as_errors(serve: Serve, tmp_path: Path) -> None:
    """CVE-2022-0485: a copy that is not whole must not look like one, either way."""
    node = MemoryNode(b"d" * MIB)

    def fail(operation: str, offset: int) -> None:
        if operation in ("read", "write") and offset >= MIB // 2:
            raise OSError(5, "bad sector")

    node.fail = fail
    served = serve(node)
    (tmp_path / "in").write_bytes(b"e" * MIB)
    for words in ((served.uri(), tmp_path / "out"), (tmp_path / "in", served.uri())):
        process = await asyncio.create_subprocess_exec(
            *("nbdcopy", "--request-size=262144", *words), stderr=asyncio.subprocess.PIPE
        )
        _, errors = await process.communicate()
        assert process.returncode == 1
        assert b"Input/output error" in errors


LOADED_SECONDS = 0.7


@pytest.mark.parametrize("loop", ["asyncio", "uvloop"])
def test_signals_under_load_stop_nothing_but_the_server(tmp_path: Path, loop: str) -> None:
    """CVE-2015-0847: handlers do nothing but tell the loop, however often and whenever."""
    image = tmp_path / "a.qcow2"
    subprocess.run(["qemu-img", "create", "-q", "-f", "qcow2", image, "64M"], check=True)
    words = ["--listen", f"unix:{tmp_path}/n", "--control", "none", "--loop", loop, "--json"]
    server = subprocess.Popen(
        [PROGRAM, "serve", "--disk", f"vda={image}", *words], stdout=subprocess.PIPE
    )
    assert server.stdout is not None
    (uri,) = json.loads(server.stdout.readline())["exports"][0]["uris"]
    bench = ["qemu-img", "bench", "-f", "raw", "-w", "-c", "1000000", "-d", "16", "-s", "4096", uri]
    load = subprocess.Popen(bench, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    deadline = os.times().elapsed + LOADED_SECONDS
    while os.times().elapsed < deadline:
        for number in (signal.SIGCHLD, signal.SIGPIPE, signal.SIGWINCH, signal.SIGCONT):
            os.kill(server.pid, number)
    assert load.poll() is None
    subprocess.run(["nbdinfo", "--size", uri], check=True, stdout=subprocess.DEVNULL)
    server.terminate()
    assert server.wait(120) == 0
    assert load.wait(120) != 0
    server.stdout.close()
    subprocess.run(["qemu-img", "check", "-q", image], check=True)


@pytest.mark.parametrize("kind", ["backing", "data"])
def test_image_cannot_name_what_its_client_wants(tmp_path: Path, kind: str) -> None:
    """CVE-2024-4467: an image from elsewhere opens no file, device or server of this machine."""
    image, secret = tmp_path / "in" / "a.qcow2", tmp_path / "secret"
    image.parent.mkdir()
    secret.write_bytes(b"s" * MIB)
    name = "json:" + json.dumps(
        {"driver": "raw", "file": {"driver": "file", "filename": str(secret)}}
    )
    words = {
        "backing": ["-u", "-b", name, "-F", "raw", str(image), "1M"],
        "data": ["-o", f"data_file={secret},data_file_raw=on", str(image), "1M"],
    }[kind]
    subprocess.run(["qemu-img", "create", "-q", "-f", "qcow2", *words], check=True)
    secret.write_bytes(b"s" * MIB)
    for command in (["serve", "--disk", f"vda={image}"], ["nbd", "-t", "-f", "qcow2", str(image)]):
        listen = ["-k", str(tmp_path / "n")] if command[0] == "nbd" else ["--control", "none"]
        listen += ["--listen", f"unix:{tmp_path}/n"] * (command[0] == "serve")
        done = subprocess.run(
            [PROGRAM, *command, *listen], capture_output=True, text=True, timeout=120
        )
        assert done.returncode == 1, done.stderr
        assert "Traceback" not in done.stderr
    assert secret.read_bytes() == b"s" * MIB


async def test_vanished_client_in_a_large_write_harms_nobody(serve: Serve) -> None:
    """CVE-2005-3534 again: the length was announced, the bytes never come."""
    node = MemoryNode(4 * MIB)
    served = serve([export_of(node)])
    client = await served.open()
    await client.send(pack_request(Command.WRITE, 0, 2 * MIB) + b"w" * MIB)
    await settled()
    client.sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    client.close()
    await served.server.wait_idle()
    assert node.content == bytes(4 * MIB)
    assert served.server.pool.taken_bytes == 0
    other: Client = await served.open()
    assert await other.read(0, 512) == bytes(512)
