"""The published matrix: README.md from the outcomes in results/."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

from conformance.notes import note_on
from conformance.requirements import NOT_VISIBLE, REQUIREMENTS
from conformance.runner import FAIL, NOT_APPLICABLE, PASS, Outcome, load_report

FOLDER = Path(__file__).parent
ORDER = ("nbdfleece", "qemu-nbd", "qemu-storage-daemon", "nbdkit", "nbd-server")
SYMBOLS = {PASS: "✓", NOT_APPLICABLE: "·"}

HEAD = """\
# Conformance of NBD servers

This suite runs against any NBD server. It has a client of its own, over raw sockets, and asks a
second time through libnbd. Each case is about numbered requirements
([requirements.py](requirements.py)), a CVE of an NBD server, or is our own.

```
python -m conformance run --server qemu-nbd                 # or any of the servers below
python -m conformance run --server nbd://localhost/disk     # one that runs already
python -m conformance run --server nbdkit --case 61 -v      # by requirement, CVE or word
python -m conformance run --server qemu-nbd --tree DIR      # programs of a Debian tree
python -m conformance clients --server qemu-nbd             # foreign clients against it
python -m conformance matrix                                # write this page
```

A server that runs already is only read, unless `--writable` says that its export may be
overwritten. `scripts/trixie-tree DIR` makes a tree with the programs of Debian 13.

**FAIL** is against a MUST or MUST NOT, *fail* against a SHOULD or SHOULD NOT; a dot means not
applicable; "(tree)" marks servers and clients of a Debian 13 tree. Two cases are sent to
nbdfleece only, because they send what no client may.
"""


class Column(NamedTuple):
    name: str
    version: str
    date: str
    outcomes: list[Outcome]
    tree: bool = False

    @property
    def title(self) -> str:
        """The name, with the version's number behind the name of a peer."""
        words = [word for word in self.version.split() if word[:1].isdigit()]
        suffix = " (tree)" if self.tree else ""
        return (f"{self.name} {words[0]}" if words else self.name) + suffix


def load(prefix: str = "") -> list[Column]:
    """All reports in results/ whose file names begin with ``prefix``."""
    columns = []
    for path in sorted((FOLDER / "results").glob("*.json")):
        if path.name.startswith("clients-") == (prefix == "clients-"):
            head, outcomes = load_report(path)
            columns.append(_column(head, outcomes))
    return sorted(columns, key=_place)


def _column(head: dict[str, Any], outcomes: list[Outcome]) -> Column:
    return Column(head["server"], head["version"], head["date"], outcomes, head["tree"])


def _place(column: Column) -> tuple[int, bool, str]:
    known = ORDER.index(column.name) if column.name in ORDER else len(ORDER)
    return known, column.tree, column.title


def symbol(outcome: Outcome | None) -> str:
    if outcome is None:
        return ""
    if outcome.outcome == FAIL:
        return "**FAIL**" if outcome.is_failure else "*fail*"
    return SYMBOLS[outcome.outcome]


def write(path: Path = FOLDER / "README.md") -> None:
    """Write the page."""
    path.write_text("\n".join(lines()).rstrip() + "\n")


def lines() -> Iterator[str]:
    columns, clients = load(), load("clients-")
    yield HEAD
    yield "## Summary\n"
    yield from _summary(columns)
    yield "\n## Deviations\n"
    for column in columns:
        yield from _deviations(column)
    yield "## Cases\n"
    yield from _table(columns)
    yield "\n## Requirements that no client can see\n"
    for number, reason in NOT_VISIBLE.items():
        yield f"- {number}. {REQUIREMENTS[number].wording}: {reason}."
    yield "\n## Foreign clients\n"
    yield from _summary(clients)
    yield ""
    yield from _table(clients)


def _summary(columns: list[Column]) -> Iterator[str]:
    yield "| server | passed | FAIL | *fail* | not applicable | date |"
    yield "|---|---|---|---|---|---|"
    for column in columns:
        failed = sum(outcome.is_failure for outcome in column.outcomes)
        lesser = sum(outcome.outcome == FAIL for outcome in column.outcomes) - failed
        counts = [
            sum(outcome.outcome == kind for outcome in column.outcomes)
            for kind in (PASS, NOT_APPLICABLE)
        ]
        row = (column.title, counts[0], failed, lesser, counts[1], column.date)
        yield "| " + " | ".join(map(str, row)) + " |"


def _deviations(column: Column) -> Iterator[str]:
    failed = [outcome for outcome in column.outcomes if outcome.outcome == FAIL]
    yield f"### {column.title}\n"
    if not failed:
        yield "None.\n"
    for outcome in sorted(failed, key=lambda outcome: not outcome.is_failure):
        note = note_on(column.name, outcome.case)
        yield f"- {symbol(outcome)} `{outcome.case}`: {_plain(outcome.evidence)}. {note}".rstrip()
    yield ""


def _plain(text: str) -> str:
    """Evidence that shows as it is, cut to a length."""
    short = text if len(text) <= 200 else text[:200] + "…"
    return short.replace("<", "&lt;").replace("|", "\\|").replace("*", "\\*").rstrip(".")


def _table(columns: list[Column]) -> Iterator[str]:
    found = [{outcome.case: outcome for outcome in column.outcomes} for column in columns]
    rows = {case: outcome for outcomes in found for case, outcome in outcomes.items()}
    yield "| case | level | " + " | ".join(column.title for column in columns) + " |"
    yield "|---|---|" + "---|" * len(columns)
    for case in sorted(rows, key=_by_number):
        marks = " | ".join(symbol(outcomes.get(case)) for outcomes in found)
        yield f"| {case} | {rows[case].level} | {marks} |"


def _by_number(case: str) -> tuple[int, str]:
    head = case.partition("/")[0]
    return (int(head) if head.isdigit() else 1000), case
