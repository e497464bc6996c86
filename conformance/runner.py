"""Running cases: starts servers, one per configuration, and keeps the outcomes."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import shutil
import signal
import tempfile
import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Any

from conformance.case import CONFIGURATIONS, Case, Process, Server
from conformance.cases import CASES
from conformance.certificates import make_certificates
from conformance.content import make_images
from conformance.errors import Finding, NotApplicable, Stalled
from conformance.programs import Programs
from conformance.servers import Adapter, Place, Running, StartError, Unsupported

CASE_SECONDS = 180.0
"""No case may take longer: each wait is bounded by itself, this bounds their sum."""
OURS = ("nbdfleece", "model")
"""Servers that get the cases which are not sent to other projects' servers."""

PASS, FAIL, NOT_APPLICABLE = "pass", "fail", "n/a"


@dataclass(frozen=True)
class Outcome:
    """What a case found of a server."""

    case: str
    numbers: tuple[int, ...]
    source: str
    level: str
    configuration: str
    outcome: str
    evidence: str
    seconds: float

    @property
    def is_failure(self) -> bool:
        """A failure of a MUST or MUST NOT."""
        return self.outcome == FAIL and self.level in "MX"


def chosen(words: Iterable[str]) -> list[Case]:
    """The cases that match any of ``words``; all without words."""
    asked = list(words)
    return [case for case in CASES if not asked or any(map(case.matches, asked))]


@contextlib.contextmanager
def time_limit(seconds: float) -> Iterator[None]:
    """Raise Stalled in the body after ``seconds``."""

    def expired(_: int, frame: FrameType | None) -> None:
        raise Stalled(f"case took more than {seconds:.0f} s")

    before = signal.signal(signal.SIGALRM, expired)
    timer = signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
        signal.setitimer(signal.ITIMER_REAL, *timer)  # of who called us: the tests have one


def run_case(case: Case, server: Server) -> Outcome:
    """Run one case against a running server."""
    started = time.monotonic()
    if case.ours_only and server.name not in OURS:
        return outcome_of(case, NOT_APPLICABLE, "sent to nbdfleece only", 0.0)
    try:
        with time_limit(CASE_SECONDS):
            evidence = case.run(server)
        made = PASS, evidence or ""
    except NotApplicable as reason:
        made = NOT_APPLICABLE, str(reason)
    except (Finding, StartError) as finding:
        made = FAIL, str(finding)
    except UnicodeDecodeError as error:
        made = FAIL, f"not UTF-8: {error}"
    if server.process is not None and not case.private and _has_ended(server.process, made[0]):
        last_words = server.process.log().rpartition("\n")[2]
        made = FAIL, f"the server ended; {made[1]}; its last words: {last_words}"
    return outcome_of(case, *made, time.monotonic() - started)


def _has_ended(process: Process, outcome: str) -> bool:
    """Whether the server is gone; one that is just going after a failure is waited for."""
    if outcome == FAIL and not process.greets():
        process.wait_end()
    return not process.alive()


def outcome_of(case: Case, outcome: str, evidence: str, seconds: float) -> Outcome:
    return Outcome(
        case.name,
        case.numbers,
        case.source,
        case.level,
        case.configuration,
        outcome,
        " ".join(evidence.split())[:600],
        round(seconds, 3),
    )


def run_server(adapter: Adapter, cases: list[Case]) -> Iterator[Outcome]:
    """Run ``cases`` against all configurations of a server, in the order of those."""
    for configuration in CONFIGURATIONS:
        wanted = [case for case in cases if case.configuration == configuration]
        if wanted:
            yield from _run_configuration(adapter, configuration, wanted)


def _run_configuration(
    adapter: Adapter, configuration: str, cases: list[Case]
) -> Iterator[Outcome]:
    try:
        running = adapter.start(configuration)
    except Unsupported as reason:
        yield from (outcome_of(case, NOT_APPLICABLE, str(reason), 0.0) for case in cases)
        return
    except StartError as error:
        yield from (outcome_of(case, FAIL, f"does not start: {error}", 0.0) for case in cases)
        return
    try:
        for case in cases:
            if not running.alive():
                running = adapter.start(configuration)
            yield _run_private(adapter, case) if case.private else run_case(case, running.server)
    finally:
        running.stop()


def _run_private(adapter: Adapter, case: Case) -> Outcome:
    running: Running = adapter.start(case.configuration, private=True)
    try:
        return run_case(case, running.server)
    finally:
        running.stop()


@contextlib.contextmanager
def place(tree: Path | None = None, size: int | None = None) -> Iterator[Place]:
    """A working folder with images and certificates; removed at the end."""
    folder = Path(tempfile.mkdtemp(prefix="nbdconf.", dir="/tmp"))
    try:
        images = make_images(folder) if size is None else make_images(folder, size)
        certificates = make_certificates(folder / "pki")
        yield Place(folder, images, certificates, Programs(tree, folder))
    finally:
        shutil.rmtree(folder)


def report(
    name: str, version: str, outcomes: list[Outcome], *, tree: bool = False
) -> dict[str, Any]:
    """The run as it is written to a file; ``tree`` says that programs of a tree were used."""
    return {
        "server": name,
        "version": version,
        "tree": tree,
        "date": time.strftime("%Y-%m-%d", time.gmtime()),
        "outcomes": [dataclasses.asdict(outcome) for outcome in outcomes],
    }


def write_report(path: Path, data: dict[str, Any]) -> None:
    """Write a report with one outcome per line, so that two runs can be compared by lines."""
    head = {key: value for key, value in data.items() if key != "outcomes"}
    rows = ",\n".join(json.dumps(row) for row in data["outcomes"])
    path.write_text(f'{json.dumps(head)[:-1]}, "outcomes": [\n{rows}\n]}}\n')


def load_report(path: Path) -> tuple[dict[str, Any], list[Outcome]]:
    data = json.loads(path.read_text())
    outcomes = [
        Outcome(**{**row, "numbers": tuple(row["numbers"])}) for row in data.pop("outcomes")
    ]
    return data, outcomes
