"""What the ranks of distributed tests do: `python tests/rank_jobs.py JOB FOLDER ...`; rank 0 writes result.json."""

from __future__ import annotations

import dataclasses
import errno
import json
import sys
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from megacog.checkpoint import records
from megacog.checkpoint.discovery import find_checkpoint
from megacog.config.schema import Config
from megacog.errors import CheckpointError
from megacog.model.init import initialize_base, initialize_plus
from megacog.model.transformer import CogVideo
from megacog.parallel.groups import ProcessGroups, build_process_groups
from megacog.training.comparison import GLOBAL_BATCH, MICRO_BATCH, compare_engines, run_step, small_config
from megacog.training.engine import Engine, build_engine
from megacog.training.pretrain import example_inputs
from megacog.training.state import RunState, load_checkpoint, shapes_of

STEPS = 4


def compare(folder: Path, steps: str, *tensor_sizes: str) -> dict[str, Any]:
    """Differences of every engine, by tensor-parallel size."""
    return {
        size: [dataclasses.asdict(row) for row in compare_engines(build_process_groups(int(size)), int(steps))]
        for size in tensor_sizes
    }


def resume(folder: Path, tensor: str, *engines: str) -> dict[str, Any]:
    """By engine (name-zero-precision): are losses and states after 4 + resume + 4 steps bitwise those of 8?"""
    groups = build_process_groups(int(tensor))
    found = {}
    for name in engines:
        engine, zero_stage, precision = name.split("-")
        config = small_config(engine, int(zero_stage), int(tensor), 2 * STEPS, precision)
        run_dir = folder / f"{name}-tensor-{tensor}"
        train = config.train.model_copy(update={"run_dir": str(run_dir)})
        found[name] = resumes_bitwise(config.model_copy(update={"train": train}), groups)
    return found


def resumes_bitwise(config: Config, groups: ProcessGroups) -> dict[str, bool]:
    first, state = start(config, groups, None)
    for step in range(1, STEPS + 1):
        run_step(first, config, groups, step)
    state.save(STEPS)
    expected = [run_step(first, config, groups, step) for step in range(STEPS + 1, 2 * STEPS + 1)]
    second, _ = start(config, groups, find_checkpoint(state.run_dir, "must"))
    actual = [run_step(second, config, groups, step) for step in range(STEPS + 1, 2 * STEPS + 1)]
    return {"losses": actual == expected, "states": same_states(first, second)}


def start(config: Config, groups: ProcessGroups, checkpoint: Any) -> tuple[Engine, RunState]:
    """An engine with its state: fresh, or from a checkpoint (found) into a model full of NaN."""
    model = CogVideo(config.model, ("sequential",), groups.tensor)
    model.to(torch.bfloat16 if config.train.precision == "bf16" else torch.float32).trainable("sequential")
    shapes, resumed = shapes_of(model), None
    if checkpoint is None:
        initialize_base(model, seed=1)
        initialize_plus(model, "sequential", "copy", seed=1)
    else:
        for parameter in model.parameters():
            parameter.data.fill_(float("nan"))
        resumed = load_checkpoint(Path(config.train.run_dir), *checkpoint, config, model)
    engine = build_engine(config, model, groups, GLOBAL_BATCH // (MICRO_BATCH * groups.data_size))
    state = RunState(config, engine, groups, shapes, {}, {}, (None, []))
    if resumed is not None:
        assert state.restore(resumed, example_inputs(config, torch.device("cpu"))) == STEPS
    return engine, state


def same_states(one: Engine, other: Engine) -> bool:
    """Whether all parameters and optimizer states are bitwise equal (tensor by tensor)."""
    same = True
    for name, parameter in one.model.named_parameters():
        if parameter.requires_grad:
            a, b = one.get_state(name), other.get_state(name)
            same &= a.keys() == b.keys() and all(torch.equal(a[field], b[field]) for field in a)
        else:
            same &= torch.equal(one.weight(name), other.weight(name))
    return same


def failing_save(folder: Path) -> dict[str, Any]:
    """What every rank is told when rank 1 has no space, and what is left of the checkpoint."""
    groups = build_process_groups(1)
    config = small_config("torch", 0, 1, 2)
    train = config.train.model_copy(update={"run_dir": str(folder / "run")})
    engine, state = start(config.model_copy(update={"train": train}), groups, None)
    run_step(engine, config, groups, 1)
    if dist.get_rank() == 1:
        records.save_tensors = no_space  # type: ignore[attr-defined]
    try:
        state.save(1)
    except CheckpointError as error:
        dist.barrier()
        left = [path.name for path in (folder / "run").rglob("*")]
        return {"error": str(error), "left": left}
    raise AssertionError("the checkpoint was written")


def no_space(*_: object) -> None:
    raise OSError(errno.ENOSPC, "No space left on device")


JOBS: dict[str, Callable[..., dict[str, Any]]] = {
    "compare": compare,
    "resume": resume,
    "failing_save": failing_save,
}


def main() -> None:
    torch.set_num_threads(1)
    job, folder, *arguments = sys.argv[1:]
    dist.init_process_group("gloo", timeout=timedelta(seconds=120))
    result = JOBS[job](Path(folder), *arguments)
    everyone: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(everyone, result)
    if dist.get_rank() == 0:
        (Path(folder) / "result.json").write_text(json.dumps(everyone))
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
