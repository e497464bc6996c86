"""Descriptors for as many clients as are allowed, and for the disks beside them."""

from __future__ import annotations

import resource
from collections.abc import Iterator

import pytest

from nbdfleece.server.limits import OTHER_DESCRIPTORS, Limits, allow_descriptors

NOFILE = resource.RLIMIT_NOFILE


@pytest.fixture
def hard() -> Iterator[int]:
    """The hard limit, under a soft one of 512; as they were at the end."""
    soft, hard = resource.getrlimit(NOFILE)
    resource.setrlimit(NOFILE, (512, hard))
    yield hard
    resource.setrlimit(NOFILE, (soft, hard))


def test_soft_limit_is_raised_for_all_clients_and_the_disks(hard: int) -> None:
    allow_descriptors(Limits(connections_max=900))
    assert resource.getrlimit(NOFILE) == (900 + OTHER_DESCRIPTORS, hard)


def test_soft_limit_that_is_enough_is_left_alone(hard: int) -> None:
    resource.setrlimit(NOFILE, (1500, hard))
    allow_descriptors(Limits(connections_max=10))
    assert resource.getrlimit(NOFILE) == (1500, hard)


def test_hard_limit_that_is_too_low_is_named(
    hard: int, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(resource, "getrlimit", lambda _: (512, 1000))
    given: list[tuple[int, int]] = []
    monkeypatch.setattr(resource, "setrlimit", lambda _, limits: given.append(limits))
    allow_descriptors(Limits(connections_max=900))
    monkeypatch.undo()
    assert given == [(1000, 1000)]
    assert "raise the hard limit" in caplog.text
