"""Where our server's time goes in a row: py-spy samples it, and a short table says what it saw.

py-spy looks at the process from outside, a few hundred times a second, so that what it sees is not
slowed down more in one function than in another. Time in the kernel belongs to the function that
called it. Only threads that run are counted: shares are of the time in which the server was busy.
"""

from __future__ import annotations

import re
import signal
import statistics
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final

from .clients import CLIENT_SECONDS
from .rows import Row
from .servers import Nbdfleece
from .version import ours

BEHIND: Final = (
    "pull-fleece", "allocating", "incremental", "block-status", "cold-read", "neighbour-p99",
    "pull-tls", "randwrite-100", "pull-unix-4",
)  # fmt: skip
"""The rows that are profiled where none is named."""

RUNS: Final = 2
RATE_HERTZ: Final = 400
LINES_MAX: Final = 12
WAITING: Final = frozenset(
    {"_worker (concurrent/futures/thread.py)", "Condition.wait (threading.py)"}
)
"""Where a thread of a pool has nothing to do, which py-spy at times takes for running."""

PROCESSES: Final = re.compile(r"(process \d+:\"[^\"]*\";?)+")
"""How a stack begins where py-spy looks at several processes: with their command lines."""

UVLOOP: Final = "Runner.run (asyncio/runners.py)"
"""What py-spy sees where uvloop runs code of its own, and its wait for the next event."""


@dataclass
class Profile:
    """Samples of a server's busy threads.

    Attributes:
        own: Samples in a function itself, or in what it called of C and of the kernel.
        whole: Samples in a function and all that it called; a recursion counts once.
        count: All samples.
    """

    own: Counter[str] = field(default_factory=Counter)
    whole: Counter[str] = field(default_factory=Counter)
    count: int = 0

    def add(self, lines: Iterable[str]) -> None:
        """Take stacks as py-spy's raw format has them: ``outer;inner COUNT``."""
        for line in lines:
            stack, _, number = line.rstrip().rpartition(" ")
            frames = [_shorten(frame) for frame in PROCESSES.sub("", stack).split(";")]
            if frames[-1] in WAITING:
                continue
            if frames[-1] == UVLOOP:
                frames.append("uvloop itself")
            self.own[frames[-1]] += int(number)
            for frame in set(frames):
                self.whole[frame] += int(number)
            self.count += int(number)


def _shorten(frame: str) -> str:
    """``function (path/to/file.py)`` with the package's own paths from its root."""
    frame = re.sub(r"\(.*/(nbdfleece/)", r"(\1", frame)
    return re.sub(r"\(.*/lib/python3[^/]*/(site-packages/)?", "(", frame)


def find_py_spy() -> Path:
    """Its path; the program ends with a word on how to install it if it is not there."""
    program = Path(sys.executable).with_name("py-spy")
    if not program.exists():
        sys.exit("bench: profiles need py-spy: scripts/setup --extra test,profile")
    return program


@contextmanager
def spying(pid: int, output: Path) -> Iterator[None]:
    """Have py-spy sample a process and its children while this context is entered.

    Raises:
        CalledProcessError: It could not.
    """
    argv = [str(find_py_spy()), "record", "--pid", str(pid), "--format", "raw", "--nolineno"]
    argv += ["--subprocesses", "--full-filenames"]
    argv += ["--rate", str(RATE_HERTZ), "--output", str(output)]
    spy = subprocess.Popen(argv, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    assert spy.stdout is not None
    first = spy.stdout.readline()  # it says that it samples, or why it cannot
    try:
        yield
    finally:
        spy.send_signal(signal.SIGINT)
        rest, _ = spy.communicate(timeout=CLIENT_SECONDS)
    if spy.returncode:
        raise subprocess.CalledProcessError(spy.returncode, argv, first + rest)


@dataclass
class Profiled:
    """What was seen of a row.

    Attributes:
        seconds: From the beginning of the workload to its end, over all runs.
        user: Processor time of the server in that time, outside the kernel.
        system: Inside it.
        values: The row's figures of each run, with the profiler beside it.
    """

    profile: Profile = field(default_factory=Profile)
    seconds: float = 0.0
    user: float = 0.0
    system: float = 0.0
    values: list[dict[str, float]] = field(default_factory=list)


def profile_rows(rows: list[Row], folder: Path) -> None:
    """Profile our server in rows, and write a page for each."""
    find_py_spy()
    folder.mkdir(parents=True, exist_ok=True)
    for row in rows:
        text = page(row, profile_row(row))
        (folder / f"{row.name}.md").write_text(text)
        print(text, flush=True)


def profile_row(row: Row) -> Profiled:
    """Run a row a few times under the profiler; neither preparations nor the start are seen."""
    server = Nbdfleece(row.place)
    setup = row.setup()
    found = Profiled()
    for _ in range(RUNS):
        row.ready(setup)
        output = row.place.path(".stacks")
        with server.serve(setup) as running:
            row.prepare(running)
            with spying(running.process.pid, output):
                begin, before = time.perf_counter(), running.process.user_and_system_seconds()
                found.values.append(row.measure(server, running))
                after = running.process.user_and_system_seconds()
                found.seconds += time.perf_counter() - begin
        found.user += after[0] - before[0]
        found.system += after[1] - before[1]
        found.profile.add(output.read_text().splitlines())
        output.unlink()
    return found


def page(row: Row, found: Profiled) -> str:
    """A page in Markdown."""
    profile = found.profile
    figures = ", ".join(
        f"{statistics.median(values[metric.key] for values in found.values):.4g} {metric.unit}"
        for metric in row.metrics
    )
    busy = found.user + found.system
    return "\n".join([
        f"# {row.title}",
        "",
        f"    scripts/bench profile {row.name}",
        "",
        f"nbdfleece {ours()}, {RUNS} runs with py-spy beside them: {figures}.",
        f"In {found.seconds:.2f} s the server used {busy:.2f} s of processor time,",
        f"{found.system:.2f} s of it in the kernel; {profile.count} samples of busy threads.",
        "",
        *_top("by itself, or in C and the kernel", profile.own, profile.count),
        "",
        *_top("with what it calls", _inner(profile.whole), profile.count),
        "",
    ])  # fmt: skip


def _top(heading: str, counts: Counter[str], total: int) -> list[str]:
    lines = [f"| function, {heading} | share |", "|---|---|"]
    for frame, count in counts.most_common(LINES_MAX):
        lines.append(f"| `{frame}` | {100 * count / total:.1f} % |")
    return lines


def _inner(counts: Counter[str]) -> Counter[str]:
    """Without what starts the server, which has all of it."""
    outer = ("(nbdfleece/cli/", "(<string>)", "(click/", "(asyncio/", "(threading.py)")
    return Counter({it: count for it, count in counts.items() if not any(o in it for o in outer)})
