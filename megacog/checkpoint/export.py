"""Exports: a model's whole weights and its tokenizers in one folder, independent of how it was trained.

    <export>/config.yaml            the run's resolved configuration
    <export>/model-00001.safetensors ...  whole (unsharded, unpadded) tensors in their own dtype
    <export>/manifest.json          format, every tensor's file, every file with size and sha256, steps, own crc32
    <export>/text_tokenizer/  <export>/frame_tokenizer/

Weights that come from elsewhere may be exported without tokenizers: such an export can be trained on with the
tokenizers that the run names, gives a clear error where its own are needed, and can be given them later.
"""

from __future__ import annotations

import json
import shutil
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from megacog.config.load import dump_config, load_config
from megacog.config.schema import BasePrecision, Config, Kernels, ModelConfig, PlusStage, Stage
from megacog.errors import CheckpointError
from megacog.model.transformer import CogVideo
from megacog.parallel.fp8 import check_device, hold_in_fp8, load_weight
from megacog.parallel.tensor import TensorParallel, materialize
from megacog.runtime.files import FolderKind, atomic_directory, atomic_file, sha256_file
from megacog.runtime.log import get_logger
from megacog.runtime.tensor_files import Deferred, save_tensors, stored_bytes

FORMAT = "megacog-export"
VERSION = 1
SHARD_BYTES = 4 * 2**30
TEXT_TOKENIZER = "text_tokenizer"
FRAME_TOKENIZER = "frame_tokenizer"
TOKENIZERS = (TEXT_TOKENIZER, FRAME_TOKENIZER)
_MANIFEST = "manifest.json"
_MANIFEST_KEYS = {"format", "version", "tensors", "files", "steps", "crc32"}
KIND = FolderKind(_MANIFEST, FORMAT)
_logger = get_logger(__name__)


@dataclass(frozen=True)
class Export:
    """An opened export; tensors are read when asked for."""

    path: Path
    config: Config
    files: Mapping[str, str]
    """Tensor name -> file name."""
    tokenizers: tuple[str, ...]
    """Folders of the tokenizers inside; weights imported without them lack them."""
    steps: Mapping[Stage, int]
    """Steps that each stage's own weights were trained for, as far as it is known."""
    fingerprint: str
    """sha256 over the manifest: names, sizes and checksums of everything inside."""

    @property
    def model(self) -> ModelConfig:
        return self.config.model

    @property
    def plus(self) -> tuple[PlusStage, ...]:
        """Stages whose attention-plus is held."""
        stages: tuple[PlusStage, ...] = ("sequential", "interpolation")
        return tuple(stage for stage in stages if f"plus.{stage}.position_embedding.weight" in self.files)

    @property
    def text_tokenizer(self) -> Path:
        return self._tokenizer(TEXT_TOKENIZER)

    @property
    def frame_tokenizer(self) -> Path:
        return self._tokenizer(FRAME_TOKENIZER)

    def _tokenizer(self, name: str) -> Path:
        missing = [kind for kind in TOKENIZERS if kind not in self.tokenizers]
        if name in missing:
            flags = " ".join(f"--{kind.replace('_', '-')} FOLDER" for kind in missing)
            raise CheckpointError(
                f"{self.path} holds no {' and no '.join(kind.replace('_', ' ') for kind in missing)}: its weights were "
                f"imported without. Put in those that they were trained with: python launch/convert.py add-tokenizers "
                f"{self.path} {flags}"
            )
        return self.path / name

    def tensor(self, name: str) -> Tensor:
        """The whole tensor `name` on the CPU, in the dtype it was stored in."""
        if name not in self.files:
            raise CheckpointError(f"{self.path} holds no tensor {name}")
        with safe_open(self.path / self.files[name], framework="pt") as file:
            return file.get_tensor(name)

    def tensor_bytes(self, names: Iterable[str]) -> dict[str, int]:
        """Bytes of the tensors `names` as they are stored; no tensor is read."""
        names = list(names)
        held = {file: stored_bytes(self.path / file) for file in {self.files[name] for name in names}}
        return {name: held[self.files[name]][name] for name in names}


def save_export(
    path: Path,
    config: Config,
    tensors: Mapping[str, Tensor | Deferred],
    text_tokenizer: Path | None,
    frame_tokenizer: Path | None,
    steps: Mapping[Stage, int] | None = None,
) -> None:
    """Write an export; the folder appears, or replaces an older one, only when complete.

    Args:
        path: The folder.
        config: The run's configuration, `boi_id` resolved.
        tensors: Whole tensors by parameter name.
        text_tokenizer, frame_tokenizer: Folders to copy in; None = the export holds none.
        steps: See `Export.steps`.
    """
    with atomic_directory(path, KIND) as folder:
        write_export(folder, config, tensors, text_tokenizer, frame_tokenizer, steps)


def write_export(
    folder: Path,
    config: Config,
    tensors: Mapping[str, Tensor | Deferred],
    text_tokenizer: Path | None,
    frame_tokenizer: Path | None,
    steps: Mapping[Stage, int] | None = None,
) -> None:
    """Fill an empty folder as `save_export` does: for writers that check it before it gets its name."""
    (folder / "config.yaml").write_text(dump_config(config), encoding="utf-8")
    placement = {}
    for index, names in enumerate(_shards(tensors), start=1):
        file = f"model-{index:05d}.safetensors"
        save_tensors({name: tensors[name] for name in names}, folder / file)
        placement.update(dict.fromkeys(names, file))
    for source, name in zip((text_tokenizer, frame_tokenizer), TOKENIZERS, strict=True):
        if source is not None:
            shutil.copytree(source, folder / name)
    manifest: dict[str, Any] = {"format": FORMAT, "version": VERSION, "tensors": placement}
    manifest |= {"files": _file_table(folder), "steps": dict(steps or {})}
    (folder / _MANIFEST).write_text(_manifest_text(manifest))


def add_tokenizers(export: Export, text_tokenizer: Path | None, frame_tokenizer: Path | None) -> None:
    """Put tokenizers into an export that lacks them; it holds them from the moment its manifest is replaced.

    Args:
        export: Opened before; open it again afterwards.
        text_tokenizer, frame_tokenizer: Folders to copy in; None = none is added.

    Raises:
        CheckpointError: It holds such a tokenizer already.
        EnvError: The disk is full; the export is as it was.
    """
    given = dict(zip(TOKENIZERS, (text_tokenizer, frame_tokenizer), strict=True))
    manifest = json.loads((export.path / _MANIFEST).read_text())
    for name, source in given.items():
        if source is None:
            continue
        if name in export.tokenizers:
            raise CheckpointError(f"{export.path} holds a {name.replace('_', ' ')} already, which is not replaced")
        target = export.path / name
        shutil.rmtree(target, ignore_errors=True)  # what a stopped command left; no manifest lists it
        with atomic_directory(target) as folder:
            shutil.copytree(source, folder, dirs_exist_ok=True)
        manifest["files"] |= {f"{name}/{file}": record for file, record in _file_table(target).items()}
    with atomic_file(export.path / _MANIFEST, "w") as file:
        file.write(_manifest_text(manifest))


def open_export(path: Path, verify: bool = False) -> Export:
    """Open an export and check that every file is there in its size (with `verify`: its checksum too).

    Raises:
        CheckpointError: Not an export, or incomplete or damaged.
    """
    manifest_path = path / _MANIFEST
    if not manifest_path.is_file():
        raise CheckpointError(f"{path} has no manifest.json, so it is no export; give the `export` folder of a run")
    try:
        manifest = json.loads(manifest_path.read_text())
        if (manifest["format"], manifest["version"]) != (FORMAT, VERSION):
            raise CheckpointError(
                f"{manifest_path} says {manifest['format']} version {manifest['version']}, "
                f"this megacog reads {FORMAT} version {VERSION}"
            )
        own = _checksum(manifest)  # which manifests of former versions lack
        if not manifest.keys() <= _MANIFEST_KEYS or manifest.get("crc32", own) != own:
            raise ValueError("checksum differs")
        files, tensors = dict(manifest["files"]), dict(manifest["tensors"])
        inside = {name: (int(record["bytes"]), str(record["sha256"])) for name, record in files.items()}
        steps = {stage: int(count) for stage, count in manifest.get("steps", {}).items()}
        if not inside.keys() >= {"config.yaml", *tensors.values()}:
            raise ValueError("it does not list every file")
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise CheckpointError(f"{manifest_path} is damaged ({error!r}); export the run again") from error
    for name, record in files.items():
        _check_file(path / name, record, verify)
    tokenizers = tuple(name for name in TOKENIZERS if any(file.startswith(f"{name}/") for file in files))
    return Export(path, load_config(path / "config.yaml"), tensors, tokenizers, steps, sha256_file(manifest_path))


def load_tensors(model: CogVideo, source: Callable[[str], Tensor], names: Iterable[str]) -> None:
    """Copy this rank's share of whole tensors into the parameters `names`.

    Args:
        model: Target; values are cast to its dtype, and quantized where it holds them in e4m3.
        source: Whole tensor by parameter name.
        names: Parameters to fill.

    Raises:
        CheckpointError: A tensor's shape does not fit the model.
    """
    parameters = dict(model.named_parameters())
    with torch.no_grad():
        for name in names:
            parameter = parameters[name]
            whole = source(name)
            shard = getattr(parameter, "shard", None)
            fits = shard is None or whole.shape[shard.dim] == shard.length
            part = shard.slice(whole, model.parallel.rank, model.parallel.size) if shard and fits else whole
            if not fits or part.shape != parameter.shape:
                raise CheckpointError(
                    f"{name} has shape {tuple(whole.shape)} in the weights to load, which does not fit the model "
                    f"(this rank's part is {tuple(parameter.shape)}); the model sections differ"
                )
            if parameter.dtype == torch.uint8:
                load_weight(model.get_submodule(name.rpartition(".")[0]), part)
            else:
                parameter.copy_(part)


def load_model(
    path: Path,
    plus: Iterable[PlusStage] | None = None,
    parallel: TensorParallel | None = None,
    dtype: torch.dtype | None = None,
    device: torch.device | str = "cpu",
    kernels: Kernels = "auto",
    base_precision: BasePrecision | None = None,
) -> CogVideo:
    """The model of an export, in eval mode, with the attention-plus sets `plus` (None = all held).

    Args:
        path: The export.
        plus: Stages to load.
        parallel: This rank's tensor-parallel place.
        dtype: Weights' dtype; None = fp32 on CPU, as stored elsewhere, bf16 with `base_precision` fp8.
        device: Where to put it.
        kernels: See `generation.kernels`.
        base_precision: See `generation.base_precision`.
    """
    export = open_export(path)
    stages = export.plus if plus is None else tuple(plus)
    missing = [stage for stage in stages if stage not in export.plus]
    if missing:
        raise CheckpointError(f"{path} holds no attention-plus of stage {missing[0]}, only {list(export.plus)}")
    stored = export.tensor("final_layernorm.weight").dtype
    if base_precision == "fp8":
        check_device(torch.device(device))
        dtype = torch.bfloat16
    dtype = dtype or (torch.float32 if torch.device(device).type == "cpu" else stored)
    if dtype != stored:
        _logger.info("%s holds %s weights; they are cast to %s", path, _short(stored), _short(dtype))
    with torch.device("meta"):
        model = CogVideo(export.model, stages, parallel, kernels=kernels)
    model.requires_grad_(False).eval()
    if base_precision == "fp8":
        hold_in_fp8(model.layers)
    materialize(model, device, dtype)
    model.choose_kernels()
    load_tensors(model, export.tensor, [name for name, _ in model.named_parameters()])
    return model


def _short(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _shards(tensors: Mapping[str, Tensor | Deferred]) -> Iterator[list[str]]:
    names: list[str] = []
    size = 0
    for name, tensor in tensors.items():
        if names and size + tensor.nbytes > SHARD_BYTES:
            yield names
            names, size = [], 0
        names.append(name)
        size += tensor.nbytes
    yield names


def _manifest_text(manifest: Mapping[str, Any]) -> str:
    return _plain_text({**manifest, "crc32": _checksum(manifest)}) + "\n"


def _plain_text(manifest: Mapping[str, Any]) -> str:
    return json.dumps(manifest, indent=1, sort_keys=True)


def _checksum(manifest: Mapping[str, Any]) -> int:
    """Of a manifest's content, its own checksum left out."""
    return zlib.crc32(_plain_text({key: value for key, value in manifest.items() if key != "crc32"}).encode())


def _file_table(folder: Path) -> dict[str, dict[str, int | str]]:
    files = sorted(file for file in folder.rglob("*") if file.is_file())
    return {
        file.relative_to(folder).as_posix(): {"bytes": file.stat().st_size, "sha256": sha256_file(file)}
        for file in files
    }


def _check_file(file: Path, record: Mapping[str, int | str], verify: bool) -> None:
    if not file.is_file():
        raise CheckpointError(f"{file} is missing from the export; copy the whole folder again")
    if file.stat().st_size != record["bytes"]:
        size = file.stat().st_size
        raise CheckpointError(f"{file} has {size} bytes, its manifest says {record['bytes']}; copy it again")
    if verify and sha256_file(file) != record["sha256"]:
        raise CheckpointError(f"{file} differs from its checksum in the manifest; copy it again")
    if file.suffix == ".safetensors":
        try:
            with safe_open(file, framework="pt"):
                pass
        except SafetensorError as error:
            raise CheckpointError(f"{file} is damaged ({error}); copy it again") from error
