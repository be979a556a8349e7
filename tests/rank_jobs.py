"""What the ranks of distributed tests do: `python tests/rank_jobs.py FOLDER JOB[:ARGUMENT,...] ...`.

Starting ranks takes longer than most jobs, so several jobs share one start. Rank 0 writes FOLDER/result.json: by
job, as it was given, the results in rank order.
"""

from __future__ import annotations

import dataclasses
import errno
import gc
import json
import sys
import threading
from collections.abc import Callable, Iterator
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from megacog.checkpoint import records
from megacog.checkpoint.discovery import find_checkpoint
from megacog.config.load import load_config
from megacog.config.schema import Config
from megacog.data.batch import Batch
from megacog.errors import CheckpointError
from megacog.model.init import initialize_base, initialize_plus
from megacog.model.transformer import CogVideo
from megacog.parallel.groups import ProcessGroups, build_process_groups
from megacog.parallel.tensor import materialize
from megacog.runtime.ranks import discover
from megacog.runtime.signals import StopFlag
from megacog.training import pretrain
from megacog.training.comparison import (
    Case,
    compare,
    run_step,
    small_batch,
    small_config,
    small_engine,
)  # fmt: skip
from megacog.training.elastic import start_small
from megacog.training.engine import Engine, build_engine
from megacog.training.guard import NonFiniteError
from megacog.training.loop import Loop, StepReport
from megacog.training.precision import DTYPES

STEPS = 2


def compare_cases(folder: Path, steps: str, *cases: str) -> dict[str, Any]:
    """Differences of cases, each given as engine-zero-tensor-sequence-stage-checkpointing, from one rank."""
    return {str(row.case): dataclasses.asdict(row) for row in compare([case_of(case) for case in cases], int(steps))}


def case_of(text: str) -> Case:
    engine, zero_stage, tensor, sequence, *rest = text.split("-")
    return Case(engine, int(zero_stage), int(tensor), int(sequence), *rest)  # type: ignore[arg-type]


def resume(folder: Path, *cases: str) -> dict[str, Any]:
    """By case (engine-zero-tensor-sequence-precision[-offload][-fp8]): are losses and states after 2 + resume + 2
    steps bitwise those of 4?"""
    found = {}
    for name in cases:
        engine, zero_stage, tensor, sequence, precision, *rest = name.split("-")
        groups = build_process_groups(int(tensor), int(sequence))
        config = small_config(
            engine, int(zero_stage), int(tensor), 2 * STEPS, precision, sequence=int(sequence)
        )
        run_dir = folder / name
        update = {"run_dir": str(run_dir), "offload_optimizer": "offload" in rest}
        update["base_precision"] = "fp8" if "fp8" in rest else None
        train = config.train.model_copy(update=update)
        found[name] = resumes_bitwise(config.model_copy(update={"train": train}), groups)
    return found


def resumes_bitwise(config: Config, groups: ProcessGroups) -> dict[str, bool]:
    first, state = start_small(config, groups, None)
    for step in range(1, STEPS + 1):
        run_step(first, config, groups, step)
    state.save(STEPS)
    expected = [run_step(first, config, groups, step) for step in range(STEPS + 1, 2 * STEPS + 1)]
    second, _ = start_small(config, groups, find_checkpoint(state.run_dir, "must"))
    actual = [run_step(second, config, groups, step) for step in range(STEPS + 1, 2 * STEPS + 1)]
    return {"losses": actual == expected, "states": same_states(first, second)}


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


def sums(folder: Path, *zero_stages: str) -> dict[str, dict[str, float]]:
    """By ZeRO stage and `gradient_dtype`: relative error of the mean gradient of four bf16 micro batches per rank.

    The truth is the plain engine's, which sums the same micro batches on one rank in fp32.
    """
    accumulation, groups = 4, build_process_groups(1)
    truth = mean_gradients(small_config("torch", 0, 1, 1, "bf16"), ProcessGroups(), accumulation * groups.data_size)
    size = sum(float(part.square().sum()) for part in truth.values())
    found: dict[str, dict[str, float]] = {}
    for zero_stage in zero_stages:
        found[zero_stage] = {}
        for dtype in ("fp32", "bf16"):
            config = small_config("deepspeed", int(zero_stage), 1, 1, "bf16")
            train = config.train.model_copy(update={"gradient_dtype": dtype})
            exchanged = {"communication_data_type": "fp32"}  # else ranks exchange bf16 whatever they sum in
            update = {"train": train, "deepspeed": config.deepspeed | exchanged}
            ours = mean_gradients(config.model_copy(update=update), groups, accumulation)
            error = sum(float((ours[name] - truth[name]).square().sum()) for name in truth)
            found[zero_stage][dtype] = (error / size) ** 0.5
    return found


def mean_gradients(config: Config, groups: ProcessGroups, accumulation: int) -> dict[str, torch.Tensor]:
    """Over `accumulation` micro batches of one sample per rank, by name: after a first step, from AdamW's moment."""
    train = config.train.model_copy(update={"gradient_clip": 0.0, "micro_batch_size": 1})
    config = config.model_copy(update={"train": train})
    model = CogVideo(config.model, ("sequential",), groups.tensor)
    initialize_base(model, seed=1)
    initialize_plus(model, "sequential", "copy", seed=1)
    model.to(DTYPES[config.train.precision]).trainable("sequential")
    engine = build_engine(config, model, groups, accumulation)
    text_BL, valid_BL, codes_BTP = small_batch(config.model, "sequential", 1)
    for micro in range(accumulation):
        row = slice(micro * groups.data_size + groups.data_rank, None)
        inputs = {"text_BL": text_BL[row][:1], "text_valid_BL": valid_BL[row][:1], "frames_BTP": codes_BTP[row][:1]}
        engine.backward(engine.forward(**inputs, stage="sequential").loss)
    engine.step(0.0)
    trained = [name for name, parameter in model.named_parameters() if parameter.requires_grad]
    return {name: engine.get_state(name)["exp_avg"] / (1 - train.betas[0]) for name in trained}


def policies(folder: Path, *zero_stages: str) -> dict[str, dict[str, list[Any]]]:
    """By ZeRO stage and activation policy: loss and gradient norm of three steps."""
    groups = build_process_groups(1)
    found: dict[str, dict[str, list[Any]]] = {}
    for zero_stage in zero_stages:
        found[zero_stage] = {}
        for policy in ("none", "selective", "full"):
            config = small_config("deepspeed", int(zero_stage), 1, 3)
            engine = small_engine(config, groups)
            engine.model.activation_checkpointing = policy  # type: ignore[assignment]
            found[zero_stage][policy] = [run_step(engine, config, groups, step) for step in (1, 2, 3)]
    return found


def building(folder: Path, *zero_stages: str) -> dict[str, dict[str, float]]:
    """By ZeRO stage: MiB of weights, and the most anonymous memory while the model, then while the engine is built."""
    groups = build_process_groups(1)
    small = small_config("deepspeed", 1, 1, 1, "bf16")
    mean_gradients(small, groups, 1)  # imports and buffers of DeepSpeed
    model = small.model.model_copy(update={"hidden_size": 1024, "num_layers": 6, "text_vocab_size": 30000})
    found = {}
    for zero_stage in zero_stages:
        train = small.train.model_copy(update={"zero_stage": int(zero_stage)})
        config = small.model_copy(update={"model": model, "train": train})
        with PeakMemory() as memory:
            with torch.device("meta"):
                built = CogVideo(config.model, ("sequential",), groups.tensor)
            materialize(built, "cpu", torch.bfloat16)
            for parameter in built.parameters():
                parameter.data.fill_(0.01)
            weights = sum(parameter.nbytes for parameter in built.parameters()) / 2**20
            built.trainable("sequential")
            trained = sum(p.nbytes for p in built.parameters() if p.requires_grad) / 2**20
            model_peak = memory.peak
            engine = build_engine(config, built, groups, 1)
        found[zero_stage] = {"weights": weights, "trained": trained, "model": model_peak, "engine": memory.peak}
        del built, engine
    return found


class PeakMemory:
    """The most anonymous memory of this process above that at the start, in MiB, looked at every few milliseconds."""

    def __enter__(self) -> PeakMemory:
        gc.collect()
        self.peak, self._start, self._stop = 0.0, self._now(), threading.Event()
        self._thread = threading.Thread(target=self._watch)
        self._thread.start()
        return self

    def _watch(self) -> None:
        while not self._stop.wait(0.005):
            self.peak = max(self.peak, self._now() - self._start)

    @staticmethod
    def _now() -> float:
        lines = Path("/proc/self/status").read_text(encoding="ascii").splitlines()
        return next(int(line.split()[1]) for line in lines if line.startswith("RssAnon")) / 1024

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join()


def failing_save(folder: Path) -> dict[str, Any]:
    """What every rank is told when rank 1 has no space, and what is left of the checkpoint."""
    groups = build_process_groups(1)
    config = small_config("torch", 0, 1, 2)
    train = config.train.model_copy(update={"run_dir": str(folder / "run")})
    engine, state = start_small(config.model_copy(update={"train": train}), groups, None)
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


def pretrain_all(folder: Path) -> dict[str, Any]:
    """By name of a configuration in `folder`: exit code, error and the steps that changed the state.

    The steps of `<name>.bad.json`, if it is there, have a non-finite loss on the last rank.
    """
    outcomes = {}
    for path in sorted(folder.glob("*.yaml")):
        bad = path.with_suffix(".bad.json")
        outcomes[path.stem] = pretrain_one(path, json.loads(bad.read_text()) if bad.exists() else None)
    return outcomes


def pretrain_one(path: Path, bad_steps: list[int] | None) -> dict[str, Any]:
    """What one configured run ends with on this rank; only with `bad_steps` is every step watched."""
    changed: list[int] = []

    class Watched(Loop):
        """A loop that spoils steps and notes which of them changed weights or optimizer states."""

        def train_step(self, batches: Iterator[Batch], step: int) -> StepReport:
            self.spoil = step in (bad_steps or ()) and dist.get_rank() == dist.get_world_size() - 1
            before = states(self.engine)
            report = super().train_step(batches, step)
            if not same_tensors(before, states(self.engine)):
                changed.append(step)
            return report

        def inputs(self, batch: Batch) -> dict[str, Any]:
            inputs = super().inputs(batch)
            if self.spoil:
                self.spoil = False  # one micro batch on one rank is enough
                inputs["frame_weights"] = (float("nan"),) * inputs["frames_BTP"].shape[1]
            return inputs

    code, error = None, None
    pretrain.Loop = Loop if bad_steps is None else Watched  # type: ignore[misc]
    try:
        with StopFlag() as stop:
            code = pretrain.run(load_config(path), discover(), torch.device("cpu"), stop)
    except NonFiniteError as problem:
        error = str(problem)
    finally:
        pretrain.Loop = Loop  # type: ignore[misc]
    return {"code": code, "error": error, "changed": changed}


def states(engine: Engine) -> dict[str, torch.Tensor]:
    """Copies of everything that a step may change."""
    return {
        f"{field}/{name}": tensor.clone()
        for name, parameter in engine.model.named_parameters()
        if parameter.requires_grad
        for field, tensor in engine.get_state(name).items()
    }


def same_tensors(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


JOBS: dict[str, Callable[..., dict[str, Any]]] = {
    "compare": compare_cases,
    "resume": resume,
    "building": building,
    "policies": policies,
    "sums": sums,
    "failing_save": failing_save,
    "pretrain_all": pretrain_all,
}


def main() -> None:
    torch.set_num_threads(1)
    folder = Path(sys.argv[1])
    dist.init_process_group("gloo", timeout=timedelta(minutes=10))
    results = {}
    for given in sys.argv[2:]:
        job, _, arguments = given.partition(":")
        result = JOBS[job](folder, *filter(None, arguments.split(",")))
        everyone: list[Any] = [None] * dist.get_world_size()
        dist.all_gather_object(everyone, result)
        results[given] = everyone
    if dist.get_rank() == 0:
        (folder / "result.json").write_text(json.dumps(results))
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
