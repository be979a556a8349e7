"""From an export to the original's format: a checkpoint folder of SwissArmyTransformer, or safetensors.

Both hold one stage (a base alone, or with one attention-plus) under the original's keys, unpadded, in the export's
own dtype.
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor

from megacog.checkpoint.export import Export
from megacog.config.schema import ModelConfig, Stage
from megacog.errors import CheckpointError, ConfigError
from megacog.interop.keys import Entry, original_entries
from megacog.interop.sat import LATEST, SAFETENSORS, rank_file
from megacog.interop.settings import FILE, settings_of
from megacog.runtime.files import atomic_directory, require_space
from megacog.runtime.tensor_files import Deferred, save_tensors


def stage_to_export(export: Export, stage: Stage | None) -> Stage:
    """The stage that is meant: the one named, or the only one there is.

    Raises:
        CheckpointError: It is not there, or there are two.
    """
    held: list[Stage] = ["base", *export.plus]
    if stage is None:
        if len(export.plus) == 2:
            raise CheckpointError(f"{export.path} holds {', '.join(held)}; choose one by --stage")
        return held[-1]
    if stage not in held:
        raise CheckpointError(f"{export.path} holds no {stage}, only {', '.join(held)}")
    return stage


def iteration_of(export: Export, stage: Stage, given: int | None) -> int:
    """The number of the inner folder: the one given, else the steps that the stage was trained for.

    Raises:
        ConfigError: None is given and the export does not know the steps, or it is negative.
    """
    if given is None and stage not in export.steps:
        raise ConfigError(
            f"{export.path} does not say for how many steps its {stage} weights were trained; give the number that the "
            "inner folder gets by --iteration"
        )
    iteration = export.steps[stage] if given is None else given
    if iteration < 0:
        raise ConfigError(f"--iteration {iteration} must not be negative")
    return iteration


def export_sat(export: Export, out: Path, stage: Stage, ranks: int, iteration: int) -> None:
    """Write a checkpoint folder of SwissArmyTransformer; it appears when complete.

    Args:
        export: Whose weights.
        out: The folder.
        stage: Which model.
        ranks: Model-parallel ranks; they divide the vocabulary and the heads.
        iteration: Number of the inner folder.

    Raises:
        ConfigError: The ranks do not divide the model.
        EnvError: `out` exists, or there is too little space.
    """
    require_ranks(export.model, ranks)
    entries = original_entries(export.model, stage)
    # Tensors lie twice on the disk while a rank's file is written.
    require_space(out, _bytes(export, entries) * (ranks + 1) // ranks)
    with atomic_directory(out) as folder:
        (folder / str(iteration)).mkdir()
        for rank in range(ranks):
            with tempfile.TemporaryDirectory(dir=folder) as scratch:
                module = dict(_module(export, entries, rank, ranks, Path(scratch)))
                torch.save({"iteration": iteration, "module": module}, folder / str(iteration) / rank_file(rank))
                del module
        _write_settings(folder, export.model, stage, ranks)
        (folder / LATEST).write_text(str(iteration))


def export_safetensors(export: Export, out: Path, stage: Stage) -> None:
    """Write `model.safetensors` under the original's keys and its model_config.json; the folder appears when complete.

    Raises:
        EnvError: `out` exists, or there is too little space.
    """
    entries = original_entries(export.model, stage)
    require_space(out, _bytes(export, entries))
    with atomic_directory(out) as folder:
        save_tensors({key: _deferred(export, entry) for key, entry in entries.items()}, folder / SAFETENSORS)
        _write_settings(folder, export.model, stage, 1)


def require_ranks(model: ModelConfig, ranks: int) -> None:
    """Raises:
    ConfigError: `ranks` does not divide vocabulary, heads and MLP; names those that do.
    """
    vocabulary = model.image_vocab_size + model.text_vocab_size

    def divides(size: int) -> bool:
        return not (vocabulary % size or model.num_heads % size or model.ffn % size)

    if ranks < 1 or not divides(ranks):
        possible = [str(size) for size in range(1, model.num_heads + 1) if divides(size)]
        raise ConfigError(
            f"{ranks} ranks do not divide {vocabulary} vocabulary rows and {model.num_heads} heads, which the "
            f"original does not pad; possible: {', '.join(possible)}"
        )


def whole_tensor(export: Export, entry: Entry) -> Tensor:
    """A tensor of the original's model."""
    parts = [export.tensor(name) for name in entry.names]
    return parts[0] if len(parts) == 1 else torch.cat(parts)


def _deferred(export: Export, entry: Entry) -> Deferred:
    return Deferred(export.tensor(entry.names[0]).dtype, entry.shape, lambda: whole_tensor(export, entry))


def _module(
    export: Export, entries: dict[str, Entry], rank: int, ranks: int, scratch: Path
) -> Iterator[tuple[str, Tensor]]:
    """A rank's part of every tensor, each in a mapped file of its own: torch.save writes all at once, from there."""
    for number, (key, entry) in enumerate(entries.items()):
        whole = whole_tensor(export, entry)
        part = whole if entry.shard is None else entry.shard.slice(whole, rank, ranks)
        mapped = torch.from_file(str(scratch / str(number)), shared=True, size=part.numel(), dtype=part.dtype)
        yield key, mapped.view(part.shape).copy_(part)


def _bytes(export: Export, entries: dict[str, Entry]) -> int:
    return sum(export.tensor_bytes(name for entry in entries.values() for name in entry.names).values())


def _write_settings(folder: Path, model: ModelConfig, stage: Stage, ranks: int) -> None:
    (folder / FILE).write_text(json.dumps(settings_of(model, stage, ranks), indent=1) + "\n")
