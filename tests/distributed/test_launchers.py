"""The main job under real launchers, killed and started again, and on ranks of which one fails."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from run_ranks import ROOT, Ranks, python_environment, run_jobs, run_ranks
from tiny_run import make_inputs, settings, write_config

from megacog.checkpoint.discovery import list_checkpoints
from megacog.checkpoint.export import open_export
from megacog.metrics.record import read_records
from megacog.runtime.ranks import free_port

pytestmark = [pytest.mark.distributed, pytest.mark.slow, pytest.mark.timeout(900)]
PROMPT = "the digit 3 moves left"
BIN = Path(sys.executable).parent


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_inputs(tmp_path_factory.mktemp("inputs"))


def config_of(inputs: Path, run_dir: Path, **train: Any) -> Path:
    values = settings(inputs, run_dir, "base", **train)
    values["samples"] = {"every": 4, "prompts": [PROMPT]}
    values["deepspeed"] = {"zero_optimization": {"stage3_param_persistence_threshold": 0}}
    return write_config(run_dir.with_suffix(".yaml"), values)


def losses(run_dir: Path) -> list[tuple[float, float]]:
    records = read_records(run_dir / "metrics.jsonl")
    return [(record["loss"], record["grad_norm"]) for record in records if record["kind"] == "train"]


def tensors(run_dir: Path) -> dict[str, torch.Tensor]:
    export = open_export(run_dir / "export", verify=True)
    return {name: export.tensor(name) for name in export.files}


def launch(command: list[str], timeout: float = 250, **environment: str) -> str:
    result = subprocess.run(
        command, cwd=ROOT, env=python_environment() | environment, capture_output=True, text=True, timeout=timeout
    )
    assert result.returncode == 0, result.stdout[-3000:] + result.stderr[-3000:]
    return result.stdout + result.stderr


def test_every_launcher_gives_the_same_run(inputs: Path, tmp_path: Path) -> None:
    options = {"engine": "deepspeed", "zero_stage": 2, "learning_rate": 1e-3}  # rounding must not grow
    place = ["launch/pretrain.py", "--config"]
    launch([sys.executable, *place, str(config_of(inputs, tmp_path / "python", **options))])
    port = str(free_port())
    launch(
        [str(BIN / "deepspeed"), "--num_accelerators", "2", "--master_port", port, *place,
         str(config_of(inputs, tmp_path / "deepspeed", **options))]
    )  # fmt: skip
    launch(
        [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", *place,
         str(config_of(inputs, tmp_path / "torchrun", **options)), "train.zero_stage=3"]
    )  # fmt: skip
    expected, weights = losses(tmp_path / "python"), tensors(tmp_path / "python")
    assert len(expected) == 8
    for name in ("deepspeed", "torchrun"):
        for one, other in zip(losses(tmp_path / name), expected, strict=True):
            assert one == pytest.approx(other, rel=1e-5)
        for key, tensor in tensors(tmp_path / name).items():
            torch.testing.assert_close(tensor, weights[key], rtol=1e-3, atol=1e-4)
        assert (tmp_path / name / "samples/step-0000008/contact_sheet.png").is_file()


@pytest.mark.parametrize("wrong", ["train.global_batch_size=3", "train.no_such_key=1"])
def test_what_all_ranks_find_wrong_is_told_once(inputs: Path, tmp_path: Path, wrong: str) -> None:
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2",
               "launch/pretrain.py", "--config", str(config_of(inputs, tmp_path / "run")), wrong]  # fmt: skip
    started = time.monotonic()
    done = subprocess.run(command, cwd=ROOT, env=python_environment(), capture_output=True, text=True, timeout=250)
    assert done.returncode != 0 and done.stderr.count("error: ") == 1, done.stderr
    assert time.monotonic() - started < 100, "the other rank is ended by the launcher"


def test_training_needs_no_compiler(inputs: Path, tmp_path: Path) -> None:
    config = config_of(inputs, tmp_path / "run", engine="deepspeed", zero_stage=1, steps=1, precision="bf16")
    empty = tmp_path / "bin"
    empty.mkdir()
    launch([sys.executable, "launch/pretrain.py", "--config", str(config)], PATH=str(empty))
    assert (tmp_path / "run/export/manifest.json").is_file()


@pytest.mark.parametrize(
    ("override", "zero_stage"), [("parallel.tensor=1", 3), ("parallel.tensor=2", 1), ("parallel.sequence=2", 2)]
)
def test_two_killed_ranks_continue_bitwise(inputs: Path, tmp_path: Path, override: str, zero_stage: int) -> None:
    options = {"engine": "deepspeed", "zero_stage": zero_stage, "precision": "bf16", "steps": 12}
    whole = config_of(inputs, tmp_path / "whole", **options)
    run_ranks(["launch/pretrain.py", "--config", str(whole), override], 2, tmp_path / "logs-whole").assert_success()
    arguments = ["launch/pretrain.py", "--config", str(config_of(inputs, tmp_path / "cut", **options)), override]
    with Ranks(arguments, 2, tmp_path / "logs-cut") as ranks:
        deadline = time.monotonic() + 200
        while not list_checkpoints(tmp_path / "cut"):
            assert time.monotonic() < deadline and ranks.processes[0].poll() is None, ranks.logs[0].read_text()
            time.sleep(0.02)
        for process in ranks.processes:
            os.killpg(process.pid, signal.SIGKILL)
    assert not (tmp_path / "cut/export").exists()
    run_ranks(arguments, 2, tmp_path / "logs-again").assert_success()
    assert losses(tmp_path / "cut") == losses(tmp_path / "whole")
    found, expected = tensors(tmp_path / "cut"), tensors(tmp_path / "whole")
    assert found.keys() == expected.keys() and all(torch.equal(found[name], expected[name]) for name in found)


def test_a_signal_to_one_rank_stops_all_with_a_checkpoint_and_code_85(inputs: Path, tmp_path: Path) -> None:
    config = config_of(inputs, tmp_path / "run", engine="torch", steps=100_000)
    with Ranks(["launch/pretrain.py", "--config", str(config)], 2, tmp_path / "logs") as ranks:
        deadline = time.monotonic() + 200
        while not list_checkpoints(tmp_path / "run"):
            assert time.monotonic() < deadline and ranks.processes[0].poll() is None, ranks.logs[0].read_text()
            time.sleep(0.02)
        ranks.processes[1].send_signal(signal.SIGTERM)
        assert ranks.wait(60).codes == [85, 85]
    last = list(read_records(tmp_path / "run/metrics.jsonl"))[-1]["step"]
    assert list_checkpoints(tmp_path / "run")[0].name == f"step-{last:07d}"


def test_a_rank_that_cannot_write_fails_the_checkpoint_everywhere(tmp_path: Path) -> None:
    for message in run_jobs(["failing_save"], 2, tmp_path)["failing_save"]:
        assert "rank 1" in message["error"] and "No space left" in message["error"]
        assert message["left"] == ["owner.json"]
