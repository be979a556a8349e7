"""The small world that commands are called in, and the figures that the tests report at the end."""

from __future__ import annotations

from collections.abc import Callable

import pytest
from command_world import command, training, world

__all__ = ["command", "training", "world"]

Figure = Callable[[str], None]
_FIGURES = pytest.StashKey[list[str]]()


@pytest.fixture
def figure(request: pytest.FixtureRequest) -> Figure:
    """Reports a line such as "shards: detected 20 of 20" after the tests (docs/reliability.md quotes them)."""
    return request.config.stash.setdefault(_FIGURES, []).append


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter, config: pytest.Config) -> None:
    if figures := config.stash.get(_FIGURES, []):
        terminalreporter.section("figures of the fault tests")
        for line in figures:
            terminalreporter.write_line(line)
