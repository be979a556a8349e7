"""Training from the original's weights: what starts where, and what stays as it was."""

from __future__ import annotations

import logging
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from sat_files import original_weights, sat_model, write_sat
from tiny_run import CAPTIONS, CODEBOOK, GRID, make_inputs, settings, write_config
from torch import Tensor

from megacog.checkpoint.digest import TensorDigest
from megacog.checkpoint.export import open_export
from megacog.config.schema import Config, ModelConfig
from megacog.errors import CheckpointError, ConfigError
from megacog.interop import main as convert
from megacog.model.transformer import CogVideo
from megacog.tokenizers import text
from megacog.tokenizers.text import TextTokenizer
from megacog.training import pretrain
from megacog.training.start import open_inherited, start_weights

LAYER, PLUS = "transformer.layers.1.attention", "plus.sequential.layers.1"


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_inputs(tmp_path_factory.mktemp("inputs"))


@pytest.fixture(scope="module")
def model(inputs: Path) -> ModelConfig:
    return sat_model(
        hidden_size=32, grid=GRID, text_length=24, text_positions=32, base_positions=50, image_vocab_size=CODEBOOK,
        text_vocab_size=96, boi_id=TextTokenizer.load(inputs / "text").boi_id,
    )  # fmt: skip


@pytest.fixture(scope="module")
def coglm(inputs: Path, model: ModelConfig, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """CogView2's base, imported without tokenizers."""
    folder = tmp_path_factory.mktemp("coglm")
    config = write_config(folder / "config.yaml", run_settings(inputs, model, folder, "base"))
    source = write_sat(folder / "coglm", model, "base", original_weights(model, "base", std=0.05))
    command = ["import-sat", source, "--out", folder / "export", "--config", config]
    assert convert.main([str(word) for word in command]) == 0
    return folder / "export"


def run_settings(inputs: Path, model: ModelConfig, folder: Path, stage: str, **train: Any) -> dict[str, Any]:
    values = settings(inputs, folder / "run", stage, engine="torch", eval_every=0, **({"steps": 2} | train))
    return values | {"model": model.model_dump(mode="json")}


def started(config: Config) -> dict[str, Tensor]:
    """The parameters at step 0."""
    model = CogVideo(config.model, (config.train.stage,))  # type: ignore[arg-type]
    start_weights(config, model, open_inherited(config))
    return {name: parameter.detach() for name, parameter in model.named_parameters()}


@pytest.mark.parametrize("dense", ["copy", "random"])
def test_a_new_set_starts_as_the_paper_or_the_released_code_says(
    inputs: Path, model: ModelConfig, coglm: Path, tmp_path: Path, dense: str
) -> None:
    values = run_settings(inputs, model, tmp_path, "sequential")
    values["model"] |= {"inherit": str(coglm), "plus_dense": dense}
    found = started(Config.model_validate(values))
    theirs = {key: tensor.float() for key, tensor in original_weights(model, "base", std=0.05).items()}
    for kind in ("weight", "bias"):
        assert torch.equal(found[f"{PLUS}.qkv.{kind}"], theirs[f"{LAYER}.query_key_value.{kind}"])
        copied = torch.equal(found[f"{PLUS}.dense.{kind}"], theirs[f"{LAYER}.dense.{kind}"])
        assert copied == (dense == "copy")
    if dense == "random":
        assert found[f"{PLUS}.dense.weight"].std() == pytest.approx(0.02, rel=0.1)
        assert not found[f"{PLUS}.dense.bias"].any()
    assert not found[f"{PLUS}.gate.logit"].any()
    frame = theirs["transformer.position_embeddings.weight"][32:48]
    positions = found["plus.sequential.position_embedding.weight"]
    assert positions.shape == (83, 32) and torch.equal(positions[:80], frame.repeat(5, 1))
    assert torch.equal(positions[80:], frame[:3])
    assert torch.equal(found["text_embedding.weight"], theirs["transformer.word_embeddings.weight"][CODEBOOK:])


def test_a_bf16_run_keeps_the_inherited_fp16_base_bitwise_and_tells_everything_in_one_table(
    inputs: Path, model: ModelConfig, coglm: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    values = run_settings(inputs, model, tmp_path, "sequential", precision="bf16")
    values["model"]["inherit"] = str(coglm)
    values["checkpoint"] = {"every": 1}
    config = str(write_config(tmp_path / "run.yaml", values))
    with caplog.at_level(logging.INFO, logger="megacog"):
        assert pretrain.main(["--config", config]) == 0
    assert "holds no text tokenizer" in caplog.text and "holds no frame tokenizer" in caplog.text
    before, after = open_export(coglm), open_export(tmp_path / "run/export", verify=True)
    assert len(before.files) == 2 * 16 + 5
    for name in before.files:
        assert after.tensor(name).dtype == torch.float16
        assert torch.equal(after.tensor(name), before.tensor(name)), name
    assert after.tensor(f"{PLUS}.qkv.weight").dtype == torch.bfloat16
    assert after.tokenizers == ("text_tokenizer", "frame_tokenizer")

    table = caplog.text[caplog.text.index("weights on this rank") :].splitlines()
    rows = {words[words.index(state) + 1]: words for words in map(str.split, table)
            for state in ("frozen", "trained") if state in words and words[0].isdigit()}  # fmt: skip
    total = TensorDigest()
    total.add("text_embedding.weight", before.tensor("text_embedding.weight"))
    digest = total.hexdigest()
    assert rows["text_embedding"] == [
        "1", "3,072", "float16", "->", "bfloat16", "frozen", "text_embedding", str(coglm), digest[:16]
    ]  # fmt: skip
    assert rows["layers.mlp"][:2] == ["8", "16,704"]
    assert rows["plus.sequential.layers"][:4] == ["10", "8,512", "bfloat16", "trained"]
    assert rows["plus.sequential.layers"][5:] == "base channel (qkv copied, dense copied)".split()

    # A resumed run has its own copy, and says the same.
    shutil.rmtree(tmp_path / "run/export")
    shutil.rmtree(tmp_path / "run/checkpoints/step-0000002")
    caplog.clear()
    with caplog.at_level(logging.INFO, logger="megacog"):
        with pytest.raises(CheckpointError, match="belongs to another run: model.inherit was .*"):
            pretrain.main(["--config", config, f"model.inherit={tmp_path}"])
        with pytest.raises(CheckpointError, match="another run: model.plus_dense was 'copy' and is 'random'"):
            pretrain.main(["--config", config, "model.plus_dense=random"])
        assert pretrain.main(["--config", config, "model.inherit=gone"]) == 0
    assert digest[:16] in caplog.text
    again = open_export(tmp_path / "run/export", verify=True)
    assert all(torch.equal(again.tensor(name), after.tensor(name)) for name in after.files)


def test_a_released_stage_is_trained_on_beside_the_idle_one(
    inputs: Path, model: ModelConfig, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    folders = [
        write_sat(tmp_path / stage, model, stage, original_weights(model, stage, std=0.05))  # type: ignore[arg-type]
        for stage in ("sequential", "interpolation")
    ]
    config = write_config(tmp_path / "config.yaml", run_settings(inputs, model, tmp_path, "base"))
    command = ["import-sat", *folders, "--out", tmp_path / "export", "--config", config,
               "--text-tokenizer", inputs / "text", "--frame-tokenizer", inputs / "frames"]  # fmt: skip
    assert convert.main([str(word) for word in command]) == 0
    values = run_settings(inputs, model, tmp_path, "sequential", steps=1)
    values["model"] |= {"inherit": str(tmp_path / "export"), "plus_from": "sequential"}
    theirs = original_weights(model, "sequential", std=0.05)
    key = "mixins.attention_plus.dense.1.weight"
    assert torch.equal(started(Config.model_validate(values))[f"{PLUS}.dense.weight"], theirs[key].float())
    with caplog.at_level(logging.INFO, logger="megacog"):
        assert pretrain.main(["--config", str(write_config(tmp_path / "run.yaml", values))]) == 0
    before, after = open_export(tmp_path / "export"), open_export(tmp_path / "run/export")
    for name in before.files:
        same = torch.equal(before.tensor(name).double(), after.tensor(name).double())
        assert same or name.startswith("plus.sequential"), name
    assert after.tensor("plus.interpolation.layers.0.qkv.bias").dtype == torch.float16
    assert "8,512  float16" in caplog.text and "idle" in caplog.text


def test_a_missing_tokenizer_is_named_where_one_is_needed(coglm: Path) -> None:
    command = f"add-tokenizers {coglm} --text-tokenizer FOLDER --frame-tokenizer FOLDER"
    with pytest.raises(CheckpointError, match=f"holds no text tokenizer and no frame tokenizer.*{command}"):
        _ = open_export(coglm).text_tokenizer


def test_a_text_tokenizer_of_other_weights_is_named_and_not_the_model_section(
    inputs: Path, model: ModelConfig, coglm: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(text, "SPECIAL_PIECES", text.SPECIAL_PIECES[::-1])
    text.train_text_tokenizer(CAPTIONS, tmp_path / "other", 96)
    other = TextTokenizer.load(tmp_path / "other").boi_id
    assert other != model.boi_id
    for boi_id in (model.boi_id, None):  # said in the model section, or left to the tokenizer
        values = run_settings(inputs, model, tmp_path, "sequential")
        values["model"] |= {"inherit": str(coglm), "boi_id": boi_id}
        values["tokenizer"] = values["tokenizer"] | {"text": str(tmp_path / "other")}
        with pytest.raises((ConfigError, CheckpointError)) as caught:
            pretrain.main(["--config", str(write_config(tmp_path / "run.yaml", values))])
        message = str(caught.value)
        assert f"<start_of_image> is piece {other} " in message and f" {model.boi_id}" in message
        assert re.search("[Ss]et tokenizer.text to the ", message)
        assert "leave" not in message and "model section" not in message
