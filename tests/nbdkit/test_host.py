"""Serving scripts: bad ones and hanging ones, thread models, and the end."""

from __future__ import annotations

import asyncio
import logging

import pytest

from tests.waiting import until

from .in_process import SECONDS_MAX, Inside, value_of
from .observe import Observer

READ = ("pread", 512, 0)
ZEROES = bytes(512)
HANG = """
    def pread(h, buf, offset, flags):
        if offset:
            begun.set()
            go.wait()
"""


def errors(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [record.getMessage() for record in caplog.records if record.levelno >= logging.ERROR]


async def test_exception_is_eio_and_its_traceback_is_logged(
    inside: Inside, caplog: pytest.LogCaptureFixture
) -> None:
    plugin = inside.load("def pread(h, buf, offset, flags): raise KeyError('lost')")
    async with inside.serve(plugin):
        assert await inside.act(READ, READ) == ["error EIO"] * 2
    first = errors(caplog)[0]
    assert first.startswith(f"{plugin.script.path}: pread: error: Traceback")
    assert "in pread" in first
    assert first.endswith("KeyError: 'lost'")
    assert "nbdfleece/nbdkit" not in first


@pytest.mark.parametrize(
    ("name", "result", "reason"),
    [
        ("get_size", "None", "must return a number, not NoneType"),
        ("get_size", "-1", "invalid size -1"),
        ("can_fua", "'yes'", "must return a number, not str"),
        ("can_cache", "7", "none of nbdkit's constants"),
        ("can_write", "1 / 0", "ZeroDivisionError"),
        ("open", "exit(1)", "SystemExit"),
    ],
)
async def test_bad_answer_refuses_the_client_and_the_server_goes_on(
    inside: Inside, caplog: pytest.LogCaptureFixture, name: str, result: str, reason: str
) -> None:
    plugin = inside.load(
        f"""
        first = True
        good = globals().get("{name}")
        def {name}(x):
            global first
            if first:
                first = False
                return {result}
            return good(x) if good else 0
        """
    )
    async with inside.serve(plugin):
        found = await inside.act(("go", "a"), ("go", "a"), READ, opts=True)
        assert found[0] == "error ENOENT"
        assert found[2] == ZEROES
    assert any(f": {name}: error: " in line and reason in line for line in errors(caplog))


async def test_hung_callback_of_one_client_holds_up_no_other(inside: Inside) -> None:
    plugin = inside.load(HANG + "\n    def thread_model(): return nbdkit.THREAD_MODEL_PARALLEL")
    async with inside.serve(plugin):
        hung = asyncio.create_task(inside.act(("pread", 512, 512)))
        await until(value_of(plugin, "begun").is_set)
        assert await inside.act(READ) == [ZEROES]
        value_of(plugin, "go").set()
        await hung


@pytest.mark.parametrize("model", range(4))
async def test_hung_callback_does_not_hold_up_the_end(
    inside: Inside, caplog: pytest.LogCaptureFixture, model: int
) -> None:
    plugin = inside.load(HANG + f"\n    def thread_model(): return {model}")
    async with asyncio.timeout(SECONDS_MAX):
        async with inside.serve(plugin, grace_seconds=0.05, closing_seconds=0.05):
            hung = asyncio.create_task(inside.act(("pread", 512, 512)))
            await until(value_of(plugin, "begun").is_set)
        assert (await hung)[0].startswith("error ")
    value_of(plugin, "go").set()


async def test_hung_open_holds_up_neither_others_nor_the_end(inside: Inside) -> None:
    plugin = inside.load(
        """
        def thread_model(): return nbdkit.THREAD_MODEL_SERIALIZE_REQUESTS
        def open(readonly):
            if nbdkit.export_name() == "slow":
                begun.set()
                go.wait()
        """
    )
    async with inside.serve(plugin, grace_seconds=0.05, closing_seconds=0.05):
        hung = asyncio.create_task(inside.act(("go", "slow"), opts=True))
        await until(value_of(plugin, "begun").is_set)
        assert (await inside.act(("go", "fast"), READ, opts=True))[1] == ZEROES
    assert (await hung)[0].startswith("error ")
    value_of(plugin, "go").set()


MEASURE = """
    import time
    now = most = 0
    lock = threading.Lock()
    def thread_model(): return {model}
    def can_multi_conn(h): return True
    def pread(h, buf, offset, flags):
        global now, most
        with lock:
            now += 1
            most = max(most, now)
            if now == {enough}:
                begun.set()
        begun.wait({patience})
        with lock:
            now -= 1
"""


@pytest.mark.parametrize(("model", "clients", "most"), [(0, 3, 1), (1, 3, 1), (2, 3, 3), (3, 3, 6)])
async def test_thread_model_says_how_many_callbacks_run(
    inside: Inside, model: int, clients: int, most: int
) -> None:
    """Three clients with two requests in flight each; all that may run at a time do."""
    patience = 0.02 if most == 1 else SECONDS_MAX
    plugin = inside.load(MEASURE.format(model=model, enough=max(most, 2), patience=patience))

    def read_two() -> None:
        client = Observer(inside.socket)
        client.act([("two_reads",)])

    async with inside.serve(plugin):
        await asyncio.gather(*(asyncio.to_thread(read_two) for _ in range(clients)))
    assert value_of(plugin, "most") == most


async def test_serialised_connections_come_one_after_the_other(inside: Inside) -> None:
    plugin = inside.load(
        """
        def thread_model(): return nbdkit.THREAD_MODEL_SERIALIZE_CONNECTIONS
        calls = []
        def preconnect(readonly): calls.append("preconnect")
        def close(h): calls.append("close")
        """
    )
    async with inside.serve(plugin):
        await asyncio.gather(*(inside.act(READ, ("shutdown",)) for _ in range(3)))
    assert value_of(plugin, "calls") == ["preconnect", "close"] * 3


async def test_script_ends_the_server(inside: Inside) -> None:
    plugin = inside.load(
        """
        ended = False
        def pread(h, buf, offset, flags): nbdkit.shutdown()
        def cleanup():
            global ended
            ended = True
        """
    )
    async with inside.serve(plugin) as server:
        await inside.act(READ)
        async with asyncio.timeout(SECONDS_MAX):
            await server.wait_end()
    assert value_of(plugin, "ended") is True


@pytest.mark.parametrize(("force", "seen"), [(False, [ZEROES, "error ESHUTDOWN"]), (True, None)])
async def test_script_disconnects_its_client(
    inside: Inside, force: bool, seen: list[object] | None
) -> None:
    plugin = inside.load(
        f"""
        def pread(h, buf, offset, flags):
            nbdkit.disconnect({force})
        """
    )
    async with inside.serve(plugin):
        found = await inside.act(READ, READ)
        assert found == seen if seen else all(str(each).startswith("error") for each in found)
        assert (await inside.act(READ))[0] == ZEROES or force


async def test_sleep_ends_with_the_server(inside: Inside, caplog: pytest.LogCaptureFixture) -> None:
    plugin = inside.load(
        """
        def pread(h, buf, offset, flags):
            begun.set()
            nbdkit.nanosleep(3600, 0)
        """
    )
    async with inside.serve(plugin):
        sleeping = asyncio.create_task(inside.act(READ))
        await until(value_of(plugin, "begun").is_set)
    await sleeping
    assert "aborting sleep because of server shut down" in errors(caplog)


async def test_coroutines_are_callbacks_too(inside: Inside) -> None:
    plugin = inside.load(
        """
        import asyncio
        loops = set()
        async def get_ready():
            loops.add(asyncio.get_running_loop())
        async def open(readonly):
            loops.add(asyncio.get_running_loop())
            return nbdkit.export_name()
        async def can_extents(h): return True
        async def extents(h, count, offset, flags): return [(0, len(disk), 3)]
        async def pread(h, buf, offset, flags):
            await asyncio.sleep(0)
            assert h == nbdkit.export_name() == "name"
            if offset:
                await asyncio.create_task(fail())
        async def fail():
            nbdkit.set_error(28)
            raise OSError
        """
    )
    async with inside.serve(plugin):
        found = await inside.act(
            ("go", "name"), READ, ("pread", 512, 512), ("status", 4096, 0), opts=True
        )
    assert found[1:] == [ZEROES, "error ENOSPC", [(4096, 3)]]
    assert len(value_of(plugin, "loops")) == 1


async def test_coroutine_that_blocks_its_loop_does_not_stop_the_server(inside: Inside) -> None:
    plugin = inside.load(
        """
        async def pread(h, buf, offset, flags):
            begun.set()
            go.wait()
        def thread_model(): return nbdkit.THREAD_MODEL_PARALLEL
        """
    )
    async with inside.serve(plugin, grace_seconds=0.05, closing_seconds=0.05):
        hung = asyncio.create_task(inside.act(READ))
        await until(value_of(plugin, "begun").is_set)
        assert (await inside.act(("flush",)))[0] == "error EINVAL"
    await hung
    value_of(plugin, "go").set()


async def test_script_offers_contexts_of_its_own(inside: Inside) -> None:
    """A superset of nbdkit: dirty bitmaps, for one, and any status of 32 bits."""
    plugin = inside.load(
        """
        opened = 0
        def open(readonly):
            global opened
            opened += 1
        def contexts(h): return ["qemu:dirty-bitmap:monday", "x-mine:hot"]
        def block_status(h, context, count, offset, flags):
            if context == "x-mine:hot":
                return [(0, len(disk), 0xFFFFFFFF)]
            return [(0, 4096, 1), (4096, 8192, 0), (12288, len(disk) - 12288, 1)]
        """
    )
    async with inside.serve(plugin):
        found = await inside.act(
            ("contexts", ["qemu:dirty-bitmap:monday", "x-mine:hot"]), opts=True
        )
    assert found == [
        {
            "base:allocation": [(65536, 0)],
            "qemu:dirty-bitmap:monday": [(4096, 1), (8192, 0), (53248, 1)],
            "x-mine:hot": [(65536, 0xFFFFFFFF)],
        }
    ]
    assert value_of(plugin, "opened") == 1, "asking for contexts opens the handle that GO gets"
