"""Parity with the original: its own tensor file, and files that a plain step-by-step model writes."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from parity_files import parity_model, small_parity_file
from safetensors import safe_open
from safetensors.torch import load_file
from sat_files import original_weights, write_sat

from megacog.config.schema import PlusStage
from megacog.errors import CheckpointError, ConfigError, DataError
from megacog.interop import main as convert
from megacog.interop.parity_writing import write_parity_file
from megacog.interop.plain import Inputs, plain_logits, plain_loss
from megacog.interop.plain import plus_mask as plain_mask
from megacog.model.layout import layer_space
from megacog.runtime.tensor_files import save_tensors
from megacog_kernels.grid import MaskSpec, Order, VideoGrid, dense_mask

ORIGINAL = Path(__file__).parents[1] / "parity" / "sequential_full.safetensors"
CASES: dict[str, tuple[PlusStage, int, dict[str, Any], tuple[int, ...]]] = {
    "interpolation in windows": ("interpolation", 4, {}, (0, 4)),
    "interpolation in windows that do not divide the grid": ("interpolation", 5, {"num_layers": 3}, (9,)),
    "interpolation without windows": ("interpolation", -1, {}, (1,)),
    "sequential in windows": ("sequential", 4, {}, (3, 0)),
    "sequential without windows, one head": ("sequential", -1, {"num_heads": 1}, (0,)),
    "another width, inner width, many heads": (
        "sequential", -1, {"hidden_size": 40, "num_heads": 8, "ffn_size": 56, "num_layers": 1}, (2, 5, 9)
    ),
    "a text that is all padding": ("sequential", -1, {}, (10, 0)),
    "a text that is all padding, in windows": ("interpolation", 4, {}, (2, 10)),
    "seven frames of 6 x 6, long text": (
        "interpolation", 3, {"num_frames": 7, "grid": (6, 6), "text_length": 33, "layernorm_eps": 1e-3}, (30, 0)
    ),
}  # fmt: skip


def parity(capsys: pytest.CaptureFixture[str], *arguments: object) -> tuple[int, dict[str, Any]]:
    capsys.readouterr()
    code = convert.main(["parity", *map(str, arguments), "--json"])
    return code, json.loads(capsys.readouterr().out)


def assert_close(report: dict[str, Any]) -> None:
    assert report["passed"] and len(report["tensors"]) == 6
    for name, row in report["tensors"].items():
        assert row["relative"] <= (1e-5 if name == "out.image_loss" else 1e-4), name


@pytest.mark.parametrize(("window", "side"), [(3, 12), (5, 10), (10, 20)])
def test_windows_are_those_of_a_rolled_and_partitioned_frame(window: int, side: int) -> None:
    """As a Swin layer makes them: roll, cut into windows, and keep what wrapped around apart."""
    model = parity_model(window, "interpolation", grid=(side, side), base_positions=1000, plus_positions=1600)
    roll = window // 2
    rolled = (torch.arange(side) - roll) % side
    wrapped = torch.arange(side) < roll
    block = rolled // window * 2 + wrapped
    same = (block[:, None] == block[None]).flatten()
    both = (same[:, None] & same[None]).view(side, side, side, side).permute(0, 2, 1, 3).reshape(side**2, side**2)
    grid = VideoGrid(1, side, side)
    space = layer_space(model.attention.interpolation, 1)
    ours = dense_mask(MaskSpec(Order((0,), (True,)), space), grid)
    assert torch.equal(torch.from_numpy(ours.copy()), both)
    assert torch.equal(plain_mask(model, "interpolation", 1, 1) > 0, both)



def test_our_model_computes_what_the_original_computed(capsys: pytest.CaptureFixture[str]) -> None:
    code, report = parity(capsys, ORIGINAL)
    assert code == 0 and report["stage"] == "sequential"
    assert_close(report)


def test_the_plain_model_computes_what_the_original_computed() -> None:
    tensors = load_file(ORIGINAL)
    model = parity_model(
        hidden_size=48, grid=(20, 20), text_length=64, image_vocab_size=200, text_vocab_size=56, boi_id=54,
        base_positions=1024, plus_positions=2000,
    )  # fmt: skip
    inputs = Inputs(tensors["in.text"], tensors["in.text_mask"].bool(), tensors["in.frames"])
    assert torch.equal(inputs.tokens(254), tensors["in.tokens"])
    assert torch.equal(inputs.labels(254), tensors["in.labels"])
    assert torch.equal(inputs.positions(512), tensors["in.position_ids"])
    with torch.no_grad():
        logits = plain_logits(lambda key: tensors[f"model.{key}"], model, "sequential", inputs)
        loss = plain_loss(logits, model, "sequential", inputs)
    torch.testing.assert_close(logits[:, ::7], tensors["out.logits"], rtol=0, atol=2e-5)
    torch.testing.assert_close(loss[None], tensors["out.image_loss"], rtol=1e-6, atol=0)


@pytest.mark.parametrize("case", CASES)
def test_our_model_agrees_with_the_plain_one(tmp_path: Path, capsys: pytest.CaptureFixture[str], case: str) -> None:
    stage, window, changes, padding = CASES[case]
    path = small_parity_file(tmp_path / "x.safetensors", parity_model(window, stage, **changes), stage, padding)
    code, report = parity(capsys, path)
    assert code == 0 and report["stage"] == stage
    assert_close(report)


def test_rows_of_a_text_that_is_all_padding_are_left_out_and_no_others(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = small_parity_file(tmp_path / "x.safetensors", parity_model(), "sequential", (10, 0))
    with safe_open(path, framework="pt") as file:
        metadata, tensors = file.metadata(), {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    # Positions 0 and 7 are text, 14 is frame 0.
    for place, code in (((0, 1), 0), ((0, 2), 1), ((1, 1), 1)):
        logits = tensors["out.logits"].clone()
        logits[place] += 1
        save_tensors(tensors | {"out.logits": logits}, tmp_path / "y.safetensors", metadata)
        assert parity(capsys, tmp_path / "y.safetensors")[0] == code


def test_a_parity_file_of_any_size_comes_from_a_configuration(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_config(tmp_path / "c.yaml", parity_model(4, "interpolation"))
    path = tmp_path / "made.safetensors"
    make = ["parity-file", "--config", str(tmp_path / "c.yaml"), "--out", str(path)]
    with pytest.raises(ConfigError, match="give --stage sequential or --stage interpolation"):
        convert.main(make)
    changes = ["--set", "model.num_layers=3", "--set", "model.hidden_size=48", "--padding", "3", "0", "9"]
    assert convert.main([*make, "--stage", "interpolation", *changes]) == 0
    assert "made.safetensors: interpolation," in capsys.readouterr().out
    with safe_open(path, framework="pt") as file:
        said = file.metadata()
        assert file.get_slice("out.logits").get_shape() == [3, 48, 44]  # every 7th of 330 positions
    assert (said["layers"], said["hidden"], said["window"], said["stage"]) == ("3", "48", "4", "2")
    code, report = parity(capsys, path)
    assert code == 0
    assert_close(report)


def test_what_the_parity_format_cannot_say_is_refused(tmp_path: Path) -> None:
    out = tmp_path / "x.safetensors"
    for model, padding, message in (
        (parity_model(grid=(4, 8)), (0,), r"square frames.* has grid \[4, 8\]"),
        (parity_model(attention={"sequential": {"kind": "local3d", "window": (3, 3)}}), (0,), "sequential local3d"),
        (parity_model(boi_id=None), (0,), "boi_id None"),
        (parity_model(), (0, 11), r"padding \[0, 11\] must be numbers from 0 to model.text_length 10"),
    ):
        with pytest.raises(ConfigError, match=message):
            write_parity_file(out, model, "sequential", padding)
    assert not list(tmp_path.iterdir())


def test_a_wrong_number_is_found_and_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = small_parity_file(tmp_path / "x.safetensors", parity_model(4, "interpolation"), "interpolation")
    with safe_open(path, framework="pt") as file:
        metadata, tensors = file.metadata(), {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    gradient = "grad.mixins.attention_plus.dense.1.weight"
    weight = "model.mixins.attention_plus.attn_distribution.1"
    for changed, found in ((gradient, gradient), (weight, "out.logits"), ("out.image_loss", "out.image_loss")):
        value = tensors[changed] + 0.1 * tensors[changed].abs().max()
        save_tensors(tensors | {changed: value}, tmp_path / "y.safetensors", metadata)
        code, report = parity(capsys, tmp_path / "y.safetensors")
        failed = {name for name, row in report["tensors"].items() if row["relative"] > 1e-4}
        assert code == 1 and not report["passed"] and found in failed
        assert failed == {changed} or changed == weight
    save_tensors(tensors, tmp_path / "z.safetensors", metadata | {"window": "-1"})
    assert parity(capsys, tmp_path / "z.safetensors")[0] == 1
    assert convert.main(["parity", str(tmp_path / "z.safetensors"), "--tolerance", "1e3"]) == 0
    assert "relative" in capsys.readouterr().out


def test_weights_may_come_from_an_export_and_results_are_written_under_the_same_names(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = parity_model(4, "interpolation")
    weights = original_weights(model, "interpolation", dtype=torch.float32, std=0.1)
    write_sat(tmp_path / "sat", model, "interpolation", weights, settings=False)
    config = tmp_path / "c.yaml"
    write_config(config, model)
    export = tmp_path / "export"
    arguments = ["import-sat", tmp_path / "sat", "--out", export, "--config", config, "--stages", "interpolation"]
    assert convert.main([str(argument) for argument in arguments]) == 0
    path = tmp_path / "x.safetensors"
    assert convert.main(["parity-file", "--export", str(export), "--padding", "0", "3", "--out", str(path)]) == 0
    assert not any(name.startswith("model.") for name in load_file(path))
    with pytest.raises(DataError, match="holds no model.* weights; give --export"):
        parity(capsys, path)
    out = tmp_path / "out.safetensors"
    code, report = parity(capsys, path, "--export", export, "--write", out)
    assert code == 0
    assert_close(report)
    theirs, ours = load_file(path), load_file(out)
    assert ours.keys() == {name for name in theirs if name.startswith(("out.", "grad."))}
    assert all(torch.allclose(ours[name], theirs[name], atol=1e-4) for name in ours)
    other = small_parity_file(tmp_path / "y.safetensors", parity_model(num_heads=2), "sequential")
    with pytest.raises(CheckpointError, match="num_heads is 2 in the file and 4 there"):
        parity(capsys, other, "--export", export)
    other = small_parity_file(tmp_path / "z.safetensors", parity_model(), "sequential")
    with pytest.raises(CheckpointError, match="no attention-plus of stage sequential"):
        parity(capsys, other, "--export", export)


def write_config(path: Path, model: Any) -> None:
    train = {"stage": "base", "run_dir": "run", "steps": 1, "global_batch_size": 1, "micro_batch_size": 1}
    sections = {"model": model.model_dump(mode="json"), "tokenizer": {"text": "t", "frames": "f"}, "train": train}
    path.write_text(json.dumps(sections))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"in.tokens": None}, "lacks in.tokens"),
        ({"in.tokens": torch.zeros(2, 330, dtype=torch.int64)}, "in.tokens is not what follows"),
        ({"in.text_mask": torch.eye(10)[:2]}, "not padded on the left"),
        ({"in.text": torch.zeros(2, 10, dtype=torch.int64)}, "ids outside 30..43"),
        ({"model.transformer.final_layernorm.bias": None}, "missing key transformer.final_layernorm.bias"),
        ({"model.transformer.final_layernorm.bias": torch.zeros(3)}, r"final_layernorm.bias is \[3\], expected \[24\]"),
        ({"grad.transformer.final_layernorm.bias": torch.zeros(24)}, "no gradient of this stage's trained weights"),
        ({"out.logits": torch.zeros(2, 3, 44)}, "out.logits is .* in the file and"),
    ],
)
def test_damaged_parity_files_are_explained(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], change: dict[str, Any], message: str
) -> None:
    path = small_parity_file(tmp_path / "x.safetensors", parity_model(), "sequential")
    with safe_open(path, framework="pt") as file:
        metadata = file.metadata()
    tensors = {name: tensor for name, tensor in (load_file(path) | change).items() if tensor is not None}
    save_tensors(tensors, tmp_path / "y.safetensors", metadata)
    with pytest.raises(DataError, match=message):
        parity(capsys, tmp_path / "y.safetensors")


def test_a_file_that_is_no_parity_file_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "x").write_text("<html>")
    with pytest.raises(DataError, match="cannot be read as safetensors"):
        parity(capsys, tmp_path / "x")
    with pytest.raises(DataError, match="cannot be read"):
        parity(capsys, tmp_path / "nothing")
    save_tensors({"a": torch.zeros(1)}, tmp_path / "a.safetensors")
    with pytest.raises(DataError, match="metadata stage is None"):
        parity(capsys, tmp_path / "a.safetensors")
