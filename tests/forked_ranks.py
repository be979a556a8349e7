"""Runs a function on several tensor-parallel ranks of this machine, without starting python again."""

from __future__ import annotations

import multiprocessing
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch.distributed as dist

from megacog.parallel.groups import build_process_groups
from megacog.parallel.tensor import TensorParallel


def run_forked(worker: Callable[[TensorParallel], Any], size: int, folder: Path) -> list[Any]:
    """Results of `worker` on `size` gloo ranks, in rank order."""
    context = multiprocessing.get_context("fork")
    queue = context.Queue()

    def rank_main(rank: int) -> None:
        try:
            dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=size)
            queue.put((rank, worker(build_process_groups(size).tensor), None))
            dist.barrier()
        except BaseException:
            queue.put((rank, None, traceback.format_exc()))

    processes = [context.Process(target=rank_main, args=(rank,), daemon=True) for rank in range(size)]
    for process in processes:
        process.start()
    results = [queue.get(timeout=120) for _ in range(size)]
    for process in processes:
        process.join(timeout=30)
    for rank, _, error in results:
        assert error is None, f"rank {rank}: {error}"
    return [value for _, value, _ in sorted(results, key=lambda result: result[0])]
