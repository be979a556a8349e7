"""The state of a run between engine and disk: checkpoints, resuming, the export at the end."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from megacog.checkpoint.commit import on_all_ranks, on_rank_0, rank_and_size
from megacog.checkpoint.export import Export, load_tensors, save_export
from megacog.checkpoint.manifest import Manifest
from megacog.checkpoint.records import Record, RecordReader, assign_owners
from megacog.checkpoint.retention import Retention
from megacog.checkpoint.rng import restore_rng, seed_everything
from megacog.checkpoint.saver import Saved, Saver
from megacog.checkpoint.store import needed_bytes, open_frozen, rng_name, save_frozen
from megacog.config.load import config_hash
from megacog.config.schema import Config
from megacog.errors import CheckpointError
from megacog.model.init import whole_shape
from megacog.model.transformer import CogVideo
from megacog.parallel.fp8 import as_held
from megacog.parallel.groups import ProcessGroups
from megacog.parallel.tensor import TensorParallel
from megacog.runtime.faults import fault_point
from megacog.runtime.log import SHARED, get_logger
from megacog.training.engine import Engine
from megacog.training.same_run import check_same_run

log = get_logger(__name__)

_FP32_BYTES = 4


def shapes_of(model: CogVideo) -> dict[str, list[int]]:
    """Whole shapes of all parameters; must be taken before an engine partitions them."""
    return {name: whole_shape(parameter, model.parallel.size) for name, parameter in model.named_parameters()}


def gather_whole(local: Tensor, parameter: Tensor, parallel: TensorParallel) -> Tensor:
    """The whole tensor of which every tensor-parallel rank holds `local`, cut as `parameter` is. Collective."""
    shard = getattr(parameter, "shard", None)
    if shard is None or parallel.size == 1 or local.dim() == 0:
        return local
    parts = [torch.empty_like(local, memory_format=torch.contiguous_format) for _ in range(parallel.size)]
    dist.all_gather(parts, local.contiguous(), group=parallel.group)
    return shard.gather(parts)


def local_part(whole: Tensor, parameter: Tensor, parallel: TensorParallel) -> Tensor:
    """This tensor-parallel rank's part of a whole tensor that is cut as `parameter` is."""
    shard = getattr(parameter, "shard", None)
    if shard is None or whole.dim() == 0:
        return whole
    return shard.slice(whole, parallel.rank, parallel.size)


def _differing(found: Record, expected: Record) -> list[str]:
    """Fields that are not the same to the bit, or in one record only."""
    fields = sorted(found.keys() | expected.keys())
    return [field for field in fields if not _same_bits(found.get(field), expected.get(field))]


def _same_bits(one: Tensor | None, other: Tensor | None) -> bool:
    if one is None or other is None or (one.dtype, one.shape) != (other.dtype, other.shape):
        return False
    bits = [tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8) for tensor in (one, other)]
    return torch.equal(*bits)


@dataclass(frozen=True)
class Resumed:
    """A verified checkpoint whose weights are in the model; the rest waits for the engine."""

    manifest: Manifest
    records: RecordReader
    frozen: RecordReader | None

    def idle_tensors(self, shapes: Mapping[str, list[int]]) -> list[str]:
        """Names of the idle sets' tensors: what is frozen and not in the model (whose parameters are in `shapes`)."""
        return sorted(set(self.frozen.placement) - set(shapes)) if self.frozen else []

    def part(self, name: str, parameter: Tensor, parallel: TensorParallel) -> Record:
        """What this tensor-parallel rank must hold of a parameter; of frozen ones as they are computed with."""
        if parameter.requires_grad:
            return {field: local_part(x, parameter, parallel) for field, x in self.records.read(name).items()}
        weight = local_part(self.frozen_tensor(name), parameter, parallel)
        if parameter.dtype != torch.uint8:
            return {"weight": weight.to(parameter.dtype)}
        codes, scale = as_held(weight.to(parameter.device))
        return {"weight": codes, "weight_scale": scale}

    def frozen_tensor(self, name: str) -> Tensor:
        """A frozen or idle tensor as it is stored."""
        assert self.frozen is not None
        return self.frozen.read(name)["weight"]


def load_checkpoint(run_dir: Path, path: Path, manifest: Manifest, config: Config, model: CogVideo) -> Resumed:
    """Put a checkpoint's weights, frozen ones too, into the model. Collective.

    Raises:
        CheckpointError: It belongs to another run (the message names every difference) or is damaged.
    """
    check_same_run(manifest.config, config, path)
    fault_point("load", manifest.step)
    records = RecordReader(path, manifest.parameters)
    trained = [name for name, parameter in model.named_parameters() if parameter.requires_grad]
    frozen_names = [name for name, parameter in model.named_parameters() if not parameter.requires_grad]
    load_tensors(model, lambda name: records.read(name)["weight"], trained)
    frozen = open_frozen(run_dir, manifest.frozen) if manifest.frozen else None
    if frozen_names:
        if frozen is None:
            raise CheckpointError(f"{path} refers to no frozen weights, but this stage has some")
        load_tensors(model, lambda name: frozen.read(name)["weight"], frozen_names)
    return Resumed(manifest, records, frozen)


class RunState:
    """Saves, restores and exports one run, whose folder it takes over. All methods are collective.

    Frozen weights and idle sets are taken from the inherited export, and later from the run's own copy, in the
    dtype that they were stored in: the compute dtype may have fewer bits.

    Args:
        config: With boi_id resolved.
        engine: Built from a model whose parameters have the whole shapes `shapes`.
        groups: This rank's process groups.
        shapes: As `shapes_of` gave before the engine was built.
        fingerprints: Of the tokenizers.
        versions: Of python and packages, for the record.
        idle: Export that holds idle attention-plus sets, and their tensors' names.
    """

    def __init__(
        self,
        config: Config,
        engine: Engine,
        groups: ProcessGroups,
        shapes: Mapping[str, list[int]],
        fingerprints: dict[str, str],
        versions: dict[str, str],
        idle: tuple[Export | None, list[str]],
    ) -> None:
        self.run_dir = Path(config.train.run_dir)
        self.saved_step = -1
        self.guard_state: Callable[[], dict[str, Any]] = dict
        """What goes into the manifest of every checkpoint besides; the same on all ranks."""
        keep = config.checkpoint
        retention = Retention(keep.keep_last, keep.keep_every, keep.keep_best)
        self._saver = Saver(self.run_dir, retention, keep.asynchronous)
        engine.before_update(self._saver.wait_for_copy)
        self._config = config
        self._settings, self._settings_hash = config.model_dump(mode="json"), config_hash(config)
        self._engine = engine
        self._groups = groups
        self._shapes = shapes
        self._fingerprints = fingerprints
        self._versions = versions
        self._export, idle_names = idle
        self._frozen_hash: str | None = None
        self._frozen: RecordReader | None = None
        self._parameters = dict(engine.model.named_parameters())
        frozen = [name for name, parameter in self._parameters.items() if not parameter.requires_grad]
        self._carried = [*frozen, *idle_names]

    def restore(self, resumed: Resumed, example: dict[str, Any]) -> int:
        """Continue from a checkpoint: optimizer state and generators; the step it was taken at.

        Args:
            resumed: As `load_checkpoint` gave.
            example: Valid forward arguments, for the engine to allocate its states with.
        """
        self._engine.prepare_states(**example)
        for name, parameter in self._parameters.items():
            if parameter.requires_grad:
                self._engine.set_state(name, resumed.part(name, parameter, self._groups.tensor))
        log.info("restored state verified: %d tensors", self._verify(resumed))
        self._restore_rng(resumed)
        self._frozen_hash, self._frozen = resumed.manifest.frozen, resumed.frozen
        self.saved_step = resumed.manifest.step
        return resumed.manifest.step

    def _verify(self, resumed: Resumed) -> int:
        """Compare all that the engine now holds with what was saved, bit for bit; how many tensors.

        Each rank compares its own part, and of the parameters those that fall to it among its replicas.

        Raises:
            CheckpointError: Something differs; the same on every rank.
        """
        replicas = self._groups.replicas
        owners = assign_owners({name: self._numel(name) for name in self._parameters}, replicas.size)
        different, count = [], 0
        for name, parameter in self._parameters.items():
            held = self._held(name, parameter)
            count += len(held)
            if owners[name] == replicas.rank:
                saved = resumed.part(name, parameter, self._groups.tensor)
                different += [f"{field} of {name}" for field in _differing(held, saved)]

        def tell() -> None:
            if different:
                raise CheckpointError(f"differ from what {resumed.records.folder} holds: {', '.join(different)}")

        on_all_ranks(tell)
        return count

    def _held(self, name: str, parameter: Tensor) -> Record:
        """What this tensor-parallel rank's engine holds of a parameter."""
        if parameter.requires_grad:
            return self._engine.get_state(name)
        record = {"weight": self._engine.weight(name)}
        if parameter.dtype == torch.uint8:
            layer = self._engine.model.get_submodule(name.rpartition(".")[0])
            record["weight_scale"] = layer.get_buffer("weight_scale")
        return record

    def _restore_rng(self, resumed: Resumed) -> None:
        rank, _ = rank_and_size()
        world = resumed.manifest.world
        if world == self._world():
            restore_rng(resumed.records.read(rng_name(rank)))
            return
        text = "the checkpoint was written by %s; resuming is exact to rounding, not bitwise"
        log.warning(text, world, extra=SHARED)
        seed_everything(self._config.train.seed + resumed.manifest.step * 1_000_003 + self._groups.data_rank)

    @property
    def writing(self) -> bool:
        """Whether this rank still writes a checkpoint; when no rank does, all call `advance_save`. Not collective."""
        return self._saver.writing

    def save(self, step: int, evaluation_loss: float | None = None) -> Saved | None:
        """Write the checkpoint of a step completely; see `start_save`. None if it is there already."""
        self.start_save(step, evaluation_loss)
        return self.finish_save()

    def start_save(self, step: int, evaluation_loss: float | None = None) -> None:
        """Begin the checkpoint of a step, the first time with all frozen weights, unless it is there already.

        Args:
            step: The step that has just ended.
            evaluation_loss: Of an evaluation at this step; one that is not finite counts for nothing.

        Raises:
            EnvError: There is not enough disk space for all of it; nothing was written.
            CheckpointError: Some rank could not write.
        """
        if step == self.saved_step:
            return
        sizes = self._trained_bytes()
        if self._frozen_hash is None:
            self._save_frozen(reserve=needed_bytes(sizes))
        if evaluation_loss is not None and not math.isfinite(evaluation_loss):
            evaluation_loss = None
        header = replace(self._header(step), evaluation_loss=evaluation_loss, guard=self.guard_state())
        self._saver.start(header, sizes, self._record)

    def finish_save(self) -> Saved | None:
        """Complete the checkpoint that was begun, waiting for its files; None if none was.

        Raises:
            CheckpointError: Some rank could not write.
        """
        return self._note(self._saver.finish())

    def advance_save(self) -> Saved | None:
        """Go on with the checkpoint that was begun, when no rank is `writing`; what it was, if it is complete now.

        Raises:
            CheckpointError: Some rank could not write.
        """
        return self._note(self._saver.advance())

    def _note(self, saved: Saved | None) -> Saved | None:
        if saved is not None:
            self.saved_step = saved.step
        return saved

    def close(self) -> None:
        """Remove old checkpoints and wait for it."""
        self._saver.close()

    def export(self, text_tokenizer: Path, frame_tokenizer: Path) -> Path:
        """Write `<run>/export` from the present weights; frozen ones and idle sets are carried over bitwise.

        Raises:
            CheckpointError: It could not be written.
        """
        self.close()  # a run that was resumed at its last step has not been through it
        rank, _ = rank_and_size()
        tensors: dict[str, Tensor] = {}
        for name, parameter in self._parameters.items():
            if not parameter.requires_grad:
                continue
            whole = self._whole_weight(name)
            if rank == 0:
                tensors[name] = whole.detach().to("cpu", copy=True)
        path = self.run_dir / "export"

        def write() -> None:
            tensors.update({name: self._carried_tensor(name) for name in self._carried})
            steps = {self._config.train.stage: self._config.train.steps}
            save_export(path, self._config, tensors, text_tokenizer, frame_tokenizer, steps)

        on_rank_0(write)
        return path

    def _header(self, step: int) -> Manifest:
        return Manifest(
            step=step,
            samples=step * self._config.train.global_batch_size,
            config=self._settings,
            config_hash=self._settings_hash,
            world=self._world(),
            fingerprints=self._fingerprints,
            versions=self._versions,
            frozen=self._frozen_hash,
            parameters={},
        )

    def _world(self) -> dict[str, int]:
        groups = self._groups
        sizes = {"tensor": groups.tensor.size, "sequence": groups.sequence.size, "data": groups.data_size}
        return {"ranks": rank_and_size()[1]} | sizes

    def _whole_weight(self, name: str) -> Tensor:
        return gather_whole(self._engine.weight(name), self._parameters[name], self._groups.tensor)

    def _record(self, name: str) -> Record:
        parameter = self._parameters[name]
        state = self._engine.get_state(name)
        return {field: gather_whole(tensor, parameter, self._groups.tensor) for field, tensor in state.items()}

    def _trained_bytes(self) -> dict[str, int]:
        """Bytes of every trained parameter's record: weight, both moments and, if the weight is not fp32, master."""
        sizes = {}
        for name, parameter in self._parameters.items():
            if parameter.requires_grad:
                masters = 0 if parameter.dtype == torch.float32 else 1
                sizes[name] = self._numel(name) * (parameter.element_size() + (2 + masters) * _FP32_BYTES)
        return sizes

    def _numel(self, name: str) -> int:
        return torch.Size(self._shapes[name]).numel()

    def _save_frozen(self, reserve: int) -> None:
        """Write frozen and idle weights, if there are any, when `reserve` bytes fit besides."""
        if not self._carried:
            return
        assert self._export is not None, "what is frozen was inherited"
        sizes = self._export.tensor_bytes(self._carried)
        self._frozen_hash = save_frozen(self.run_dir, self._header(0), sizes, self._frozen_record, reserve)

    def _frozen_record(self, name: str) -> Record:
        return {"weight": self._carried_tensor(name)}

    def _carried_tensor(self, name: str) -> Tensor:
        if self._frozen is not None:
            return self._frozen.read(name)["weight"]
        assert self._export is not None
        return self._export.tensor(name)
