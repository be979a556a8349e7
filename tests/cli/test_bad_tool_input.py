"""Bad input of prepare, train_tokenizer, infer and evaluate: one clear message, a non-zero exit, nothing written."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from command_line import Command, assert_tells, files, nothing_changes, prepare_arguments
from tiny_videos import write_captions

PROMPT = "the digit 3 moves left"


# ---- prepare ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("captions", "options", "code", "message"),
    [
        ("nope.csv", {}, 1, "nope.csv: no such caption file"),
        ("good.mp4", {}, 1, "captions are read from .csv, .tsv or .jsonl"),
        ("captions.csv", {"video_column": "film"}, 1, "no column 'film', only .'video', 'caption'.*--video-column"),
        ("captions.csv", {"tokenizer": "nowhere"}, 1, "nowhere/tokenizer.json: No such file"),
        ("captions.csv", {"size": 15}, 1, "15x15 pixels do not divide into codes of 4x4"),
        ("captions.csv", {"device": "gpu"}, 1, "--device gpu cannot be used.*Devices here: cpu"),
        ("captions.csv", {"root": "nowhere"}, 1, "--root .*nowhere is no folder"),
        ("captions.csv", {"out": "file"}, 1, "file/clips.*A file stands where a folder is needed"),
    ],
)
def test_prepare_refuses_what_it_cannot_work_with(
    command: Command, world: Path, tmp_path: Path, captions: str, options: dict[str, Any], code: int, message: str
) -> None:
    out = (world / options["out"] if "out" in options else tmp_path) / "clips"
    given = {key: value for key, value in options.items() if key != "out"}
    with nothing_changes(world, tmp_path):
        outcome = command("prepare", *prepare_arguments(world, world / "videos" / captions, out, **given))
    assert outcome.code == code
    assert_tells(outcome.message, message)


@pytest.mark.parametrize("option", [["--fps", "x"], ["--workers", "two"], ["--memory-gib", "1e300"]])
def test_prepare_explains_ill_typed_options(command: Command, world: Path, option: list[str]) -> None:
    outcome = command("prepare", "run", world / "videos/captions.csv", "--out", "x", "--tokenizer", "y", *option)
    assert outcome.code == 2
    assert_tells(outcome.err, f"argument {option[0]}: .*{option[1]}'? is no")


def test_broken_videos_and_empty_captions_are_listed_with_reasons(
    command: Command, world: Path, tmp_path: Path
) -> None:
    bad = [("broken.mp4", "b"), ("text.mp4", "c"), ("gone.mp4", "d"), ("good.mp4", "  ")]
    captions = write_captions(tmp_path / "bad.csv", bad)
    none = command("prepare", *prepare_arguments(world, captions, tmp_path / "bad/c"))
    assert none.code == 1
    assert_tells(none.message, "not one of 4 rows of .*bad.csv could be prepared; .*failed.jsonl says why")
    assert [line["line"] for line in failures(tmp_path / "bad")] == [2, 3, 4, 5]
    assert files(tmp_path / "bad").keys() == {"failed.jsonl"}
    rows = [("broken.mp4", "b"), ("good.mp4", "a gray ramp")]
    captions = write_captions(tmp_path / "some.csv", rows)
    some = command("prepare", *prepare_arguments(world, captions, tmp_path / "some/c"))
    assert some.code == 0 and "1 clips" in some.out and "1 failed" in some.out
    assert [(line["video"], line["line"]) for line in failures(tmp_path / "some")] == [("broken.mp4", 2)]


def failures(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "failed.jsonl").read_text().splitlines()]


# ---- train_tokenizer -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (["text", "nope.csv", "--out", "{out}"], 1, "nope.csv: no such caption file"),
        (["text", "{world}/empty.csv", "--out", "{out}"], 1, "empty.csv:3: empty caption"),
        (["text", "{world}/latin.csv", "--out", "{out}"], 1, "latin.csv:2: the caption is not UTF-8"),
        (["text", "{captions}", "--out", "{world}/file/t", "--vocab-size", "60"], 1, "file.*[Cc]hoose another place"),
        (["text", "{captions}", "--out", "{world}/videos", "--force", "--vocab-size", "60"], 1, "something else"),
        (["text", "{captions}", "--out", "{world}/file", "--force", "--vocab-size", "60"], 1, "file is a file"),
        (["text", "{captions}", "--out", "{out}", "--vocab-size", "3"], 75, "vocab_size 3.*give more pieces"),
        (["text", "{captions}", "--out", "{out}", "--vocab-size", "9999999999999"], 75, "vocab_size 9999999999999"),
        (["frames", "{world}/nowhere", "--out", "{out}"], 1, "nowhere: no such file or folder"),
        (["frames", "{world}/inputs", "--out", "{out}"], 1, "inputs: no videos found"),
        (["frames", "{world}/videos", "--out", "{out}", "--device", "gpu"], 1, "--device gpu cannot be used"),
        (["frames", "{world}/videos", "--out", "{world}/file/t"], 1, "file/t cannot be made: .*file is a file"),
        (["frames", "{world}/videos", "--out", "{world}/videos", "--force"], 1, "something else"),
        (["frames", "{world}/videos", "--out", "{out}", "--steps", "0"], 75, "--steps must be at least 1"),
        (["show", "{world}/videos"], 1, "neither a text tokenizer"),
    ],
)
def test_tokenizer_training_refuses_bad_input_before_it_writes(
    command: Command, world: Path, tmp_path: Path, arguments: list[str], code: int, message: str
) -> None:
    (world / "empty.csv").write_text("video,caption\na.mp4,hello\nb.mp4,\n")
    (world / "latin.csv").write_bytes("video,caption\na.mp4,caf\xe9\n".encode("latin-1"))
    places = {"world": world, "out": tmp_path / "out", "captions": world / "videos/captions.csv"}
    with nothing_changes(world, tmp_path):
        outcome = command("train_tokenizer", *(argument.format(**places) for argument in arguments))
    assert outcome.code == code
    assert_tells(outcome.message, message)


# ---- infer and evaluate ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "prompt file .* does not exist"),
        ("folder", "is a folder"),
        (b"", "holds no prompt"),
        (b" \n\n", "holds no prompt"),
        (b"fine\ncaf\xe9\n", r":2: not UTF-8 \(byte 0xe9\)"),
    ],
)
def test_a_prompt_file_that_cannot_be_used_makes_nothing(
    command: Command, world: Path, tmp_path: Path, content: Any, message: str
) -> None:
    prompts = tmp_path / "prompts.txt"
    if content == "folder":
        prompts.mkdir()
    elif content is not None:
        prompts.write_bytes(content)
    with nothing_changes(tmp_path):
        outcome = command("infer", prompts, "--model", world / "made/export", "--out", tmp_path / "out")
    assert outcome.code == 1 and str(prompts) in outcome.message
    assert_tells(outcome.message, message)


def test_bad_prompts_are_told_one_by_one_and_the_exit_code_says_so(
    command: Command, world: Path, tmp_path: Path
) -> None:
    (tmp_path / "no.png").write_text("no picture")
    lines = [
        (PROMPT * 20, "tokens, more than the 20"),
        ('{"text": " "}', "the text is empty"),
        ('{"text": "a", "image": "no.png"}', "no.png"),
        ('{"text": "a", "image": "gone.png"}', "gone.png does not exist"),
        ('{"text": "a", "seconds": 1e300}', "longer than"),
        ('{"text": "a", "seconds": 1e-9}', "frames per second"),
        ('{"text": "a", "sed": 3}', "unknown key 'sed'; did you mean 'seed'"),
    ]
    (tmp_path / "prompts.txt").write_text("\n".join(line for line, _ in lines))
    out = tmp_path / "out"
    outcome = command("infer", tmp_path / "prompts.txt", "--model", world / "made/export", "--out", out, "levels=0")
    assert outcome.code == 1
    errors = [line for line in outcome.err.splitlines() if line.startswith("error: ")]
    assert len(errors) == len(lines)
    for number, ((_, message), error) in enumerate(zip(lines, errors, strict=True), 1):
        assert f"prompts.txt:{number}: " in error and message in error and len(error) < 500
    assert files(out).keys() == {"results.jsonl"}


def without_file(name: str) -> Callable[[Path], None]:
    return lambda export: (export / name).unlink()


def changed_manifest(**fields: Any) -> Callable[[Path], None]:
    def change(export: Path) -> None:
        manifest = json.loads((export / "manifest.json").read_text())
        del manifest["crc32"]  # as of a former version
        (export / "manifest.json").write_text(json.dumps(manifest | fields))

    return change


def cut_weights(export: Path) -> None:
    weights = export / "model-00001.safetensors"
    weights.write_bytes(weights.read_bytes()[:1000])


@pytest.mark.parametrize("name", ["infer", "evaluate"])
@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (shutil.rmtree, "has no manifest.json, so it is no export"),
        (cut_weights, "model-00001.safetensors has 1000 bytes, its manifest says"),
        (without_file("config.yaml"), "config.yaml is missing from the export"),
        (without_file("text_tokenizer/text.model"), "text.model is missing from the export"),
        (changed_manifest(files=[]), "manifest.json is damaged"),
        (changed_manifest(version=99), "version 99, this megacog reads .* version 1"),
    ],
)
def test_a_missing_or_damaged_export_is_named(
    command: Command, world: Path, tmp_path: Path, name: str, damage: Callable[[Path], None], message: str
) -> None:
    shutil.copytree(world / "made/export", tmp_path / "export")
    damage(tmp_path / "export")
    with nothing_changes(tmp_path):
        outcome = command(name, *export_arguments(name, world, tmp_path / "export", tmp_path / "out"))
    assert outcome.code == 1
    assert_tells(outcome.message, message)


def export_arguments(name: str, world: Path, export: Path, out: Path) -> list[object]:
    if name == "infer":
        return [world / "prompts.txt", "--model", export, "--out", out]
    return [export, "--out", out, "--judge-cache", out / "judge"]


@pytest.mark.parametrize(
    ("name", "arguments", "code", "message"),
    [
        ("infer", ["levels=40"], 75, "generation.levels: expected less than or equal to 10"),
        ("infer", ["guidence=3"], 75, "guidence: unknown key; did you mean guidance"),
        ("infer", ["--device", "gpu"], 1, "--device gpu cannot be used"),
        ("infer", ["--scale", "100000"], 75, "--scale must be from 1 to 256"),
        ("evaluate", [], 1, "makes frames of 16x16 pixels; the judge knows .* of 32x32, or enlarged"),
        ("evaluate", ["--clips", "0"], 75, "--clips must be at least 1"),
        ("evaluate", ["--device", "gpu"], 1, "--device gpu cannot be used"),
    ],
)
def test_generation_refuses_settings_that_cannot_work(
    command: Command, world: Path, tmp_path: Path, name: str, arguments: list[str], code: int, message: str
) -> None:
    with nothing_changes(tmp_path, world):
        given = export_arguments(name, world, world / "made/export", tmp_path / "out")
        outcome = command(name, *given, *arguments)
    assert outcome.code == code
    assert_tells(outcome.message, message)


@pytest.mark.parametrize("name", ["infer", "evaluate"])
def test_an_export_without_the_stages_that_clips_need_is_refused(
    command: Command, world: Path, tmp_path: Path, name: str
) -> None:
    with nothing_changes(tmp_path, world):
        outcome = command(name, *export_arguments(name, world, world / "run/export", tmp_path / "out"))
    assert outcome.code == 1
    assert_tells(outcome.message, "run/export holds no attention-plus of stage sequential; train that stage first")


@pytest.mark.parametrize("out", ["file", "file/out"])
def test_an_output_folder_that_cannot_be_made_is_named(command: Command, world: Path, out: str) -> None:
    with nothing_changes(world):
        outcome = command("infer", world / "prompts.txt", "--model", world / "made/export", "--out", world / out)
    assert outcome.code == 1
    assert_tells(outcome.message, f"output folder {world / out} cannot be made")


# ---- convert ---------------------------------------------------------------------------------------------------------

TO_SAT = ("export-sat", "{export}", "--stage", "base", "--iteration", "1")


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (["import-sat", "{world}/nowhere", "--out", "{out}"], 1, "nowhere does not exist; give the folder"),
        (["import-sat", "{world}/inputs", "--out", "{out}"], 1, "inputs holds no mp_rank_00_model_states.pt"),
        (["import-sat", "{world}/file", "--out", "{out}"], 1, "file is a file; give the folder"),
        (["import-sat", "{world}/file", "--out", "{world}/videos"], 1, "videos exists already"),
        (["import-sat", "{world}/file", "--out", "{world}/videos", "--force"], 1, "something else and is not replaced"),
        (["export-sat", "{world}/videos", "--out", "{out}"], 1, "videos has no manifest.json"),
        (["export-sat", "{export}", "--out", "{out}", "--stage", "base"], 75, "by --iteration"),
        ([*TO_SAT, "--out", "{out}", "--ranks", "0"], 75, "0 ranks do not divide"),
        (["export-safetensors", "{export}", "--out", "{out}"], 1, "choose one by --stage"),
        ([*TO_SAT, "--out", "{world}/videos"], 1, "exists already"),
        (["add-tokenizers", "{export}"], 75, "nothing to add"),
        (["add-tokenizers", "{export}", "--text-tokenizer", "{world}/nowhere"], 1, "nowhere does not exist; run"),
        (["parity", "{world}/file"], 1, "file cannot be read as safetensors"),
        (["parity", "{export}/model-00001.safetensors"], 1, "metadata stage is None, expected a number"),
        (["verify", "{world}/inputs"], 1, "inputs has no manifest.json"),
    ],
)
def test_convert_refuses_bad_input_before_it_writes(
    command: Command, world: Path, tmp_path: Path, arguments: list[str], code: int, message: str
) -> None:
    places = {"world": world, "out": tmp_path / "out", "export": world / "made/export"}
    with nothing_changes(world, tmp_path):
        outcome = command("convert", *(argument.format(**places) for argument in arguments))
    assert outcome.code == code
    assert_tells(outcome.message, message)
