"""Batches for training and evaluation, made in this process or in loader processes.

The order never depends on the number of loader processes: they fill in numbered batches.
"""

from __future__ import annotations

import ctypes
import itertools
import signal
import sys
import warnings
import weakref
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch.utils.data import DataLoader, Dataset

from megacog.config.schema import Config
from megacog.data.batch import Batch, BatchArrays, collate
from megacog.data.dataset import StageDataset, open_sources
from megacog.data.sampler import BatchPlan
from megacog.errors import EnvError, MegacogError
from megacog.tokenizers.text import TextTokenizer

_PR_SET_PDEATHSIG = 1


class TrainingBatches(Iterator[Batch]):
    """The endless micro batches of one data-parallel rank, from `start_step` on.

    Every optimizer step has `accumulation` of them. `close` ends the loader processes.

    Attributes:
        accumulation: micro batches per optimizer step.
    """

    def __init__(self, config: Config, text: TextTokenizer, *, data_rank: int, data_size: int, start_step: int) -> None:
        train = config.train
        plan = BatchPlan(train.global_batch_size, train.micro_batch_size, data_rank, data_size)
        self.accumulation = plan.accumulation
        self._text, self._text_length = text, config.model.text_length
        sources = open_sources(config.data.train, "data.train")
        dataset = _MicroBatches(StageDataset(config, sources, text, training=True), plan)
        order = _Order(start_step, plan.accumulation)
        self._iterator: Iterator[BatchArrays | MegacogError] | None
        self._end_workers: Callable[[], object] | None = None
        if config.data.workers:
            self._iterator = _start_workers(dataset, order, config.data.workers)
            # Also at exit, before multiprocessing waits for processes that would go on for ever.
            self._end_workers = weakref.finalize(self, _end_workers, self._iterator)
        else:
            self._iterator = map(dataset.__getitem__, order)

    def __next__(self) -> Batch:
        if self._iterator is None:
            raise RuntimeError("the batches are closed")
        try:
            arrays = next(self._iterator)
        except RuntimeError as error:
            if "DataLoader worker" not in str(error):
                raise
            self.close()
            raise EnvError(
                f"a loader process died ({str(error).splitlines()[0]}). It may have run out of memory: lower "
                "data.workers, or set data.workers=0 to load in the training process."
            ) from None
        if isinstance(arrays, MegacogError):
            self.close()
            raise arrays
        return collate(arrays, self._text, self._text_length)

    def close(self) -> None:
        """Ends the loader processes; there are no batches afterwards."""
        self._iterator = None
        if self._end_workers is not None:
            self._end_workers()

    def __enter__(self) -> TrainingBatches:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def training_batches(
    config: Config, text: TextTokenizer, *, data_rank: int, data_size: int, start_step: int
) -> TrainingBatches:
    """Returns the endless micro batches of a data-parallel rank, first those of `start_step`.

    Micro batch m of step n holds the same samples whatever the number of ranks and loader processes
    of the runs before; only the global batch size and the data decide.

    Raises:
        ConfigError: the global batch is no multiple of micro batch x ranks.
        DataError: shards are missing, damaged, or hold nothing the stage can use; also from `next`.
        EnvError: from `next`: a loader process died.
    """
    return TrainingBatches(config, text, data_rank=data_rank, data_size=data_size, start_step=start_step)


def evaluation_batches(
    config: Config, text: TextTokenizer, *, data_rank: int, data_size: int, count: int
) -> list[Batch]:
    """Returns this rank's share of the evaluation samples; the same in every run and at every step.

    All ranks together see `count * train.micro_batch_size` samples, whatever their number, in equally
    many batches of equal sizes (the last may be smaller than a micro batch: weigh by `len(batch)`).
    When the ranks do not divide them, the first samples are seen twice to fill up.

    Returns:
        Batches; none when `data.eval` is empty.
    """
    if not config.data.eval:
        return []
    sources = open_sources(config.data.eval, "data.eval")
    dataset = StageDataset(config, sources, text, training=False)
    micro = config.train.micro_batch_size
    total = count * micro
    rows = -(-total // data_size)
    positions = [(data_rank + data_size * row) % total for row in range(rows)]
    return [
        collate(dataset.batch(0, positions[first : first + micro]), text, config.model.text_length)
        for first in range(0, rows, micro)
    ]


class _Order:
    """Yields (step, micro batch) from a step on, without end."""

    def __init__(self, start_step: int, accumulation: int) -> None:
        self._start_step, self._accumulation = start_step, accumulation

    def __iter__(self) -> Iterator[tuple[int, int]]:
        for step in itertools.count(self._start_step):
            yield from ((step, micro) for micro in range(self._accumulation))


class _MicroBatches(Dataset[Any]):
    """Micro batches of one rank by (step, micro batch). Errors of the user's data are returned, so that
    they cross process borders as they are."""

    def __init__(self, dataset: StageDataset, plan: BatchPlan) -> None:
        self._dataset, self._plan = dataset, plan

    def __getitem__(self, index: tuple[int, int]) -> BatchArrays | MegacogError:
        step, micro = index
        phase = self._dataset.phase_at(step)
        positions = self._plan.positions(step - self._dataset.phase_starts[phase], micro)
        try:
            return self._dataset.batch(phase, positions)
        except MegacogError as error:
            return error


def _start_workers(dataset: _MicroBatches, order: _Order, workers: int) -> Iterator[Any]:
    """Returns the micro batches in order, made by loader processes."""
    # Forked processes share the opened shards' arrays with this one; no tensor is used in them.
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="This DataLoader will create")
        loader = DataLoader(
            dataset,
            batch_size=None,
            sampler=order,
            num_workers=workers,
            collate_fn=_unchanged,
            worker_init_fn=_start_worker,
            multiprocessing_context="fork",
            # Without its own generator DataLoader draws from torch's global one, which dropout uses.
            generator=torch.Generator(),
        )
        return iter(loader)


def _end_workers(iterator: Any) -> None:
    # DataLoader itself leaves this to the garbage collector, which a traceback can keep waiting.
    iterator._shutdown_workers()
    for worker in iterator._workers:
        if worker.is_alive():
            worker.kill()


def _unchanged(arrays: Any) -> Any:
    return arrays


def _start_worker(_: int) -> None:
    """Leaves signals to the training process, and dies with it."""
    for name in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1):
        signal.signal(name, signal.SIG_IGN)
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
