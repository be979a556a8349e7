"""The infer command, end to end with a tiny random export."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import av
import numpy as np
import pytest
from PIL import Image
from small_export import make_export

from megacog.errors import CheckpointError, ConfigError, EnvError
from megacog.generation import infer
from megacog.generation.infer import clip_stem, find_export, main, slug
from megacog.generation.output import can_write_mp4, write_mp4


@pytest.fixture(scope="module")
def export_path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_export(tmp_path_factory.mktemp("infer"), levels=1, top_k=8)


@pytest.fixture(scope="module")
def sequential_only(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_export(tmp_path_factory.mktemp("infer"), plus=("sequential",))


def write_prompts(folder: Path, *lines: str) -> Path:
    path = folder / "prompts.txt"
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return path


def results(out: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (out / "results.jsonl").read_text(encoding="utf-8").splitlines()]


def digest(path: str) -> str:
    return hashlib.sha256(Path(path).read_bytes()).hexdigest()


def test_the_shell_command_makes_every_good_prompt_and_reports_the_bad_ones(
    export_path: Path, tmp_path: Path, repository: Path
) -> None:
    """Through infer.sh, with a path that needs quoting, bad lines, an image and a video prompt."""
    folder = tmp_path / "a folder; $(touch hacked)"
    folder.mkdir()
    Image.fromarray(np.full((40, 60, 3), 200, dtype=np.uint8)).save(folder / "gray.png")
    write_mp4(folder / "old.mp4", np.zeros((17, 16, 16, 3), dtype=np.uint8), fps=8.0)
    (folder / "broken.png").write_bytes(b"no image")
    prompts = write_prompts(
        folder,
        "the digit 3 moves right",
        '{"text": "the digit 4 moves up", "image": "gray.png", "seed": 5}',
        '{"text": "the digit 5 moves up", "video": "old.mp4"}',
        '{"text": "the digit 6 moves up", "image": "broken.png"}',
        '{"text": "x", "secnds": 3}',
        "the digit 3 moves right " * 20,
    )
    environment = os.environ | {
        "VIRTUAL_ENV": str(Path(sys.executable).parents[1]),
        "PYTHONPATH": f"{repository}{os.pathsep}{repository / 'kernels'}",
        "MEGACOG_MODEL": str(export_path),
    }
    done = subprocess.run(
        ["bash", str(repository / "launch" / "infer.sh"), str(prompts), "--out", str(folder / "out"), "samples=1"],
        cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=240,
    )  # fmt: skip
    assert done.returncode == 1, done.stderr
    assert f"model: {export_path}" in done.stdout
    assert "27 frames of 3 clips" in done.stdout and "s per frame" in done.stdout
    assert "3 of 6 prompts failed" in done.stderr
    assert "prompts.txt:5: unknown key 'secnds'; did you mean 'seconds'" in done.stderr
    assert "Traceback" not in done.stderr
    assert not list(tmp_path.rglob("hacked"))
    rows = {row["line"]: row for row in results(folder / "out")}
    assert sorted(rows) == [1, 2, 3, 4, 5, 6]
    assert "not a readable png or jpg" in rows[4]["error"]
    assert "more than the 20 that the model reads" in rows[6]["error"]
    assert [rows[line]["given_frames"] for line in (1, 2, 3)] == [0, 1, 3]
    assert rows[2]["seed"] == 5 and rows[1]["seed"] == 1234
    assert rows[1]["settings"]["levels"] == 1 and rows[1]["settings"]["top_k"] == 8
    assert len(rows[1]["model_fingerprint"]) == 64
    names = {path.name for path in (folder / "out").iterdir()}
    assert names == {"results.jsonl"} | {
        f"{stem}.{kind}"
        for stem in ("0001_the-digit-3-moves-right", "0002_the-digit-4-moves-up", "0003_the-digit-5-moves-up")
        for kind in ("mp4", "gif", "png")
    }
    with av.open(rows[1]["paths"]["mp4"]) as container:
        frames = list(container.decode(video=0))
        assert len(frames) == 9 and (frames[0].height, frames[0].width) == (128, 128)


def test_equal_prompts_and_seeds_give_equal_clips_and_samples_differ(export_path: Path, tmp_path: Path) -> None:
    line = "the digit 8 moves down"
    seeded = [json.dumps({"text": line, "seed": seed}) for seed in (1234, 3)]
    prompts = write_prompts(tmp_path, line, *seeded)
    arguments = [str(prompts), "--model", str(export_path), "levels=0", "samples=2", "--scale", "1"]
    assert main([*arguments, "--out", str(tmp_path / "wide")]) == 0
    assert main([*arguments, "--out", str(tmp_path / "narrow"), "batch_size=1"]) == 0
    wide = {(row["line"], row["sample"]): digest(row["paths"]["mp4"]) for row in results(tmp_path / "wide")}
    narrow = {(row["line"], row["sample"]): digest(row["paths"]["mp4"]) for row in results(tmp_path / "narrow")}
    assert wide == narrow and len(wide) == 6
    assert wide[1, 0] == wide[2, 0] and wide[1, 1] == wide[2, 1]
    assert len({wide[1, 0], wide[1, 1], wide[3, 0], wide[3, 1]}) == 4


def test_without_a_video_library_clips_come_as_gif_and_png(
    export_path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "av", None)  # an import of it fails
    can_write_mp4.cache_clear()
    prompts = write_prompts(tmp_path, "the digit 1 moves left", "the digit 2 moves up")
    out = tmp_path / "out"
    assert main([str(prompts), "--model", str(export_path), "--out", str(out), "levels=0"]) == 0
    can_write_mp4.cache_clear()
    assert {path.suffix for path in out.iterdir()} == {".gif", ".png", ".jsonl"}
    assert all(set(row["paths"]) == {"gif", "png"} for row in results(out))
    shown = capsys.readouterr()
    assert "*.gif (also .png)" in shown.out and shown.err.count("no mp4 files will be written") == 1


def test_nothing_is_overwritten_without_force(export_path: Path, tmp_path: Path) -> None:
    prompts = write_prompts(tmp_path, "the digit 1 moves left")
    out = tmp_path / "out"
    out.mkdir()
    (out / "0001_the-digit-1-moves-left.gif").write_text("mine")
    arguments = [str(prompts), "--model", str(export_path), "--out", str(out), "levels=0"]
    with pytest.raises(EnvError, match="already holds 0001_the-digit-1-moves-left.gif"):
        main(arguments)
    assert [path.name for path in out.iterdir()] == ["0001_the-digit-1-moves-left.gif"]
    assert main([*arguments, "--force"]) == 0
    assert (out / "0001_the-digit-1-moves-left.gif").read_bytes().startswith(b"GIF89a")


def test_a_wrong_setting_names_the_closest_one(export_path: Path, tmp_path: Path) -> None:
    prompts = write_prompts(tmp_path, "the digit 1 moves left")
    with pytest.raises(ConfigError, match="guidance"):
        main([str(prompts), "--model", str(export_path), "--out", str(tmp_path / "out"), "guidence=3"])
    assert not (tmp_path / "out").exists()


def test_an_export_without_interpolation_makes_key_frames_only(sequential_only: Path, tmp_path: Path) -> None:
    prompts = write_prompts(tmp_path, "the digit 1 moves left")
    arguments = [str(prompts), "--model", str(sequential_only), "--out", str(tmp_path / "out")]
    with pytest.raises(CheckpointError, match="no attention-plus of stage interpolation; .*levels=0"):
        main(arguments)
    assert main([*arguments, "levels=0"]) == 0
    assert results(tmp_path / "out")[0]["frames"] == 5


def test_the_model_comes_from_the_argument_then_the_environment_then_the_newest_run(
    export_path: Path, sequential_only: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("MEGACOG_MODEL", raising=False)
    with pytest.raises(CheckpointError, match="quickstart.sh"):
        find_export(None, [tmp_path])
    older, newer = tmp_path / "runs" / "a" / "export", tmp_path / "runs" / "b" / "stage" / "export"
    for place, source, age in ((older, export_path, 1), (newer, sequential_only, 2)):
        place.parent.mkdir(parents=True)
        place.symlink_to(source, target_is_directory=True)
        os.utime(source / "manifest.json", (age, age))
    assert find_export(None, [tmp_path]) == sequential_only
    os.utime(export_path / "manifest.json", (3, 3))
    assert find_export(None, [tmp_path]) == export_path
    monkeypatch.setenv("MEGACOG_MODEL", "from-environment")
    assert find_export(None, [tmp_path]) == Path("from-environment")
    assert find_export("given", [tmp_path]) == Path("given")


def test_a_damaged_newest_export_is_named_with_the_one_that_can_be_used_instead(
    export_path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("MEGACOG_MODEL", raising=False)
    paths = [tmp_path / "runs" / name / "export" for name in ("oldest", "older", "newer", "newest")]
    for age, path in enumerate(paths):
        shutil.copytree(export_path, path)
        os.utime(path / "manifest.json", (age, age))
    for path in paths[2:]:
        (path / "model-00001.safetensors").write_bytes(b"cut")
    with pytest.raises(CheckpointError) as caught:
        find_export(None, [tmp_path])
    message, damaged = str(caught.value), paths[3] / "model-00001.safetensors"
    assert message.startswith(f"the newest export, {paths[3]}, cannot be used: {damaged} has 3 bytes")
    assert message.endswith(f"pass --model {paths[1]} to use it.")
    for age, path in enumerate(paths[:2]):
        (path / "manifest.json").write_text("{")
        os.utime(path / "manifest.json", (8 + age, 8 + age))
    with pytest.raises(CheckpointError, match=rf"{paths[1]}/manifest.json is damaged.*no whole one"):
        find_export(None, [tmp_path])


def test_decoding_to_pixels_is_reported_where_nobody_watches(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    clock = iter(range(0, 1000, 6))
    monkeypatch.setattr(infer, "time", SimpleNamespace(monotonic=lambda: next(clock)))
    meter = infer.FrameMeter(33, "decoding to pixels")
    with caplog.at_level("INFO", logger="megacog"):
        for _ in range(4):
            meter(3)
    assert caplog.messages == [f"decoding to pixels: {done} of 33 frames" for done in (6, 12)]


def test_file_names_hold_nothing_of_a_prompt_but_letters_digits_and_dashes() -> None:
    assert slug("../../etc/passwd; rm -rf $HOME") == "etc-passwd-rm-rf-home"
    assert slug("\u72ee\u5b50\u5728 \u559d\u6c34\u3002/..") == "\u72ee\u5b50\u5728-\u559d\u6c34"
    assert slug("Lo\u0308we_1 \u03a9\0\\:") == "l\u00f6we-1-\u03c9"
    assert slug("a" * 59 + " b") == "a" * 59
    assert slug("x" + "\u72ee" * 40) == "x" + "\u72ee" * 19  # 58 bytes: no half character
    assert slug("?! ...") == "" and clip_stem(3, "?!", 0, 1) == "0003"
    assert clip_stem(3, "\u72ee\u5b50", 0, 1) == "0003_\u72ee\u5b50"
    assert clip_stem(3, "A lion!", 1, 4) == "0003-2_a-lion"
