"""Folders that are no checkpoint of the original, or a damaged one: each is told, and nothing is left behind."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from sat_files import convert_command as run
from sat_files import original_weights, sat_model, write_config, write_sat

from megacog.config.schema import ModelConfig
from megacog.errors import CheckpointError, ConfigError

RANK_0 = "27000/mp_rank_00_model_states.pt"


def truncated(folder: Path) -> None:
    whole = (folder / RANK_0).read_bytes()
    (folder / RANK_0).write_bytes(whole[: len(whole) // 2])


def changed_weights(change: Callable[[dict[str, Any]], object]) -> Callable[[Path], None]:
    def spoil(folder: Path) -> None:
        content = torch.load(folder / RANK_0, weights_only=False)
        change(content["module"])
        torch.save(content, folder / RANK_0)

    return spoil


def changed_settings(**changes: Any) -> Callable[[Path], None]:
    def spoil(folder: Path) -> None:
        path = folder / "model_config.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | changes))

    return spoil


def packed(folder: Path) -> None:
    shutil.make_archive(str(folder / "cogvideo-stage1"), "zip", folder / "27000")
    shutil.rmtree(folder / "27000")
    (folder / "latest").unlink()


KEY = "transformer.layers.1.mlp.dense_h_to_4h.bias"
BAD: dict[str, tuple[Callable[[Path], object], str]] = {
    "missing rank file": (changed_settings(model_parallel_size=2), "lacks mp_rank_01_model_states.pt of 2"),
    "truncated": (truncated, "truncated or damaged.*Download it again"),
    "an HTML page": (lambda folder: (folder / RANK_0).write_text("<!DOCTYPE html><html>"), "is an HTML page"),
    "a git-lfs pointer": (
        lambda folder: (folder / RANK_0).write_text("version https://git-lfs.github.com/spec/v1\nsize 15442500000\n"),
        "is a git-lfs pointer.*15442500000 bytes",
    ),
    "still packed in the folder": (packed, "holds cogvideo-stage1.zip, still packed"),
    "unknown key": (
        changed_weights(lambda module: module.update({KEY.replace("bias", "biaz"): module[KEY]})),
        rf"unknown key {KEY.replace('bias', 'biaz')} \(nearest: {KEY}\)",
    ),
    "missing keys": (
        changed_weights(lambda module: [module.pop(KEY), module.pop("transformer.final_layernorm.bias")]),
        rf"2 differences.*missing key transformer.final_layernorm.bias\n  missing key {KEY}",
    ),
    "wrong shape": (
        changed_weights(lambda module: module.update({KEY: module[KEY][:-1].clone()})),
        rf"{KEY} is \[95\], expected \[96\]",
    ),
    "not a tensor": (changed_weights(lambda module: module.update({KEY: 3})), f"{KEY} is no tensor of weights"),
    "the same key twice": (
        changed_weights(lambda module: module.update({"word_embeddings.weight": torch.zeros(1)})),
        "holds transformer.word_embeddings.weight twice",
    ),
    "no weights": (lambda folder: torch.save({"epoch": 3}, folder / RANK_0), r"has no `module`.*\['epoch'\]"),
    "latest says nonsense": (lambda folder: (folder / "latest").write_text("../x"), "names no iteration"),
    "latest says another": (lambda folder: (folder / "latest").write_text("9"), "there is no folder .*9"),
    "other heads": (changed_settings(num_attention_heads=8), "num_attention_heads is 8, not 4"),
    "another window": (changed_settings(window_size=10), "window_size is 10, not -1"),
    "another inner width": (changed_settings(inner_hidden_size=7), "inner_hidden_size is 7, not 96"),
    "another norm": (changed_settings(layernorm_order="post"), "layernorm_order is 'post', not 'sandwich'"),
    "another grid": (changed_settings(layout="6,31,131"), "layout is '6,31,131', not"),
    "weights that are NaN": (
        changed_weights(lambda module: module[KEY].fill_(float("nan"))), "not finite: some of them are NaN",
    ),
    "another stage": (changed_settings(cogvideo_stage=3), "cogvideo_stage is 3, expected 1 or 2"),
    "settings are no JSON": (lambda folder: (folder / "model_config.json").write_text("{"), "cannot be read"),
}  # fmt: skip


@pytest.fixture
def config(tmp_path: Path) -> Path:
    return write_config(tmp_path, sat_model())


@pytest.mark.parametrize("case", BAD)
def test_bad_folders_are_explained_and_leave_nothing(tmp_path: Path, config: Path, case: str) -> None:
    spoil, message = BAD[case]
    folder = write_sat(tmp_path / "sat", sat_model(), "sequential")
    spoil(folder)
    with pytest.raises((CheckpointError, ConfigError), match=f"(?s){message}"):
        run("import-sat", folder, "--out", tmp_path / "export", "--config", config)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["config.yaml", "sat"]


def test_a_rank_that_is_missing_is_noticed_without_settings(tmp_path: Path, config: Path) -> None:
    folder = write_sat(tmp_path / "sat", sat_model(), "sequential", ranks=4, settings=False)
    arguments = (folder, "--out", tmp_path / "export", "--config", config, "--stages", "sequential")
    (folder / "27000/mp_rank_03_model_states.pt").unlink()
    with pytest.raises(CheckpointError, match="each file holds 1/4 of every tensor, so mp_rank_03_model_states.pt"):
        run("import-sat", *arguments)
    (folder / "27000/mp_rank_00_model_states.pt").unlink()
    with pytest.raises(CheckpointError, match="lacks mp_rank_00_model_states.pt of 3"):
        run("import-sat", *arguments)


def test_ranks_that_disagree_about_what_each_holds_whole_are_refused(tmp_path: Path, config: Path) -> None:
    folder = write_sat(tmp_path / "sat", sat_model(), "sequential", ranks=2)
    path = folder / "27000/mp_rank_01_model_states.pt"
    content = torch.load(path, weights_only=False)
    content["module"]["transformer.final_layernorm.bias"][0] += 1
    torch.save(content, path)
    with pytest.raises(CheckpointError, match="transformer.final_layernorm.bias differs between ranks 0 and 1"):
        run("import-sat", folder, "--out", tmp_path / "export", "--config", config)


def test_a_rank_s_file_that_is_a_copy_of_another_one_s_is_refused(tmp_path: Path, config: Path) -> None:
    model = sat_model()
    weights = original_weights(model, "sequential")
    for key in weights:  # what every rank has alike before training: no sign of a copy
        if key.endswith("query_key_value.bias") or "query_key_value.0" in key:
            weights[key] = torch.zeros_like(weights[key])
    folder = write_sat(tmp_path / "sat", model, "sequential", weights, ranks=4)
    arguments = (folder, "--out", tmp_path / "export", "--config", config)
    assert run("import-sat", *arguments) == 0
    shutil.rmtree(tmp_path / "export")
    paths = [folder / f"27000/mp_rank_{rank:02d}_model_states.pt" for rank in range(4)]
    shutil.copy(paths[1], paths[3])
    with pytest.raises(CheckpointError, match=f"{paths[1]} and {paths[3]} hold the same part of every tensor"):
        run("import-sat", *arguments)
    assert not (tmp_path / "export").exists()


def test_a_packed_zip_a_file_and_nothing_are_no_folders(tmp_path: Path, config: Path) -> None:
    folder = write_sat(tmp_path / "cogvideo-stage1", sat_model(), "sequential")
    packed_ = shutil.make_archive(str(tmp_path / "cogvideo-stage1"), "zip", tmp_path, folder.name)
    arguments = ("--out", tmp_path / "export", "--config", config)
    for path, message in (
        (Path(packed_), "zip archive still packed; unzip it"), (folder / RANK_0, "is a file; give the folder"),
        (tmp_path / "nothing", "does not exist"), (folder / "27000/..", None),
    ):  # fmt: skip
        if message is None:
            assert run("import-sat", path, *arguments) == 0
            continue
        with pytest.raises(CheckpointError, match=message):
            run("import-sat", path, *arguments)


def test_code_in_a_checkpoint_is_refused_and_not_run(tmp_path: Path, config: Path) -> None:
    folder = write_sat(tmp_path / "sat", sat_model(), "sequential")
    content = torch.load(folder / RANK_0, weights_only=False)
    torch.save(content | {"args": ModelConfig}, folder / RANK_0)
    with pytest.raises(CheckpointError, match="wants to construct megacog.config.schema.ModelConfig, which megacog"):
        run("import-sat", folder, "--out", tmp_path / "export", "--config", config)


def test_the_folder_of_one_iteration_may_be_given(tmp_path: Path, config: Path) -> None:
    folder = write_sat(tmp_path / "sat", sat_model(), "sequential")
    shutil.copy(folder / "model_config.json", folder / "27000")
    assert run("import-sat", folder / "27000", "--out", tmp_path / "export", "--config", config) == 0


def test_the_folder_of_one_iteration_without_settings_leads_to_its_parent(tmp_path: Path, config: Path) -> None:
    for stage, arguments in (("base", ()), ("sequential", ("--config", config))):
        folder = write_sat(tmp_path / stage, sat_model(), stage)
        with pytest.raises(CheckpointError, match=f"27000 is the folder of one iteration; give its parent {folder},"):
            run("import-sat", folder / "27000", "--out", tmp_path / "export", *arguments)


def test_a_folder_of_checkpoints_and_an_export_are_told(tmp_path: Path, config: Path) -> None:
    folders = [write_sat(tmp_path / "release" / stage, sat_model(), stage) for stage in ("sequential", "interpolation")]
    arguments = ("--out", tmp_path / "export", "--config", config)
    both = " and ".join(str(folder) for folder in sorted(folders))
    with pytest.raises(CheckpointError, match=f"checkpoints lie inside; give {both}$"):
        run("import-sat", tmp_path / "release", *arguments)
    made = tmp_path / "made"
    made.mkdir()
    for name in ("manifest.json", "config.yaml"):
        (made / name).write_text("{}")
    with pytest.raises(CheckpointError, match="made holds no .*; it is a megacog export already"):
        run("import-sat", made, *arguments)
