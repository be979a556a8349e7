"""The main job: pretrain one stage of a model, under `deepspeed`, torchrun, srun or plain python alike."""

from __future__ import annotations

import argparse
import platform
import shlex
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from megacog import __version__
from megacog.checkpoint.commit import on_rank_0
from megacog.checkpoint.discovery import find_checkpoint
from megacog.checkpoint.export import FRAME_TOKENIZER, TEXT_TOKENIZER, Export
from megacog.checkpoint.export import KIND as EXPORT
from megacog.checkpoint.manifest import Manifest
from megacog.checkpoint.rng import seed_everything
from megacog.config.load import config_hash, dump_config, load_config
from megacog.config.schema import Config
from megacog.data.batch import Batch
from megacog.data.check import check_data
from megacog.data.loader import evaluation_batches, training_batches
from megacog.errors import EXIT_DONE, EXIT_PREEMPTED, CheckpointError, ConfigError
from megacog.generation.clusters import clusters_for
from megacog.metrics.record import Recorder
from megacog.metrics.throughput import Throughput
from megacog.model.flops import tokens_per_sample, training_work
from megacog.model.layout import stage_layout
from megacog.model.transformer import CogVideo
from megacog.parallel.fp8 import check_device, hold_in_fp8, why_not
from megacog.parallel.groups import ProcessGroups, build_process_groups
from megacog.parallel.tensor import materialize
from megacog.planning.cluster import Cluster, Device
from megacog.planning.plan import accumulation_steps, data_parallel
from megacog.planning.require import require_memory
from megacog.runtime import faults
from megacog.runtime import log as logs
from megacog.runtime.files import atomic_file, require_replaceable
from megacog.runtime.hardware import available_cores, describe_device, device_name, peak_tflops, rank_device
from megacog.runtime.heartbeat import Limits, Watch, beat
from megacog.runtime.ranks import Ranks, discover, meeting, require_world
from megacog.runtime.signals import StopFlag
from megacog.runtime.told import told_by_rank_0
from megacog.tokenizers.frames import FrameTokenizer, load_frame_tokenizer
from megacog.tokenizers.text import TextTokenizer
from megacog.training.checkpoints import Checkpoints
from megacog.training.engine import Engine, build_engine
from megacog.training.loop import Loop
from megacog.training.precision import DTYPES
from megacog.training.rollback import Rollbacks, ShiftedBatches, read_rollbacks, record_rollback
from megacog.training.samples import Sampler
from megacog.training.start import describe_weights, idle_tensors, open_inherited, start_weights
from megacog.training.state import Resumed, RunState, load_checkpoint, shapes_of
from megacog.training.switches import Switches, refuse_stopped
from megacog_kernels import dispatch

log = logs.get_logger(__name__)

_COLLECTIVE_MARGIN = 600.0
_KINDS = {"text": "text tokenizer", "frames": "frame tokenizer"}
"""Key of the `tokenizer` section -> in words."""


@dataclass(frozen=True)
class Tokenizers:
    """Both tokenizers, opened."""

    text: TextTokenizer
    frames: FrameTokenizer

    @property
    def fingerprints(self) -> dict[str, str]:
        return {"text": self.text.fingerprint, "frames": self.frames.fingerprint}


def main(argv: Sequence[str] | None = None, stop: StopFlag | None = None) -> int:
    """Run the job; 0 when `train.steps` is reached and exported, 85 when it was stopped.

    Args:
        argv: Command line; None = that of this process.
        stop: An entered flag, which may have been set already; None = one of its own.
    """
    if stop is None:
        with StopFlag() as stop:
            return main(argv, stop)
    arguments = parse_arguments(argv)
    ranks = discover()
    logs.setup(ranks.rank)
    log.info("%s", ranks)
    faults.arm(ranks.rank)
    with told_by_rank_0(ranks, stop):
        config = load_config(arguments.config, arguments.overrides)
        require_world(ranks, config.cluster)
        check_plan(config, ranks)
    with watch(config, ranks) as watched:
        device = start_processes(config, ranks)
        try:
            if watched is not None:
                watched.join(on_rank_0(watched.open))
            return run(config, ranks, device, stop)
        except BaseException as error:
            if watched is not None:
                watched.fail(error)  # before what follows, which may hang without the others
            raise
        finally:
            dist.destroy_process_group()


@contextmanager
def watch(config: Config, ranks: Ranks) -> Iterator[Watch | None]:
    """Context in which this rank is watched, if the configuration says so."""
    if not config.watch.enabled or sys.platform != "linux":
        log.warning("ranks are not watched: one that is stuck will not end the run")
        yield None
        return
    settings = config.watch
    limits = Limits(settings.step_seconds, settings.start_seconds, settings.slow_seconds, settings.lost_seconds)
    with Watch(ranks, limits, Path(config.train.run_dir)) as watched:
        yield watched


def parse_arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="pretrain.py", description="Pretrain one stage of a model.",
        epilog="Any key of the configuration can be overridden: train.learning_rate=1e-4 parallel.tensor=2",
    )  # fmt: skip
    parser.add_argument("--config", required=True, type=Path, help="YAML file of the run")
    parser.add_argument("--local_rank", "--local-rank", type=int, help="set by the DeepSpeed launcher, not used")
    parser.add_argument(
        "overrides", nargs="*", default=[], metavar="key=value", help="override a key of the configuration"
    )
    return parser.parse_args(argv)


def check_plan(config: Config, ranks: Ranks) -> None:
    """Refuse a run that does not divide over its ranks or that its GPUs cannot do, while there is nothing yet.

    Raises:
        ConfigError: On every rank; on rank 0 with the planner's numbers and, if it does not fit, what would.
    """
    device = rank_device(ranks)
    try:
        accumulation_steps(config, data_parallel(config, ranks.world_size))
        if device.type == "cuda":
            require_memory(config, this_cluster(ranks, device), suggest=ranks.rank == 0)
    except ConfigError:
        if ranks.rank == 0:
            raise
        raise ConfigError("the run does not divide or does not fit: see the message of rank 0") from None


def start_processes(config: Config, ranks: Ranks) -> torch.device:
    """Join the other ranks; the device of this one."""
    torch.set_num_threads(config.train.threads or max(1, available_cores() // ranks.local_world_size))
    device = rank_device(ranks)
    beat("meet", 0)
    # The watch names a rank that is stuck; a collective alone would only say that it has waited.
    limit = max(config.watch.start_seconds, config.watch.slow_seconds) + _COLLECTIVE_MARGIN
    started = time.monotonic()
    with meeting():
        dist.init_process_group("nccl" if device.type == "cuda" else "gloo", timeout=timedelta(seconds=limit))
    if ranks.world_size > 1:
        log.info("all %d ranks have met after %.1f s", ranks.world_size, time.monotonic() - started)
    return device


def run(config: Config, ranks: Ranks, device: torch.device, stop: StopFlag) -> int:
    """Train one stage on this rank; the exit code."""
    groups = build_process_groups(config.parallel.tensor, config.parallel.sequence)
    accumulation = accumulation_steps(config, groups.data_size)
    tokenizers = open_tokenizers(config)
    config = resolve(config, tokenizers)
    data = on_rank_0(lambda: check_data(config, tokenizers.frames.fingerprint, tokenizers.text))
    run_dir = Path(config.train.run_dir)
    on_rank_0(lambda: refuse_stopped(run_dir))
    on_rank_0(lambda: check_export_place(run_dir / "export"))
    checkpoint = find_checkpoint(run_dir, config.train.resume)
    export = open_inherited(config) if checkpoint is None else None  # a resumed run has its own copy
    if export is not None:
        theirs = fingerprints_of(export)
        check_tokenizers(tokenizers, theirs, export.path)
        for kind in sorted(_KINDS.keys() - theirs.keys()):
            text = "%s holds no %s; the run's own is taken to be its weights'"
            log.warning(text, export.path, _KINDS[kind], extra=logs.SHARED)

    seed_everything(config.train.seed + groups.data_rank)
    beat("build" if checkpoint is None else "load", 0)
    model, resumed, sources = build_model(config, groups, device, export, checkpoint)
    if checkpoint is not None:
        check_tokenizers(tokenizers, checkpoint[1].fingerprints, checkpoint[0])
    shapes = shapes_of(model)
    idle = idle_tensors(config, export) if resumed is None else resumed.idle_tensors(shapes)
    if ranks.rank == 0:
        save_run_files(config, run_dir)
        table = describe_weights(model, sources, idle, stored_weights(export, resumed))
        announce(config, ranks, groups, accumulation, f"data:\n{data}\nweights on this rank:\n{table}")
    engine = build_engine(config, model, groups, accumulation)
    state = RunState(config, engine, groups, shapes, tokenizers.fingerprints, versions(), (export, idle))
    recorder = Recorder(run_dir, ranks.rank, config.metrics.tensorboard)
    start_step = 0
    if resumed is not None:
        start_step = state.restore(resumed, example_inputs(config, device))
        log.info("resumed at step %d from %s", start_step, resumed.records.folder)
    recorder.truncate_after(start_step)

    evaluation = load_evaluation(config, tokenizers.text, groups)
    rollbacks = on_rank_0(lambda: read_rollbacks(run_dir))
    checkpoints = Checkpoints(state, config.checkpoint, recorder)
    loop = Loop(
        config, engine, accumulation, device, evaluation, recorder, build_throughput(config, ranks.world_size), stop,
        checkpoints=checkpoints,
        sample=make_sampler(config, tokenizers, evaluation, engine, ranks),
        tensor_rank=groups.tensor.rank,
        switches=Switches(run_dir, config.train.max_minutes, stop, ranks.rank),
        roll_back=roll_back(config, checkpoints, rollbacks) if config.watch.on_spike == "rollback" else None,
    )  # fmt: skip
    state.guard_state = loop.guard.state
    if resumed is not None:
        loop.guard.restore(resumed.manifest.guard)
    batches = ShiftedBatches(
        lambda start: training_batches(
            config, tokenizers.text, data_rank=groups.data_rank, data_size=groups.data_size, start_step=start
        ),
        rollbacks,
        start_step,
    )
    try:
        step = loop.run(batches, start_step)
    finally:
        batches.close()
        recorder.close()
    if step < config.train.steps or loop.rolled_back:
        reason = "a spike of the loss" if loop.rolled_back else stop.signal_name or "another rank"
        log.info("stopped at step %d by %s; run the same command to continue", step, reason)
        stop.leaving = True
        return EXIT_PREEMPTED
    beat("export", step)
    path = state.export(Path(config.tokenizer.text), Path(config.tokenizer.frames))
    log.info("done: %d steps; the model is in %s", step, path)
    return EXIT_DONE


def roll_back(config: Config, checkpoints: Checkpoints, rollbacks: Rollbacks) -> Callable[[int, float], bool]:
    """What the loop calls at a spike: lets the next start go on from the newest checkpoint, with other samples."""
    run_dir = Path(config.train.run_dir)

    def act(step: int, loss: float) -> bool:
        beat("save", step)  # it waits for files
        checkpoints.complete()
        return on_rank_0(lambda: record_rollback(run_dir, rollbacks, config.watch.max_rollbacks, step, loss))

    return act


def check_export_place(path: Path) -> None:
    """Say now, not when the run ends, that its export would replace something else."""
    if path.exists():
        require_replaceable(path, EXPORT)


def this_cluster(ranks: Ranks, device: torch.device) -> Cluster:
    """The GPUs that the run has; speeds of links do not matter here."""
    memory_gib = torch.cuda.get_device_properties(device).total_memory / 2**30
    nodes = max(1, ranks.world_size // ranks.local_world_size)
    gpu = Device(device_name(), memory_gib, triton=dispatch.serves(device), no_fp8=why_not(device))
    return Cluster(gpu, ranks.world_size // nodes, nodes)


def open_tokenizers(config: Config) -> Tokenizers:
    return Tokenizers(
        TextTokenizer.load(Path(config.tokenizer.text)), load_frame_tokenizer(Path(config.tokenizer.frames))
    )


def resolve(config: Config, tokenizers: Tokenizers) -> Config:
    """The configuration with boi_id filled in, checked against the tokenizers.

    Raises:
        ConfigError: Vocabularies do not fit, or samples are asked for that cannot be made.
    """
    model, text, frames = config.model, tokenizers.text, tokenizers.frames
    problems = []
    if text.vocab_size > model.text_vocab_size:
        problems.append(
            f"model.text_vocab_size {model.text_vocab_size} < {text.vocab_size} pieces of {config.tokenizer.text}"
        )
    if frames.codebook_size != model.image_vocab_size:
        problems.append(
            f"model.image_vocab_size {model.image_vocab_size} is not the codebook_size {frames.codebook_size} "
            f"of {config.tokenizer.frames}"
        )
    if model.boi_id not in (None, text.boi_id):
        mend = "leave model.boi_id out"
        if model.inherit is not None:
            mend = f"set tokenizer.text to the text tokenizer that the weights of {model.inherit} were trained with"
        problems.append(
            f"<start_of_image> is piece {text.boi_id} of {config.tokenizer.text}, not model.boi_id {model.boi_id}; "
            f"{mend}"
        )
    if config.samples.every:
        if config.train.stage == "interpolation" and not config.data.eval:
            problems.append("samples.every in the interpolation stage needs data.eval: its clips are filled in")
        if config.train.stage != "interpolation" and not config.samples.prompts:
            problems.append("samples.every needs samples.prompts")
    if problems:
        raise ConfigError("; ".join(problems))
    return config.model_copy(update={"model": model.model_copy(update={"boi_id": text.boi_id})})


def fingerprints_of(export: Export) -> dict[str, str]:
    """Of the tokenizers inside an export; imported weights may lack them."""
    found = {}
    if TEXT_TOKENIZER in export.tokenizers:
        found["text"] = TextTokenizer.load(export.text_tokenizer).fingerprint
    if FRAME_TOKENIZER in export.tokenizers:
        found["frames"] = load_frame_tokenizer(export.frame_tokenizer).fingerprint
    return found


def check_tokenizers(tokenizers: Tokenizers, theirs: Mapping[str, str], path: Path) -> None:
    """Raises:
    CheckpointError: The weights in `path`, an export or a checkpoint, were trained with other tokenizers.
    """
    ours = tokenizers.fingerprints
    different = [kind for kind in ours if kind in theirs and theirs[kind] != ours[kind]]
    if different:
        raise CheckpointError(
            f"{path} was trained with another {' and '.join(_KINDS[kind] for kind in different)}; its weights mean "
            f"nothing with this one. Set tokenizer.{different[0]} to the one that it was trained with"
        )


def stored_weights(export: Export | None, resumed: Resumed | None) -> Callable[[str], Tensor] | None:
    """How to read what the run does not train as it is stored: from its own copy, or from the inherited export."""
    if resumed is not None and resumed.frozen is not None:
        return resumed.frozen_tensor
    return export.tensor if export is not None else None


def build_model(
    config: Config,
    groups: ProcessGroups,
    device: torch.device,
    export: Export | None,
    checkpoint: tuple[Path, Manifest] | None,
) -> tuple[CogVideo, Resumed | None, dict[str, str]]:
    """This rank's model with its weights in place, the checkpoint they came from, and the source of each part."""
    stage = config.train.stage
    plus = () if stage == "base" else (stage,)
    with torch.device("meta"):
        model = CogVideo(
            config.model, plus, groups.tensor, config.train.activation_checkpointing, config.train.kernels,
            groups.sequence, config.train.deterministic,
        )  # fmt: skip
    model.trainable(stage)
    if config.train.base_precision == "fp8":
        check_device(device)
        hold_in_fp8(model.layers)
    materialize(model, device, DTYPES[config.train.precision])
    model.choose_kernels()
    if checkpoint is None:
        return model, None, start_weights(config, model, export)
    path, manifest = checkpoint
    resumed = load_checkpoint(Path(config.train.run_dir), path, manifest, config, model)
    sources = {part: f"checkpoint, step {manifest.step}" for part in ("base", f"plus.{stage}")}
    return model, resumed, sources


def example_inputs(config: Config, device: torch.device) -> dict[str, Any]:
    """Valid forward arguments that need no data."""
    grid = stage_layout(config.model, config.train.stage).grid
    batch, length = config.train.micro_batch_size, config.model.text_length
    return {
        "text_BL": torch.zeros(batch, length, dtype=torch.int64, device=device),
        "text_valid_BL": torch.ones(batch, length, dtype=torch.bool, device=device),
        "frames_BTP": torch.zeros(batch, grid.frames, grid.cells, dtype=torch.int64, device=device),
        "stage": config.train.stage,
    }


def load_evaluation(config: Config, text: TextTokenizer, groups: ProcessGroups) -> list[Batch]:
    """This rank's evaluation batches; none without data.eval."""
    if not config.data.eval:
        return []
    place = {"data_rank": groups.data_rank, "data_size": groups.data_size}
    return list(evaluation_batches(config, text, **place, count=config.train.eval_batches))


def make_sampler(config: Config, tokenizers: Tokenizers, evaluation: list[Batch], engine: Engine, ranks: Ranks) -> Any:
    """What the loop calls to write samples: all ranks fill in rank 0's clips."""
    first: list[Any] = [evaluation[0] if evaluation else None]
    if config.samples.every and ranks.world_size > 1:
        dist.broadcast_object_list(first, src=0)
    clusters = clusters_for(config.generation, tokenizers.frames) if config.samples.every else None
    sampler = Sampler(config, tokenizers.text, tokenizers.frames, first[0], clusters)

    def sample(step: int) -> None:
        log.info("step %d | samples in %s", step, sampler.write(engine, step, write=ranks.rank == 0))

    return sample


def build_throughput(config: Config, world_size: int) -> Throughput:
    """The stopwatch of a run's steps."""
    stage = config.train.stage
    peak = config.metrics.peak_tflops or peak_tflops(device_name(), config.train.precision)
    work = training_work(config.model, stage, config.train.activation_checkpointing)
    return Throughput(work.model, work.hardware, tokens_per_sample(config.model, stage), world_size, peak)


def versions() -> dict[str, str]:
    """Of python, megacog and the packages that numbers depend on."""
    found = {"python": platform.python_version(), "megacog": __version__}
    for package in ("torch", "deepspeed", "numpy", "safetensors", "sentencepiece", "h5py"):
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    return found


def save_run_files(config: Config, run_dir: Path) -> None:
    """Resolved configuration, command line and versions."""
    with atomic_file(run_dir / "config.yaml", "w") as file:
        file.write(dump_config(config))
    with atomic_file(run_dir / "command.txt", "w") as file:
        file.write(shlex.join([sys.executable, *sys.argv]) + "\n")
        file.writelines(f"{name} {number}\n" for name, number in versions().items())


def announce(config: Config, ranks: Ranks, groups: ProcessGroups, accumulation: int, tables: str) -> None:
    """What is about to happen, once."""
    train = config.train
    engine = f"deepspeed, ZeRO {train.zero_stage}" if train.engine == "deepspeed" else "torch"
    engine += ", optimizer on the host" if train.offload_optimizer else ""
    log.info("configuration %s:\n%s", config_hash(config)[:12], dump_config(config).rstrip())
    log.info("%s", tables)
    log.info(
        "%s | %d ranks by %s: tensor %d x sequence %d x data %d | engine %s | %s",
        describe_device(), ranks.world_size, ranks.source, groups.tensor.size, groups.sequence.size, groups.data_size,
        engine, train.precision,
    )  # fmt: skip
    log.info(
        "batch %d = micro %d x accumulation %d x data-parallel ranks %d | stage %s | %d steps | output in %s",
        train.global_batch_size, train.micro_batch_size, accumulation, groups.data_size, train.stage, train.steps,
        train.run_dir,
    )  # fmt: skip
