"""The conformance suite itself: right servers pass, and each fault fails the case about it."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest

from conformance import matrix
from conformance.__main__ import server_of
from conformance.broken_server import BrokenServer
from conformance.case import READ_ONLY, WRITABLE, Case, Server
from conformance.cases import CASES
from conformance.clients import ClientCase, Site, run_clients, run_site
from conformance.content import SMALL_DISK_BYTES
from conformance.programs import Programs
from conformance.requirements import NOT_VISIBLE, REQUIREMENTS
from conformance.runner import (
    FAIL,
    PASS,
    Outcome,
    chosen,
    place,
    report,
    run_case,
    run_server,
    write_report,
)
from conformance.servers import ADAPTERS, Place
from conformance.stream import TIMEOUT_SECONDS

SLOW = ("slow-handshake", "client-that-waits", "huge-options")

# (configuration, fault, a case that must fail)
FAULTS = [
    (READ_ONLY, "unknown-client-flag-accepted", "7/unknown-client-flag-drops-connection"),
    (READ_ONLY, "extra-handshake-flag", "5/no-other-handshake-flag"),
    (READ_ONLY, "abort-unanswered", "15/abort-is-acknowledged"),
    (READ_ONLY, "padding-always", "8/no-padding-after-export-name-when-agreed"),
    (READ_ONLY, "data-not-skipped", "9/data-of-unknown-option-is-skipped"),
    (READ_ONLY, "any-export-name", "10/unknown-name-in-export-name-ends-session"),
    (READ_ONLY, "data-ignored", "18/list-with-data-is-invalid"),
    (READ_ONLY, "data-ignored", "40/structured-reply-with-data-is-invalid"),
    (READ_ONLY, "data-ignored", "173/extended-headers-with-data-is-invalid"),
    (READ_ONLY, "nul-in-name", "1/strings-are-utf8-without-nul"),
    (READ_ONLY, "wrong-option-echo", "13/replies-echo-the-option"),
    (READ_ONLY, "info-size-zero", "34/info-tells-what-go-tells"),
    (READ_ONLY, "info-twice", "36/each-information-comes-once"),
    (READ_ONLY, "padding-after-go", "35/no-padding-after-go"),
    (READ_ONLY, "no-info-export", "29/export-information-comes-before-ack"),
    (READ_ONLY, "info-before-unknown", "30/no-information-before-err-unknown"),
    (READ_ONLY, "odd-preferred-size", "93/sizes-are-sound"),
    (READ_ONLY, "no-has-flags", "66/has-flags-is-set"),
    (READ_ONLY, "writing-offered-read-only", "67/read-only-export-offers-no-writing"),
    (READ_ONLY, "df-always-offered", "42/reply-extensions-are-not-offered-before-agreement"),
    (READ_ONLY, "set-without-structured", "48/set-without-structured-replies-is-invalid"),
    (READ_ONLY, "duplicate-contexts", "61/context-asked-twice-is-selected-once"),
    (READ_ONLY, "set-adds", "62/set-replaces-the-set-before"),
    (READ_ONLY, "failed-set-keeps", "62/failing-set-clears-the-set-before"),
    (READ_ONLY, "wildcards-select", "57/base-is-wildcard-in-list-and-nothing-in-set"),
    (READ_ONLY, "wildcards-select", "59/empty-leaf-selects-nothing"),
    (READ_ONLY, "list-with-ids", "52/list-replies-are-contexts-with-id-zero-then-ack"),
    (READ_ONLY, "trailing-bytes-accepted", "own/bytes-after-the-last-query-are-invalid"),
    (READ_ONLY, "structured-always", "100/replies-are-simple-unless-agreed"),
    (READ_ONLY, "simple-read", "41/reads-are-structured-after-agreement"),
    (READ_ONLY, "simple-errors", "106/no-simple-reply-to-read-after-agreement"),
    (READ_ONLY, "cookie-cut", "101/cookies-are-echoed"),
    (READ_ONLY, "done-early", "108/done-is-on-the-last-chunk"),
    (READ_ONLY, "reply-flag-unknown", "111/only-known-reply-flags-and-types"),
    (READ_ONLY, "errors-without-text", "107/structured-errors-have-text"),
    (READ_ONLY, "error-text-long", "123/error-chunks-are-sound"),
    (READ_ONLY, "own-error-numbers", "163/error-numbers-are-known-and-used-rightly"),
    (READ_ONLY, "drop-on-error", "165/read-past-the-end-is-einval"),
    (READ_ONLY, "drop-on-error", "114/survey-is-never-disconnected"),
    (READ_ONLY, "drop-on-length-zero", "127/read-of-length-zero-does-not-disconnect"),
    (READ_ONLY, "never-replies", "133/content-is-right"),
    (READ_ONLY, "wrong-content", "133/content-is-right"),
    (READ_ONLY, "content-short", "133/content-chunks-cover-the-request"),
    (READ_ONLY, "content-overlaps", "131/content-chunks-do-not-overlap"),
    (READ_ONLY, "hole-outside", "117/hole-chunks-are-sound"),
    (READ_ONLY, "df-fragmented", "136/df-gives-one-data-chunk"),
    (READ_ONLY, "extent-of-zero", "119/extents-are-not-empty"),
    (READ_ONLY, "req-one-ignored", "120/req-one-gives-one-extent"),
    (READ_ONLY, "extent-outside", "121/only-the-last-extent-leaves-the-request"),
    (READ_ONLY, "equal-neighbours", "157/equal-neighbours-are-merged"),
    (READ_ONLY, "one-context-only", "154/one-chunk-per-context"),
    (READ_ONLY, "reserved-status-bits", "65/base-allocation-has-no-reserved-bits"),
    (READ_ONLY, "zero-is-a-lie", "158/zero-is-never-a-lie"),
    (READ_ONLY, "bitmap-shifted", "189/bitmaps-show-what-is-dirty"),
    (READ_ONLY, "any-flag-accepted", "169/unknown-flags-are-einval"),
    (READ_ONLY, "einval-when-read-only", "166/write-to-read-only-export-is-eperm"),
    (READ_ONLY, "read-only-written", "68/read-only-export-is-not-written"),
    (READ_ONLY, "refused-payload-left", "139/payload-is-taken-when-read-only"),
    (READ_ONLY, "extended-offset-zero", "177/extended-replies-echo-offset"),
    (READ_ONLY, "extended-count-wrong", "181/extended-status-chunks-are-sound"),
    (READ_ONLY, "status-ids-unchecked", "185/wrong-status-payload-is-einval"),
    (WRITABLE, "writes-lost", "138/written-bytes-are-read-back"),
    (WRITABLE, "trim-rounds-outwards", "142/trim-touches-only-its-range"),
    (WRITABLE, "zeroes-short", "146/write-zeroes-reads-back-as-zero"),
    (WRITABLE, "fast-zero-in-part", "150/fast-zero-zeroes-or-alters-nothing"),
    (WRITABLE, "cut-payload-written", "own/client-that-leaves-in-a-payload-writes-nothing-wrong"),
]


@pytest.fixture(scope="module")
def right(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, Server]]:
    """The model without faults, in both configurations."""
    folder = tmp_path_factory.mktemp("right")
    servers = {
        configuration: BrokenServer(folder / configuration, writable=configuration == WRITABLE)
        for configuration in (READ_ONLY, WRITABLE)
    }
    yield {configuration: server.handle() for configuration, server in servers.items()}
    for server in servers.values():
        server.close()


SILENT = ("any-export-name", "never-replies")
"""Faults that show by nothing happening for as long as a case waits."""
SILENCE_SECONDS = 0.5
"""For those; a slow machine can only make it a failure that is to be one."""


def with_fault(path: Path, fault: str, configuration: str, case: Case) -> Outcome:
    server = BrokenServer(path, {fault}, writable=configuration == WRITABLE)
    try:
        seconds = SILENCE_SECONDS if fault in SILENT else TIMEOUT_SECONDS
        return run_case(case, server.handle(seconds))
    finally:
        server.close()


def named(name: str) -> Case:
    (found,) = (case for case in CASES if case.name == name)
    return found


def quick(configuration: str) -> list[Case]:
    return [
        case
        for case in CASES
        if case.configuration == configuration
        and not case.private
        and not any(word in case.name for word in SLOW)
    ]


@pytest.mark.parametrize(("configuration", "fault", "name"), FAULTS)
def test_case_on_server_with_its_fault_fails(
    tmp_path: Path, right: dict[str, Server], configuration: str, fault: str, name: str
) -> None:
    """A case that cannot fail proves nothing: without the fault it passes, with it it fails."""
    case = named(name)
    good = run_case(case, right[configuration])
    wrong = with_fault(tmp_path / "wrong", fault, configuration, case)
    assert good.outcome == PASS, good.evidence
    assert wrong.outcome == FAIL, wrong.evidence
    assert wrong.evidence


@pytest.mark.parametrize("configuration", [READ_ONLY, WRITABLE])
def test_cases_on_right_server_do_not_fail(right: dict[str, Server], configuration: str) -> None:
    """The model without faults is a conforming server: no case may say otherwise."""
    outcomes = [run_case(case, right[configuration]) for case in quick(configuration)]
    failed = [
        f"{outcome.case}: {outcome.evidence}" for outcome in outcomes if outcome.outcome == FAIL
    ]
    assert not failed
    assert sum(outcome.outcome == PASS for outcome in outcomes) > len(outcomes) / 2


def test_requirements_are_covered_or_explained() -> None:
    """Each requirement has a case, or a reason why no client can see it, and not both."""
    covered = {number for case in CASES for number in case.numbers}
    assert covered | NOT_VISIBLE.keys() == REQUIREMENTS.keys()
    assert not covered & NOT_VISIBLE.keys()


def test_case_names_are_unique_and_questions_stand() -> None:
    names = [case.name for case in CASES]
    assert len(names) == len(set(names))
    assert all(case.question for case in CASES)


def test_cases_for_our_own_server_only_are_not_sent_to_others(tmp_path: Path) -> None:
    """Trailing bytes after the last query, and FAST_ZERO that was not offered."""
    ours = [case for case in CASES if case.ours_only]
    assert {case.name for case in ours} == {
        "151/fast-zero-that-was-not-offered-is-einval",
        "own/bytes-after-the-last-query-are-invalid",
    }
    server = BrokenServer(tmp_path / "s")
    handle = server.handle()
    handle.name = "somebody-else"
    try:
        assert all(run_case(case, handle).outcome == "n/a" for case in ours)
    finally:
        server.close()


@pytest.fixture(scope="module")
def where() -> Iterator[Place]:
    for program in ("qemu-nbd", "qemu-img", "qemu-io"):
        if shutil.which(program) is None:
            pytest.skip(f"{program} is not installed")
    with place(size=SMALL_DISK_BYTES) as made:
        yield made


def test_quick_run_against_qemu_nbd_finds_its_known_deviations(where: Place) -> None:
    """The servers of others are real: QEMU passes nearly all, and fails what it is known for."""
    adapter = ADAPTERS["qemu-nbd"](where)
    outcomes = list(run_server(adapter, quick(READ_ONLY)))
    failed = {outcome.case for outcome in outcomes if outcome.outcome == FAIL}
    assert len(failed) < 10, [o for o in outcomes if o.outcome == FAIL]
    assert "166/write-to-read-only-export-is-eperm" in failed
    assert sum(outcome.outcome == PASS for outcome in outcomes) > 120


def test_foreign_clients_against_qemu_nbd_get_what_they_should(where: Place) -> None:
    """nbdinfo and nbdcopy are real, and their results are compared."""
    adapter = ADAPTERS["qemu-nbd"](where)
    outcomes = list(run_clients(adapter, ["nbdinfo --size", "nbdinfo --can", "qemu-img info"]))
    assert [outcome.evidence for outcome in outcomes if outcome.outcome == FAIL] == []
    assert len(outcomes) == 4


def test_client_with_wrong_result_fails(right: dict[str, Server], where: Place) -> None:
    """A check whose program tells something else than the server is a failure."""

    def lies(site: Site) -> str:
        shown = site.run("nbdinfo", "--size", site.uri).stdout.strip()
        assert shown == str(SMALL_DISK_BYTES)
        site.run("nbdinfo", "--can", "no-such-capability", site.uri)
        return "unreachable"

    if not where.programs.has("nbdinfo"):
        pytest.skip("nbdinfo is not installed")
    case = ClientCase(lies, "lies", READ_ONLY)
    (outcome,) = run_site(Site(where, right[READ_ONLY]), [case])
    assert outcome.outcome == FAIL
    assert outcome.evidence.startswith("nbdinfo: status ")


def outcome_with(case: str, outcome: str, level: str) -> Outcome:
    return Outcome(case, (7,), "", level, READ_ONLY, outcome, "what was | seen", 0.1)


def test_matrix_of_a_run_tells_must_from_should(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "results").mkdir()
    outcomes = [
        outcome_with("7/a", FAIL, "M"),
        outcome_with("18/b", FAIL, "S"),
        outcome_with("9/c", PASS, "M"),
    ]
    data = report("nbd-server", "nbd-server 3.24", outcomes)
    write_report(tmp_path / "results" / "nbd-server.json", data)
    monkeypatch.setattr(matrix, "FOLDER", tmp_path)
    matrix.write(tmp_path / "README.md")
    page = (tmp_path / "README.md").read_text()
    assert "| nbd-server 3.24 | 1 | 1 | 1 | 0 |" in page
    assert "| 7/a | M | **FAIL** |" in page
    assert "| 18/b | S | *fail* |" in page
    assert page.index("| 7/a") < page.index("| 9/c") < page.index("| 18/b")


def test_programs_of_a_tree_run_in_a_mount_namespace_of_their_own(tmp_path: Path) -> None:
    """The mounts end with the process, so that nothing has to be undone."""
    program = tmp_path / "usr" / "bin" / "nbdinfo"
    program.parent.mkdir(parents=True)
    program.touch()
    programs = Programs(tmp_path, tmp_path / "work")
    argv = programs.argv("nbdinfo", "--version")
    assert argv[:2] == ["unshare", "--mount"]
    assert argv[-2:] == ["/usr/bin/nbdinfo", "--version"]
    with pytest.raises(FileNotFoundError, match="qemu-nbd is not installed in"):
        programs.argv("qemu-nbd")


def test_uri_of_a_running_server_is_understood() -> None:
    server = server_of("nbd+unix:///a%2Fb?socket=/tmp/s", writable=True)
    assert (server.endpoint.path, server.export.name) == ("/tmp/s", "a/b")
    assert server.configuration == WRITABLE
    server = server_of("nbds://[::1]:4711/x?tls-certificates=/pki", writable=False)
    assert (server.endpoint.host, server.endpoint.port, server.tls) == ("::1", 4711, "forced")


def test_choice_of_cases_by_number_source_and_name() -> None:
    assert {7} <= {number for case in chosen(["7"]) for number in case.numbers}
    assert all(7 in case.numbers for case in chosen(["7"]))
    assert chosen(["CVE-2021-3716"])
    assert len(chosen([])) == len(CASES)
