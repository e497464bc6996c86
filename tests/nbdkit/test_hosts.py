"""Scripts behave the same under nbdkit and under us: bytes, flags, extents, errors, calls.

Each scenario runs under a real nbdkit and under ours; what the client sees and which callbacks
the script saw, in which order and with which arguments, must be equal.
"""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from .conftest import NBDKITS, OURS, SCRIPTS, Host, need, wait_for
from .observe import DF, FAST_ZERO, FUA, NO_HOLE, REQ_ONE, Action, Observer

SECTOR = b"a" * 512
ALL = (
    "config_complete,thread_model,get_ready,after_fork,cleanup,preconnect,list_exports,"
    "default_export,close,export_description,block_size,is_rotational,can_multi_conn,can_write,"
    "can_flush,can_trim,can_zero,can_fast_zero,can_extents,can_fua,can_cache,pwrite,flush,trim,"
    "zero,extents,cache"
)
DATA = "pwrite,flush,trim,zero,extents,cache"
EVERYTHING: tuple[Action, ...] = (
    ("pread", 512, 0),
    ("pread", 100000, 1000),
    ("pread", 512, 0, DF),
    ("pwrite", SECTOR, 512),
    ("pwrite", SECTOR, 1024, FUA),
    ("pread", 2048, 0),
    ("zero", 512, 512),
    ("zero", 512, 512, NO_HOLE),
    ("zero", 512, 512, FUA),
    ("zero", 512, 512, FAST_ZERO),
    ("zero", 512, 1024, FUA | NO_HOLE | FAST_ZERO),
    ("pread", 2048, 0),
    ("trim", 512, 4096),
    ("trim", 512, 4096, FUA),
    ("flush",),
    ("cache", 65536, 0),
    ("status", 65536, 0),
    ("status", 65536, 5000),
    ("status", 65536, 5000, REQ_ONE),
    ("status", 4096, 1044480),
    ("pread", 512, 1 << 20),
    ("pwrite", SECTOR, 1 << 20),
    ("trim", 512, 1 << 20),
    ("shutdown",),
)
NEGOTIATION: tuple[Action, ...] = (
    ("list",),
    ("info", "two"),
    ("info", ""),
    ("go", ""),
    ("pread", 512, 0),
    ("shutdown",),
)


@dataclass(frozen=True)
class Scenario:
    """Parameters of record.py, flags of the host, and what clients do."""

    parameters: tuple[str, ...] = ()
    flags: tuple[str, ...] = ()
    actions: tuple[Action, ...] = EVERYTHING
    opts: bool = False
    structured: bool = True
    version: int = 2


def returning(name: str, value: Any) -> str:
    return f"return={name}:{value!r}"


SCENARIOS = {
    "bare": Scenario(),
    "bare-v1": Scenario(version=1),
    "data": Scenario((f"define={DATA}",)),
    "data-v1": Scenario((f"define={DATA}",), version=1),
    "all": Scenario((f"define={ALL}",)),
    "all-read-only": Scenario((f"define={ALL}",), ("-r",)),
    "simple-replies": Scenario((f"define={DATA}",), structured=False),
    "negotiation": Scenario((f"define={ALL}",), actions=NEGOTIATION, opts=True),
    "negotiation-defaults": Scenario((f"define={DATA}",), actions=NEGOTIATION, opts=True),
    "no-default-export": Scenario(
        ("define=default_export", "fail=default_export"), actions=NEGOTIATION, opts=True
    ),
    "only-pwrite": Scenario(("define=pwrite",)),
    "fua-emulated": Scenario((f"define={DATA},can_fua", returning("can_fua", 1))),
    "fua-none": Scenario((f"define={DATA},can_fua", returning("can_fua", 0))),
    "flush-hidden": Scenario((f"define={DATA},can_flush", returning("can_flush", False))),
    "almost-true": Scenario(
        (
            "define=pwrite,zero,can_write,can_zero,can_multi_conn,is_rotational",
            returning("can_zero", 1),
            returning("can_multi_conn", "yes"),
            returning("is_rotational", 1),
        )
    ),
    "cache-emulated": Scenario(("define=cache,can_cache", returning("can_cache", 1))),
    "cache-none": Scenario(("define=cache,can_cache", returning("can_cache", 0))),
    "promises-without-callbacks": Scenario(
        ("define=can_write,can_flush,can_trim,can_zero,can_fua,can_cache,can_extents",)
    ),
    "zero-unsupported": Scenario((f"define={DATA}", "fail=zero:95")),
    "zero-unsupported-softly": Scenario((f"define={DATA}", "soft=zero:95")),
    "zero-fails": Scenario((f"define={DATA}", "fail=zero:28")),
    "all-fail": Scenario(
        (f"define={DATA}", *(f"fail={name}" for name in ["pread", *DATA.split(",")]))
    ),
    "set-error-alone-is-no-error": Scenario(
        (f"define={DATA}", *(f"soft={name}:28" for name in ["pread", *DATA.split(",")]))
    ),
    "one-connection-at-a-time": Scenario(
        (f"define={DATA},can_multi_conn,thread_model", returning("thread_model", 0))
    ),
    "block-size-unknown": Scenario(
        ("define=block_size", returning("block_size", (0, 0, 0))), actions=NEGOTIATION, opts=True
    ),
    "no-handle": Scenario((returning("open", None), "define=close")),
}
ERRNOS = (1, 2, 5, 12, 13, 22, 27, 28, 30, 75, 95, 108, 110, 122)
REFUSALS = ("open", "get_size", "can_write", "can_zero", "can_fua", "can_extents", "can_cache")
EXTENTS: list[Any] = [
    [],
    None,
    [[0, 1 << 20, 0]],
    [(0, 1 << 20)],
    [(0, 512, 0), (1024, 512, 0)],
    [(512, 512, 0), (0, 512, 0)],
    [(8192, 4096, 0)],
    [(0, "a", 0)],
    [(0, 100, 0)],
    [(0, 1 << 20, 7)],
    [(0, 4096, 1), (4096, 4096, 2), (8192, 4096, 2), (12288, 1 << 20, 0)],
]
SCENARIOS["errnos"] = Scenario(
    (f"errnos={','.join(map(str, ERRNOS))}",),
    actions=tuple(("pread", 512, 512 * index) for index in range(len(ERRNOS))),
)
SCENARIOS["refusals"] = Scenario(
    (f"define={ALL}", "refuse=1"),
    actions=(*(("go", name) for name in REFUSALS), ("go", "one"), ("pread", 512, 0)),
    opts=True,
)
SCENARIOS["refused-before-the-greeting"] = Scenario(
    (f"define={ALL}", "fail=preconnect"), actions=(("pread", 512, 0),)
)
SCENARIOS["extents"] = Scenario(
    ("define=extents", f"extents={EXTENTS!r}"),
    actions=tuple(
        ("status", 8192, 4096 + index, flags)
        for index in range(len(EXTENTS))
        for flags in (0, REQ_ONE)
    ),
)
ON_OLD = ("bare-v1", "data", "negotiation", "extents")
"""What is compared with nbdkit 1.32 too."""


def observe(host: Host, scenario: Scenario, folder: Path) -> tuple[list[Any], list[str]]:
    """What clients see, and what the script notes."""
    folder.mkdir()
    script, calls = folder / "record.py", folder / "calls"
    text = (SCRIPTS / "record.py").read_text()
    script.write_text(text.replace("API_VERSION = 2", f"API_VERSION = {scenario.version}"))
    parameters = (str(script), f"log={calls}", *scenario.parameters)
    with host.serve(folder, *scenario.flags, *parameters) as running:
        observer = Observer(running.socket, opts=scenario.opts, structured=scenario.structured)
        seen = observer.act(scenario.actions)
        del observer
        if "close" in "".join(scenario.parameters) and "fail=preconnect" not in parameters:
            # nbdkit does not wait for connections that are just ending.
            wait_for(lambda: calls.read_text().splitlines()[-1].startswith("close("))
        status = running.stop()
        assert status == 0, running.errors
    return seen, calls.read_text().splitlines()


@pytest.mark.parametrize(
    ("version", "name"),
    [("nbdkit-1.42", name) for name in SCENARIOS] + [("nbdkit-1.32", name) for name in ON_OLD],
)
def test_script_behaves_as_under_nbdkit(version: str, name: str, tmp_path: Path) -> None:
    nbdkit = NBDKITS[version]
    need(nbdkit, tmp_path)
    scenario = SCENARIOS[name]
    with ThreadPoolExecutor() as both:
        theirs = both.submit(observe, nbdkit, scenario, tmp_path / "theirs")
        ours = both.submit(observe, OURS, scenario, tmp_path / "ours")
    their_view, their_calls = theirs.result()
    our_view, our_calls = ours.result()
    assert our_view == their_view
    assert our_calls == their_calls
