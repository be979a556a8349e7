"""Results that a pass which runs twice computes only once.

Activation checkpointing forgets what a layer computes and runs it again for the backward pass. An op whose result
is worth its memory computes it through `kept`: it is stored in the first run and taken from there in the second,
where the op's gradient finds the same inputs as ever. What calls `kept` must stand below autograd: in the
implementation of an operator, or in the forward of an autograd function.

torch's own selective contexts are of no use here: they count every operator of the region, and what gathers
weights inside of it (ZeRO 3) does not run the same ones twice.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar

from torch import Tensor

Results = tuple[Tensor, ...]

_run: ContextVar[Callable[[Callable[[], Results]], Results] | None] = ContextVar("run", default=None)


def kept(compute: Callable[[], Results]) -> Results:
    """What `compute` returns: of this run, or of the first one of a region that runs again."""
    run = _run.get()
    return compute() if run is None else run(compute)


class KeptResults:
    """What one region keeps from its first run for its second; each result is given back once."""

    def __init__(self) -> None:
        self._results: deque[Results] = deque()

    @contextmanager
    def first_run(self) -> Iterator[None]:
        with _set(self._record):
            yield

    @contextmanager
    def second_run(self) -> Iterator[None]:
        with _set(lambda _: self._results.popleft()):
            yield

    def _record(self, compute: Callable[[], Results]) -> Results:
        results = compute()
        self._results.append(tuple(part.detach() for part in results))
        return results


@contextmanager
def _set(run: Callable[[Callable[[], Results]], Results]) -> Iterator[None]:
    token = _run.set(run)
    try:
        yield
    finally:
        _run.reset(token)
