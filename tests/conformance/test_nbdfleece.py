"""nbdfleece in the conformance suite: nothing may fail, in any configuration, with any client."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from conformance.case import CONFIGURATIONS, READ_ONLY
from conformance.cases import CASES
from conformance.clients import run_clients
from conformance.content import SMALL_DISK_BYTES
from conformance.runner import FAIL, NOT_APPLICABLE, PASS, Outcome, place, run_server
from conformance.servers import ADAPTERS, Place
from tests.tree import debian_13

SLOW = ("slow-handshake", "client-that-waits", "huge-options", "many-idle-connections")


@pytest.fixture(scope="module")
def where() -> Iterator[Place]:
    with place(size=SMALL_DISK_BYTES) as made:
        yield made


def failures(outcomes: list[Outcome]) -> list[str]:
    return [f"{each.case}: {each.evidence}" for each in outcomes if each.outcome == FAIL]


@pytest.mark.parametrize("configuration", CONFIGURATIONS)
def test_no_case_fails(where: Place, configuration: str) -> None:
    """SHOULD rows too."""
    cases = [
        case
        for case in CASES
        if case.configuration == configuration and not any(word in case.name for word in SLOW)
    ]
    outcomes = list(run_server(ADAPTERS["nbdfleece"](where), cases))
    assert failures(outcomes) == []
    skipped = [each.case for each in outcomes if each.outcome == NOT_APPLICABLE]
    assert len(skipped) <= 8, skipped  # the disk is below 4 GiB, and see conformance/README.md
    assert any(each.outcome == PASS for each in outcomes)


def test_no_foreign_client_fails(where: Place) -> None:
    outcomes = list(run_clients(ADAPTERS["nbdfleece"](where), []))
    assert failures(outcomes) == []
    assert sum(each.outcome == PASS for each in outcomes) > 30


def test_no_newer_client_fails() -> None:
    """libnbd 1.22 and QEMU 10, which speak extended headers."""
    with place(debian_13(), SMALL_DISK_BYTES) as where:
        adapter = ADAPTERS["nbdfleece"](where)
        outcomes = list(run_clients(adapter, []))
        cases = [
            case for case in CASES if case.configuration == READ_ONLY and "libnbd" in case.name
        ]
        outcomes += run_server(adapter, cases)
    assert failures(outcomes) == []
    assert sum(each.outcome == PASS for each in outcomes) > 30
