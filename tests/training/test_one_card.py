"""Training an attention-plus within the memory of one card: the program of configs/cogvideo-9b-single-48gb.yaml."""

from __future__ import annotations

import re
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from tiny_run import make_inputs, settings, write_config
from tracked_memory import TrackedMemory

from megacog.config.load import load_config
from megacog.errors import EnvError
from megacog.model.transformer import CogVideo
from megacog.parallel.fp8 import hold_in_fp8
from megacog.training import one_card, pretrain

ROOT = Path(__file__).resolve().parents[2]
CONFIG = ROOT / "configs/cogvideo-9b-single-48gb.yaml"
ONE_CARD: dict[str, Any] = {
    "base_precision": "fp8", "activation_checkpointing": "selective", "zero_stage": 1, "offload_optimizer": True,
}  # fmt: skip
BUCKET = 20_000
"""Elements of DeepSpeed's bucket in the small run."""


def elements(model: CogVideo) -> tuple[int, int, int]:
    """In e4m3, frozen in bf16, and trained."""
    parameters = list(model.parameters())
    held = sum(p.numel() for p in parameters if p.dtype == torch.uint8)
    trained = sum(p.numel() for p in parameters if p.requires_grad)
    return held, sum(p.numel() for p in parameters) - held - trained, trained


def on_meta(config: Any) -> CogVideo:
    with torch.device("meta"):
        model = CogVideo(config.model, ("sequential",))
    model.trainable("sequential")
    hold_in_fp8(model.layers)
    return model


def test_the_file_trains_as_it_says_and_counts_right() -> None:
    config = load_config(CONFIG, [])
    assert {key: getattr(config.train, key) for key in ONE_CARD} == ONE_CARD
    text = CONFIG.read_text()
    counts = [int(count.replace(",", "")) for count in re.findall(r"^# .*?(\d[\d,]{8,}) ", text, re.M)]
    assert counts[:3] == list(elements(on_meta(config)))
    lines = re.findall(r"^# .* (\d+\.\d+)$", text, re.M)
    *parts, whole = [float(line) for line in lines]
    assert len(parts) == 6 and sum(parts) == pytest.approx(whole, abs=0.05) and whole < 40


@pytest.fixture(scope="module")
def values(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """A sequential run of a model whose weights outweigh everything else, on a base of its own."""
    folder = tmp_path_factory.mktemp("inputs")
    inputs = make_inputs(folder)
    large = {"num_layers": 2, "hidden_size": 256}
    base = settings(inputs, folder / "base", "base", engine="torch", steps=1, eval_every=0)
    base["model"] |= large
    assert pretrain.main(["--config", str(write_config(folder / "base.yaml", base))]) == 0
    run = settings(inputs, folder / "run", "sequential", precision="bf16", steps=2, eval_every=0)
    run["train"] |= {"global_batch_size": 2, "micro_batch_size": 1}
    run["model"] |= large | {"inherit": str(folder / "base/export")}
    run["deepspeed"] = {"zero_optimization": {"reduce_bucket_size": BUCKET}}
    return run


def peak(values: dict[str, Any], run_dir: Path, cap: int | None = None, **train: Any) -> int:
    """Most bytes of tensors at once in a run before it saves, which takes copies to the host a file at a time."""
    run = values | {"train": values["train"] | {"run_dir": str(run_dir)} | train}
    config = write_config(run_dir.with_suffix(".yaml"), run)
    peaks: list[int] = []

    def end(checkpoints: Any, step: int, loss: Any) -> None:
        peaks.append(memory.peak)
        memory.cap = None

    with pytest.MonkeyPatch.context() as patch, TrackedMemory(cap) as memory:
        patch.setattr(pretrain.Checkpoints, "save", end)
        patch.setattr(pretrain.Checkpoints, "save_last", end)
        assert pretrain.main(["--config", str(config)]) == 0
    return peaks[0]


def test_a_small_run_stays_below_the_cap_that_the_arithmetic_gives(values: dict[str, Any], tmp_path: Path) -> None:
    path = write_config(tmp_path / "config.yaml", values)
    config = load_config(path, [])
    config = config.model_copy(update={"model": config.model.model_copy(update={"boi_id": 0})})
    held, others, trained = elements(on_meta(config))
    device = held + 2 * others + (2 + 4) * trained
    # Here the host's memory is counted, too: masters, moments and their gradients in fp32, a copy in bf16.
    host = (4 + 8 + 4 + 2) * trained
    # When the last backward pass ends: gradients as autograd made them, and copies in fp32 that are reduced.
    reduction = (2 + 4) * trained + 2 * 4 * BUCKET
    one_matrix = 2 * 4 * 3 * config.model.hidden_size**2  # in fp32, twice
    cap = device + host + reduction + one_matrix
    assert device + host < peak(values, tmp_path / "run", cap, **ONE_CARD) <= cap
    with pytest.raises(MemoryError):
        peak(values, tmp_path / "in-bf16", cap, **ONE_CARD | {"base_precision": None})


def test_the_proof_trains_a_small_model_of_the_same_run(capsys: pytest.CaptureFixture[str]) -> None:
    small = [
        "model.num_layers=2", "model.hidden_size=64", "model.num_heads=4", "model.grid=[4,4]", "model.boi_id=3",
        "model.base_positions=600", "model.image_vocab_size=64", "model.text_vocab_size=96", "train.threads=1",
    ]  # fmt: skip
    assert one_card.main(["--config", str(CONFIG), *small, "train.micro_batch_size=2"]) == 0
    out = capsys.readouterr().out
    assert "without a limit" in out and "step 2: 2 micro batches of 2, loss 4.1" in out


def test_a_missing_engine_is_told_before_the_model_is_built(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(one_card.importlib.util, "find_spec", lambda name: None)
    monkeypatch.setattr(one_card, "start_processes", lambda *_: pytest.fail("started"))
    with pytest.raises(EnvError, match="DeepSpeed, which is not installed here"):
        one_card.main(["--config", str(CONFIG)])


def test_a_card_smaller_than_the_limit_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    card = SimpleNamespace(total_memory=40 * 2**30)
    fractions: list[float] = []
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: card)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "Card")
    monkeypatch.setattr(torch.cuda, "set_per_process_memory_fraction", lambda share, device: fractions.append(share))
    device = torch.device("cuda")
    assert one_card.limit(device, 30) == "of which 30 GiB may be used" and fractions == [0.75]
    with pytest.raises(EnvError, match=r"--gib 44 is more than the 40.0 GiB of Card"):
        one_card.limit(device, 44)
