"""Replaying work on a device from CUDA graphs, which costs the host one launch instead of hundreds."""

from __future__ import annotations

from collections.abc import Callable

import torch

from megacog.model.transformer import CogVideo
from megacog_kernels.attention.dispatch import choose

Record = Callable[[Callable[[], None]], Callable[[], None]]
"""From work to something that does it at every call; recording itself does not do it."""


def record_cuda_graph(work: Callable[[], None]) -> Callable[[], None]:
    """Captures work on the current CUDA device without doing it; the result does it anew at every call."""
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        work()
    return graph.replay


def can_capture(model: CogVideo) -> bool:
    """Whether decoding with this model can be captured: on one GPU, with kernels that read positions there."""
    if model.device.type != "cuda" or model.parallel.size > 1:
        return False
    dtype = model.final_layernorm.weight.dtype
    return choose(model.kernels, model.device, dtype, model.config.head_dim) == "triton"


class Replayed:
    """Work of a few kinds that reads and writes tensors in place, each kind recorded once.

    The first call of a kind runs as it is, which compiles kernels and makes their tables; then the kind is recorded,
    without being done again, and later calls replay it.
    """

    def __init__(self, work: Callable[[int], None], record: Record = record_cuda_graph) -> None:
        self._work, self._record = work, record
        self._replays: dict[int, Callable[[], None]] = {}

    def __call__(self, kind: int) -> None:
        """Do the work of this kind."""
        if kind in self._replays:
            self._replays[kind]()
            return
        self._work(kind)
        self._replays[kind] = self._record(lambda: self._work(kind))
