"""Checkpoints of the original in and out: every tensor, to the bit."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from sat_files import convert_command as run
from sat_files import cut, old_name, original_weights, sat_model, write_config, write_sat
from torch import Tensor

from megacog.checkpoint.export import load_model, open_export
from megacog.config.schema import Stage
from megacog.errors import CheckpointError, ConfigError, DataError, EnvError
from megacog.interop import importing
from megacog.interop.keys import original_entries

BOTH: tuple[Stage, ...] = ("sequential", "interpolation")


@pytest.fixture
def config(tmp_path: Path) -> Path:
    return write_config(tmp_path, sat_model())


def contents(export: Path) -> dict[str, Tensor]:
    opened = open_export(export, verify=True)
    return {name: opened.tensor(name) for name in opened.files}


def assert_same(one: dict[str, Tensor], other: dict[str, Tensor]) -> None:
    assert one.keys() == other.keys()
    for name, tensor in one.items():
        assert tensor.dtype == other[name].dtype and torch.equal(tensor, other[name]), name


def files(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.suffix == ".safetensors"}


# ---- import ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_every_tensor_of_a_stage_arrives_bitwise_in_its_own_dtype(
    tmp_path: Path, config: Path, dtype: torch.dtype
) -> None:
    model = sat_model()
    weights = original_weights(model, "sequential", dtype=dtype)
    write_sat(tmp_path / "sat", model, "sequential", weights)
    assert run("import-sat", tmp_path / "sat", "--out", tmp_path / "export", "--config", config) == 0
    found = contents(tmp_path / "export")
    words = weights.pop("transformer.word_embeddings.weight")
    assert torch.equal(found.pop("code_embedding.weight"), words[:24])
    assert torch.equal(found.pop("text_embedding.weight"), words[24:])
    assert len(found) == len(weights) == 2 * 21 + 4
    gate = found["plus.sequential.layers.1.gate.logit"]
    assert gate.dtype == dtype and torch.equal(gate, weights["mixins.attention_plus.attn_distribution.1"])
    assert torch.equal(found["layers.0.mlp.up.weight"], weights["transformer.layers.0.mlp.dense_h_to_4h.weight"])
    assert sorted(x.double().sum().item() for x in found.values()) == sorted(
        x.double().sum().item() for x in weights.values()
    )
    assert open_export(tmp_path / "export").plus == ("sequential",)


def test_a_base_and_two_stages_become_one_export_with_one_base(
    tmp_path: Path, config: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = sat_model()
    folders = [write_sat(tmp_path / stage, model, stage) for stage in ("base", *BOTH)]
    assert run("import-sat", *folders, "--out", tmp_path / "export", "--config", config) == 0
    printed = capsys.readouterr().out
    found = contents(tmp_path / "export")
    assert len(found) == 2 * 16 + 5 + 2 * (2 * 5 + 1)
    weights = original_weights(model, "interpolation")
    name = "mixins.attention_plus.dense.0.weight"
    assert torch.equal(found["plus.interpolation.layers.0.dense.weight"], weights[name])
    assert not torch.equal(found["plus.sequential.layers.0.dense.weight"], weights[name])
    assert all(f"logits of {stage}, random input" in printed for stage in ("base", *BOTH)) and "float16" in printed
    assert run("import-sat", folders[0], "--out", tmp_path / "only", "--config", config) == 0
    assert open_export(tmp_path / "only").plus == ()
    assert_same(contents(tmp_path / "only"), {k: v for k, v in found.items() if not k.startswith("plus.")})


@pytest.mark.parametrize("ranks", [2, 4])
def test_model_parallel_ranks_old_names_and_release_give_the_same_export(
    tmp_path: Path, config: Path, ranks: int
) -> None:
    model = sat_model()
    whole = write_sat(tmp_path / "whole", model, "sequential")
    cut_ = write_sat(tmp_path / "cut", model, "sequential", ranks=ranks, iteration="release", rename=old_name)
    for folder in (whole, cut_):
        assert run("import-sat", folder, "--out", tmp_path / f"{folder.name}-export", "--config", config) == 0
    assert files(tmp_path / "whole-export") == files(tmp_path / "cut-export")


def test_the_ranks_hold_what_the_original_gives_them() -> None:
    """The test's own cutting against the rule: chunks r, r + mp, r + 2 mp of 3 mp."""
    weight = torch.arange(72.0).view(72, 1)
    chunks = weight.chunk(6)
    assert torch.equal(cut("x.query_key_value.weight", weight, 1, 2), torch.cat([chunks[1], chunks[3], chunks[5]]))


def test_model_config_json_suffices_for_icetk_vocabularies(tmp_path: Path) -> None:
    model = sat_model(
        hidden_size=8, num_heads=2, num_layers=1, image_vocab_size=20000, text_vocab_size=130010, boi_id=130000,
        text_positions=512, base_positions=1024,
    )  # fmt: skip
    folders = [write_sat(tmp_path / stage, model, stage) for stage in BOTH]
    out = tmp_path / "export"
    assert run("import-sat", *folders, "--out", out) == 0
    export = open_export(out, verify=True)
    assert export.model == model and export.tokenizers == ()
    assert export.config.generation.preset == "cogvideo" and export.config.generation.sampler == "clusters"
    with pytest.raises(CheckpointError, match="no frame tokenizer.*add-tokenizers .*--frame-tokenizer"):
        _ = export.frame_tokenizer


def test_the_stage_is_asked_for_when_nothing_says_it(tmp_path: Path, config: Path) -> None:
    folder = write_sat(tmp_path / "sat", sat_model(), "interpolation", settings=False)
    with pytest.raises(CheckpointError, match="give --config"):
        run("import-sat", folder, "--out", tmp_path / "export", "--stages", "interpolation")
    with pytest.raises(CheckpointError, match="--stages sequential .* or interpolation"):
        run("import-sat", folder, "--out", tmp_path / "export", "--config", config)
    inherit = ("--set", "model.inherit=x", "--set", "train.stage=interpolation")
    assert run("import-sat", folder, "--out", tmp_path / "export", "--config", config, *inherit) == 0
    assert open_export(tmp_path / "export").plus == ("interpolation",)
    with pytest.raises(ConfigError, match="--set changes keys of --config"):
        run("import-sat", folder, "--out", tmp_path / "export", "--set", "train.seed=1")


def test_a_stage_that_contradicts_the_folder_is_refused(tmp_path: Path, config: Path) -> None:
    folders = [write_sat(tmp_path / stage, sat_model(), stage) for stage in BOTH]
    arguments = (*folders, "--out", tmp_path / "export", "--config", config, "--stages")
    with pytest.raises(ConfigError, match="sequential is interpolation, its model_config.json says sequential"):
        run("import-sat", *arguments, *reversed(BOTH))
    assert not (tmp_path / "export").exists()
    assert run("import-sat", *arguments, *BOTH) == 0


def test_different_bases_are_an_error_that_names_the_tensor_unless_one_is_chosen(tmp_path: Path, config: Path) -> None:
    model = sat_model()
    one = write_sat(tmp_path / "one", model, "sequential")
    weights = original_weights(model, "interpolation")
    key = "transformer.layers.1.mlp.dense_4h_to_h.bias"
    weights[key] = weights[key].clone()
    weights[key].view(torch.int16)[5] ^= 1
    two = write_sat(tmp_path / "two", model, "interpolation", weights)
    arguments = (one, two, "--out", tmp_path / "export", "--config", config)
    with pytest.raises(CheckpointError, match=f"differ, first in {key}.*--base-from"):
        run("import-sat", *arguments)
    with pytest.raises(ConfigError, match="none of the folders"):
        run("import-sat", *arguments, "--base-from", tmp_path)
    assert not (tmp_path / "export").exists()
    assert run("import-sat", *arguments, "--base-from", two) == 0
    assert torch.equal(contents(tmp_path / "export")["layers.1.mlp.down.bias"], weights[key])


def test_nan_bases_are_identical_to_themselves(tmp_path: Path, config: Path) -> None:
    model = sat_model()
    weights = {stage: original_weights(model, stage) for stage in BOTH}
    for module in weights.values():
        module["transformer.position_embeddings.weight"][-1] = float("nan")  # a row that no text reaches
    folders = [write_sat(tmp_path / stage, model, stage, weights[stage]) for stage in BOTH]
    assert run("import-sat", *folders, "--out", tmp_path / "export", "--config", config) == 0


def test_an_import_whose_logits_differ_is_not_kept(
    tmp_path: Path, config: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = write_sat(tmp_path / "sat", sat_model(), "sequential")
    original = importing._tensors

    def swapped(*arguments: Any) -> Any:
        tensors = original(*arguments)
        tensors["layers.0.attention.qkv.bias"] = tensors["plus.sequential.layers.0.qkv.bias"]
        return tensors

    monkeypatch.setattr(importing, "_tensors", swapped)
    with pytest.raises(CheckpointError, match="sequential weights compute other logits"):
        run("import-sat", folder, "--out", tmp_path / "export", "--config", config)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["config.yaml", "sat"]


def test_an_older_export_is_replaced_only_when_asked_and_nothing_else_is(
    tmp_path: Path, config: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    one = write_sat(tmp_path / "one", sat_model(), "sequential")
    other = write_sat(tmp_path / "other", sat_model(), "interpolation")
    arguments = ("--out", tmp_path / "export", "--config", config)
    assert run("import-sat", one, *arguments) == 0
    with monkeypatch.context() as patch:
        patch.setattr(importing, "find_checkpoint", lambda path: pytest.fail("weights are opened before --out"))
        with pytest.raises(DataError, match="export exists already; .*--force"):
            run("import-sat", other, *arguments)
        with pytest.raises(EnvError, match="something else"):
            run("import-sat", one, "--out", one, "--config", config, "--force")
    assert open_export(tmp_path / "export", verify=True).plus == ("sequential",)
    assert run("import-sat", other, *arguments, "--force") == 0
    assert open_export(tmp_path / "export", verify=True).plus == ("interpolation",)


# ---- export ----------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def export(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("made")
    config = write_config(folder, sat_model())
    folders = [write_sat(folder / stage, sat_model(), stage) for stage in BOTH]
    assert run("import-sat", *folders, "--out", folder / "export", "--config", config) == 0
    return folder / "export"


@pytest.mark.parametrize("stage", ["base", *BOTH])
@pytest.mark.parametrize("ranks", [1, 2])
def test_an_exported_stage_is_the_original_file_again(tmp_path: Path, export: Path, stage: Stage, ranks: int) -> None:
    out = tmp_path / "sat"
    assert run("export-sat", export, "--out", out, "--stage", stage, "--ranks", ranks, "--iteration", 38000) == 0
    assert (out / "latest").read_text() == "38000"
    weights = original_weights(sat_model(), stage)
    for rank in range(ranks):
        content = torch.load(out / f"38000/mp_rank_{rank:02d}_model_states.pt", weights_only=True)
        assert content["iteration"] == 38000
        assert_same(content["module"], {key: cut(key, whole, rank, ranks) for key, whole in weights.items()})
        for tensor in content["module"].values():
            assert tensor.untyped_storage().nbytes() == tensor.nbytes
    assert run("import-sat", out, "--out", tmp_path / "again") == 0
    expected = {
        name: tensor for name, tensor in contents(export).items()
        if not name.startswith("plus.") or name.startswith(f"plus.{stage}.")
    }  # fmt: skip
    assert_same(contents(tmp_path / "again"), expected)
    assert open_export(tmp_path / "again").model == open_export(export).model


def test_the_iteration_is_the_stage_s_own_or_is_asked_for(tmp_path: Path, config: Path) -> None:
    folders = [
        write_sat(tmp_path / stage, sat_model(), stage, iteration=iteration)
        for stage, iteration in (("base", "release"), ("sequential", 27000), ("interpolation", 38000))
    ]
    assert run("import-sat", *folders, "--out", tmp_path / "export", "--config", config) == 0
    for stage, iteration in (("sequential", "27000"), ("interpolation", "38000")):
        assert run("export-sat", tmp_path / "export", "--out", tmp_path / f"{stage}-sat", "--stage", stage) == 0
        assert (tmp_path / f"{stage}-sat" / "latest").read_text() == iteration
    arguments = ("export-sat", tmp_path / "export", "--out", tmp_path / "base-sat", "--stage", "base")
    with pytest.raises(ConfigError, match="for how many steps its base weights were trained; .* by --iteration"):
        run(*arguments)
    with pytest.raises(ConfigError, match="--iteration -1 must not be negative"):
        run(*arguments, "--iteration", -1)
    assert not (tmp_path / "base-sat").exists()
    assert run(*arguments, "--iteration", 0) == 0 and (tmp_path / "base-sat/latest").read_text() == "0"


@pytest.mark.parametrize(("command", "ranks"), [("export-sat", 1), ("export-sat", 2), ("export-safetensors", 1)])
def test_an_export_that_the_disk_cannot_hold_is_refused_before_it_is_written(
    tmp_path: Path, export: Path, monkeypatch: pytest.MonkeyPatch, command: str, ranks: int
) -> None:
    weights = sum(tensor.nbytes for tensor in original_weights(sat_model(), "sequential").values())
    # Of each tensor a rank's part lies twice on the disk while its file is written.
    needed = weights * (ranks + 1) // ranks if command == "export-sat" else weights
    arguments = (command, export, "--out", tmp_path / "out", "--stage", "sequential")
    arguments += ("--ranks", ranks) if command == "export-sat" else ()
    monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=needed - 1))
    with pytest.raises(EnvError, match=f"out: not enough disk space: {needed} bytes"):
        run(*arguments)
    assert not list(tmp_path.iterdir())
    monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=needed))
    assert run(*arguments) == 0


def test_both_stages_go_out_and_come_back_bitwise(tmp_path: Path, export: Path) -> None:
    folders = [tmp_path / stage for stage in BOTH]
    for stage, folder in zip(BOTH, folders, strict=True):
        assert run("export-sat", export, "--out", folder, "--stage", stage, "--ranks", 2) == 0
    assert run("import-sat", *folders, "--out", tmp_path / "again") == 0
    assert files(tmp_path / "again") == files(export)


def test_safetensors_have_the_original_keys_and_come_back_bitwise(tmp_path: Path, export: Path) -> None:
    out = tmp_path / "safetensors"
    assert run("export-safetensors", export, "--out", out, "--stage", "interpolation") == 0
    assert_same(load_file(out / "model.safetensors"), original_weights(sat_model(), "interpolation"))
    assert run("import-sat", out, "--out", tmp_path / "again") == 0
    mine = {name: tensor for name, tensor in contents(export).items() if ".sequential." not in name}
    assert_same(contents(tmp_path / "again"), mine)


def test_exports_that_cannot_be_are_refused(tmp_path: Path, export: Path) -> None:
    out = tmp_path / "out"
    with pytest.raises(CheckpointError, match="holds base, sequential, interpolation; choose one by --stage"):
        run("export-sat", export, "--out", out)
    with pytest.raises(ConfigError, match="3 ranks do not divide 40 vocabulary rows and 4 heads.*possible: 1, 2, 4"):
        run("export-sat", export, "--out", out, "--stage", "sequential", "--ranks", 3)
    assert not out.exists()
    out.mkdir()
    (out / "mine").touch()
    with pytest.raises(EnvError, match="exists already"):
        run("export-sat", export, "--out", out, "--stage", "sequential")


def test_verify_checks_bytes_and_names(tmp_path: Path, export: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run("verify", export) == 0
    assert "base, sequential, interpolation; 59 tensors, no tokenizers" in capsys.readouterr().out
    copy = shutil.copytree(export, tmp_path / "copy")
    text = (copy / "config.yaml").read_text()
    manifest = json.loads((copy / "manifest.json").read_text())
    (copy / "config.yaml").write_text(text.replace("num_layers: 2", "num_layers: 1"))
    with pytest.raises(CheckpointError, match="differs from its checksum"):
        run("verify", copy)
    del manifest["files"]["config.yaml"]
    from megacog.runtime.files import sha256_file

    path = copy / "config.yaml"
    manifest["files"]["config.yaml"] = {"bytes": path.stat().st_size, "sha256": sha256_file(path)}
    del manifest["crc32"]  # as of a former version
    (copy / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(CheckpointError, match="unknown key layers.1.attention.dense.bias"):
        run("verify", copy)


def test_a_model_of_an_import_runs_in_fp32_and_says_so(export: Path, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level("INFO", logger="megacog"):
        model = load_model(export)
    assert model.device.type == "cpu" and "holds float16 weights; they are cast to float32" in caplog.text


def test_every_tensor_has_one_original_and_back() -> None:
    for stage in ("base", *BOTH):
        names = [name for entry in original_entries(sat_model(), stage).values() for name in entry.names]
        assert len(names) == len(set(names))
