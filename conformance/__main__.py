"""``python -m conformance``: run the suite, write its matrix, run foreign clients."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator
from pathlib import Path
from urllib.parse import parse_qs, unquote, urlsplit

from conformance import matrix
from conformance.case import READ_ONLY, TLS_FORCED, WRITABLE, Case, Export, Server
from conformance.clients import run_clients
from conformance.content import SMALL_DISK_BYTES
from conformance.errors import Finding
from conformance.requirements import NOT_VISIBLE, REQUIREMENTS
from conformance.runner import (
    FAIL,
    NOT_APPLICABLE,
    Outcome,
    chosen,
    outcome_of,
    place,
    report,
    run_case,
    run_server,
    write_report,
)
from conformance.servers import ADAPTERS
from conformance.stream import Endpoint


def arguments() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="conformance", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    run = commands.add_parser("run", help="run the cases against a server")
    run.add_argument("--server", required=True, help=f"{', '.join(ADAPTERS)}, or an NBD URI")
    run.add_argument("--case", action="append", default=[], help="a number, CVE or part of a name")
    run.add_argument("--json", type=Path, help="write the outcomes to this file")
    run.add_argument("--tree", type=Path, help="use the programs of this Debian tree")
    run.add_argument("--writable", action="store_true", help="a URI's export may be overwritten")
    run.add_argument("-v", "--verbose", action="store_true", help="print passed cases too")
    clients = commands.add_parser("clients", help="run foreign clients against a server")
    clients.add_argument("--server", required=True, help=", ".join(ADAPTERS))
    clients.add_argument("--client", action="append", default=[], help="part of a check's name")
    clients.add_argument("--json", type=Path, help="write the outcomes to this file")
    clients.add_argument("--tree", type=Path, help="use the programs of this Debian tree")
    clients.add_argument("-v", "--verbose", action="store_true", help="print passed checks too")
    commands.add_parser("list", help="list the cases")
    commands.add_parser("matrix", help="write README.md from the files in results/")
    return parser


def main() -> int:
    """Run the command line.

    Returns:
        The exit status: 0, 1 if a MUST or MUST NOT failed, 2 if the server is not there.
    """
    options = arguments().parse_args()
    if options.command == "matrix":
        matrix.write()
        return 0
    if options.command == "list":
        return _list()
    try:
        return _clients(options) if options.command == "clients" else _run(options)
    except (Finding, FileNotFoundError) as error:
        print(f"conformance: {options.server}: {error}", file=sys.stderr)
        return 2


def _clients(options: argparse.Namespace) -> int:
    with place(options.tree, SMALL_DISK_BYTES) as where:
        adapter = ADAPTERS[options.server](where)
        version = adapter.version()
        outcomes = _shown(run_clients(adapter, options.client), options.verbose)
    return _finish(options, version, outcomes)


def _list() -> int:
    for case in chosen([]):
        print(f"{case.level} {case.name:64} {case.configuration:14} {case.question}")
    covered = {number for case in chosen([]) for number in case.numbers}
    print(f"{len(chosen([]))} cases, {len(covered)} of {len(REQUIREMENTS)} requirements")
    for number in sorted(REQUIREMENTS.keys() - covered):
        print(f"not covered: {number}: {NOT_VISIBLE.get(number, 'GAP')}")
    return 0


def _run(options: argparse.Namespace) -> int:
    wanted = chosen(options.case)
    if options.server in ADAPTERS:
        with place(options.tree) as where:
            adapter = ADAPTERS[options.server](where)
            version = adapter.version()
            outcomes = _shown(run_server(adapter, wanted), options.verbose)
    else:
        version = options.server
        outcomes = _shown(_run_uri(options.server, options.writable, wanted), options.verbose)
    return _finish(options, version, outcomes)


def _finish(options: argparse.Namespace, version: str, outcomes: list[Outcome]) -> int:
    _summary(version, outcomes)
    if options.json:
        data = report(options.server, version, outcomes, tree=options.tree is not None)
        write_report(options.json, data)
    return int(any(outcome.is_failure for outcome in outcomes))


def _shown(outcomes: Iterator[Outcome], verbose: bool) -> list[Outcome]:
    kept = []
    for outcome in outcomes:
        kept.append(outcome)
        if verbose or outcome.outcome == FAIL:
            mark = "FAIL" if outcome.is_failure else outcome.outcome
            print(f"{mark:5}{outcome.level} {outcome.case}: {outcome.evidence}", flush=True)
    return kept


def _summary(version: str, outcomes: list[Outcome]) -> None:
    failed = sum(outcome.is_failure for outcome in outcomes)
    lesser = sum(outcome.outcome == FAIL for outcome in outcomes) - failed
    skipped = sum(outcome.outcome == NOT_APPLICABLE for outcome in outcomes)
    passed = len(outcomes) - failed - lesser - skipped
    print(
        f"{version}: {passed} passed, {failed} failed, {lesser} failed what SHOULD be, "
        f"{skipped} not applicable"
    )


def _run_uri(uri: str, writable: bool, cases: list[Case]) -> Iterator[Outcome]:
    server = server_of(uri, writable)
    with server.enter() as client:
        if client.export.size < SMALL_DISK_BYTES:
            raise SystemExit(f"{uri}: {client.export.size} bytes; cases need {SMALL_DISK_BYTES}")
    for case in cases:
        if case.configuration != server.configuration or case.private:
            reason = f"needs a server in the configuration {case.configuration}, of its own"
            yield outcome_of(case, NOT_APPLICABLE, reason, 0.0)
        else:
            yield run_case(case, server)


def server_of(uri: str, writable: bool) -> Server:
    """The handle of a server that runs already, by its URI (nbd, nbds, +unix)."""
    parts = urlsplit(uri)
    query = {key: values[0] for key, values in parse_qs(parts.query).items()}
    tls = parts.scheme.startswith("nbds")
    configuration = TLS_FORCED if tls else WRITABLE if writable else READ_ONLY
    if parts.scheme.endswith("+unix"):
        endpoint = Endpoint(path=query["socket"])
    else:
        endpoint = Endpoint(host=parts.hostname or "localhost", port=parts.port or 10809)
    export = Export(unquote(parts.path[1:]), writable=writable)
    certificates = Path(query["tls-certificates"]) if "tls-certificates" in query else None
    mode = "forced" if tls else "off"
    return Server(uri, configuration, endpoint, (export,), mode, certificates)


if __name__ == "__main__":
    sys.exit(main())
