from __future__ import annotations

import json
import os
import signal
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import safetensors.torch
import torch
from PIL import Image

from megacog.errors import ConfigError, DataError
from megacog.prepare import digits
from megacog.prepare.frame_pool import (
    FramePool,
    PoolSettings,
    choose_videos,
    list_videos,
    load_pool,
    split_heldout,
)
from megacog.prepare.frame_report import measure
from megacog.prepare.perceptual import PerceptualLoss, expected_shapes
from megacog.prepare.train_frames import (
    FrameTrainer,
    FrameTraining,
    learning_rate,
    partial_path,
    run_training,
    training_identity,
)
from megacog.prepare.train_tokenizer import main
from megacog.tokenizers.frames import ConvTokenizerConfig, load_frame_tokenizer
from megacog.tokenizers.text import TextTokenizer

TINY = ConvTokenizerConfig(width=4, blocks=1, codebook_size=16, code_dim=4)
SHORT = FrameTraining(tokenizer=TINY, steps=6, batch_size=4, warmup_steps=2)


@pytest.fixture(scope="module")
def pool() -> FramePool:
    return FramePool([digits.render(clip) for clip in digits.corpus_clips("train", 8, 0)])


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("corpus") / "digits"
    digits.main([str(out), "--clips", "6", "--heldout-clips", "2"])
    return out


def same(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


def interrupt_after(trainer: FrameTrainer, steps: int, monkeypatch: pytest.MonkeyPatch) -> None:
    real_step = trainer.step

    def step() -> dict[str, float]:
        values = real_step()
        if trainer.step_number == steps:
            os.kill(os.getpid(), signal.SIGINT)
        return values

    monkeypatch.setattr(trainer, "step", step)


@pytest.mark.parametrize("quantizer", ["fsq", "ema_vq"])
def test_interrupted_run_ends_with_the_same_bits(
    pool: FramePool, tmp_path: Path, quantizer: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = replace(SHORT, tokenizer=replace(TINY, quantizer=quantizer))
    identity = training_identity(settings)
    whole = FrameTrainer(settings, pool)
    run_training(whole, tmp_path / "whole", identity)
    assert not partial_path(tmp_path / "whole").exists()

    stopped = FrameTrainer(settings, pool)
    interrupt_after(stopped, 3, monkeypatch)
    with pytest.raises(KeyboardInterrupt):
        run_training(stopped, tmp_path / "out", identity)
    assert stopped.step_number == 3
    assert not same(stopped.state(), whole.state())
    continued = FrameTrainer(settings, pool)
    run_training(continued, tmp_path / "out", identity)
    assert same(continued.state(), whole.state())
    assert continued.tokenizer.fingerprint == whole.tokenizer.fingerprint


def test_unfinished_run_of_other_settings_is_refused(
    pool: FramePool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    stopped = FrameTrainer(SHORT, pool)
    interrupt_after(stopped, 2, monkeypatch)
    with pytest.raises(KeyboardInterrupt):
        run_training(stopped, tmp_path / "out", training_identity(SHORT))
    other = replace(SHORT, learning_rate=1e-3)
    with pytest.raises(ConfigError, match="learning_rate: 0.004 -> 0.001.*--restart"):
        run_training(FrameTrainer(other, pool), tmp_path / "out", training_identity(other))
    state = tmp_path / "out.partial" / "state.safetensors"
    state.write_bytes(state.read_bytes()[:-50])
    with pytest.raises(DataError, match="cannot be read.*--restart"):
        run_training(FrameTrainer(SHORT, pool), tmp_path / "out", training_identity(SHORT))


@pytest.mark.parametrize("quantizer", ["fsq", "ema_vq"])
def test_training_learns_to_reconstruct(pool: FramePool, quantizer: str) -> None:
    config = ConvTokenizerConfig(quantizer=quantizer, width=8, blocks=1, codebook_size=64, code_dim=8)
    trainer = FrameTrainer(FrameTraining(tokenizer=config, steps=80, batch_size=8), pool)
    while trainer.step_number < 80:
        values = trainer.step()
    report = measure(trainer.tokenizer.eval(), pool)
    # A black frame gets 14 dB.
    assert report["psnr_db"] > 17.5, (report, values)
    assert report["perplexity"] > 4, report


def test_lone_blank_pixels_do_not_collapse_the_codes(pool: FramePool) -> None:
    trainer = FrameTrainer(FrameTraining(tokenizer=replace(TINY, width=8), steps=30, batch_size=8), pool)
    output = trainer.tokenizer.decoder[-1].bias
    assert torch.allclose(output, torch.full((3,), -1.0))
    while trainer.step_number < 30:
        trainer.step()
    assert measure(trainer.tokenizer.eval(), pool)["used_codes_share"] > 0.1


def test_temporal_loss_compares_differences_of_neighbors(pool: FramePool) -> None:
    trainer = FrameTrainer(replace(SHORT, temporal_weight=2.0), pool)
    generator = torch.Generator().manual_seed(0)
    output, real = (torch.randn(4, 3, 8, 8, generator=generator) for _ in range(2))
    expected = 2.0 * ((output[2:] - output[:2]) - (real[2:] - real[:2])).abs().mean()
    assert torch.allclose(trainer._losses(output, real)["temporal"], expected)


def test_pairs_are_neighbors_in_the_same_clip() -> None:
    clips = [np.full((n, 4, 4, 3), 10 * k, np.uint8) + np.arange(n, dtype=np.uint8)[:, None, None, None]
             for k, n in enumerate((5, 1, 3))]  # fmt: skip
    pairs = FramePool(clips).pairs(200, torch.Generator().manual_seed(0))[:, 0, 0, 0].int()
    first, second = pairs.chunk(2)
    assert torch.equal(first // 10, second // 10)
    alone = first // 10 == 1
    assert torch.equal((first - second).abs(), (~alone).int())
    assert len(first.unique()) == 9


def test_learning_rate_warms_up_and_decays() -> None:
    settings = FrameTraining(steps=100, warmup_steps=10, learning_rate=1.0, min_learning_rate_ratio=0.1)
    rates = [learning_rate(settings, step) for step in range(100)]
    assert rates[0] == pytest.approx(0.1) and rates[9] == pytest.approx(1.0) == max(rates)
    assert all(later < earlier for earlier, later in zip(rates[10:], rates[11:], strict=False))
    assert rates[-1] == pytest.approx(0.1, abs=1e-3)


def test_frames_command_writes_a_loadable_folder(corpus: Path, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    out = tmp_path / "frames"
    options = ["--heldout", str(corpus / "heldout"), "--steps", "3", "--batch", "4", "--width", "4", "--workers", "1"]
    command = ["frames", str(corpus / "train"), "--out", str(out), *options]
    assert main(command) == 0
    assert "held-out PSNR" in capsys.readouterr().out
    assert sorted(path.name for path in out.iterdir()) == [
        "model.safetensors",
        "reconstruction.png",
        "report.json",
        "tokenizer.json",
    ]
    report = json.loads((out / "report.json").read_text())
    assert report["fingerprint"] == load_frame_tokenizer(out).fingerprint
    assert report["codebook_size"] == 200 and report["heldout_videos"] == 2 and report["training_videos"] == 6
    assert 5 < report["psnr_db"] < 40 and 1 <= report["perplexity"] <= 200
    with Image.open(out / "reconstruction.png") as picture:
        assert picture.size == (8 * 34 * 3, 2 * 34 * 3)
    assert not partial_path(out).exists()
    with pytest.raises(DataError, match="exists already.*--force"):
        main(command)
    assert main(["show", str(out)]) == 0
    assert json.loads(capsys.readouterr().out)["report"] == report


def test_gifs_and_folders_of_frames_are_read_and_broken_videos_passed_over(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    frames = [Image.fromarray(np.full((20, 30, 3), 20 * k, np.uint8)) for k in range(5)]
    frames[0].save(tmp_path / "a.gif", save_all=True, append_images=frames[1:], duration=125)
    (tmp_path / "b").mkdir()
    for k, frame in enumerate(frames):
        frame.save(tmp_path / "b" / f"{k}.png")
    (tmp_path / "c.mp4").write_bytes(b"no video")
    videos = list_videos([tmp_path])
    assert [path.name for path in videos] == ["a.gif", "b", "c.mp4"]
    pool = load_pool(videos, PoolSettings(height=8, width=12, workers=1, frames_per_video=4), "reading")
    assert pool.frames_NHWC.shape == (8, 8, 12, 3)
    assert "c.mp4" in caplog.text
    with pytest.raises(DataError, match="none of 1 videos.*c.mp4"):
        load_pool(videos[2:], PoolSettings(workers=1), "reading")


def test_missing_and_empty_sources_are_errors(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="nowhere: no such"):
        list_videos([tmp_path / "nowhere"])
    with pytest.raises(DataError, match="no videos found"):
        list_videos([tmp_path])
    (tmp_path / "notes.txt").write_text("x")
    with pytest.raises(DataError, match="not a video"):
        list_videos([tmp_path / "notes.txt"])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--size", "30"], "not a multiple of --downsample 4"),
        (["--batch", "3"], "even number"),
        (["--steps", "0"], "at least 1"),
        (["--levels", "8,1"], "at least 2"),
        (["--downsample", "3"], "power of two"),
        (["--heldout-fraction", "1"], "between 0 and 1"),
        (["--fps", "0"], "--fps must be positive"),
    ],
)
def test_bad_options_are_errors_before_any_work(tmp_path: Path, options: list[str], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        main(["frames", str(tmp_path), "--out", str(tmp_path / "out"), *options])


def test_heldout_split_is_by_path_and_disjoint() -> None:
    videos = [Path(f"{k:03d}.mp4") for k in range(100)]
    train, heldout = split_heldout(videos, 0.1)
    assert len(heldout) == 10 and sorted([*train, *heldout]) == videos
    assert split_heldout(videos[::-1], 0.1)[1] == heldout[::-1]
    assert split_heldout(videos[:1], 0.1) == (videos[:1], videos[:1])
    chosen = choose_videos(videos, PoolSettings(max_videos=7))
    assert len(set(chosen)) == 7 and chosen == sorted(chosen)
    assert choose_videos(videos, PoolSettings(max_videos=7, seed=1)) != chosen


def test_perceptual_loss_is_zero_for_equal_images_and_has_a_gradient() -> None:
    generator = torch.Generator().manual_seed(0)
    weights = {name: 0.05 * torch.rand(shape, generator=generator) for name, shape in expected_shapes().items()}
    loss = PerceptualLoss(weights)
    image = torch.rand(1, 3, 32, 32, generator=generator) * 2 - 1
    assert loss(image, image) == 0
    other = (-image).requires_grad_()
    distance = loss(other, image)
    distance.backward()
    assert distance > 0 and other.grad is not None and other.grad.abs().sum() > 0
    assert not list(loss.parameters())


def test_perceptual_weights_with_wrong_names_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "weights.safetensors"
    with pytest.raises(DataError, match="cannot be read"):
        PerceptualLoss.load(path)
    safetensors.torch.save_file({"features.0.weight": torch.zeros(64, 3, 5, 5)}, path)
    with pytest.raises(DataError, match=r"31 of 31 tensors wrong.*features.0.bias is missing"):
        PerceptualLoss.load(path)


def test_text_command_reads_caption_files(corpus: Path, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    out = tmp_path / "text"
    options = ["--out", str(out), "--vocab-size", "64", "--template", "{span}s", "--null-caption", "a clip"]
    assert main(["text", str(corpus / "train" / "captions.csv"), *options]) == 0
    assert "unknown 0.000 %" in capsys.readouterr().out
    tokenizer = TextTokenizer.load(out)
    assert tokenizer.settings.template == "{span}s"
    assert main(["show", str(out)]) == 0
    assert json.loads(capsys.readouterr().out)["vocab_size"] == tokenizer.vocab_size


def test_text_command_names_the_line_of_an_empty_caption(tmp_path: Path) -> None:
    table = tmp_path / "captions.csv"
    table.write_text("video,caption\na.mp4,a dog\nb.mp4,\n")
    with pytest.raises(DataError, match=r"captions.csv:3: "):
        main(["text", str(table), "--out", str(tmp_path / "text"), "--vocab-size", "64"])
    assert not (tmp_path / "text").exists()


def test_show_of_another_folder_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="neither a text tokenizer"):
        main(["show", str(tmp_path)])
