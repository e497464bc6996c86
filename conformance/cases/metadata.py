"""Negotiation of metadata contexts (requirements 44 to 65, 191)."""

from __future__ import annotations

import struct

from conformance.case import MANY, Server, closing_on_error, requirement
from conformance.client import Client, pack_queries, pack_string
from conformance.errors import expect, require
from conformance.replies import Answer
from conformance.wire import Cmd, Errno, Option, Rep

NAMESPACES = ("base:", "nbd-server:", "x-", "qemu:")


def structured(server: Server) -> Client:
    """Haggling, with structured replies agreed."""
    client = server.haggle()
    with closing_on_error(client):
        require(client.agree_structured(), "no structured replies")
    return client


def all_contexts(client: Client, server: Server) -> list[str]:
    """Every context that LIST tells, or the case is not applicable."""
    answer = client.list_contexts(server.export.name)
    require(answer.type != Rep.ERR_UNSUP, "no metadata contexts")
    expect(answer.acknowledged, f"LIST_META_CONTEXT answered {answer}")
    require(answer.names, "no metadata contexts")
    return sorted(answer.names)


def no_status(client: Client, server: Server) -> None:
    """GO, then BLOCK_STATUS is an error: no context is selected."""
    expect(client.go(server.export.name).acknowledged, "GO failed")
    reply = client.call(Cmd.BLOCK_STATUS, 0, 65536)
    expect(reply.error, f"contexts survived: {reply.extents}")


@requirement(44, 45, 56, 64)
def context_names_are_namespace_and_leaf(server: Server) -> str:
    """Each name is namespace:leaf, of a namespace that exists."""
    with structured(server) as client:
        names = all_contexts(client, server)
        for name in names:
            expect(":" in name and not name.endswith(":"), f"context {name!r}")
            expect(name.startswith(NAMESPACES), f"namespace of {name!r}")
    return ", ".join(names)


@requirement(48)
def set_without_structured_replies_is_invalid(server: Server) -> None:
    """SET_META_CONTEXT needs structured replies."""
    with server.haggle() as client:
        all_contexts(client, server)
        answer = client.set_contexts(server.export.name, ["base:allocation"])
        expect(answer.type == Rep.ERR_INVALID, str(answer))


def _malformed(name: str) -> list[bytes]:
    head = pack_string(name)
    return [
        head + struct.pack(">II", 1, 100) + b"base:allocation",
        head + struct.pack(">I", 2) + pack_string("base:allocation"),
        head + struct.pack(">I", 0xFFFFFFFF),
        head,
        struct.pack(">I", 0x7FFFFFFF),
        b"",
    ]


@requirement(49)
def malformed_context_options_are_invalid(server: Server) -> None:
    """Queries or counts that leave the option are ERR_INVALID, and haggling goes on."""
    with structured(server) as client:
        all_contexts(client, server)
        for option in (Option.LIST_META_CONTEXT, Option.SET_META_CONTEXT):
            for data in _malformed(server.export.name):
                answer = client.option(option, data)
                expect(answer.type == Rep.ERR_INVALID, f"{option.name} {data[:40]!r}: {answer}")
        expect(client.go(server.export.name).acknowledged, "GO failed afterwards")


@requirement(50, 51)
def unknown_namespaces_are_ignored(server: Server) -> None:
    """Queries in namespaces that nobody has give a lone ACK, or what else was asked."""
    with structured(server) as client:
        names = all_contexts(client, server)
        unknown = ["x-nobody:thing", "nothing", "", ":", "BASE:allocation", "\N{SNOWMAN}:x"]
        for ask in (client.list_contexts, client.set_contexts):
            answer = ask(server.export.name, unknown)
            expect(answer.acknowledged and not answer.names, f"{ask.__name__}: {answer.names}")
            answer = ask(server.export.name, ["x-nobody:thing", names[0]])
            expect(answer.names == {names[0]}, f"{ask.__name__}: {answer.names}, {answer}")


@requirement(52, 55)
def list_replies_are_contexts_with_id_zero_then_ack(server: Server) -> None:
    """LIST gives only META_CONTEXT replies, with id 0, then ACK."""
    with structured(server) as client:
        all_contexts(client, server)
        answer = client.list_contexts(server.export.name)
        kinds = {reply.type for reply in answer.replies[:-1]}
        expect(kinds <= {Rep.META_CONTEXT}, f"reply types {kinds}")
        expect({number for number, _ in answer.contexts} == {0}, f"{answer.contexts}")


@requirement(53)
def list_without_queries_gives_everything(server: Server) -> str:
    """LIST without queries tells every context that can be selected."""
    with structured(server) as client:
        names = set(all_contexts(client, server))
        known = {f"qemu:dirty-bitmap:{name}" for name in server.export.dirty}
        known |= {"qemu:allocation-depth"} if server.export.depth else set()
        probes = [*known, "base:allocation", "qemu:allocation-depth"]
        selectable = client.set_contexts(server.export.name, probes).names
        expect(selectable <= names, f"selectable but not listed: {sorted(selectable - names)}")
        missing = known - names if "qemu:dirty-bitmap" in str(names) else set()
        expect(not missing, f"not listed: {sorted(missing)}")
    return ", ".join(sorted(names))


@requirement(54)
def list_with_queries_gives_what_matches(server: Server) -> None:
    """Each context is found by its own name, alone and among others."""
    with structured(server) as client:
        names = all_contexts(client, server)
        for name in names:
            got = client.list_contexts(server.export.name, [name]).names
            expect(got == {name}, f"{name}: {got}")
        got = client.list_contexts(server.export.name, [*names, "x-nobody:x"]).names
        expect(got == set(names), f"{got}")


@requirement(57)
def base_is_wildcard_in_list_and_nothing_in_set(server: Server) -> None:
    """base: lists all base contexts, and selects none."""
    with structured(server) as client:
        names = {name for name in all_contexts(client, server) if name.startswith("base:")}
        got = client.list_contexts(server.export.name, ["base:"]).names
        expect(got == names, f"LIST base: gives {got}")
        answer = client.set_contexts(server.export.name, ["base:"])
        expect(answer.acknowledged and not answer.names, f"SET base: gives {answer.names}")


@requirement(58)
def unknown_base_leaf_is_ignored(server: Server) -> None:
    """base:something-unknown matches nothing, neither does a longer or shorter name."""
    with structured(server) as client:
        all_contexts(client, server)
        for leaf in ("nothing", "allocation2", "alloc", "allocation:"):
            for ask in (client.list_contexts, client.set_contexts):
                answer = ask(server.export.name, [f"base:{leaf}"])
                expect(answer.acknowledged and not answer.names, f"base:{leaf}: {answer.names}")


@requirement(59, 191)
def empty_leaf_selects_nothing(server: Server) -> None:
    """SET with an empty leaf, of any namespace, selects nothing."""
    with structured(server) as client:
        all_contexts(client, server)
        for query in ("base:", "qemu:", "qemu:dirty-bitmap:", "x-a:"):
            answer = client.set_contexts(server.export.name, [query])
            expect(answer.acknowledged and not answer.names, f"{query}: {answer.names}")


@requirement(60)
def set_without_queries_selects_nothing(server: Server) -> None:
    """SET without queries gives a lone ACK, and BLOCK_STATUS has no context then."""
    with structured(server) as client:
        all_contexts(client, server)
        answer = client.set_contexts(server.export.name, [])
        expect(answer.acknowledged and len(answer.replies) == 1, str(answer))
        no_status(client, server)


def _unique(answer: Answer) -> None:
    ids = [number for number, _ in answer.contexts]
    names = [name for _, name in answer.contexts]
    expect(len(set(ids)) == len(ids), f"ids {ids} of {names}")
    expect(len(set(names)) == len(names), f"names {names} with ids {ids}")


@requirement(61)
def selected_contexts_have_unique_ids(server: Server) -> str:
    """SET of all contexts gives each once, with an id of its own."""
    with structured(server) as client:
        names = all_contexts(client, server)
        answer = client.set_contexts(server.export.name, names)
        expect(answer.acknowledged and answer.names == set(names), f"{answer.contexts}")
        _unique(answer)
    return f"{answer.contexts}"


@requirement(61)
def context_asked_twice_is_selected_once(server: Server) -> None:
    """A query that is repeated does not select its context twice."""
    with structured(server) as client:
        name = all_contexts(client, server)[0]
        _unique(client.set_contexts(server.export.name, [name, name]))


@requirement(62)
def set_replaces_the_set_before(server: Server) -> None:
    """The last SET alone counts."""
    with structured(server) as client:
        names = all_contexts(client, server)
        client.set_contexts(server.export.name, names)
        answer = client.set_contexts(server.export.name, names[-1:])
        expect(answer.names == set(names[-1:]), f"{answer.names}")
        client.go(server.export.name)
        reply = client.call(Cmd.BLOCK_STATUS, 0, 65536)
        expect(set(reply.extents) == {answer.contexts[0][0]}, f"status of {set(reply.extents)}")


@requirement(62)
def failing_set_clears_the_set_before(server: Server) -> None:
    """A SET that is refused leaves nothing selected."""
    with structured(server) as client:
        names = all_contexts(client, server)
        client.set_contexts(server.export.name, names)
        answer = client.option(Option.SET_META_CONTEXT, _malformed(server.export.name)[0])
        expect(answer.final.is_error, str(answer))
        no_status(client, server)


@requirement(62)
def set_without_match_clears_the_set_before(server: Server) -> None:
    """A SET that matches nothing leaves nothing selected."""
    with structured(server) as client:
        client.set_contexts(server.export.name, all_contexts(client, server))
        client.set_contexts(server.export.name, ["x-nobody:thing"])
        no_status(client, server)


@requirement(63, on=MANY)
def contexts_of_another_export_do_not_count(server: Server) -> None:
    """Contexts set for one export are gone when another is entered."""
    with structured(server) as client:
        client.set_contexts(server.export.name, all_contexts(client, server))
        other = server.exports[1].name
        expect(client.go(other).acknowledged, "GO failed")
        reply = client.call(Cmd.BLOCK_STATUS, 0, 65536)
        expect(reply.error, f"status of another export's contexts: {reply.extents}")


@requirement(63, level="S")
def contexts_survive_info_and_a_failed_go(server: Server) -> None:
    """INFO, and GO of a name that is not there, leave the selection alone."""
    require(server.strict_names, "the server takes any name")
    with structured(server) as client:
        names = all_contexts(client, server)
        answer = client.set_contexts(server.export.name, names)
        client.info(server.export.name)
        client.go("there is no such export")
        client.go(server.export.name)
        reply = client.call(Cmd.BLOCK_STATUS, 0, 65536)
        expect(set(reply.extents) == {number for number, _ in answer.contexts}, str(reply))


@requirement(63, level="S")
def contexts_of_unknown_export_are_refused(server: Server) -> str:
    """LIST and SET for an export that is not there give an error, not contexts."""
    require(server.strict_names, "the server takes any name")
    with structured(server) as client:
        all_contexts(client, server)
        data = pack_queries("there is no such export", ["base:allocation"])
        answers = [
            client.option(option, data)
            for option in (Option.LIST_META_CONTEXT, Option.SET_META_CONTEXT)
        ]
        for answer in answers:
            expect(answer.type == Rep.ERR_UNKNOWN, f"{answer} with {answer.names}")
    return "ERR_UNKNOWN"


@requirement(191)
def qemu_wildcards_list_their_contexts(server: Server) -> None:
    """qemu: lists all of QEMU's contexts, qemu:dirty-bitmap: all bitmaps."""
    with structured(server) as client:
        names = {name for name in all_contexts(client, server) if name.startswith("qemu:")}
        require(names, "no qemu: contexts")
        expect(client.list_contexts(server.export.name, ["qemu:"]).names == names, "qemu:")
        bitmaps = {name for name in names if name.startswith("qemu:dirty-bitmap:")}
        got = client.list_contexts(server.export.name, ["qemu:dirty-bitmap:"]).names
        expect(got == bitmaps, f"qemu:dirty-bitmap: gives {got}")


@requirement(189)
def bitmap_names_compare_exactly(server: Server) -> None:
    """A part of a bitmap's name, more than it, or other case, is another bitmap."""
    require(server.export.dirty, "no dirty bitmaps")
    name = f"qemu:dirty-bitmap:{next(iter(server.export.dirty))}"
    with structured(server) as client:
        require(name in all_contexts(client, server), f"no context {name}")
        for wrong in (name[:-1], name + "x", name.upper(), f" {name}", f"{name}\0"):
            answer = client.set_contexts(server.export.name, [wrong])
            expect(not answer.names, f"{wrong!r} selects {answer.names}")


@requirement(153)
def block_status_without_context_is_einval(server: Server) -> str:
    """BLOCK_STATUS without a selected context is EINVAL, and the connection goes on."""
    replies = []
    for agreed in (False, True):
        with server.haggle() as client:
            require(not agreed or client.agree_structured(), "no structured replies")
            client.go(server.export.name)
            reply = client.call(Cmd.BLOCK_STATUS, 0, 4096)
            expect(reply.error == Errno.EINVAL, str(reply))
            client.read(0, 512)
            replies.append(str(reply))
    return replies[-1]
