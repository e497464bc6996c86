"""A handle as a block node, without a server."""

from __future__ import annotations

import errno

import pytest

from nbdfleece.nbdkit.gate import Gate, Threads
from nbdfleece.nbdkit.handle import Handle
from nbdfleece.nbdkit.lifecycle import Plugin
from nbdfleece.nbdkit.node import PluginNode, ScriptContext

from .in_process import Inside, value_of

HUGE = 1 << 43


async def node_of(plugin: Plugin) -> tuple[PluginNode, Handle]:
    gate = Gate(Threads(), 1)
    handle = await gate.run(None, lambda: Handle(plugin.script, read_only=False))
    return PluginNode(handle, gate, None), handle


async def test_extents_and_requests_may_be_larger_than_32_bits(inside: Inside) -> None:
    plugin = inside.load(
        f"""
        calls = []
        def get_size(h): return {HUGE}
        def extents(h, count, offset, flags): return [(0, {HUGE // 2}, 0), ({HUGE // 2}, {HUGE}, 3)]
        def contexts(h): return ["x:y"]
        def block_status(h, context, count, offset, flags): return [(0, {HUGE}, 9)]
        def zero(h, count, offset, flags): calls.append(count)
        def trim(h, count, offset, flags): calls.append(count)
        """
    )
    node, handle = await node_of(plugin)
    found = await node.block_status(4096, HUGE - 4096)
    assert found.lengths.tolist() == [HUGE // 2 - 4096, HUGE // 2]
    context = ScriptContext("x:y", node, handle)
    assert (await context.extents(0, HUGE, extents_max=1)).pairs() == [(HUGE, 9)]
    await node.write_zeroes(0, HUGE)
    await node.trim(0, HUGE)
    assert value_of(plugin, "calls") == [HUGE, HUGE]


async def test_zeroes_without_zero_are_written_in_pieces(inside: Inside) -> None:
    plugin = inside.load(
        """
        calls = []
        def get_size(h): return 1 << 30
        def pwrite(h, buf, offset, flags): calls.append((offset, len(buf)))
        """
    )
    node, _ = await node_of(plugin)
    await node.write_zeroes(512, (64 << 20) + 1024)
    assert value_of(plugin, "calls") == [(512, 64 << 20), (512 + (64 << 20), 1024)]
    with pytest.raises(OSError, match="zero failed") as caught:
        await node.write_zeroes(0, 512, fast=True)
    assert caught.value.errno == errno.EOPNOTSUPP


async def test_script_never_sees_buffers_of_the_server(inside: Inside) -> None:
    """A call goes on when its client has left, and the server uses its buffers for another."""
    plugin = inside.load(
        """
        kept = []
        def pread(h, buf, offset, flags):
            kept.append(buf)
            buf[:] = bytes([7]) * len(buf)
        def pwrite(h, buf, offset, flags): kept.append(buf)
        """
    )
    node, _ = await node_of(plugin)
    buffer = bytearray(512)
    await node.read_into(0, memoryview(buffer))
    await node.write(0, memoryview(buffer))
    assert bytes(buffer) == bytes([7]) * 512
    buffer[:] = bytes(512)
    assert [bytes(view) for view in value_of(plugin, "kept")] == [bytes([7]) * 512] * 2
    assert value_of(plugin, "kept")[1].readonly
