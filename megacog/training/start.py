"""Where a run's weights start: at random, or from the export that it inherits."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from megacog.checkpoint.digest import TensorDigest
from megacog.checkpoint.export import Export, load_tensors, open_export
from megacog.config.schema import Config, ModelConfig, PlusStage
from megacog.errors import CheckpointError, ConfigError
from megacog.model.init import initialize_base, initialize_plus
from megacog.model.transformer import CogVideo
from megacog.runtime.log import SHARED, get_logger
from megacog.training.state import local_part

log = get_logger(__name__)

_SHAPE_KEYS = (
    "num_layers", "hidden_size", "num_heads", "ffn", "grid", "image_vocab_size", "text_vocab_size", "text_positions",
    "base_position_rows", "layernorm_eps",
)  # fmt: skip
"""What the base must share with a model that inherits it."""
_DIGEST_SHOWN = 16
"""Digits of a sha256 in the table."""


def open_inherited(config: Config) -> Export | None:
    """The export that the run inherits, checked against the run's model; None without one.

    Raises:
        CheckpointError: It is no export, is damaged, or has another shape.
    """
    if config.model.inherit is None:
        return None
    export = open_export(Path(config.model.inherit))
    if export.model.boi_id != config.model.boi_id:  # ours is the tokenizer's
        raise CheckpointError(
            f"{config.tokenizer.text} is not the text tokenizer of model.inherit {export.path}: <start_of_image> is "
            f"piece {config.model.boi_id} in it and {export.model.boi_id} there. Set tokenizer.text to the one that "
            "the weights were trained with"
        )
    problems = _differences(export.model, config.model, _SHAPE_KEYS)
    if export.plus and config.train.stage != "base":
        problems += _differences(export.model, config.model, ("plus_position_rows",))
    for stage in idle_sets(config, export):
        if getattr(export.model.attention, stage) != getattr(config.model.attention, stage):
            problems.append(f"attention.{stage} differs from the one its attention-plus was trained with")
    if problems:
        raise CheckpointError(
            f"model.inherit {export.path} does not fit this model: " + "; ".join(problems) + ". Make the model "
            "section agree with the export's config.yaml"
        )
    return export


def _differences(old: ModelConfig, new: ModelConfig, keys: tuple[str, ...]) -> list[str]:
    pairs = [(key, getattr(old, key), getattr(new, key)) for key in keys]
    return [f"{key} is {theirs} there and {ours} here" for key, theirs, ours in pairs if theirs != ours]


def idle_sets(config: Config, export: Export | None) -> tuple[PlusStage, ...]:
    """Attention-plus sets of the inherited export that the run carries over untouched.

    Training the base carries none: they belong to the base as it was.
    """
    if export is None or config.train.stage == "base":
        return ()
    return tuple(stage for stage in export.plus if stage != config.train.stage)


def idle_tensors(config: Config, export: Export | None) -> list[str]:
    """Names of the tensors of `idle_sets`."""
    if export is None:
        return []
    stages = idle_sets(config, export)
    return [name for name in sorted(export.files) if any(name.startswith(f"plus.{stage}.") for stage in stages)]


def start_weights(config: Config, model: CogVideo, export: Export | None) -> dict[str, str]:
    """Fill the model; where each part came from, by part name ("base", "plus.<stage>").

    Raises:
        ConfigError: `model.plus_from` names a set that the export does not hold.
    """
    seed, stage = config.train.seed, config.train.stage
    sources = {"base": f"random, seed {seed}"}
    if export is None:
        initialize_base(model, seed)
    else:
        base = [name for name, _ in model.named_parameters() if not name.startswith("plus.")]
        load_tensors(model, export.tensor, base)
        sources["base"] = str(export.path)
    if stage == "base":
        if export is not None and export.plus:
            sets = list(export.plus)
            log.warning("training the base drops the attention-plus sets %s of %s", sets, export.path, extra=SHARED)
        return sources
    sources[f"plus.{stage}"] = _start_plus(config, model, stage, export)
    return sources


def _start_plus(config: Config, model: CogVideo, stage: PlusStage, export: Export | None) -> str:
    origin = config.model.plus_from
    if origin == "base":
        if export is not None and stage in export.plus:
            text = "%s holds plus.%s already; a fresh one is trained (model.plus_from: base)"
            log.warning(text, export.path, stage, extra=SHARED)

        def base(name: str) -> Tensor:
            """As it is stored: the model may hold it in fewer bits."""
            assert export is not None, "what is frozen was inherited"
            return local_part(export.tensor(name), model.get_parameter(name), model.parallel)

        initialize_plus(model, stage, config.model.plus_dense, config.train.seed, base)
        dense = "copied" if config.model.plus_dense == "copy" else "random"
        return f"base channel (qkv copied, dense {dense})"
    if export is None or origin not in export.plus:
        held = list(export.plus) if export is not None else []
        raise ConfigError(
            f"model.plus_from is {origin}, but {config.model.inherit} holds no plus.{origin}, only {held}; "
            "train that stage first, or use plus_from: base"
        )
    names = [name for name, _ in model.named_parameters() if name.startswith(f"plus.{stage}.")]

    def source(name: str) -> Tensor:
        return export.tensor(name.replace(f"plus.{stage}.", f"plus.{origin}.", 1))

    load_tensors(model, source, names)
    return f"plus.{origin} of {export.path}"


def describe_weights(
    model: CogVideo, sources: dict[str, str], idle: list[str], stored: Callable[[str], Tensor] | None
) -> str:
    """A table of tensor groups: tensors, parameters, dtype, trained or frozen, source, hash of what is not trained.

    Args:
        model: Counted as this rank holds it, before an engine partitions it.
        sources: As `start_weights` returns.
        idle: Tensors of the sets that are carried over.
        stored: Reads a frozen or idle tensor whole, as it is stored; None = nothing is.
    """
    rows: list[tuple[str, ...]] = [("tensors", "parameters", "dtype", "state", "group", "from", "sha256")]
    parameters = dict(model.named_parameters())
    for group, names in _groups(parameters).items():
        part = ".".join(group.split(".")[:2]) if group.startswith("plus.") else "base"
        first, numel = parameters[names[0]], sum(parameters[name].numel() for name in names)
        state, dtype, digest = "trained", _short(first), ""
        if not first.requires_grad:
            assert stored is not None, "what is frozen was inherited"
            kept = _kept(names, stored)
            state, digest = "frozen", kept.digest
            dtype = kept.dtype if kept.dtype == dtype else f"{kept.dtype} -> {dtype}"  # what loading has cast
        source = sources.get(part, "checkpoint")
        rows.append((str(len(names)), f"{numel:,}", dtype, state, group, source, digest))
    for group, names in _groups(idle).items():
        assert stored is not None, "idle sets were inherited"
        kept = _kept(names, stored)
        facts = (f"{kept.numel:,}", kept.dtype, "idle", group, "carried over bitwise", kept.digest)
        rows.append((str(len(names)), *facts))
    return "\n".join(_format_rows(rows))


def _groups(names: Iterable[str]) -> dict[str, list[str]]:
    groups: dict[str, list[str]] = {}
    for name in names:
        groups.setdefault(_group(name), []).append(name)
    return groups


@dataclass(frozen=True)
class _Kept:
    """What a group of stored tensors amounts to."""

    dtype: str
    numel: int
    digest: str
    """First digits of the sha256 over all of them."""


def _kept(names: Sequence[str], stored: Callable[[str], Tensor]) -> _Kept:
    """Reads the tensors one at a time: a group may be larger than the memory of the host."""
    total, numel, dtypes = TensorDigest(), 0, {}
    for name in sorted(names):
        tensor = stored(name)
        total.add(name, tensor)
        numel += tensor.numel()
        dtypes[name] = _short(tensor)
    return _Kept(dtypes[names[0]], numel, total.hexdigest()[:_DIGEST_SHOWN])


def _short(tensor: Tensor) -> str:
    held = torch.float8_e4m3fn if tensor.dtype == torch.uint8 else tensor.dtype
    return str(held).removeprefix("torch.")


def _group(name: str) -> str:
    parts = name.split(".")
    if parts[0] == "plus":
        return f"plus.{parts[1]}.{'positions' if parts[2] == 'position_embedding' else 'layers'}"
    if parts[0] == "layers":
        return "layers.layernorms" if "layernorm" in parts[2] else f"layers.{parts[2]}"
    return parts[0]


def _format_rows(rows: list[tuple[str, ...]]) -> Iterator[str]:
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    for row in rows:
        numbers = [cell.rjust(width) for cell, width in zip(row[:2], widths[:2], strict=True)]
        words = [cell.ljust(width) for cell, width in zip(row[2:], widths[2:], strict=True)]
        yield "  ".join(numbers + words).rstrip()
