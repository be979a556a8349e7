"""From checkpoint folders of the original to one export: one base and an attention-plus set per video stage.

Tensors are read from mapped files and written one at a time, in their own dtype; the export appears when it is
complete and its logits agree with the source's.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from torch import Tensor

from megacog.checkpoint.export import KIND, open_export, write_export
from megacog.config.load import load_config
from megacog.config.schema import (
    Config,
    GenerationConfig,
    ModelConfig,
    SpaceConfig,
    Stage,
    TokenizerConfig,
    TrainConfig,
)
from megacog.errors import CheckpointError, ConfigError
from megacog.interop.keys import Entry, original_entries
from megacog.interop.parity import Difference
from megacog.interop.sat import SatTensors, find_checkpoint, same_bits, settings_above
from megacog.interop.self_parity import self_parity
from megacog.interop.settings import FILE, disagreements, model_of, stage_of
from megacog.interop.tokenizers import GivenTokenizers
from megacog.runtime.files import atomic_directory, require_place, require_space
from megacog.runtime.log import get_logger
from megacog.runtime.tensor_files import Deferred

_STAGES: tuple[Stage, ...] = ("base", "sequential", "interpolation")
_COMPARED = (
    "num_layers", "hidden_size", "num_heads", "ffn", "grid", "num_frames", "image_vocab_size", "text_vocab_size",
    "base_position_rows", "plus_position_rows",
)  # fmt: skip
"""What several folders must agree in."""
_BATCH, _MICRO_BATCH = 416, 4
"""Of the release; nothing reads them in an export, but a configuration names them."""
_NO_TOKENIZER = "none was given"
_logger = get_logger(__name__)


@dataclass(frozen=True)
class ImportOptions:
    """What the folders do not say."""

    config: Path | None = None
    """Configuration of the export; needed without model_config.json or with another vocabulary than icetk's."""
    overrides: tuple[str, ...] = ()
    """key=value changes of it."""
    stages: tuple[Stage, ...] = ()
    """What each folder holds, where model_config.json does not say."""
    base_from: Path | None = None
    """The folder whose base is taken when they differ; None = an error then."""
    text_tokenizer: Path | None = None
    frame_tokenizer: Path | None = None
    force: bool = False
    """Replace an older export."""


@dataclass(frozen=True)
class Source:
    """One folder, its stage and its tensors."""

    tensors: SatTensors
    stage: Stage
    entries: dict[str, Entry]

    @property
    def base(self) -> dict[str, Entry]:
        return {key: entry for key, entry in self.entries.items() if not entry.names[0].startswith("plus.")}


@dataclass(frozen=True)
class Imported:
    """What an import did."""

    stages: tuple[Stage, ...]
    tensors: int
    parameters: int
    bytes: int
    dtypes: tuple[str, ...]
    seconds: float
    """Of reading, writing and checksums; without the comparison of logits."""
    parity: tuple[Difference, ...]


def import_sat(folders: Sequence[Path], out: Path, options: ImportOptions) -> Imported:
    """Write the export of one or several checkpoint folders that share a base.

    Raises:
        CheckpointError: A folder or file is not what it should be, bases differ, or logits do.
        ConfigError: The configuration or a tokenizer does not fit.
        DataError: `out` is there already, and not `options.force`; or a tokenizer cannot be read.
        EnvError: There is too little disk space, or `out` is something else.
    """
    require_place(out, KIND, options.force)
    tokenizers = GivenTokenizers(options.text_tokenizer, options.frame_tokenizer)
    sources, config = _open(folders, options, tokenizers)
    base = _choose_base(sources, options.base_from)
    tensors = _tensors(base, sources)
    size = sum(tensor.nbytes for tensor in tensors.values())
    require_space(out, size)
    start = time.monotonic()
    with atomic_directory(out, KIND if options.force else None) as folder:
        steps = {source.stage: source.tensors.folder.iteration for source in sources}
        known = {stage: number for stage, number in steps.items() if number}
        write_export(folder, config, tensors, options.text_tokenizer, options.frame_tokenizer, known)
        seconds = time.monotonic() - start
        _logger.info("written: %.2f GB in %.0f s; comparing logits with the source's", size / 1e9, seconds)
        export = open_export(folder)
        # The base's own weights go with every set, also where they were chosen from another folder.
        parity = [self_parity(export, source.stage, partial(_weight, base, source)) for source in sources]
    dtypes = sorted({str(tensor.dtype).removeprefix("torch.") for tensor in tensors.values()})
    numel = sum(tensor.nbytes // tensor.dtype.itemsize for tensor in tensors.values())
    stages = tuple(source.stage for source in sources)
    return Imported(stages, len(tensors), numel, size, tuple(dtypes), seconds, tuple(parity))


def _open(folders: Sequence[Path], options: ImportOptions, tokenizers: GivenTokenizers) -> tuple[list[Source], Config]:
    if options.stages and len(options.stages) != len(folders):
        raise ConfigError(f"--stages names {len(options.stages)} stages for {len(folders)} folders; name one for each")
    given = load_config(options.config, options.overrides) if options.config else None
    opened = [SatTensors(find_checkpoint(path)) for path in folders]
    said: list[Stage | None] = list(options.stages) or [None] * len(opened)
    stages = [_stage(tensors, stage, given) for tensors, stage in zip(opened, said, strict=True)]
    twice = [stage for stage in _STAGES if stages.count(stage) > 1]
    if twice:
        names = ", ".join(str(path) for path, stage in zip(folders, stages, strict=True) if stage == twice[0])
        raise CheckpointError(
            f"{names} all hold the {twice[0]} stage; give one of them, or tell them by --stages where no {FILE} does"
        )
    config = _config(opened, stages, given, options)
    if config.model.boi_id is None:
        raise ConfigError("model.boi_id is not set; give the id of the start-of-image piece (icetk: 130000)")
    tokenizers.require(config.model)
    sources = []
    for tensors, stage in zip(opened, stages, strict=True):
        entries = original_entries(config.model, stage)
        tensors.check(entries)
        sources.append(Source(tensors, stage, entries))
    return sources, config


def _stage(tensors: SatTensors, named: Stage | None, config: Config | None) -> Stage:
    if not tensors.has_plus:
        if named not in (None, "base"):
            raise CheckpointError(f"{tensors.path} holds a base and no attention-plus, so it is not stage {named}")
        return "base"
    said = stage_of(tensors.folder.settings or {}, tensors.path)
    if named is not None:
        if said not in (None, named):
            raise ConfigError(
                f"--stages says that {tensors.path} is {named}, its {FILE} says {said} (cogvideo_stage); name the "
                "folders and stages in the same order, or leave --stages out"
            )
        return named
    if said is None and config is not None and config.train.stage != "base":
        return config.train.stage
    if said is None:
        raise CheckpointError(
            f"{tensors.path} holds an attention-plus, but no {FILE} says of which stage; say it by --stages "
            "sequential (cogvideo-stage1) or interpolation (cogvideo-stage2), one word for each folder"
            + settings_above(tensors.folder)
        )
    return said


def _config(
    opened: Sequence[SatTensors], stages: Sequence[Stage], given: Config | None, options: ImportOptions
) -> Config:
    """The configuration given, checked against what the folders say; else the one that they say."""
    if given is not None:
        problems = [
            f"{tensors.path / FILE}: {line}"
            for tensors, stage in zip(opened, stages, strict=True)
            for line in disagreements(tensors.folder.settings or {}, given.model, stage)
        ]
        if problems:
            raise ConfigError(f"{options.config} does not fit the checkpoint: " + "; ".join(problems))
        return given
    described = [
        (tensors.path, stage, model_of(tensors.folder.settings, stage, tensors.path))
        for tensors, stage in zip(opened, stages, strict=True)
        if tensors.folder.settings is not None
    ]
    if not described:
        raise CheckpointError(
            f"{opened[0].path} has no {FILE}; give --config, such as configs/cogvideo-9b.yaml"
            + settings_above(opened[0].folder)
        )
    model = _common_model(described)
    steps = max(1, *(tensors.folder.iteration for tensors in opened))
    return Config(
        model=model,
        tokenizer=TokenizerConfig(
            text=str(options.text_tokenizer or _NO_TOKENIZER), frames=str(options.frame_tokenizer or _NO_TOKENIZER)
        ),
        train=TrainConfig(
            stage="base", run_dir="imported", steps=steps, global_batch_size=_BATCH, micro_batch_size=_MICRO_BATCH
        ),
        generation=GenerationConfig(preset="cogvideo"),  # what these weights were released with
    )


def _common_model(described: Sequence[tuple[Path, Stage, ModelConfig]]) -> ModelConfig:
    first_path, _, model = described[0]
    attention: dict[str, SpaceConfig] = {}
    for path, stage, other in described:
        differences = [
            f"{key} is {getattr(model, key)} and {getattr(other, key)}"
            for key in _COMPARED
            if getattr(model, key) != getattr(other, key)
        ]
        if differences:
            raise CheckpointError(f"{first_path} and {path} hold different models: {'; '.join(differences)}")
        if stage != "base":
            attention[stage] = getattr(other.attention, stage)
    return model.model_copy(update={"attention": model.attention.model_copy(update=attention)})


def _choose_base(sources: Sequence[Source], base_from: Path | None) -> Source:
    """The source whose base is exported.

    Raises:
        CheckpointError: The bases differ and none is chosen; names the first tensor that does.
    """
    chosen = sources[0]
    if base_from is not None:
        named = [source for source in sources if source.tensors.path.resolve() == base_from.resolve()]
        if not named:
            raise ConfigError(f"--base-from {base_from} is none of the folders to import")
        chosen = named[0]
    for source in sources:
        different = _first_difference(chosen, source) if source is not chosen else None
        if different is None:
            continue
        message = f"the bases of {chosen.tensors.path} and {source.tensors.path} differ, first in {different}"
        if base_from is None:
            raise CheckpointError(
                f"{message}. An attention-plus works with the base that it was trained on: import them one by one, "
                "or choose whose base both get by --base-from FOLDER"
            )
        _logger.warning("%s; that of %s is taken", message, base_from)
    return chosen


def _first_difference(one: Source, other: Source) -> str | None:
    for key, entry in one.base.items():
        if not same_bits(one.tensors.whole(entry), other.tensors.whole(entry)):
            return key
    return None


def _tensors(base: Source, sources: Sequence[Source]) -> dict[str, Deferred]:
    """Every parameter of the export."""
    tensors = {name: base.tensors.deferred(entry, name) for entry in base.base.values() for name in entry.names}
    for source in sources:
        plus = [entry for key, entry in source.entries.items() if key not in source.base]
        tensors |= {entry.names[0]: source.tensors.deferred(entry, entry.names[0]) for entry in plus}
    return tensors


def _weight(base: Source, source: Source, key: str) -> Tensor:
    """A tensor of the original's model that this import makes of a source and the chosen base."""
    holder = base if key in base.base else source
    return holder.tensors.whole(holder.entries[key])
