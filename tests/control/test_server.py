"""The control socket under clients that mean well, and others."""

from __future__ import annotations

import asyncio
import json
import socket
import stat
from contextlib import suppress
from pathlib import Path

import pytest
from qemu.qmp import ExecuteError, QMPClient

from nbdfleece.control import server as control_server
from nbdfleece.control import session
from nbdfleece.control.dispatcher import Dispatcher
from nbdfleece.control.server import ControlServer, may_control
from nbdfleece.control.session import EVENT_BYTES_MAX
from nbdfleece.control.texts import TEXT_BYTES_MAX
from nbdfleece.daemon import Daemon, DaemonOptions
from tests.loop_turns import until

from .conftest import RawClient

CAPABILITIES = b'{"execute": "qmp_capabilities"}\n'


async def test_qemus_own_client_connects_asks_and_disconnects(qmp: QMPClient) -> None:
    version = await qmp.execute("query-version")
    assert isinstance(version, dict)
    assert str(version["package"]).startswith("nbdfleece")


async def test_unknown_command_has_its_error_class(qmp: QMPClient) -> None:
    with pytest.raises(ExecuteError) as caught:
        await qmp.execute("nonsense")
    assert caught.value.error_class == "CommandNotFound"


async def test_failed_command_leaves_the_session_usable(qmp: QMPClient) -> None:
    with pytest.raises(ExecuteError, match="there is no snapshot 'none'"):
        await qmp.execute("snapshot-delete", {"name": "none"})
    assert await qmp.execute("query-snapshots") == []


def test_socket_is_for_its_owner_only(daemon: Daemon) -> None:
    assert daemon.options.control is not None
    assert stat.S_IMODE(daemon.options.control.stat().st_mode) == 0o600


def test_only_the_own_user_and_root_may_control(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("os.geteuid", lambda: 1000)
    assert may_control(1000)
    assert may_control(0)
    assert not may_control(1001)


async def test_other_user_is_hung_up_on(daemon: Daemon, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(control_server, "may_control", lambda uid: False)
    reader, writer = await asyncio.open_unix_connection(str(daemon.options.control))
    assert await reader.read() == b""
    writer.close()


async def test_commands_in_one_piece_are_answered_in_order(raw: RawClient) -> None:
    raw.writer.write(
        CAPABILITIES + b"".join(b'{"execute":"query-status","id":%d}' % n for n in range(50))
    )
    assert await raw.receive() == {"return": {}}
    assert [(await raw.receive())["id"] for _ in range(50)] == list(range(50))


async def test_client_that_closes_its_sending_side_still_gets_its_answers(raw: RawClient) -> None:
    raw.writer.write(CAPABILITIES + b'{"execute": "query-status"}')
    raw.writer.write_eof()
    await raw.receive()
    assert (await raw.receive())["return"]["running"] is True
    assert await raw.receive() is None


async def test_noise_is_answered_with_an_error_and_the_session_goes_on(raw: RawClient) -> None:
    assert "error" in await raw.ask(b"\xff\xfe\x00nonsense\n")
    assert "error" in await raw.ask(b'{"execute": "\n')
    assert await raw.ask(CAPABILITIES) == {"return": {}}


async def test_command_too_long_ends_its_session_only(raw: RawClient, qmp: QMPClient) -> None:
    raw.writer.write(b'{"execute": "' + b"x" * (TEXT_BYTES_MAX + 65536))
    assert "size limit" in (await raw.receive())["error"]["desc"]
    await raw.receive_end()
    assert await qmp.execute("query-snapshots") == []


async def test_events_reach_every_session_in_command_mode(
    daemon: Daemon, raw: RawClient, qmp: QMPClient
) -> None:
    await raw.ask(CAPABILITIES)
    with qmp.listener("BACKUP_STARTED") as events:
        await qmp.execute("backup-begin", {"name": "b", "checkpoint": "monday"})
        event = await events.get()
    assert event["data"] == {"backup": "b", "checkpoint": "monday", "disks": ["vda", "vdb"]}
    seen = await raw.receive()
    assert seen["event"] == "BACKUP_STARTED"
    assert set(seen["timestamp"]) == {"seconds", "microseconds"}


async def test_events_do_not_reach_a_session_that_still_negotiates(
    daemon: Daemon, raw: RawClient, qmp: QMPClient
) -> None:
    await qmp.execute("backup-begin", {"name": "b"})
    assert await raw.ask(CAPABILITIES) == {"return": {}}


async def test_client_that_reads_no_events_loses_its_session_and_no_memory_grows(
    options: DaemonOptions, qmp: QMPClient, raw: RawClient, daemon: Daemon
) -> None:
    await raw.ask(CAPABILITIES)
    control = daemon.control
    assert control is not None
    await until(lambda: control.session_count == 2)
    data = {"text": "x" * 65536}
    sent = 0
    while control.session_count == 2:
        control.send_event("NOISE", data)
        await qmp.execute("query-status")  # its client reads everything
        sent += 65536
        assert sent < 16 * EVENT_BYTES_MAX
    assert control.session_count == 1


async def test_sessions_above_the_limit_are_hung_up_on(daemon: Daemon, tmp_path: Path) -> None:
    listening = socket.socket(socket.AF_UNIX)
    path = str(tmp_path / "limited.sock")
    listening.bind(path)
    listening.listen()
    listening.setblocking(False)
    control = ControlServer(listening, Dispatcher(daemon), sessions_max=1)
    first_reader, first = await asyncio.open_unix_connection(path)
    assert json.loads(await first_reader.readline())
    second_reader, second = await asyncio.open_unix_connection(path)
    assert await second_reader.read() == b""
    await control.close()
    assert await first_reader.read() == b""
    for writer in (first, second):
        writer.close()
    listening.close()


async def test_command_of_a_client_that_has_gone_is_finished(
    daemon: Daemon, raw: RawClient, qmp: QMPClient
) -> None:
    await raw.ask(CAPABILITIES)
    raw.writer.write(b'{"execute": "backup-begin", "arguments": {"name": "b"}}')
    await raw.close()
    with qmp.listener("BACKUP_STARTED") as events:
        if not daemon.engine.snapshots:
            await events.get()
    await until(lambda: "b" in daemon.engine.snapshots)


async def test_quit_is_answered_and_asks_for_the_end(daemon: Daemon, qmp: QMPClient) -> None:
    assert await qmp.execute("quit") == {}
    await daemon.wait_stop_requested()


async def test_end_tells_every_client_and_aborts_what_is_pending(options: DaemonOptions) -> None:
    client = QMPClient()
    with client.listener(("SHUTDOWN", "BACKUP_ABORTED")) as events:
        async with Daemon(options):
            await client.connect(str(options.control))
            await client.execute("backup-begin", {"name": "b", "checkpoint": "monday"})
        told = [await events.get() for _ in range(2)]
    assert [event["event"] for event in told] == ["SHUTDOWN", "BACKUP_ABORTED"]
    assert told[0]["data"] == {"guest": False, "reason": "host-signal"}
    with suppress(EOFError):
        await client.disconnect()
    assert options.control is not None
    assert not options.control.exists()


async def test_client_that_leaves_as_the_server_ends_does_not_hold_it_up(
    options: DaemonOptions, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(session, "DRAIN_SECONDS", 600)
    client = QMPClient()
    async with asyncio.timeout(120):
        async with Daemon(options):
            await client.connect(str(options.control))
            await client.disconnect()


async def test_client_that_comes_as_the_server_ends_is_closed(options: DaemonOptions) -> None:
    with socket.socket(socket.AF_UNIX) as client:
        async with Daemon(options) as daemon:
            client.connect(str(options.control))
            assert daemon.control is not None
            daemon.control._accept()
        client.settimeout(60)
        while client.recv(65536):
            pass


async def test_command_during_the_end_is_refused(daemon: Daemon, raw: RawClient) -> None:
    await raw.ask(CAPABILITIES)
    assert daemon.control is not None
    await daemon.control.finish_commands()
    answer = await raw.ask(b'{"execute": "query-status"}')
    assert answer["error"]["desc"] == "the server is shutting down"
