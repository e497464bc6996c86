"""What holds for all tests: nothing is skipped in CI for want of a program."""

from __future__ import annotations

import compileall
import os
from collections.abc import Generator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, settings

import nbdfleece

settings.register_profile("nbdfleece", deadline=None)
settings.load_profile("nbdfleece")

REQUIRE_ALL = os.environ.get("NBDFLEECE_REQUIRE_ALL") == "1"

GOOD_REASONS = (
    "TLS-PSK needs Python 3.13",
    "this Python has TLS-PSK",
    "the kernel has no vsock",
    "never cold",
    "no loop device",
    "refused by both",
)
"""What no installation of ours can change; anything else that is skipped fails in CI."""


def pytest_sessionstart() -> None:
    """Have our bytecode ready: the tests start our programs more than a thousand times.

    Where PYTHONDONTWRITEBYTECODE is set each of them would compile all of it anew.
    """
    compileall.compile_dir(str(Path(nbdfleece.__file__).parent), quiet=2)


@pytest.hookimpl(hookwrapper=True)
def pytest_runtest_makereport(
    item: pytest.Item, call: pytest.CallInfo[None]
) -> Generator[None, Any, None]:
    outcome = yield
    report = outcome.get_result()
    if REQUIRE_ALL and report.skipped and not hasattr(report, "wasxfail"):
        reason = str(report.longrepr[2] if isinstance(report.longrepr, tuple) else report.longrepr)
        if not any(good in reason for good in GOOD_REASONS):
            report.outcome = "failed"
            report.longrepr = f"skipped although everything must be there: {reason}"


def pytest_configure() -> None:
    """Hypothesis judges nothing by the clock or by luck, and has the same examples in CI.

    Its health checks fail a test whose examples took long to make, which on a loaded machine is
    the machine. Where developers work new examples are welcome.
    """
    checks = HealthCheck.too_slow, HealthCheck.filter_too_much, HealthCheck.data_too_large
    base = settings.get_profile("nbdfleece")
    settings.register_profile("steady", base, derandomize=REQUIRE_ALL, suppress_health_check=checks)
    settings.load_profile("steady")
