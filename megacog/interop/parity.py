"""Parity: what a tensor file of the original says, computed with our model.

A parity file (safetensors) holds the original's inputs (`in.*`), perhaps its weights (`model.<key>`), and what it
computed from them in fp32: logits of every n-th position (`out.logits`), the loss (`out.image_loss`) and gradients
of it (`grad.<key>`). Its metadata says the stage, the window and the sizes.

Legend: B batch, L text length, T frames, P cells of a frame, S = L + T * P, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from megacog.checkpoint.export import Export, load_tensors
from megacog.config.schema import AttentionConfig, ModelConfig, PlusStage
from megacog.errors import CheckpointError, DataError
from megacog.interop.keys import Entry, name_problems, original_entries, original_key, shape_problems
from megacog.interop.plain import Inputs
from megacog.interop.settings import STAGE_NUMBERS, window_space
from megacog.model.transformer import CogVideo
from megacog.parallel.tensor import materialize

LOGITS, LOSS, GRADIENT, MODEL = "out.logits", "out.image_loss", "grad.", "model."
_INPUTS = ("in.text", "in.text_mask", "in.frames", "in.tokens", "in.labels", "in.position_ids")
_NUMBERS = (
    "stage", "window", "layers", "hidden", "heads", "vocab", "num_image_tokens", "boi", "frame_side", "frames",
    "text_len", "logits_stride",
)  # fmt: skip


@dataclass(frozen=True)
class Difference:
    """How far one tensor of ours is from the file's."""

    name: str
    max_abs: float
    """max |ours - theirs|."""
    relative: float
    """max |ours - theirs| / max |theirs|."""


class ParityFile:
    """An opened parity file; tensors are read when asked for.

    Raises:
        DataError: It is no safetensors file, or lacks metadata or inputs.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            self._file = safe_open(path, framework="pt")
        except (OSError, SafetensorError) as error:
            raise DataError(f"{path} cannot be read as safetensors ({error}); copy it again") from error
        self.metadata: dict[str, str] = self._file.metadata() or {}
        self.names = frozenset(self._file.keys())
        self._numbers = {key: self._number(key) for key in _NUMBERS}
        missing = [name for name in _INPUTS if name not in self.names]
        if missing:
            raise DataError(f"{path} lacks {', '.join(missing)}; it is no parity file")
        if self["stage"] not in STAGE_NUMBERS:
            raise DataError(f"{path}: stage is {self['stage']}, expected 1 or 2")
        self.stage: PlusStage = STAGE_NUMBERS[self["stage"]]

    def __getitem__(self, key: str) -> int:
        """A number of the metadata."""
        return self._numbers[key]

    def tensor(self, name: str) -> Tensor:
        return self._file.get_tensor(name)

    @property
    def inputs(self) -> Inputs:
        """What the original was fed with, checked to be what our model derives from text and frames.

        Raises:
            DataError: Tokens, labels, positions or padding are others.
        """
        text_BL, valid_BL = self.tensor("in.text").long(), self.tensor("in.text_mask").bool()
        inputs = Inputs(text_BL, valid_BL, self.tensor("in.frames").long())
        if (valid_BL[:, 1:] < valid_BL[:, :-1]).any():
            raise DataError(f"{self.path}: in.text is not padded on the left, which is what the model takes")
        codes = self["num_image_tokens"]
        if text_BL.min() < codes or text_BL.max() >= self["vocab"]:
            raise DataError(f"{self.path}: in.text has ids outside {codes}..{self['vocab'] - 1}, the text pieces")
        derived = {
            "in.tokens": inputs.tokens(self["boi"]), "in.labels": inputs.labels(self["boi"]),
            "in.position_ids": inputs.positions(self.first_position),
        }  # fmt: skip
        for name, tensor in derived.items():
            if not torch.equal(tensor, self.tensor(name).long()):
                raise DataError(f"{self.path}: {name} is not what follows from in.text and in.frames")
        return inputs

    @property
    def first_position(self) -> int:
        """Position id of frame 0's first cell."""
        return int(self.tensor("in.position_ids")[0, self["text_len"]])

    @property
    def wanted(self) -> list[str]:
        """Names of the results that are in the file."""
        return sorted(name for name in self.names if name in (LOGITS, LOSS) or name.startswith(GRADIENT))

    @property
    def read_rows(self) -> Tensor:
        """Rows of out.logits that mean something: bool [B, rows].

        Those of a text that is all padding do not: nothing reads them, and the original fills them with the mean over
        all positions.
        """
        valid_BL = self.tensor("in.text_mask").bool()
        positions = torch.arange(0, self.tensor("in.tokens").shape[1], self["logits_stride"])
        return valid_BL.any(1)[:, None] | (positions >= self["text_len"])

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Shape of every `model.*` tensor, by the original's key."""
        names = [name for name in self.names if name.startswith(MODEL)]
        return {name.removeprefix(MODEL): tuple(self._file.get_slice(name).get_shape()) for name in names}

    def _number(self, key: str) -> int:
        try:
            return int(self.metadata[key])
        except (KeyError, ValueError) as error:
            found = self.metadata.get(key)
            raise DataError(f"{self.path}: metadata {key} is {found!r}, expected a number; no parity file?") from error


def parity_model(file: ParityFile, export: Export | None) -> ModelConfig:
    """The model of a parity file, with the rest taken from an export, or from the shapes of the file's weights.

    Raises:
        CheckpointError: The export is of another shape.
        DataError: The file holds no weights and there is no export, or they do not fit its metadata.
    """
    said = {
        "num_layers": file["layers"], "hidden_size": file["hidden"], "num_heads": file["heads"],
        "grid": (file["frame_side"],) * 2, "num_frames": file["frames"], "image_vocab_size": file["num_image_tokens"],
        "text_vocab_size": file["vocab"] - file["num_image_tokens"], "boi_id": file["boi"] - file["num_image_tokens"],
        "text_positions": file.first_position,
    }  # fmt: skip
    run = {"text_length": file["text_len"], "attention": AttentionConfig(**{file.stage: window_space(file["window"])})}
    if export is not None:
        differences = [
            f"{key} is {value} in the file and {getattr(export.model, key)} there"
            for key, value in said.items()
            if getattr(export.model, key) != value
        ]
        if differences:
            raise CheckpointError(f"{export.path} does not fit {file.path}: {'; '.join(differences)}")
        return export.model.model_copy(update=run)
    shapes = file.shapes()
    if not shapes:
        raise DataError(f"{file.path} holds no model.* weights; give --export for those to compute with")
    tables = {
        "base_positions": "transformer.position_embeddings.weight",
        "plus_positions": original_key("plus.sequential.position_embedding.weight"),
        "ffn_size": original_key("layers.0.mlp.up.weight"),
    }
    rows = {key: shapes[name][0] for key, name in tables.items() if name in shapes}
    eps = float(file.metadata.get("layernorm_eps", 1e-5))
    model = ModelConfig(**said, **run, **rows, layernorm_eps=eps)  # type: ignore[arg-type]
    entries = original_entries(model, file.stage)
    problems = name_problems(shapes, entries) or shape_problems(shapes, entries)
    if problems:
        raise DataError(f"{file.path}: its weights do not fit its metadata:\n  " + "\n  ".join(problems))
    return model


def build(file: ParityFile, export: Export | None) -> CogVideo:
    """Our model in fp32 on the CPU with the export's weights, or the file's."""
    config = parity_model(file, export)
    if export is not None and file.stage not in export.plus:
        raise CheckpointError(f"{export.path} holds no attention-plus of stage {file.stage}, only {list(export.plus)}")
    with torch.device("meta"):
        model = CogVideo(config, (file.stage,))
    materialize(model, "cpu", torch.float32).requires_grad_(False).eval()
    read = export.tensor if export is not None else _file_weights(file, original_entries(config, file.stage))
    load_tensors(model, read, [name for name, _ in model.named_parameters()])
    return model


def compute(file: ParityFile, model: CogVideo, wanted: list[str]) -> dict[str, Tensor]:
    """Our numbers for results of the file; fp32. One sample at a time, to need the memory of one.

    Raises:
        DataError: A gradient is asked for that this stage does not have.
    """
    inputs, stage = file.inputs, file.stage
    gradients = _parameters_of(file, model, wanted)
    text_BL = inputs.text_BL - model.config.image_vocab_size
    logits, losses = [], []
    batch = len(text_BL)
    for b in range(batch):
        sample = (text_BL[b : b + 1], inputs.valid_BL[b : b + 1], inputs.frames_BTP[b : b + 1])
        if LOGITS in wanted:
            with torch.no_grad():
                logits.append(model.logits(*sample, stage, positions=slice(None, None, file["logits_stride"])))
        if LOSS in wanted or gradients:
            loss = model(*sample, stage).loss / batch  # every sample has as many predicted codes
            losses.append(loss.detach())
            if gradients:
                loss.backward()
    results = {name: parameter.grad for name, parameter in gradients.items() if parameter.grad is not None}
    if LOGITS in wanted:
        results[LOGITS] = torch.cat(logits)
    if LOSS in wanted:
        results[LOSS] = torch.stack(losses).sum()[None]
    return results


def compare(ours: Mapping[str, Tensor], file: ParityFile) -> list[Difference]:
    """The difference of every tensor of ours from the file's of that name; of logits, in rows that mean something.

    Raises:
        DataError: Shapes differ.
    """
    rows = []
    for name, tensor in sorted(ours.items()):
        other = file.tensor(name).float()
        if other.shape != tensor.shape:
            raise DataError(f"{name} is {list(other.shape)} in the file and {list(tensor.shape)} of ours")
        if name == LOGITS:
            tensor, other = tensor[file.read_rows], other[file.read_rows]
        rows.append(difference(name, tensor, other))
    return rows


def difference(name: str, ours: Tensor, theirs: Tensor) -> Difference:
    """Absolute and relative difference of two tensors; the relative one of equal zeros is 0."""
    most = float((ours - theirs).abs().max())
    scale = float(theirs.abs().max())
    return Difference(name, most, most / scale if scale else (0.0 if most == 0 else float("inf")))


def _parameters_of(file: ParityFile, model: CogVideo, wanted: list[str]) -> dict[str, torch.nn.Parameter]:
    """Our parameter of every `grad.<key>` that is wanted, made to take gradients."""
    parameters = dict(model.named_parameters())
    trained = {original_key(name): name for name in parameters if name.startswith("plus.")}
    found: dict[str, torch.nn.Parameter] = {}
    for name in wanted:
        if not name.startswith(GRADIENT):
            continue
        key = name.removeprefix(GRADIENT)
        if key not in trained:
            problem = name_problems([key], trained)[0]
            raise DataError(f"{file.path}: {name} is no gradient of this stage's trained weights: {problem}")
        found[name] = parameters[trained[key]]
        found[name].requires_grad_()
    return found


def _file_weights(file: ParityFile, entries: Mapping[str, Entry]) -> Callable[[str], Tensor]:
    def read(name: str) -> Tensor:
        entry = entries[original_key(name)]
        return file.tensor(MODEL + entry.key)[entry.part(name)]

    return read
