"""Batches for training and evaluation, made in this process or in loader processes.

The order never depends on the number of loader processes: they fill in numbered batches.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from functools import partial

from megacog.config.schema import Config
from megacog.data.batch import Batch, BatchArrays, collate
from megacog.data.dataset import StageDataset, open_sources
from megacog.data.loader_processes import LoaderProcesses, Note
from megacog.data.sampler import BatchPlan
from megacog.errors import MegacogError
from megacog.tokenizers.text import TextTokenizer


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
        dataset = StageDataset(config, sources, text, training=True)
        make = partial(_micro_batch, dataset, plan, start_step)
        self._processes: LoaderProcesses | None = None
        self._iterator: Iterator[BatchArrays | MegacogError] | None
        if config.data.workers:
            self._processes = LoaderProcesses(make, config.data.workers, config.data.worker_timeout)
            self._iterator = self._processes
        else:
            self._iterator = (make(number, None) for number in itertools.count())

    def __next__(self) -> Batch:
        if self._iterator is None:
            raise RuntimeError("the batches are closed")
        arrays = next(self._iterator)
        if isinstance(arrays, MegacogError):
            self.close()
            raise arrays
        return collate(arrays, self._text, self._text_length)

    def close(self) -> None:
        """Ends the loader processes; there are no batches afterwards."""
        self._iterator = None
        if self._processes is not None:
            self._processes.close()

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
        EnvError: from `next`: a loader process died or hung, and the one that replaced it too.
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


def _micro_batch(
    dataset: StageDataset, plan: BatchPlan, start_step: int, number: int, note: Note | None
) -> BatchArrays | MegacogError:
    """Returns a micro batch of this rank, counted from the first one of `start_step`.

    Errors of the user's data are returned, so that they cross process borders as they are.
    """
    steps, micro = divmod(number, plan.accumulation)
    step = start_step + steps
    phase = dataset.phase_at(step)
    positions = plan.positions(step - dataset.phase_starts[phase], micro)
    try:
        return dataset.batch(phase, positions, note)
    except MegacogError as error:
        return error

