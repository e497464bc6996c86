"""Cases and what they are given: the registry, the server handle and the outcomes."""

from __future__ import annotations

import contextlib
import ssl
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol
from urllib.parse import quote

from conformance.client import Client
from conformance.content import Content
from conformance.errors import NotApplicable, expect, require
from conformance.replies import Reply
from conformance.requirements import REQUIREMENTS
from conformance.stream import TIMEOUT_SECONDS, Endpoint
from conformance.wire import Cmd, Flag

# Configurations: how a server is set up for a case.
READ_ONLY = "read-only"
WRITABLE = "writable"
TCP = "tcp"
MANY = "many-exports"
TLS_FORCED = "tls-forced"
TLS_SELECTIVE = "tls-selective"
BAD_SECTOR = "bad-sector"
BAD_STATUS = "bad-status"
BLOCK_SIZES = "block-sizes"
CONFIGURATIONS = (
    READ_ONLY,
    WRITABLE,
    TCP,
    MANY,
    TLS_FORCED,
    TLS_SELECTIVE,
    BAD_SECTOR,
    BAD_STATUS,
    BLOCK_SIZES,
)


@dataclass(frozen=True)
class Export:
    """What is known beforehand of an export; None where nothing is."""

    name: str
    size: int | None = None
    writable: bool = False
    content: Content | None = None
    dirty: Mapping[str, tuple[tuple[int, int], ...]] = field(default_factory=dict)
    depth: bool = False
    description: str | None = None
    tls_only: bool = False


class Process(Protocol):
    """The running server, for cases that stop or kill it."""

    def alive(self) -> bool: ...

    def greets(self) -> bool: ...

    def wait_end(self) -> bool: ...

    def log(self) -> str: ...

    def terminate(self) -> None: ...

    def kill(self) -> None: ...

    def restart(self) -> None: ...


@dataclass
class Server:
    """How to reach the server under test, and what it is known to have.

    Attributes:
        strict_names: Whether export names other than those in ``exports`` are unknown to it.
        python: The command that runs a Python which has libnbd's binding.
        process: None when the suite did not start the server.
        memo: What cases share about this server; filled by them.
    """

    name: str
    configuration: str
    endpoint: Endpoint
    exports: tuple[Export, ...]
    tls: str = "off"
    certificates: Path | None = None
    strict_names: bool = True
    process: Process | None = None
    timeout: float = TIMEOUT_SECONDS
    python: tuple[str, ...] = (sys.executable,)
    memo: dict[str, Any] = field(default_factory=dict)

    @property
    def export(self) -> Export:
        return self.exports[0]

    def uri(self, export: Export | None = None) -> str:
        """The export's NBD URI, as libnbd takes it."""
        name = quote((export or self.export).name, safe="")
        scheme = "nbds" if self.tls == "forced" else "nbd"
        query = [f"tls-certificates={self.certificates}"] if self.tls == "forced" else []
        if not self.endpoint.path:
            address = f"{scheme}://{self.endpoint.host}:{self.endpoint.port}/{name}"
        else:
            address = f"{scheme}+unix:///{name}"
            query.insert(0, f"socket={self.endpoint.path}")
        return address + ("?" + "&".join(query) if query else "")

    def connect(self) -> Client:
        """A connection from which nothing was read."""
        return Client(self.endpoint, self.timeout)

    def haggle(self, tls: bool | None = None) -> Client:
        """A connection that is ready for options; over TLS where the server insists."""
        client = self.connect()
        with closing_on_error(client):
            client.handshake()
            if self.tls == "forced" if tls is None else tls:
                client.start_tls(self.tls_context())
        return client

    def enter(
        self,
        *,
        structured: bool = False,
        extended: bool = False,
        contexts: tuple[str, ...] = (),
        export: Export | None = None,
        tls: bool | None = None,
    ) -> Client:
        """A connection in the transmission phase.

        Raises:
            NotApplicable: The server does not take an option on the way.
        """
        client = self.haggle(tls)
        name = (export or self.export).name
        with closing_on_error(client):
            if extended:
                require(client.agree_extended(), "no extended headers")
            elif structured:
                require(client.agree_structured(), "no structured replies")
            if contexts:
                _select(client, name, contexts)
            answer = client.go(name)
            expect(answer.acknowledged, f"GO {name!r} answered {answer}")
        return client

    def tls_context(self, newest: ssl.TLSVersion | None = None) -> ssl.SSLContext:
        """A TLS client's context that trusts the suite's CA and shows its client certificate."""
        if self.certificates is None:
            raise NotApplicable("no certificates are known for this server")
        context = ssl.create_default_context(cafile=self.certificates / "ca-cert.pem")
        key = self.certificates / "client-key.pem"
        if key.exists():
            context.load_cert_chain(self.certificates / "client-cert.pem", key)
        if newest is not None:
            context.maximum_version = newest
        return context


@contextlib.contextmanager
def closing_on_error(client: Client) -> Iterator[None]:
    """Close ``client`` if the body does not hand it on."""
    try:
        yield
    except BaseException:
        client.stream.close()
        raise


def _select(client: Client, name: str, contexts: tuple[str, ...]) -> None:
    answer = client.set_contexts(name, contexts)
    require(answer.acknowledged, f"SET_META_CONTEXT answered {answer}")
    missing = set(contexts) - answer.names
    require(not missing, f"no context {', '.join(sorted(missing))}")


class CaseFunction(Protocol):
    __name__: str

    def __call__(self, server: Server) -> str | None: ...


@dataclass(frozen=True)
class Case:
    """One question to a server.

    Attributes:
        numbers: Requirements that it is about, the first foremost; empty for other sources.
        source: Where it comes from when not from a requirement: a CVE, or ``own``.
        level: M, X, S or N, of the first requirement unless the case asks only for less.
        private: It stops, kills or floods the server: it gets one for itself.
        ours_only: Never sent to a server other than nbdfleece.
    """

    run: CaseFunction
    numbers: tuple[int, ...]
    source: str
    level: str
    configuration: str
    private: bool
    ours_only: bool

    @property
    def name(self) -> str:
        head = str(self.numbers[0]) if self.numbers else self.source
        return f"{head}/{self.run.__name__.replace('_', '-')}"

    @property
    def question(self) -> str:
        return (self.run.__doc__ or "").strip().partition("\n")[0]

    def matches(self, word: str) -> bool:
        """Whether ``--case word`` means this case: a number, a source, or part of the name."""
        if word.isdigit():
            return int(word) in self.numbers
        return word in self.name


CASES: list[Case] = []


def requirement(
    *numbers: int,
    on: str = READ_ONLY,
    level: str | None = None,
    private: bool = False,
    ours_only: bool = False,
) -> Callable[[CaseFunction], CaseFunction]:
    """Register a case about requirements ``numbers``, run on the configuration ``on``."""

    def register(run: CaseFunction) -> CaseFunction:
        strength = level or REQUIREMENTS[numbers[0]].level
        CASES.append(Case(run, numbers, "", strength, on, private, ours_only))
        return run

    return register


def security(
    source: str,
    *,
    on: str = READ_ONLY,
    private: bool = False,
    ours_only: bool = False,
    level: str = "M",
) -> Callable[[CaseFunction], CaseFunction]:
    """Register a case about a CVE, or of our ``own``."""

    def register(run: CaseFunction) -> CaseFunction:
        CASES.append(Case(run, (), source, level, on, private, ours_only))
        return run

    return register


# --- what cases of every phase use


def still_serves(server: Server) -> None:
    """Another client gets a reply: the server as a whole took no harm."""
    with server.enter() as other:
        other.read(0, 512 if (other.export.size >= 512) else 1)


DRAINING_SECONDS_MAX = 3.0
"""After so long a server is taken to stop although it still greets new clients."""


@contextlib.contextmanager
def draining(server: Server) -> Iterator[Client]:
    """Tell the server to stop while a client has not read its replies yet.

    What is in flight holds the server between running and ended, where the protocol has rules;
    a server with nothing to finish may go at once. That it is no longer there for new clients
    shows that it has begun. Gives that client: 15 replies are due.
    """
    require(server.process, "the suite did not start this server")
    assert server.process is not None
    with server.enter() as busy:
        size = min(busy.export.size, 1 << 20)
        busy.send(*(busy.request(Cmd.READ, 0, size) for _ in range(16)))
        busy.receive()
        server.process.terminate()
        # The signal may be on its way for as long as the server is not given the processor.
        deadline = time.monotonic() + DRAINING_SECONDS_MAX
        while server.process.greets() and time.monotonic() < deadline:
            time.sleep(0.02)
        yield busy


def expect_error(reply: Reply, *wanted: int) -> str:
    """The reply is an error, of the ``wanted`` numbers if there are any."""
    expect(reply.error, f"{reply.request}: succeeded")
    expect(not wanted or reply.error in wanted, str(reply))
    return str(reply)


def has_flag(client: Client, flag: Flag) -> None:
    """The export offers ``flag``, or the case is not applicable."""
    require(client.export.flags & flag, f"{flag.name} is not offered")
