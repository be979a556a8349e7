"""Checkpoint folders of SwissArmyTransformer, as CogView2 and CogVideo are released.

    <folder>/latest                                   the iteration, e.g. 27000 (or `release`)
    <folder>/model_config.json                        see settings.py; may be missing
    <folder>/<iteration>/mp_rank_XX_model_states.pt   a dict whose `module` is key -> tensor, one file per
                                                      model-parallel rank

What `convert.py export-safetensors` writes, `model.safetensors` in place of the rank files, is read as well.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from itertools import combinations
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from megacog.checkpoint.export import KIND
from megacog.errors import CheckpointError
from megacog.interop.keys import MIXINS, Entry, modern_key, name_problems, shape_problems
from megacog.interop.settings import FILE as SETTINGS
from megacog.interop.settings import read_settings
from megacog.interop.torch_files import NUMPY_ARRAYS, open_torch_file, require_no_stand_in
from megacog.runtime.tensor_files import Deferred

LATEST = "latest"
SAFETENSORS = "model.safetensors"
_RANK_FILE = re.compile(r"^mp_rank_(\d+)_model_states\.pt$")


def rank_file(rank: int) -> str:
    """File name of a model-parallel rank's weights."""
    return f"mp_rank_{rank:02d}_model_states.pt"


@dataclass(frozen=True)
class SatFolder:
    """What lies in a checkpoint folder."""

    path: Path
    iteration: int
    """0 where the folder does not say."""
    files: tuple[Path, ...]
    """One per model-parallel rank."""
    settings: dict[str, Any] | None
    """model_config.json."""


def find_checkpoint(path: Path) -> SatFolder:
    """The checkpoint in a folder; the folder of one iteration may be given as well.

    Raises:
        CheckpointError: Something else is there, or a file is missing.
    """
    _require_folder(path)
    settings = read_settings(path)
    if (path / SAFETENSORS).is_file():
        return SatFolder(path, _iteration(path.name), (path / SAFETENSORS,), settings)
    folder = path / _latest(path) if (path / LATEST).is_file() else path
    found = {int(match[1]): file for file in _entries(folder) if (match := _RANK_FILE.match(file.name))}
    if not found:
        raise CheckpointError(f"{folder} holds no {rank_file(0)}; {_what_else(path)}")
    said = (settings or {}).get("model_parallel_size")
    ranks = max(max(found) + 1, said if isinstance(said, int) else 1)
    missing = [rank_file(rank) for rank in range(ranks) if rank not in found]
    if missing:
        raise CheckpointError(
            f"{folder} lacks {', '.join(missing)} of {ranks} model-parallel ranks; download or copy what is missing"
        )
    return SatFolder(path, _iteration(folder.name), tuple(found[rank] for rank in range(ranks)), settings)


def settings_above(folder: SatFolder) -> str:
    """The end of a message where settings are missing: they lie above the folder of one iteration, if it was given."""
    above = folder.path.absolute().parent
    if folder.settings is not None or not (above / SETTINGS).is_file():
        return ""
    return f". {folder.path} is the folder of one iteration; give its parent {above}, which holds {SETTINGS}"


class SatTensors:
    """The weights of a checkpoint, whole, read from mapped files when asked for.

    Args:
        folder: As `find_checkpoint` gives.

    Raises:
        CheckpointError: A file is damaged, or no file of weights.
    """

    def __init__(self, folder: SatFolder) -> None:
        self.folder = folder
        self._ranks = [_weights(file) for file in folder.files]
        self.keys = frozenset(self._ranks[0])

    @property
    def path(self) -> Path:
        return self.folder.path

    @property
    def has_plus(self) -> bool:
        """Whether an attention-plus is there besides the base."""
        return any(key.startswith(MIXINS) for key in self.keys)

    def check(self, entries: Mapping[str, Entry]) -> None:
        """Compare names, shapes and ranks with what the model has.

        Raises:
            CheckpointError: Lists everything that differs.
        """
        for file, rank in zip(self.folder.files, self._ranks, strict=True):
            problems = name_problems(rank, entries)
            if problems:
                raise _differs(file, problems, "The model that is expected differs, or the file is another one")
        self._require_all_ranks(entries)
        self._require_no_copy(entries)
        whole = {key: self._whole_shape(entry) for key, entry in entries.items()}
        problems = shape_problems(whole, entries) + self._rank_problems(entries)
        if problems:
            raise _differs(self.path, problems, "Give --config for a model of these shapes, or other files")

    def whole(self, entry: Entry) -> Tensor:
        """A whole tensor in its own dtype; a view of the mapped file where one rank holds it."""
        parts = [rank[entry.key] for rank in self._ranks]
        return parts[0] if len(parts) == 1 or entry.shard is None else entry.shard.gather(parts)

    def deferred(self, entry: Entry, name: str) -> Deferred:
        """Our parameter `name`, read when it is written."""
        rows = entry.part(name)
        shape = (rows.stop - rows.start, *entry.shape[1:])
        return Deferred(self._ranks[0][entry.key].dtype, shape, lambda: self.whole(entry)[rows])

    def _whole_shape(self, entry: Entry) -> tuple[int, ...]:
        shape = list(self._ranks[0][entry.key].shape)
        if entry.shard is not None and len(shape) > entry.shard.dim:
            shape[entry.shard.dim] = sum(rank[entry.key].shape[entry.shard.dim] for rank in self._ranks)
        return tuple(shape)

    def _require_all_ranks(self, entries: Mapping[str, Entry]) -> None:
        """A file without its fellows has a part of every tensor: said once, not for every tensor."""
        cut = [entry for entry in entries.values() if entry.shard is not None]
        sizes = set()
        for entry in cut:
            assert entry.shard is not None
            shape = self._ranks[0][entry.key].shape
            local = shape[entry.shard.dim] if len(shape) > entry.shard.dim else 0
            sizes.add(entry.shard.length / local if local else 0)
        held = len(self._ranks)
        size = sizes.pop() if len(sizes) == 1 else held
        if size > held and size == int(size):
            missing = ", ".join(rank_file(rank) for rank in range(held, int(size)))
            raise CheckpointError(
                f"{self.path}: each file holds 1/{int(size)} of every tensor, so {missing} of {int(size)} "
                "model-parallel ranks are missing; copy them beside the others"
            )

    def _require_no_copy(self, entries: Mapping[str, Entry]) -> None:
        """A file that was copied over another rank's holds the same part of everything that ranks share out."""
        cut = [entry.key for entry in entries.values() if entry.shard is not None]
        files = list(zip(self.folder.files, self._ranks, strict=True))
        for (first, ours), (second, theirs) in combinations(files, 2):
            # Single parts may be equal, such as biases that are 0. Small ones first: most pairs end there.
            if all(same_bits(ours[key], theirs[key]) for key in sorted(cut, key=lambda key: ours[key].numel())):
                raise CheckpointError(
                    f"{first} and {second} hold the same part of every tensor, so one is a copy of the other; copy or "
                    "download both again"
                )

    def _rank_problems(self, entries: Mapping[str, Entry]) -> list[str]:
        first, problems = self._ranks[0], []
        for number, rank in enumerate(self._ranks[1:], start=1):
            for key, entry in entries.items():
                if rank[key].dtype != first[key].dtype:
                    problems.append(f"{key} is {first[key].dtype} in rank 0 and {rank[key].dtype} in rank {number}")
                elif entry.shard is not None and rank[key].shape != first[key].shape:
                    shapes = f"{list(first[key].shape)} in rank 0 and {list(rank[key].shape)}"
                    problems.append(f"{key} is {shapes} in rank {number}, expected equal parts")
                elif entry.shard is None and not same_bits(rank[key], first[key]):
                    problems.append(f"{key} differs between ranks 0 and {number}, which hold it whole")
        return problems


def same_bits(one: Tensor, other: Tensor) -> bool:
    """Whether dtype, shape and every bit are equal; NaN equals itself."""
    if one.dtype != other.dtype or one.shape != other.shape:
        return False
    flat = (tensor.contiguous().reshape(-1).view(torch.uint8) for tensor in (one, other))
    return torch.equal(*flat)


def _weights(file: Path) -> dict[str, Tensor]:
    module = _safetensors(file) if file.suffix == ".safetensors" else _module(file)
    tensors: dict[str, Tensor] = {}
    for key, tensor in module.items():
        if not isinstance(tensor, Tensor) or not tensor.is_floating_point():
            raise CheckpointError(f"{file}: {key} is no tensor of weights; is it another model's file?")
        name = modern_key(key)
        if name in tensors:
            raise CheckpointError(f"{file} holds {name} twice, under an old and a new name; remove one of them")
        tensors[name] = tensor
    return tensors


def _module(file: Path) -> Mapping[str, Any]:
    content = open_torch_file(file, allow=NUMPY_ARRAYS)
    module = content.get("module")
    if not isinstance(module, Mapping):
        raise CheckpointError(f"{file} has no `module` with weights, only {sorted(content)}; is it another program's?")
    return module


def _safetensors(file: Path) -> Mapping[str, Tensor]:
    try:
        return load_file(file)
    except SafetensorError as error:
        raise CheckpointError(f"{file} is truncated or damaged ({error}); copy it again") from error


def _require_folder(path: Path) -> None:
    if path.is_dir():
        return
    if not path.exists():
        raise CheckpointError(f"{path} does not exist; give the folder of a checkpoint, which holds `{LATEST}`")
    head = require_no_stand_in(path, "the folder of a checkpoint")
    if head.startswith(b"PK") and path.suffix != ".pt":
        raise CheckpointError(f"{path} is a zip archive still packed; unzip it and give the folder that it makes")
    raise CheckpointError(f"{path} is a file; give the folder of the checkpoint, which holds `{LATEST}`")


def _what_else(path: Path) -> str:
    """What a folder without weights is, as far as can be told, and what to do."""
    if (path / KIND.file).is_file() and (path / "config.yaml").is_file():
        return "it is a megacog export already and needs no import"
    entries = _entries(path)
    packed = [entry.name for entry in entries if entry.suffix == ".zip"]
    if packed:
        return f"it holds {packed[0]}, still packed: unzip it and give the folder that it makes"
    inside = [str(entry) for entry in entries if (entry / LATEST).is_file()]
    if inside:
        return f"checkpoints lie inside; give {' and '.join(inside)}"
    return f"a checkpoint has a file `{LATEST}` and a folder of that name with {rank_file(0)}"


def _latest(path: Path) -> str:
    name = (path / LATEST).read_text(encoding="utf-8", errors="replace").strip()
    if not re.fullmatch(r"\w{1,40}", name):
        raise CheckpointError(f"{path / LATEST} names no iteration, it says {name[:40]!r}; copy it again")
    if not (path / name).is_dir():
        raise CheckpointError(f"{path / LATEST} says {name}, but there is no folder {path / name}; copy it again")
    return name


def _iteration(name: str) -> int:
    return int(name) if name.isdigit() else 0


def _entries(folder: Path) -> list[Path]:
    return sorted(folder.iterdir())


def _differs(path: Path, problems: list[str], remedy: str) -> CheckpointError:
    head = f"{path} does not hold what the model has ({len(problems)} differences). {remedy}."
    return CheckpointError("\n  ".join([head, *problems]))
