"""What all tests share: where the data is, torch's threads, and that no test is skipped unseen."""

from __future__ import annotations

import signal
from collections.abc import Generator
from pathlib import Path

import pytest
from hypothesis import settings

# The same examples in every run: a failure in CI is a failure here.
settings.register_profile("ci", derandomize=True, deadline=None)
settings.load_profile("ci")

# A shell's background jobs ignore Ctrl-C, and so would every program that a test starts and interrupts.
if signal.getsignal(signal.SIGINT) == signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--no-skips", action="store_true", help="a skipped test or module is a failure")


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(
    item: pytest.Item,
) -> Generator[None, pytest.TestReport, pytest.TestReport]:
    report = yield
    _forbid_skip(report, item.config)
    return report


@pytest.hookimpl(wrapper=True)
def pytest_make_collect_report(
    collector: pytest.Collector,
) -> Generator[None, pytest.CollectReport, pytest.CollectReport]:
    report = yield
    _forbid_skip(report, collector.config)
    return report


def _forbid_skip(report: pytest.TestReport | pytest.CollectReport, config: pytest.Config) -> None:
    # An expected failure is reported as skipped too, and is none.
    if config.getoption("--no-skips") and report.skipped and not hasattr(report, "wasxfail"):
        report.outcome = "failed"
        report.longrepr = f"{report.nodeid}: --no-skips forbids this skip: {report.longrepr}"


@pytest.fixture(scope="session", autouse=True)
def _two_threads() -> None:
    """CI has two cores; threads beyond the cores only wait for each other."""
    import torch

    torch.set_num_threads(2)


@pytest.fixture(scope="session")
def data_dir() -> Path:
    """The folder of the small real cases that come with the tests."""
    return Path(__file__).parent / "data"
