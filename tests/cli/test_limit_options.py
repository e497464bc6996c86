"""Limits and settings of exports on the command line, and that the manual has them all."""

from __future__ import annotations

import re
import resource
from pathlib import Path

import pytest

from nbdfleece.cli.export_options import _KEYS, parse_export_rule
from nbdfleece.cli.limit_options import limit_names, parse_limits
from nbdfleece.errors import UsageError
from nbdfleece.export.policy import ExportRule
from nbdfleece.server.limits import Limits

from .conftest import Start, make_image

MANUAL = (Path(__file__).parents[2] / "docs" / "nbd.md").read_text()


def rows() -> dict[str, str]:
    """The second column of the manual's tables by the first."""
    return dict(re.findall(r"^\| `([a-z-]+)` \| ([^|]*) \|", MANUAL, re.MULTILINE))


def test_manual_has_every_limit_with_its_default() -> None:
    found = rows()
    limits = {name: parse_limits([f"{name}={found[name]}"]) for name in limit_names()}
    assert set(limits.values()) == {Limits()}


def test_manual_has_every_setting_of_exports() -> None:
    assert set(_KEYS) <= rows().keys()


def test_limits_are_read_by_name() -> None:
    limits = parse_limits(["idle-seconds=1.5", "queries-max=7", "flush-bytes=1M", "queries-max=8"])
    assert (limits.idle_seconds, limits.wire.queries_max, limits.flush_bytes) == (1.5, 8, 1 << 20)
    assert limits.connections_max == Limits().connections_max


@pytest.mark.parametrize(
    "word",
    ["", "idle-seconds", "idle-seconds=inf", "idle-seconds=-0.1", "excess-waits=1", "options-max=0"]
    + ["option-length-max=64M", "payload-skip-max=5G", "payload-accepted-max=16M"],
)
def test_limit_that_cannot_be_is_refused(word: str) -> None:
    with pytest.raises(UsageError):
        parse_limits([word])


def test_export_rule_may_have_colons_in_its_pattern() -> None:
    assert parse_export_rule("a:b/*:tls-only=on,connections-max=2") == ExportRule(
        pattern="a:b/*", tls_only=True, connections_max=2
    )


def test_server_has_descriptors_for_all_its_clients(tmp_path: Path, start: Start) -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (512, hard))
    try:
        image = make_image(tmp_path / "a.qcow2")
        server = start("--disk", f"vda={image}", "--listen", "unix:n")
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    limits = Path(f"/proc/{server.process.pid}/limits").read_text()
    (allowed,) = re.findall(r"^Max open files +(\d+)", limits, re.MULTILINE)
    assert int(allowed) >= Limits().connections_max + 1024
