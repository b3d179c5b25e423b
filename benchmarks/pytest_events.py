"""The pytest plugin for `benchmarks.watch`: `pytest -p benchmarks.pytest_events`.

Writes the start and outcome of each test to the file named by APT_TEST_EVENTS, leaves out tests
that were already started according to it, and stops after a test that made the GPU unusable, since
all later tests would fail.
"""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from benchmarks.events import Events, begun
from benchmarks.worker import LOST, why_lost

VARIABLE = "APT_TEST_EVENTS"


def pytest_configure(config: pytest.Config) -> None:
    config.pluginmanager.register(EventsPlugin(Path(os.environ[VARIABLE])), "events of tests")


class EventsPlugin:
    """Writes the events of one run."""

    def __init__(self, path: Path) -> None:
        self.done = begun(path)
        self.events = Events(path)
        self.reports: list[pytest.TestReport] = []

    @pytest.hookimpl(trylast=True)  # after selection by markers
    def pytest_collection_modifyitems(
        self, config: pytest.Config, items: list[pytest.Item]
    ) -> None:
        left = [item for item in items if item.nodeid not in self.done]
        config.hook.pytest_deselected(items=[item for item in items if item.nodeid in self.done])
        items[:] = left
        self.events.write("collected", number=len(left))

    def pytest_runtest_logstart(self, nodeid: str) -> None:
        self.reports = []
        self.events.write("begin", nodeid)

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        self.reports.append(report)

    def pytest_runtest_logfinish(self, nodeid: str) -> None:
        failed = [report for report in self.reports if report.failed]
        skipped = [report for report in self.reports if report.skipped]
        lost = why_lost() if failed else ""
        outcome = "failed" if failed else "skipped" if skipped else "passed"
        text = failed[0].longreprtext if failed else ""
        self.events.write(
            "end", nodeid, outcome=outcome, traceback=text, **({"lost": lost} if lost else {})
        )
        if lost:
            pytest.exit(f"{nodeid} left the GPU unusable: {lost}", returncode=LOST)

    def pytest_sessionfinish(self, exitstatus: int) -> None:
        if exitstatus in (pytest.ExitCode.OK, pytest.ExitCode.TESTS_FAILED):
            self.events.write("finished")
        elif exitstatus == pytest.ExitCode.NO_TESTS_COLLECTED and self.done:
            self.events.write("finished")  # the last test had killed the process before
