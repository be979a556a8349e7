"""Log lines: whose, from which rank, and where they go."""

from __future__ import annotations

import logging
from collections.abc import Iterator

import pytest

from megacog.runtime import log


@pytest.fixture(autouse=True)
def _restore() -> Iterator[None]:
    loggers = [logging.getLogger(name) for name in ("megacog", "megacog_kernels")]
    before = [(list(logger.handlers), logger.level) for logger in loggers]
    yield
    for logger, (handlers, level) in zip(loggers, before, strict=True):
        logger.handlers[:] = handlers
        logger.setLevel(level)


@pytest.mark.parametrize("name", ["megacog.training.loop", "megacog_kernels"])
def test_rank_0_says_everything_once_and_others_only_warnings(name: str, capsys: pytest.CaptureFixture) -> None:
    log.setup(0)
    log.setup(0)
    logging.getLogger(name).info("first")
    log.setup(1)
    logging.getLogger(name).info("second")
    logging.getLogger(name).warning("third")
    logging.getLogger(name).warning("as on every rank", extra=log.SHARED)
    lines = capsys.readouterr().err.splitlines()
    assert [line.split()[-1] for line in lines] == ["first", "third"]
    assert "rank 1" in lines[1]
