"""A catalogue that must first find its answer out: the machine stands still, and loses nothing."""

from __future__ import annotations

import pytest

from nbdfleece.nbd.constants import InfoType, Option, OptionReply
from nbdfleece.nbd.errors import OptionError
from nbdfleece.nbd.export_info import ExportInfo, Lookup, NotKnownYet
from nbdfleece.nbd.negotiation import Negotiation
from nbdfleece.nbd.outcomes import Negotiated

from .wire import STRUCTURED, Exports, client_flags, go, info, option, set_contexts

DISK = ExportInfo(name="disk", size=4096, contexts=("base:allocation",))


class Slow(Exports):
    """Knows each answer when it is asked for the second time."""

    answers = 0

    def exports(self):  # type: ignore[no-untyped-def]
        self.think()
        return super().exports()

    def find(self, name: str) -> ExportInfo | None:
        self.think()
        return super().find(name)

    def think(self) -> None:
        self.answers += 1
        if self.answers % 2:
            raise NotKnownYet


def take(negotiation: Negotiation) -> bytes:
    return b"".join(iter(negotiation.data_to_send, b""))


def replies_of(data: bytes, *, slow: bool, cut: int) -> tuple[bytes, Negotiation, list[Lookup]]:
    """All replies to what a client sends in pieces of ``cut`` bytes."""
    negotiation = Negotiation(Slow([DISK]) if slow else Exports([DISK]))
    replies, lookups = take(negotiation), []
    for position in range(0, len(data), cut):
        negotiation.receive_data(data[position : position + cut])
        replies += take(negotiation)
        while negotiation.lookup is not None:
            assert take(negotiation) == b"", "nothing is answered meanwhile"
            lookups.append(negotiation.lookup)
            negotiation.resume()
            replies += take(negotiation)
    return replies, negotiation, lookups


@pytest.mark.parametrize("cut", [1, 7, 1 << 20])
def test_replies_are_the_same_as_of_one_that_knows(cut: int) -> None:
    data = client_flags() + option(Option.LIST) + STRUCTURED + set_contexts("base:", name="disk")
    data += info("disk", [InfoType.NAME]) + info("other") + go("disk")
    slow, negotiation, lookups = replies_of(data, slow=True, cut=cut)
    quick, other, _ = replies_of(data, slow=False, cut=len(data))
    assert slow == quick
    assert isinstance(negotiation.outcome, Negotiated)
    assert negotiation.outcome == other.outcome
    assert [lookup.option for lookup in lookups] == [
        Option.LIST,
        Option.SET_META_CONTEXT,
        Option.INFO,
        Option.INFO,
        Option.GO,
    ]
    assert lookups[2] == Lookup(Option.INFO, "disk", frozenset({InfoType.NAME}))


def test_answer_may_be_a_refusal() -> None:
    class Refusing(Slow):
        def find(self, name: str) -> ExportInfo | None:
            self.think()
            raise OptionError(OptionReply.ERR_POLICY, "not you")

    negotiation = Negotiation(Refusing([DISK]))
    negotiation.receive_data(client_flags() + go("disk"))
    take(negotiation)
    negotiation.resume()
    assert b"not you" in take(negotiation)
    assert negotiation.outcome is None


def test_end_of_the_stream_while_it_stands_still_is_the_end() -> None:
    negotiation = Negotiation(Slow([DISK]))
    negotiation.receive_data(client_flags() + go("disk"))
    take(negotiation)
    negotiation.receive_eof()
    negotiation.resume()
    assert negotiation.outcome is not None
    assert not isinstance(negotiation.outcome, Negotiated)
