"""Each rank killed and stopped in each phase of a real run: named, and the run over in time, with no process left."""

from __future__ import annotations

from pathlib import Path

import pytest
from tiny_run import make_inputs, settings, write_config

from megacog.training.fault_times import Case, NeverCameError, measure, summary

pytestmark = [pytest.mark.distributed, pytest.mark.slow, pytest.mark.timeout(300)]
LIMIT = 4.0
CASES = [
    ("kill", "data", 0), ("kill", "forward", 1), ("kill", "backward", 0), ("kill", "step", 1), ("kill", "evaluate", 1),
    ("kill", "save", 0), ("kill", "save", 1), ("kill", "load", 1), ("stop", "data", 1), ("stop", "forward", 0),
    ("stop", "step", 1), ("stop", "evaluate", 0), ("stop", "save", 1), ("stop", "load", 0),
]  # fmt: skip
"""All phases; `python -m megacog.training.fault_times` measures every rank in each."""


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("inputs")
    values = settings(make_inputs(folder), folder / "run", "base", engine="torch", steps=6, eval_every=3)
    return write_config(folder / "run.yaml", values | {"checkpoint": {"every": 3}})


@pytest.fixture(scope="module")
def cases() -> list[Case]:
    return []


@pytest.mark.parametrize(("kind", "phase", "rank"), CASES)
def test_the_rank_is_named_and_the_run_ends(
    config: Path, cases: list[Case], kind: str, phase: str, rank: int
) -> None:
    try:
        case = measure(config, 2, kind, phase, rank, LIMIT)
    except NeverCameError:
        if kind == "kill":  # no limit is short then
            raise
        case = measure(config, 2, kind, phase, rank, 4 * LIMIT)  # other work held the run up for so long
    cases.append(case)
    assert case.named, case.output
    assert 0 not in case.codes and case.orphans == 0, case.output
    assert case.codes[1 - rank] == 1, case.output
    assert case.seconds <= (10 if kind == "kill" else case.limit + 5), case.output


def test_the_figures_are_within_the_goals(cases: list[Case]) -> None:
    figures = summary(cases)
    print(figures)
    assert figures["kill"]["p95"] <= 10 and figures["stop"]["p95"] <= 5
    assert all(found["orphans"] == found["not_named"] == 0 for found in figures.values())
