"""Proof that a run resumes on any layout of ranks and any ZeRO stage: every pair of small layouts, in fp32.

Each layout trains a small model for two steps and saves; its state, gathered whole, is hashed, and the loss of the
third step noted. Each layout then resumes each checkpoint: the hash must be the same, the loss within 1e-6. With
--folder, a proof that was interrupted goes on where it was.
"""

from __future__ import annotations

import argparse
import gc
import itertools
import json
import logging
import multiprocessing
import os
import shutil
import tempfile
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import torch
import torch.distributed as dist

from megacog.checkpoint.commit import on_rank_0
from megacog.checkpoint.digest import TensorDigest
from megacog.checkpoint.discovery import find_checkpoint
from megacog.checkpoint.manifest import Manifest
from megacog.config.schema import Config
from megacog.parallel.groups import ProcessGroups, build_process_groups
from megacog.runtime.cli import run
from megacog.runtime.files import write_json
from megacog.runtime.processes import die_with
from megacog.training.comparison import GLOBAL_BATCH, MICRO_BATCH, run_step, small_config
from megacog.training.engine import Engine, build_engine, import_deepspeed
from megacog.training.pretrain import build_model, example_inputs
from megacog.training.state import RunState, gather_whole, shapes_of
from megacog.training.synthetic import random_base

TOLERANCE = 1e-6
"""Of the next loss, relative."""
STEPS = 2
_ROWS = "rows.jsonl"
T = TypeVar("T")


@dataclass(frozen=True)
class Layout:
    """How many ranks, and what they share."""

    engine: str
    zero_stage: int
    tensor: int
    sequence: int
    data: int

    @property
    def ranks(self) -> int:
        return self.tensor * self.sequence * self.data

    def __str__(self) -> str:
        return f"{self.engine}-{self.zero_stage}-{self.tensor}-{self.sequence}-{self.data}"

    @staticmethod
    def parse(text: str) -> Layout:
        engine, *numbers = text.split("-")
        return Layout(engine, *map(int, numbers))


@dataclass(frozen=True)
class Resumption:
    """One checkpoint resumed on one layout."""

    saved: str
    resumed: str
    bitwise: bool
    """Weights, masters, moments and frozen weights, gathered, are those saved."""
    loss: float
    """Relative difference of the next step's loss."""

    @property
    def accepted(self) -> bool:
        return self.bitwise and self.loss <= TOLERANCE


def all_layouts(
    data: Iterable[int], tensor: Iterable[int], sequence: Iterable[int], zero_stages: Iterable[int]
) -> list[Layout]:
    """DeepSpeed on every combination but ZeRO 3 with tensor parallelism, which is refused."""
    found = [Layout("deepspeed", *sizes) for sizes in itertools.product(zero_stages, tensor, sequence, data)]
    return [layout for layout in found if layout.zero_stage < 3 or layout.tensor == 1]


def start_small(
    config: Config, groups: ProcessGroups, checkpoint: tuple[Path, Manifest] | None
) -> tuple[Engine, RunState]:
    """An engine over a random base with the run's state: fresh, or as a checkpoint holds it."""
    device = torch.device("cpu")
    base = random_base(config, device) if checkpoint is None else None
    model, resumed, _ = build_model(config, groups, device, base, checkpoint)
    shapes = shapes_of(model)
    engine = build_engine(config, model, groups, GLOBAL_BATCH // (MICRO_BATCH * groups.data_size))
    state = RunState(config, engine, groups, shapes, {}, {}, (base, []))
    if resumed is not None:
        state.restore(resumed, example_inputs(config, device))
    return engine, state


def prove(folder: Path, pairs: Sequence[tuple[Layout, Layout]]) -> list[Resumption]:
    """Resume checkpoints of layouts on the layouts beside them, but for what `folder` holds already.

    Ranks are forks of this process, which must not have joined a world.
    """
    import_deepspeed()  # once, before the forks
    done = {(row.saved, row.resumed) for row in read_rows(folder)}
    left = [(saved, resumed) for saved, resumed in pairs if (str(saved), str(resumed)) not in done]
    unsaved = {saved for saved, _ in left if not _expected_file(folder, saved).exists()}
    for ranks, layouts in _by_ranks(unsaved, lambda layout: layout):
        _run_world(ranks, partial(save_all, folder, layouts))
    for ranks, some in _by_ranks(left, lambda pair: pair[1]):
        _run_world(ranks, partial(resume_all, folder, some))
    return [row for row in read_rows(folder) if (row.saved, row.resumed) in {(str(a), str(b)) for a, b in pairs}]


def pairwise(layouts: Sequence[Layout]) -> list[tuple[Layout, Layout]]:
    """Few pairs of layouts, saved and resumed, in which every two values of their sizes and stages come together.

    Greedy: the pair with most combinations that are still missing, of equal ones that with the fewest ranks.
    """
    pairs = list(itertools.product(layouts, layouts))

    def combinations(pair: tuple[Layout, Layout]) -> set[Any]:
        values = [*vars(pair[0]).values(), *vars(pair[1]).values()]
        return set(itertools.combinations(enumerate(values), 2))

    missing = set().union(*map(combinations, pairs))
    chosen = []
    while missing:
        best = max(pairs, key=lambda pair: (len(combinations(pair) & missing), -pair[0].ranks - pair[1].ranks))
        chosen.append(best)
        missing -= combinations(best)
    return chosen


def save_all(folder: Path, layouts: Iterable[Layout]) -> None:
    """Train and save on each layout, all of this many ranks: `folder/<layout>/` and what must come out. Collective."""
    for layout in layouts:
        run_dir = folder / str(layout)
        on_rank_0(partial(shutil.rmtree, run_dir, ignore_errors=True))  # of an interrupted proof
        config, groups = _config(run_dir, layout), build_process_groups(layout.tensor, layout.sequence)
        engine, state = start_small(config, groups, None)
        for step in range(1, STEPS + 1):
            run_step(engine, config, groups, step)
        state.save(STEPS)
        expected = {"digest": state_digest(engine, groups), "loss": run_step(engine, config, groups, STEPS + 1)[0]}
        on_rank_0(partial(write_json, _expected_file(folder, layout), expected))


def resume_all(folder: Path, pairs: Iterable[tuple[Layout, Layout]]) -> None:
    """Resume checkpoints of `save_all`, each on the layout beside it, all of this many ranks. Collective."""
    for saved, layout in pairs:
        run_dir = folder / str(saved)
        config, groups = _config(run_dir, layout), build_process_groups(layout.tensor, layout.sequence)
        engine, _ = start_small(config, groups, find_checkpoint(run_dir, "must"))
        expected = json.loads(_expected_file(folder, saved).read_text())
        bitwise = state_digest(engine, groups) == expected["digest"]
        loss, _ = run_step(engine, config, groups, STEPS + 1)
        difference = abs(loss - expected["loss"]) / abs(expected["loss"])
        on_rank_0(partial(_add_row, folder, Resumption(str(saved), str(layout), bitwise, difference)))


def state_digest(engine: Engine, groups: ProcessGroups) -> str:
    """sha256 over all that an engine holds, gathered: every field of every parameter, frozen ones and buffers too."""
    digest = TensorDigest()
    for name, parameter in engine.model.named_parameters():
        state = engine.get_state(name) if parameter.requires_grad else {"weight": engine.weight(name)}
        for field, tensor in sorted(state.items()):
            digest.add(f"{field}/{name}", gather_whole(tensor, parameter, groups.tensor).detach().cpu())
    for name, buffer in engine.model.named_buffers():
        digest.add(name, buffer.cpu())
    return digest.hexdigest()


def _config(run_dir: Path, layout: Layout) -> Config:
    config = small_config(
        layout.engine, layout.zero_stage, layout.tensor, STEPS + 1, sequence=layout.sequence
    )
    return config.model_copy(update={"train": config.train.model_copy(update={"run_dir": str(run_dir)})})


def _expected_file(folder: Path, layout: Layout) -> Path:
    return folder / f"{layout}.json"


def read_rows(folder: Path) -> list[Resumption]:
    """What a folder's proof has found so far; a line that was cut off does not count."""
    path = folder / _ROWS
    rows = []
    for line in path.read_text(encoding="utf-8").splitlines() if path.exists() else []:
        with suppress(ValueError):
            rows.append(Resumption(**json.loads(line)))
    return rows


def _add_row(folder: Path, row: Resumption) -> None:
    with open(folder / _ROWS, "a", encoding="utf-8") as file:
        file.write("\n" + json.dumps(vars(row)) + "\n")  # the first newline ends a line that was cut off


def _by_ranks(items: Iterable[T], layout: Callable[[T], Layout]) -> Iterator[tuple[int, list[T]]]:
    ordered = sorted(items, key=lambda item: (layout(item).ranks, str(item)))
    for ranks, some in itertools.groupby(ordered, key=lambda item: layout(item).ranks):
        yield ranks, list(some)


def _run_world(ranks: int, work: Callable[[], None]) -> None:
    """Run collective work on forks of this process.

    Raises:
        RuntimeError: A rank failed.
    """
    with tempfile.TemporaryDirectory() as folder:
        context = multiprocessing.get_context("fork")
        places = [(rank, ranks, os.getpid(), folder, work) for rank in range(ranks)]
        processes = [context.Process(target=_be_a_rank, args=place) for place in places]
        for process in processes:
            process.start()
        for process in processes:
            process.join()
    codes = [process.exitcode for process in processes]
    if any(codes):
        raise RuntimeError(f"of {ranks} ranks some failed; exit codes in rank order: {codes}")


def _be_a_rank(rank: int, ranks: int, parent: int, folder: str, work: Callable[[], None]) -> None:
    die_with(parent)
    gc.freeze()  # what the parent has left is not for a fork to take apart
    logging.disable(logging.WARNING)  # that layouts change is the point
    torch.set_num_threads(1)
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(ranks)}
    store = f"file://{folder}/store"
    dist.init_process_group("gloo", init_method=store, rank=rank, world_size=ranks, timeout=timedelta(minutes=10))
    work()
    dist.barrier()
    dist.destroy_process_group()


def main(argv: Sequence[str] | None = None) -> int:
    """Run `prove.py elastic`; 0 if every pair is accepted."""
    parser = argparse.ArgumentParser(prog="prove.py elastic", description=__doc__)
    parser.add_argument("--data", type=int, nargs="+", default=[1, 2, 4], help="data-parallel sizes")
    parser.add_argument("--tensor", type=int, nargs="+", default=[1, 2], help="tensor-parallel sizes")
    parser.add_argument("--sequence", type=int, nargs="+", default=[1], help="sequence-parallel sizes")
    parser.add_argument("--zero", type=int, nargs="+", default=[1, 2, 3], help="ZeRO stages")
    parser.add_argument("--pairwise", action="store_true", help="a cover of all pairs of values instead of all pairs")
    parser.add_argument("--folder", type=Path, help="keep checkpoints and results here, and go on with what is there")
    arguments = parser.parse_args(argv)
    layouts = all_layouts(arguments.data, arguments.tensor, arguments.sequence, arguments.zero)
    pairs = pairwise(layouts) if arguments.pairwise else list(itertools.product(layouts, layouts))
    with tempfile.TemporaryDirectory() as temporary:
        folder = arguments.folder or Path(temporary)
        folder.mkdir(parents=True, exist_ok=True)
        return _report(prove(folder, pairs), layouts, len(pairs))


def _report(rows: list[Resumption], layouts: list[Layout], wanted: int) -> int:
    for row in rows:
        if not row.accepted:
            print(f"NOT ACCEPTED: {row}")
    bitwise, worst = sum(row.bitwise for row in rows), max(row.loss for row in rows)
    accepted = sum(row.accepted for row in rows)
    print(
        f"{len(layouts)} layouts (zero-tensor-sequence-data: {', '.join(str(x).partition('-')[2] for x in layouts)}): "
        f"{len(rows)} pairs resumed, {bitwise} bitwise, largest relative difference of the next loss {worst:.1e}; "
        f"{accepted} accepted"
    )
    return 0 if accepted == len(rows) == wanted else 1


if __name__ == "__main__":
    run(main)
