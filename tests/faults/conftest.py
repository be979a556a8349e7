"""The small world that commands are called in, and the figures that the tests report at the end."""

from __future__ import annotations

from collections.abc import Callable

import pytest
from command_world import command, training, world

__all__ = ["command", "training", "world"]

Figure = Callable[[str], None]
_PROPERTY = "figure"


@pytest.fixture
def figure(request: pytest.FixtureRequest) -> Figure:
    """Reports a line such as "shards: detected 20 of 20" after the tests (docs/reliability.md quotes them)."""
    properties = request.node.user_properties  # which come back from the processes of pytest-xdist, too
    return lambda line: properties.append((_PROPERTY, line))


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    calls = [report for name in ("passed", "failed") for report in terminalreporter.getreports(name)]
    figures = [
        line for report in calls if report.when == "call" for name, line in report.user_properties if name == _PROPERTY
    ]
    if figures:
        terminalreporter.section("figures of the fault tests")
        for line in figures:
            terminalreporter.write_line(line)
