"""Errors that all ranks find by themselves, before they have met."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from megacog.errors import ConfigError
from megacog.runtime.ranks import Ranks
from megacog.runtime.signals import StopFlag

_PATIENCE = 120.0
"""Seconds: rank 0 may need some to find out what would fit."""


@contextmanager
def told_by_rank_0(ranks: Ranks, stop: StopFlag, patience: float = _PATIENCE) -> Iterator[None]:
    """Context in which a ConfigError is taken to be that of every rank, so that rank 0 alone tells it.

    The others stay until they are asked to stop, since a launcher ends all ranks when one has left, and could end
    rank 0 before it has spoken. A rank that nobody ends has an error of its own, and tells it after all.
    """
    try:
        yield
    except ConfigError as error:
        error.told = ranks.rank != 0 and stop.wait(patience)
        raise
