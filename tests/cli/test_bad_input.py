"""Bad input of training, and of the executables: one clear message, a non-zero exit, nothing half-written."""

from __future__ import annotations

import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest
from command_line import Command, TrainingArguments, assert_tells, files, nothing_changes
from tiny_run import CAPTIONS, CODEBOOK

from megacog.data.shards import Shard, ShardWriter
from megacog.parallel.groups import Replicas
from megacog.tokenizers.text import train_text_tokenizer
from megacog.training import pretrain

# ---- configuration ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("train.learning_rat=1", "learning_rat: unknown key; did you mean learning_rate"),
        ("train.steps=many", "train.steps: expected a valid integer.*many"),
        ("train.steps", "train.steps.*section.key=value"),
        ("train.betas=[0.9", "not valid YAML"),
        ("train.betas=[2,0.9]", "train.betas.0: expected less than 1"),
        ("parallel.tensor=3", "parallel.tensor 3 does not divide model.num_heads 4"),
        ("parallel.tensor=2", "parallel.tensor 2 x parallel.sequence 1 do not divide the 1 ranks"),
        ("parallel.sequence=2", "parallel.tensor 1 x parallel.sequence 2 do not divide the 1 ranks"),
        ("parallel.sequence=3", "parallel.sequence 3 does not divide model.num_heads 4"),
        ("parallel={tensor: 2, sequence: 2}", "parallel.tensor 2 with parallel.sequence 2 is not proved"),
        ("train.stage=sequential", "sequential needs model.inherit"),
        ("train.micro_batch_size=3", "global_batch_size 8 is not a multiple of train.micro_batch_size 3"),
    ],
)
def test_a_bad_setting_is_named_with_its_key_and_nothing_starts(
    command: Command, training: TrainingArguments, tmp_path: Path, override: str, message: str
) -> None:
    arguments = training()
    with nothing_changes(tmp_path):
        outcome = command("pretrain", *arguments, override)
    assert outcome.code == 75
    assert_tells(outcome.message, message)


def test_bad_keys_in_a_file_are_told_with_their_lines(
    command: Command, training: TrainingArguments, tmp_path: Path
) -> None:
    arguments = training(train__step=3, model__num_layers="two")
    lines = (tmp_path / "config.yaml").read_text().splitlines()
    outcome = command("pretrain", *arguments)
    assert outcome.code == 75
    for key, message in (("step: 3", "train.step: unknown key"), ("num_layers", "model.num_layers: expected")):
        number = next(index for index, line in enumerate(lines, 1) if line.strip().startswith(key))
        assert f"config.yaml:{number}: {message}" in outcome.message


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "no such configuration file"),
        ("folder", "is a folder"),
        (b"", "expected sections with keys"),
        (b"model: [", "config.yaml:1: not valid YAML"),
        (b"# caf\xe9\n", "not UTF-8"),
    ],
)
def test_a_file_that_is_no_configuration_is_refused(
    command: Command, tmp_path: Path, content: Any, message: str
) -> None:
    path = tmp_path / "config.yaml"
    if content == "folder":
        path.mkdir()
    elif content is not None:
        path.write_bytes(content)
    outcome = command("pretrain", "--config", path)
    assert outcome.code == 75 and str(path) in outcome.message
    assert_tells(outcome.message, message)


def test_a_batch_that_ranks_cannot_share_is_refused(
    command: Command, training: TrainingArguments, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    build = pretrain.build_process_groups
    three = Replicas(rank=0, size=3)
    monkeypatch.setattr(pretrain, "build_process_groups", lambda *sizes: replace(build(*sizes), replicas=three))
    arguments = training()
    with nothing_changes(tmp_path):
        outcome = command("pretrain", *arguments)
    assert outcome.code == 75
    assert_tells(outcome.message, "global_batch_size 8 .*micro_batch_size 2 x 3 data-parallel ranks")


# ---- shards ----------------------------------------------------------------------------------------------------------


def make_shard(path: Path, like: Path, **changes: Any) -> Path:
    """One clip, coded as `like` says but for the changes of its description."""
    with Shard(like) as shard:
        meta = replace(shard.meta, **changes)
    with ShardWriter(path, meta) as writer:
        codes = np.full((17, *meta.grid), meta.codebook_size - 1)
        writer.add("other", "the digit 3 moves left", codes, fps=8.0)
    return path


def missing(path: Path, like: Path) -> str:
    return f"no shard matches .*{path.name}"


def truncated(path: Path, like: Path) -> str:
    path.write_bytes(like.read_bytes()[:-200])
    return f"{path.name}.*truncated"


def not_hdf5(path: Path, like: Path) -> str:
    path.write_bytes(b"PK" + like.read_bytes()[2:])
    return f"{path.name} is not an HDF5 file"


def other_tokenizer(path: Path, like: Path) -> str:
    make_shard(path, like, tokenizer_fingerprint="f" * 64)
    return f"{path.name} was made by another frame tokenizer.*the same code means another picture"


def outside_the_codebook(path: Path, like: Path) -> str:
    make_shard(path, like, codebook_size=CODEBOOK + 9)
    with h5py.File(path, "r+", libver="latest") as file:
        file.attrs["codebook_size"] = np.int64(CODEBOOK)
    return f"{path.name}.*other.*code.*{CODEBOOK + 8}.*codebook_size {CODEBOOK}"


@pytest.mark.parametrize("damage", [missing, truncated, not_hdf5, other_tokenizer, outside_the_codebook])
def test_training_refuses_a_bad_shard_and_leaves_no_model(
    command: Command, training: TrainingArguments, world: Path, tmp_path: Path, damage: Callable[[Path, Path], str]
) -> None:
    message = damage(tmp_path / "bad.h5", world / "inputs/train.h5")
    outcome = command("pretrain", *training(data__train=[{"path": str(tmp_path / "bad.h5")}]))
    assert outcome.code == 1
    assert_tells(outcome.message, message)
    assert not any("export" in name or "checkpoints" in name or ".tmp-" in name for name in files(tmp_path))


@pytest.mark.parametrize("damage", [missing, truncated, not_hdf5, outside_the_codebook])
def test_verify_and_inspect_name_a_bad_shard(
    command: Command, world: Path, tmp_path: Path, damage: Callable[[Path, Path], str]
) -> None:
    message = damage(tmp_path / "bad.h5", world / "inputs/train.h5")
    with nothing_changes(tmp_path):
        verified = command("prepare", "verify", tmp_path / "bad.h5")
        inspected = command("prepare", "inspect", tmp_path / "bad.h5")
    assert verified.code == 1 and "1 failures" in verified.out
    assert_tells(verified.out, message if damage is not outside_the_codebook else "bad.h5.*outside the codebook")
    assert inspected.code == 1
    assert_tells(inspected.message, message)


def test_a_pattern_without_shards_and_evaluation_on_training_clips_are_refused(
    command: Command, training: TrainingArguments, world: Path, tmp_path: Path
) -> None:
    outcome = command("pretrain", *training(data__train=[{"path": str(tmp_path / "nope-*.h5")}]))
    assert outcome.code == 1
    assert_tells(outcome.message, "no shard matches .*nope")
    outcome = command("pretrain", *training(data__eval=[{"path": str(world / "inputs/train.h5")}]))
    assert outcome.code == 1
    assert_tells(outcome.message, r"40 clip\(s\) .* in data.train and in data.eval")
    assert not (tmp_path / "run").exists()


def test_a_caption_longer_than_the_model_reads_is_named_before_training(
    command: Command, training: TrainingArguments, tmp_path: Path
) -> None:
    outcome = command("pretrain", *training(model__text_length=2))
    assert outcome.code == 1
    assert_tells(outcome.message, "train.h5: clip 'train-0' has a text of .* more than model.text_length 2")
    assert not (tmp_path / "run").exists()


# ---- runs, checkpoints, exports to start from ------------------------------------------------------------------------


def test_resuming_without_a_checkpoint_or_over_one_is_refused_as_asked(
    command: Command, training: TrainingArguments, world: Path, tmp_path: Path
) -> None:
    arguments = training()
    with nothing_changes(tmp_path, world):
        must = command("pretrain", *arguments, "train.resume=must")
        never = command("pretrain", *arguments, "train.resume=never", f"train.run_dir={world / 'run'}")
    assert must.code == 1 and never.code == 1
    assert_tells(must.message, "train.resume is `must`, but .*run/checkpoints holds no checkpoint")
    assert_tells(never.message, "train.resume is `never`, but .*step-0000001 exists")


def test_a_run_of_another_configuration_is_never_continued(
    command: Command, training: TrainingArguments, world: Path, tmp_path: Path
) -> None:
    arguments = training(train__run_dir=str(world / "run"), train__seed=7, model__num_heads=2)
    with nothing_changes(world):
        outcome = command("pretrain", *arguments)
    assert outcome.code == 1
    assert_tells(outcome.message, "step-0000001 belongs to another run: model.num_heads was 4 and is 2; train.seed")


def test_a_run_whose_text_tokenizer_was_trained_again_is_never_continued(
    command: Command, training: TrainingArguments, world: Path, tmp_path: Path
) -> None:
    train_text_tokenizer([*CAPTIONS, "a lion"], tmp_path / "text", 96)
    arguments = training(train__run_dir=str(world / "run"), tokenizer__text=str(tmp_path / "text"))
    with nothing_changes(world):
        outcome = command("pretrain", *arguments)
    assert outcome.code == 1
    assert_tells(outcome.message, "step-0000001 was trained with another text tokenizer.*tokenizer.text")


def test_damaged_checkpoints_never_become_a_new_start(
    command: Command, training: TrainingArguments, world: Path, tmp_path: Path
) -> None:
    shutil.copytree(world / "run", tmp_path / "run")
    records = next((tmp_path / "run/checkpoints").glob("step-*/records-*"))
    records.write_bytes(records.read_bytes()[:-1])
    arguments = training()
    with nothing_changes(tmp_path):
        outcome = command("pretrain", *arguments)
    assert outcome.code == 1
    assert_tells(outcome.message, f"no checkpoint of this run can be used: step-0000001: .*{records.name}")


@pytest.mark.parametrize(
    ("inherit", "changes", "message"),
    [
        ("nowhere", {}, "nowhere has no manifest.json, so it is no export"),
        ("run", {}, "run has no manifest.json.*give the `export` folder"),
        ("made/export", {}, "made/export does not fit this model: image_vocab_size is 16 there and 24 here"),
        ("run/export", {"plus_from": "sequential"}, "model.plus_from is sequential, but .* holds no plus.sequential"),
    ],
)
def test_an_export_that_cannot_be_inherited_is_refused(
    command: Command,
    training: TrainingArguments,
    world: Path,
    tmp_path: Path,
    inherit: str,
    changes: dict[str, str],
    message: str,
) -> None:
    model = {f"model__{key}": value for key, value in changes.items()}
    arguments = training("interpolation", model__inherit=str(world / inherit), **model)
    with nothing_changes(tmp_path, world):
        outcome = command("pretrain", *arguments)
    assert outcome.code == (75 if changes else 1)
    assert_tells(outcome.message, message)


@pytest.mark.parametrize("run_dir", ["file", "file/run"])
def test_a_run_folder_that_cannot_be_made_is_named_before_training(
    command: Command, training: TrainingArguments, world: Path, run_dir: str
) -> None:
    with nothing_changes(world):
        outcome = command("pretrain", *training(train__run_dir=str(world / run_dir)))
    assert outcome.code == 1
    assert_tells(outcome.message, f"{world / 'file'}.*choose another place")


def test_an_export_folder_of_something_else_is_named_before_training(
    command: Command, training: TrainingArguments, tmp_path: Path
) -> None:
    (tmp_path / "run/export").mkdir(parents=True)
    (tmp_path / "run/export/manifest.json").write_text('{"name": "mine"}')
    outcome = command("pretrain", *training(train__run_dir=str(tmp_path / "run")))
    assert outcome.code == 1
    assert_tells(outcome.message, "run/export holds no manifest.json of megacog-export.*not replaced")
    assert [path.name for path in (tmp_path / "run").rglob("*")] == ["export", "manifest.json"]


def test_tokenizers_that_are_swapped_or_missing_are_named(
    command: Command, training: TrainingArguments, world: Path
) -> None:
    text, frames = str(world / "inputs/text"), str(world / "inputs/frames")
    swapped = command("pretrain", *training(tokenizer__text=frames, tokenizer__frames=text))
    assert swapped.code == 1
    assert_tells(swapped.message, "frames/text.json: No such file.*is .*inputs/frames a text tokenizer folder")
    lost = command("pretrain", *training(tokenizer__frames=str(world / "nowhere")))
    assert lost.code == 1
    assert_tells(lost.message, "nowhere/tokenizer.json: No such file.*train_tokenizer.py frames")


# ---- as processes ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (["launch/prepare.py", "verify", "nope.h5"], 1, "nope.h5"),
        (["launch/prepare.py", "run", "nope.csv", "--out", "x/y", "--tokenizer", "z"], 1, "nope.csv: no such caption"),
        (["launch/pretrain.py", "--config", "nope.yaml"], 75, "nope.yaml: no such configuration file"),
    ],
)
def test_the_executables_exit_with_the_code_and_without_a_traceback(
    repository: Path, tmp_path: Path, arguments: list[str], code: int, message: str
) -> None:
    script, *rest = arguments
    result = subprocess.run(
        [sys.executable, str(repository / script), *rest], cwd=tmp_path, capture_output=True, text=True, check=False
    )
    assert result.returncode == code, result.stderr
    assert message in result.stdout + result.stderr and "Traceback" not in result.stderr
    assert files(tmp_path) == {}
