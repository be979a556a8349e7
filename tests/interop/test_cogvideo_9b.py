"""The released model, on the meta device: every parameter is counted, every tensor has its place.

cogvideo_keys.tsv has the keys of the released checkpoints, {layer} standing for 0..47, with their shapes and the
checkpoints that have them.
"""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from megacog.config.load import load_config
from megacog.config.schema import Config, Stage
from megacog.interop.keys import modern_key, original_entries, original_key
from megacog.model.transformer import CogVideo

HERE = Path(__file__).parent
CHECKPOINTS: dict[str, Stage] = {
    "coglm": "base", "cogvideo-stage1": "sequential", "cogvideo-stage2": "interpolation"
}  # fmt: skip
TENSORS = {"coglm": 772, "cogvideo-stage1": 1013, "cogvideo-stage2": 1013}


@pytest.fixture(scope="module")
def config() -> Config:
    return load_config(HERE.parents[1] / "configs" / "cogvideo-9b.yaml")


@pytest.fixture(scope="module")
def model(config: Config) -> CogVideo:
    with torch.device("meta"):
        return CogVideo(config.model, ("sequential", "interpolation"))


def released(checkpoint: str) -> dict[str, tuple[int, ...]]:
    """Every key of a released checkpoint with its shape."""
    found = {}
    for line in (HERE / "cogvideo_keys.tsv").read_text().splitlines()[1:]:
        key, shape, checkpoints, times = line.split("\t")
        if checkpoint in checkpoints.split():
            for layer in range(int(times)):
                found[key.replace("{layer}", str(layer))] = tuple(int(side) for side in shape.split("x"))
    return found


def count(model: torch.nn.Module) -> int:
    return sum(parameter.numel() for parameter in model.parameters())


def test_parameters_are_those_of_the_release(model: CogVideo) -> None:
    assert model.code_embedding.weight.numel() + model.text_embedding.weight.numel() == 460_830_720
    assert count(model.position_embedding) == 3_145_728
    assert count(model.layers[17]) == 113_298_432
    plus = model.plus["sequential"]
    assert count(plus) == count(model.plus["interpolation"]) == 1_818_820_608
    layer = model.plus_of("sequential").layers[3]  # type: ignore[union-attr]
    assert (count(layer.qkv), count(layer.dense), count(layer.gate)) == (28_320_768, 9_440_256, 3_072)
    assert count(layer) == 37_764_096
    assert count(model) - 2 * count(plus) == 5_902_307_328
    assert count(model) - count(plus) == 7_721_127_936
    assert count(model) == 9_539_948_544


@pytest.mark.parametrize("checkpoint", CHECKPOINTS)
def test_every_tensor_of_the_release_has_exactly_one_place_and_back(
    config: Config, model: CogVideo, checkpoint: str
) -> None:
    stage, theirs = CHECKPOINTS[checkpoint], released(checkpoint)
    assert len(theirs) == TENSORS[checkpoint]
    entries = original_entries(config.model, stage)
    assert {key: entry.shape for key, entry in entries.items()} == theirs
    other = "interpolation" if stage == "sequential" else "sequential"
    parameters = {
        name: parameter for name, parameter in model.named_parameters()
        if not name.startswith("plus." if stage == "base" else f"plus.{other}.")
    }  # fmt: skip
    names = [name for entry in entries.values() for name in entry.names]
    assert sorted(names) == sorted(parameters), "each of ours is in one of theirs, none left over"
    for key, entry in entries.items():
        assert [original_key(name) for name in entry.names] == [key] * len(entry.names)
        assert modern_key(key) == key
        for name, rows in zip(entry.names, entry.rows, strict=True):
            assert parameters[name].shape == (rows, *theirs[key][1:])
    assert sum(theirs_.numel() for theirs_ in parameters.values()) == sum(
        torch.Size(shape).numel() for shape in theirs.values()
    )


def test_training_follows_the_release(config: Config) -> None:
    train = config.train
    assert (train.global_batch_size, train.micro_batch_size, train.steps, train.warmup_steps) == (416, 4, 500_000, 500)
    assert (train.learning_rate, train.min_learning_rate_ratio, train.weight_decay) == (2e-4, 0.1, 1e-4)
    assert (train.betas, train.eps, train.gradient_clip, train.zero_stage) == ((0.9, 0.95), 1e-8, 0.1, 2)
    assert train.activation_checkpointing == "selective" and config.model.inherit and config.model.plus_dense == "copy"
    # icetk has 130000 pieces, to which start_of_image is appended; ids count from the first code.
    assert config.model.image_vocab_size + config.model.boi_id == 150_000  # type: ignore[operator]
