"""Tokenizers that are put into an imported export: those of the model, or an error before weights are read."""

from __future__ import annotations

import json
import shutil
from dataclasses import dataclass
from pathlib import Path

import pytest
from sat_files import sat_model, write_sat
from small_icetk import small_vqvae, write_text_model

from megacog.checkpoint import export as exports
from megacog.checkpoint.export import FRAME_TOKENIZER, open_export
from megacog.config.schema import ModelConfig
from megacog.errors import CheckpointError, ConfigError, DataError
from megacog.interop import main as convert
from megacog.interop.icetk_text import import_icetk_text
from megacog.interop.sat import SatTensors
from megacog.interop.tokenizers import GivenTokenizers
from megacog.runtime.files import sha256_file
from megacog.tokenizers.frames import load_frame_tokenizer, write_frame_tokenizer
from megacog.tokenizers.icetk_vqvae import IcetkVqvae, IcetkVqvaeConfig


def run(command: str, *arguments: object) -> int:
    return convert.main([command, *map(str, arguments)])


@dataclass(frozen=True)
class Given:
    """Tokenizer folders and a checkpoint whose model they fit."""

    text: Path
    frames: Path
    sat: Path
    model: ModelConfig


@pytest.fixture(scope="module")
def given(tmp_path_factory: pytest.TempPathFactory) -> Given:
    folder = tmp_path_factory.mktemp("given")
    pieces = write_text_model(folder / "ice_text.model")
    text = import_icetk_text(folder / "ice_text.model", folder / "text", pieces=pieces)
    (folder / "frames").mkdir()
    write_frame_tokenizer(folder / "frames", small_vqvae())
    model = sat_model(image_vocab_size=200, text_vocab_size=text.vocab_size + 2, boi_id=text.boi_id)
    return Given(folder / "text", folder / "frames", write_sat(folder / "sat", model, "sequential"), model)


def configured(path: Path, model: ModelConfig) -> Path:
    train = {"stage": "base", "run_dir": "run", "steps": 7, "global_batch_size": 1, "micro_batch_size": 1}
    sections = {"model": model.model_dump(mode="json"), "tokenizer": {"text": "t", "frames": "f"}, "train": train}
    path.write_text(json.dumps(sections))
    return path


def imports(given: Given, folder: Path, model: ModelConfig | None = None, **other: Path) -> Path:
    out = folder / "export"
    tokenizers = {"text": given.text, "frame": given.frames} | other
    words = [word for kind, path in tokenizers.items() for word in (f"--{kind}-tokenizer", path)]
    config = configured(folder / "config.yaml", model or given.model)
    assert run("import-sat", given.sat, "--out", out, "--config", config, *words) == 0
    return out


def test_tokenizers_of_the_model_are_put_in_and_verified(
    given: Given, tmp_path: Path, capsys: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    export = open_export(imports(given, tmp_path), verify=True)
    assert load_frame_tokenizer(export.frame_tokenizer).fingerprint == small_vqvae().fingerprint
    assert run("verify", export.path) == 0
    assert "text_tokenizer and frame_tokenizer" in capsys.readouterr().out
    assert "pixels" not in caplog.text


def test_tokenizers_of_another_model_are_refused_before_weights_are_read(
    given: Given, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(SatTensors, "check", lambda *_: pytest.fail("weights are read"))
    model, pieces = given.model, given.model.text_vocab_size - 2
    assert model.boi_id is not None
    for changes, message in (
        (
            {"text_vocab_size": pieces - 1},
            f"text has {pieces} text pieces, the model's text_vocab_size is {pieces - 1}",
        ),
        ({"boi_id": model.boi_id - 1}, f"id {model.boi_id}, the model's boi_id is {model.boi_id - 1}"),
        ({"image_vocab_size": 201}, "frames has 200 codes, the model's image_vocab_size is 201"),
    ):
        other = model.model_copy(update=changes)
        sat = write_sat(tmp_path / f"sat-{next(iter(changes))}", other, "sequential")
        with pytest.raises(ConfigError, match=message):
            imports(Given(given.text, given.frames, sat, other), tmp_path, other)
    assert not (tmp_path / "export").exists()


@pytest.mark.parametrize("kind", ["text", "frame"])
def test_what_is_no_tokenizer_folder_is_refused_before_weights_are_opened(
    given: Given, tmp_path: Path, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("megacog.interop.importing.find_checkpoint", lambda _: pytest.fail("weights are opened"))
    (tmp_path / "ice").touch()
    (tmp_path / "empty").mkdir()
    for name, message in (
        ("nothing", f"--{kind}-tokenizer .*nothing does not exist; run convert.py import-icetk-{kind}"),
        ("ice", f"--{kind}-tokenizer .*ice is a file; run convert.py import-icetk-{kind}"),
        ("empty", f"is .*empty a {kind} tokenizer folder"),
    ):
        with pytest.raises(DataError, match=message):
            imports(given, tmp_path, **{kind: tmp_path / name})
    assert not (tmp_path / "export").exists()


def bare(given: Given, folder: Path) -> Path:
    """An export without tokenizers."""
    config = configured(folder / "config.yaml", given.model)
    assert run("import-sat", given.sat, "--out", folder / "bare", "--config", config) == 0
    return folder / "bare"


def test_tokenizers_are_added_to_an_export_later_and_verified(
    given: Given, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    whole, export = imports(given, tmp_path), bare(given, tmp_path)
    weights = {path.name: path.stat().st_mtime_ns for path in export.iterdir() if path.suffix == ".safetensors"}
    assert run("add-tokenizers", export, "--text-tokenizer", given.text) == 0
    with pytest.raises(CheckpointError, match=f"add-tokenizers {export} --frame-tokenizer FOLDER$"):
        _ = open_export(export).frame_tokenizer
    assert run("add-tokenizers", export, "--frame-tokenizer", given.frames) == 0
    assert run("verify", export) == 0
    assert "text_tokenizer and frame_tokenizer" in capsys.readouterr().out
    one, other = (json.loads((folder / "manifest.json").read_text()) for folder in (whole, export))
    del one["files"]["config.yaml"], other["files"]["config.yaml"]  # names the folders that import-sat was given
    assert one == other
    assert all((export / name).stat().st_mtime_ns == time for name, time in weights.items())
    with pytest.raises(CheckpointError, match="holds a text tokenizer already"):
        run("add-tokenizers", export, "--text-tokenizer", given.text)
    with pytest.raises(ConfigError, match="nothing to add"):
        run("add-tokenizers", export)


def test_tokenizers_of_another_model_are_not_added(given: Given, tmp_path: Path) -> None:
    export = bare(given, tmp_path)
    before = {path: path.read_bytes() for path in export.rglob("*") if path.is_file()}
    (tmp_path / "other").mkdir()
    write_frame_tokenizer(tmp_path / "other", IcetkVqvae(IcetkVqvaeConfig(width=32, code_dim=4, codebook_size=100)))
    with pytest.raises(ConfigError, match="do not fit the model: .*other has 100 codes"):
        run("add-tokenizers", export, "--text-tokenizer", given.text, "--frame-tokenizer", tmp_path / "other")
    with pytest.raises(DataError, match="--text-tokenizer .*nothing does not exist"):
        run("add-tokenizers", export, "--text-tokenizer", tmp_path / "nothing")
    assert {path: path.read_bytes() for path in export.rglob("*") if path.is_file()} == before


def test_an_addition_that_is_stopped_adds_nothing_and_can_be_made_again(
    given: Given, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    export = bare(given, tmp_path)
    before = open_export(export).fingerprint
    with monkeypatch.context() as patch:
        patch.setattr(exports, "_manifest_text", lambda _: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            run("add-tokenizers", export, "--text-tokenizer", given.text, "--frame-tokenizer", given.frames)
    assert (export / "text_tokenizer").is_dir()
    stopped = open_export(export, verify=True)
    assert stopped.tokenizers == () and stopped.fingerprint == before
    assert run("add-tokenizers", export, "--text-tokenizer", given.text, "--frame-tokenizer", given.frames) == 0
    assert run("verify", export) == 0 and open_export(export).fingerprint != before


def test_verify_finds_a_tokenizer_of_another_model(given: Given, tmp_path: Path) -> None:
    export = imports(given, tmp_path)
    manifest = json.loads((export / "manifest.json").read_text())
    other = shutil.copytree(export, tmp_path / "other")
    text = (other / "config.yaml").read_text()
    assert f"boi_id: {given.model.boi_id}\n" in text
    (other / "config.yaml").write_text(text.replace(f"boi_id: {given.model.boi_id}\n", "boi_id: 1\n"))
    path = other / "config.yaml"
    manifest["files"]["config.yaml"] = {"bytes": path.stat().st_size, "sha256": sha256_file(path)}
    del manifest["crc32"]  # as of a former version
    (other / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(CheckpointError, match="text_tokenizer has <start_of_image> as id .*boi_id is 1"):
        run("verify", other)
    assert run("verify", export) == 0


@pytest.mark.parametrize(("rate", "grid", "warned"), [(8, (20, 20), False), (4, (20, 20), True), (4, (4, 4), False)])
def test_a_rate_that_is_not_the_release_s_is_warned_of(
    tmp_path: Path, rate: int, grid: tuple[int, int], warned: bool, caplog: pytest.LogCaptureFixture
) -> None:
    folder = tmp_path / FRAME_TOKENIZER
    folder.mkdir()
    write_frame_tokenizer(folder, small_vqvae(rate))
    model = ModelConfig(num_layers=1, hidden_size=8, num_heads=1, image_vocab_size=200, text_vocab_size=9, grid=grid)
    assert GivenTokenizers(None, folder).problems(model) == []
    assert ("clips will have 80 x 80 pixels, not 160 x 160" in caplog.text) == warned
