"""Proof that a run resumes on any layout of ranks and any ZeRO stage: every pair of small layouts, in fp32.

Each layout trains a small model for two steps and saves; its state, gathered whole, is hashed, and the loss of the
third step noted. Each layout then resumes each checkpoint: the hash must be the same, the loss within 1e-6.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from datetime import timedelta
from functools import partial
from pathlib import Path

import torch
import torch.distributed as dist

from megacog.checkpoint.commit import on_rank_0
from megacog.checkpoint.digest import TensorDigest
from megacog.checkpoint.discovery import find_checkpoint
from megacog.checkpoint.manifest import Manifest
from megacog.config.schema import Config
from megacog.parallel.groups import ProcessGroups, build_process_groups
from megacog.runtime.cli import run
from megacog.training.comparison import GLOBAL_BATCH, MICRO_BATCH, run_step, small_config
from megacog.training.engine import Engine, build_engine
from megacog.training.pretrain import build_model, example_inputs
from megacog.training.state import RunState, gather_whole, shapes_of
from megacog.training.synthetic import random_base

TOLERANCE = 1e-6
"""Of the next loss, relative."""
STEPS = 2


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


def save_all(folder: Path, layouts: Iterable[Layout]) -> None:
    """Train and save on each layout, all of this many ranks: `folder/<layout>/` and what must come out. Collective."""
    for layout in layouts:
        config, groups = _config(folder / str(layout), layout), build_process_groups(layout.tensor, layout.sequence)
        engine, state = start_small(config, groups, None)
        for step in range(1, STEPS + 1):
            run_step(engine, config, groups, step)
        state.save(STEPS)
        digest = state_digest(engine, groups)
        text = json.dumps({"digest": digest, "loss": run_step(engine, config, groups, STEPS + 1)[0]})
        on_rank_0(partial(_expected_file(folder, layout).write_text, text))


def resume_all(folder: Path, pairs: Iterable[tuple[Layout, Layout]]) -> list[Resumption]:
    """Resume checkpoints of `save_all`, each on the layout beside it, all of this many ranks. Collective."""
    found = []
    for saved, layout in pairs:
        run_dir = folder / str(saved)
        config, groups = _config(run_dir, layout), build_process_groups(layout.tensor, layout.sequence)
        engine, _ = start_small(config, groups, find_checkpoint(run_dir, "must"))
        expected = json.loads(_expected_file(folder, saved).read_text())
        bitwise = state_digest(engine, groups) == expected["digest"]
        loss, _ = run_step(engine, config, groups, STEPS + 1)
        difference = abs(loss - expected["loss"]) / abs(expected["loss"])
        found.append(Resumption(str(saved), str(layout), bitwise, difference))
    return found


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


def main(argv: Sequence[str] | None = None) -> int:
    """Run `prove.py elastic`: start all ranks that are needed, or be one of them; 0 if every pair is accepted."""
    parser = argparse.ArgumentParser(prog="prove.py elastic", description=__doc__)
    parser.add_argument("--data", type=int, nargs="+", default=[1, 2, 4], help="data-parallel sizes")
    parser.add_argument("--tensor", type=int, nargs="+", default=[1, 2], help="tensor-parallel sizes")
    parser.add_argument("--sequence", type=int, nargs="+", default=[1], help="sequence-parallel sizes")
    parser.add_argument("--zero", type=int, nargs="+", default=[1, 2, 3], help="ZeRO stages")
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--phase", choices=["save", "resume"], help=argparse.SUPPRESS)
    arguments = parser.parse_args(argv)
    layouts = all_layouts(arguments.data, arguments.tensor, arguments.sequence, arguments.zero)
    if arguments.phase is not None:
        return _be_a_rank(arguments.folder, arguments.phase, layouts)
    with tempfile.TemporaryDirectory() as folder:
        for phase in ("save", "resume"):
            for ranks in sorted({layout.ranks for layout in layouts}):
                _start_ranks(Path(folder), phase, ranks, sys.argv[2:] if argv is None else argv)
        return _report(Path(folder), layouts)


def _be_a_rank(folder: Path, phase: str, layouts: list[Layout]) -> int:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", timeout=timedelta(minutes=10))
    mine = [layout for layout in layouts if layout.ranks == dist.get_world_size()]
    if phase == "save":
        save_all(folder, mine)
    else:
        found = [vars(row) for row in resume_all(folder, itertools.product(layouts, mine))]
        on_rank_0(lambda: (folder / f"{dist.get_world_size()}-ranks.result").write_text(json.dumps(found)))
    dist.destroy_process_group()
    return 0


def _start_ranks(folder: Path, phase: str, ranks: int, arguments: Sequence[str]) -> None:
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(ranks)]
    command += ["-m", "megacog.training.elastic", *arguments, "--folder", str(folder), "--phase", phase]
    subprocess.run(command, env=os.environ | {"OMP_NUM_THREADS": "1"}, check=True)


def _report(folder: Path, layouts: list[Layout]) -> int:
    rows = [Resumption(**row) for file in sorted(folder.glob("*.result")) for row in json.loads(file.read_text())]
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
    return 0 if accepted == len(rows) == len(layouts) ** 2 else 1


if __name__ == "__main__":
    run(main)
