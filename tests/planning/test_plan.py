"""Plans of real configurations: counts, memory, what fits, refusals."""

from __future__ import annotations

import itertools
import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from run_ranks import ROOT, python_environment

from megacog.config.load import load_config
from megacog.config.schema import Config, PlusStage
from megacog.errors import ConfigError
from megacog.model.transformer import CogVideo
from megacog.planning import suggest
from megacog.planning.cluster import GIB, Assumptions, Cluster, Device, find_device, reported_gib
from megacog.planning.main import main
from megacog.planning.plan import Plan, plan
from megacog.planning.report import refusal
from megacog.planning.require import require_memory

CONFIGS = sorted((Path(__file__).parents[2] / "configs").glob("*.yaml"))
NINE = Path(__file__).parents[2] / "configs" / "cogvideo-9b.yaml"


def cluster(gpus: int = 1, nodes: int = 1, memory: float = 141, name: str = "H200", **assumed: float) -> Cluster:
    return Cluster(find_device(name, memory, "bf16"), gpus, nodes, Assumptions(**assumed))


@pytest.fixture(scope="module")
def nine() -> Config:
    return load_config(NINE)


def changed(config: Config, **train: Any) -> Config:
    return config.model_copy(update={"train": config.train.model_copy(update=train)})


@pytest.fixture(scope="module")
def on_one_h200(nine: Config) -> Plan:
    return plan(changed(nine, global_batch_size=32, micro_batch_size=8), cluster())


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_every_configuration_is_loaded_and_planned(path: Path) -> None:
    config = load_config(path)
    found = plan(config, Cluster(find_device("H100", 80, config.train.precision), 1, 1), (), suggest=False)
    assert found.trained > 0 and found.world == 1
    assert found.tokens_per_second and found.tokens_per_second > 0
    assert found.fits, "as they are, on one card of the usual kind"


def header(path: Path) -> str:
    """The comment at the top of a configuration, as one line."""
    lines = itertools.takewhile(lambda line: line.startswith("#"), path.read_text().splitlines())
    return " ".join(line.lstrip("# ") for line in lines)


def later_stages() -> list[Any]:
    """Every stage that a header says how to train after the file's own, with its words."""
    found = []
    for path in CONFIGS:
        for command in re.findall(r"train\.stage=\w+(?: [\w.]+=[^\s,;]+)*", header(path)):
            words = command.split()
            # Layers and samples are those of the stage beside it, but for the large grid.
            marks = [] if "32x32" in path.stem else [pytest.mark.slow]
            found.append(pytest.param(path, words, marks=marks, id=f"{path.stem}-{words[0].partition('=')[2]}"))
    return found


def test_headers_name_all_stages_that_can_be_trained() -> None:
    assert [case.id for case in later_stages()] == [
        "cogvideo-1.3b-16x32x32-sequential", "cogvideo-1.3b-sequential", "cogvideo-1.3b-interpolation",
        "cogvideo-125m-sequential", "cogvideo-125m-interpolation", "cogvideo-350m-sequential",
        "cogvideo-350m-interpolation", "cogvideo-9b-single-48gb-interpolation", "cogvideo-9b-interpolation",
    ]  # fmt: skip


@pytest.mark.parametrize(("path", "words"), later_stages())
def test_every_stage_that_a_header_names_is_loaded_and_planned(path: Path, words: list[str]) -> None:
    config = load_config(path, words)
    assert plan(config, Cluster(find_device("H100", 80, "bf16"), 1, 1), (), suggest=False).fits


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_headers_count_the_parameters_of_base_and_sets(path: Path) -> None:
    said = re.search(r"([\d.,]+)( billion| million)? parameters", header(path))
    if said is None:
        pytest.skip("counts nothing in sum")
    model = load_config(path).model
    stages: tuple[PlusStage, ...] = ("sequential", "interpolation") if model.num_frames % 2 else ("sequential",)
    with torch.device("meta"):
        built = CogVideo(model.model_copy(update={"boi_id": 0, "inherit": None}), stages)
    total = sum(parameter.numel() for parameter in built.parameters())
    if said[2] is None:
        assert total == int(said[1].replace(",", ""))
    else:
        digits = len(said[1].partition(".")[2])
        assert round(total / {" billion": 1e9, " million": 1e6}[said[2]], digits) == float(said[1])


def test_counts_of_the_9b_are_those_of_the_release(on_one_h200: Plan) -> None:
    assert on_one_h200.trained == 1_818_820_608
    assert on_one_h200.trained + on_one_h200.frozen == 7_721_127_936


def test_memory_of_the_9b_is_what_was_counted_by_hand(on_one_h200: Plan) -> None:
    """Per sample: 10.8 GiB without recomputation, 3.4 selective, 0.6 full; weights 14.4, masters and moments 20.3."""
    per_sample = {name: found.activations / 8 / GIB for name, found in on_one_h200.policies.items()}
    assert per_sample == pytest.approx({"none": 10.8, "selective": 3.4, "full": 0.6}, rel=0.1)
    assert on_one_h200.state["weights"] / GIB == pytest.approx(14.4, rel=0.01)
    assert (on_one_h200.state["masters"] + on_one_h200.state["moments"]) / GIB == pytest.approx(20.3, rel=0.01)
    peaks = [on_one_h200.policies[policy].peak for policy in ("full", "selective", "none")]
    assert peaks == sorted(peaks) and on_one_h200.peak == peaks[1], "the policy of the file is selective"


def test_work_of_the_9b_is_what_was_counted_by_hand(on_one_h200: Plan) -> None:
    """72.8 TFLOP per sample, and 119 ms on an H200 at the assumed rates without recomputation."""
    assert on_one_h200.seconds and on_one_h200.model_tflops
    per_sample = on_one_h200.model_tflops * on_one_h200.seconds / 32
    assert per_sample == pytest.approx(72.8, rel=0.05)


def test_one_card_of_48_gb_holds_what_was_counted_by_hand() -> None:
    """33.8e9 bytes: a base in e4m3, no optimizer state; 34.4e9 with a base in bf16 and micro batches of two."""
    for overrides, counted in (([], 33.8e9), (["train.base_precision=null", "train.micro_batch_size=2"], 34.4e9)):
        one = load_config(NINE.with_name("cogvideo-9b-single-48gb.yaml"), overrides)
        found = plan(one, cluster(memory=48, name="L40S"), (), suggest=False)
        assert found.peak == pytest.approx(counted, rel=0.01) and found.fits


def test_the_largest_micro_batch_fits_and_the_next_one_does_not(nine: Config, on_one_h200: Plan) -> None:
    largest = on_one_h200.policies["selective"].largest_micro_batch
    fits = plan(changed(nine, global_batch_size=4 * largest, micro_batch_size=largest), cluster(), (), suggest=False)
    larger = largest + 1
    fails = plan(changed(nine, global_batch_size=4 * larger, micro_batch_size=larger), cluster(), (), suggest=False)
    assert fits.fits and not fails.fits


def test_what_is_suggested_fits(nine: Config) -> None:
    too_much = changed(nine, activation_checkpointing="none", micro_batch_size=8, global_batch_size=512)
    found = plan(too_much, cluster(gpus=8, memory=80, name="A100"))
    assert not found.fits and found.suggestions
    for suggestion in found.suggestions:
        overrides = suggestion.split("  (")[0].split()
        given = ["train.activation_checkpointing=none", "train.micro_batch_size=8", "train.global_batch_size=512"]
        mended = load_config(NINE, [*given, *overrides])
        assert plan(mended, cluster(gpus=8, memory=80, name="A100"), (), suggest=False).fits, suggestion


SMALL = """
model: {num_layers: 2, hidden_size: 64, num_heads: 4, grid: [4, 4], text_length: 8, text_positions: 8,
  image_vocab_size: 50, text_vocab_size: 40, boi_id: 3, inherit: none}
tokenizer: {text: none, frames: none}
train: {stage: sequential, run_dir: none, steps: 10, global_batch_size: 16, micro_batch_size: 2}
"""


def test_a_plan_for_gpus_needs_no_triton(tmp_path: Path) -> None:
    """As after an install without GPU extras, in a process that has not loaded it either."""
    (tmp_path / "run.yaml").write_text(SMALL)
    blocked = "import sys, runpy; sys.modules['triton'] = None; sys.argv[0] = 'plan.py'; "
    command = [sys.executable, "-c", blocked + "runpy.run_path('launch/plan.py', run_name='__main__')"]
    command += ["--config", str(tmp_path / "run.yaml"), "--gpus", "8x80"]
    done = subprocess.run(command, cwd=ROOT, env=python_environment(), capture_output=True, text=True, timeout=240)
    assert done.returncode == 0 and "fits: peak" in done.stdout, done.stderr


def test_auto_is_the_reference_where_the_kernels_know_no_head_dim(tmp_path: Path) -> None:
    (tmp_path / "run.yaml").write_text(SMALL)

    def planned(*overrides: str) -> float:
        run = load_config(tmp_path / "run.yaml", ["model.hidden_size=192", *overrides])
        parts = plan(run, cluster(gpus=8, memory=80, name="H100"), (), suggest=False).parts
        assert parts
        return parts["attention"]

    assert planned("model.num_heads=2") == planned("model.num_heads=2", "train.kernels=reference")
    assert planned("model.num_heads=3") == planned("model.num_heads=3", "train.kernels=triton")
    assert planned("model.num_heads=3") != planned("model.num_heads=2")
    with pytest.raises(ConfigError, match="train.kernels: .* 16, 32, 64, 128, not 96"):
        planned("model.num_heads=2", "train.kernels=triton")


@pytest.mark.parametrize(("name", "memory", "has"), [("A40", 48, "8.6"), ("A100", 80, "8.0"), ("MI300X", 192, "none")])
def test_a_base_in_fp8_is_refused_where_nothing_multiplies_it(nine: Config, name: str, memory: int, has: str) -> None:
    with pytest.raises(ConfigError, match=f"needs compute capability 8.9 .*{name} .*{has}"):
        plan(changed(nine, base_precision="fp8"), cluster(memory=memory, name=name))


@pytest.mark.parametrize("name", ["A40", "L40S"])
def test_one_card_that_is_too_small_is_told_of_the_hosts_memory(nine: Config, name: str) -> None:
    found = plan(nine, cluster(memory=48, name=name))
    assert not found.fits and any("train.offload_optimizer=true" in line for line in found.suggestions)
    assert any("base_precision=fp8" in line for line in found.suggestions) == (name == "L40S")
    assert not any("zero_stage=2" in line or "zero_stage=3" in line for line in found.suggestions), "on one card"


def test_what_is_suggested_takes_larger_micro_batches_too(nine: Config) -> None:
    """ZeRO 1 needs most to average gradients, whatever the micro batch; ZeRO 2 leaves room for two samples."""
    one = changed(nine, zero_stage=1, micro_batch_size=1, global_batch_size=512)
    found = plan(one, cluster(gpus=8, memory=32, name="A100"))
    assert any(line.startswith("train.zero_stage=2 train.micro_batch_size=2 ") for line in found.suggestions)


def test_zero_3_must_hold_the_whole_model_while_it_is_built(nine: Config) -> None:
    """Its steps take 10.6 GiB on 8 ranks; the model that each rank builds and then cuts, 14.4."""
    three = changed(nine, zero_stage=3, activation_checkpointing="full", micro_batch_size=1)
    small, enough = (plan(three, cluster(gpus=8, memory=memory), (), suggest=False) for memory in (16, 17))
    assert not small.fits and enough.fits
    assert small.policies["full"].peak_when == "while the model is built"
    assert small.peak == pytest.approx(14.38 * GIB, rel=1e-3) and small.policies["full"].largest_micro_batch == 0


@pytest.fixture
def small(tmp_path: Path) -> Config:
    (tmp_path / "run.yaml").write_text(SMALL)
    return load_config(tmp_path / "run.yaml")


def test_a_hopeless_run_is_refused_without_passes_of_what_cannot_fit(
    small: Config, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(suggest, "plan_peak", lambda *_: pytest.fail("made a pass"))
    tiny = cluster(gpus=8, memory=1)
    found = plan(small, tiny, ())
    assert found.usable == 0 and found.suggestions == []
    assert "tensors may take 0.0 GiB" in refusal(found, small, gpu=True)


def test_of_many_ranks_one_looks_for_what_fits(small: Config, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[Config] = []
    monkeypatch.setattr(suggest, "suggestions", lambda config, _: asked.append(config) or iter(()))
    for one in (False, True):
        with pytest.raises(ConfigError, match="the run needs"):
            require_memory(small, cluster(gpus=8, memory=1), suggest=one)
        assert len(asked) == one


@pytest.mark.parametrize(
    ("name", "sold", "reported"), [("L40S", 48, 44.42), ("A100", 80, 79.15), ("H200", 141, 139.8), (None, 80, 79.1)]
)
def test_a_nominal_size_is_what_such_a_device_reports(name: str | None, sold: float, reported: float) -> None:
    assert find_device(name, sold, "bf16").memory_gib == reported
    assert find_device("A100", 32, "bf16").memory_gib == 32, "any other size is taken as it is"
    assert (reported_gib(48), reported_gib(77)) == (44.42, 77), "of devices without a name, the smallest"


def test_a_checkpoint_is_as_large_for_any_number_of_tensor_parallel_ranks(small: Config) -> None:
    alone, shared = (
        plan(small.model_copy(update={"parallel": small.parallel.model_copy(update={"tensor": tensor})}),
             cluster(gpus=2), (), suggest=False)
        for tensor in (1, 2)
    )  # fmt: skip
    assert shared.trained < alone.trained
    assert (shared.checkpoint, shared.frozen_checkpoint) == (alone.checkpoint, alone.frozen_checkpoint)


def test_a_refusals_numbers_add_up(nine: Config) -> None:
    found = plan(changed(nine, zero_stage=1, micro_batch_size=1, activation_checkpointing="full"), cluster(memory=48))
    message = refusal(found, nine, gpu=True)
    assert "while gradients are averaged: state" in message
    parts = found.policies[found.policy].peak_parts
    assert sum(parts.values()) == pytest.approx(found.peak) and parts["activations"] == 0


def test_a_run_that_cannot_fit_is_refused_with_the_planners_numbers(nine: Config) -> None:
    small = Cluster(Device("some GPU", 24), 1, 1)
    with pytest.raises(ConfigError, match=r"(?s)needs \d+\.\d GiB per GPU.*may take 21\.4 GiB.*memory_check=false"):
        require_memory(changed(nine, global_batch_size=4), small)
    require_memory(changed(nine, global_batch_size=4, memory_check=False), small)


def test_ranks_and_batches_that_do_not_divide_are_refused_with_what_does(nine: Config) -> None:
    message = "416 is not a multiple of .* 4 x 12 data-parallel ranks = 48; .* train.global_batch_size=384 or 432$"
    with pytest.raises(ConfigError, match=message):
        plan(nine, cluster(gpus=6, nodes=2))
    with pytest.raises(ConfigError, match="global_batch_size=384 or 480, or train.micro_batch_size=4 or 13$"):
        plan(changed(nine, micro_batch_size=12), cluster(gpus=8))
    tensor = nine.model_copy(update={"parallel": nine.parallel.model_copy(update={"tensor": 2})})
    with pytest.raises(ConfigError, match="parallel.tensor 2 x parallel.sequence 1 do not divide the 13 ranks"):
        plan(tensor, cluster(gpus=1, nodes=13))


def test_more_nodes_wait_longer_for_gradients_but_no_work_changes(nine: Config) -> None:
    one, many = (
        plan(changed(nine, global_batch_size=4 * 8 * nodes), cluster(gpus=8, nodes=nodes), (), suggest=False)
        for nodes in (1, 64)
    )
    assert one.parts and many.parts
    assert one.parts["gemm"] == many.parts["gemm"]
    assert one.parts["exposed"] < many.parts["exposed"]
    assert one.parts["optimizer"] > many.parts["optimizer"], "shares of the optimizer are smaller"


def test_the_command_prints_a_plan_and_says_75_when_it_does_not_fit(capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["--config", str(CONFIGS[0]), "--gpus"]
    assert main([*arguments, "8x80", "--device", "H100"]) == 0
    text = capsys.readouterr().out
    assert "fits: peak" in text and "predicted" in text and "this run" in text
    assert main([*arguments, "1x0.5", "--device", "H100", "train.global_batch_size=52"]) == 75
    assert "DOES NOT FIT" in capsys.readouterr().out


def test_the_command_prints_json_and_a_weak_scaling_table(capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["--config", str(CONFIGS[0]), "--gpus", "8x80"]
    assert main([*arguments, "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["world"] == 8
    assert main([*arguments, "--weak-scaling", "8,16,64"]) == 0
    rows = [line.split() for line in capsys.readouterr().out.splitlines()]
    assert [row[0] for row in rows] == ["GPUs", "8", "16", "64"]
    assert rows[1][-2:] == ["100.0", "%"]
    assert main([*arguments, "--weak-scaling", "8,16", "--json"]) == 0
    assert [each["world"] for each in json.loads(capsys.readouterr().out)] == [8, 16]


@pytest.mark.parametrize("sizes", ["8,a", "8,", "0"])
def test_sizes_that_are_no_numbers_are_told(sizes: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["--config", str(CONFIGS[0]), "--gpus", "8x80", "--weak-scaling", sizes])
    assert "--weak-scaling: '" in (said := capsys.readouterr().err) and "is no whole number above 0" in said


def test_bad_sizes_of_gpus_are_told_before_torch_is_loaded() -> None:
    blocked = "import sys; sys.modules['torch'] = None; from megacog.commands import plan; plan()"
    command = [sys.executable, "-c", blocked, "--config", str(CONFIGS[0]), "--gpus", "8*80"]
    done = subprocess.run(command, cwd=ROOT, env=python_environment(), capture_output=True, text=True, timeout=60)
    assert done.returncode == 75 and done.stderr.startswith("error: --gpus 8*80: expected"), done.stderr


@pytest.mark.parametrize(
    ("gpus", "device", "assume", "message"),
    [
        ("8*80", None, [], "--gpus 8*80: expected GPUs per node x GiB of each"),
        ("8x80", "H1000", [], "device 'H1000' is not known; --device takes H100"),
        ("8x77", None, [], "a device of 77 GiB is not known"),
        ("8x80", None, ["gem=1"], "--assume gem=1: expected one of attention_share"),
        ("8x80", None, ["gemm_share=x"], "expected name=number"),
        ("8x80", None, ["gemm_share=0"], "--assume gemm_share=0: expected a share above 0, at most 1"),
        ("8x80", None, ["link_share=50"], "--assume link_share=50: expected a share above 0, at most 1"),
        ("8x80", None, ["pcie_bandwidth=0"], "--assume pcie_bandwidth=0: expected positive"),
        ("8x80", None, ["latency=-1"], "--assume latency=-1: expected not negative"),
        ("8x80", None, ["spread=nan"], "--assume spread=nan: expected not negative"),
    ],
)
def test_bad_arguments_are_told(gpus: str, device: str | None, assume: list[str], message: str) -> None:
    options = [part for setting in assume for part in ("--assume", setting)]
    options += ["--device", device] if device else []
    with pytest.raises(ConfigError, match=re.escape(message)):
        main(["--config", str(CONFIGS[0]), "--gpus", gpus, *options])


def test_a_cpu_has_memory_and_no_predicted_time(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--config", str(CONFIGS[-1]), "--gpus", "2x16", "--device", "cpu"]) == 0
    assert "time: not predicted" in capsys.readouterr().out


def test_an_offloaded_optimizer_takes_the_hosts_time_and_memory() -> None:
    one = load_config(NINE.with_name("cogvideo-9b-single-48gb.yaml"))
    found, faster = (plan(one, cluster(memory=48, name="L40S", pcie_bandwidth=rate), (), suggest=False)
                     for rate in (25e9, 50e9))  # fmt: skip
    assert found.host == 18 * found.trained, "masters and moments 12, gradients 4, weights on their way back 2"
    assert found.parts and faster.parts
    assert found.parts["optimizer"] == pytest.approx(found.trained * (50 / 100e9 + 6 / 25e9))
    assert found.parts["optimizer"] - faster.parts["optimizer"] == pytest.approx(found.trained * 6 / 50e9)


def test_reference_attention_has_its_time(nine: Config) -> None:
    """It computes what masks hide, so more than the kernels do."""
    small = Cluster(find_device("H100", 80, "bf16"), 1, 1)
    run = load_config(CONFIGS[0])
    kernels, reference = (plan(changed(run, kernels=which), small, (), suggest=False).parts
                          for which in ("auto", "reference"))  # fmt: skip
    assert kernels and reference and reference["attention"] > kernels["attention"] > 0


def test_a_ring_over_nodes_is_as_fast_as_the_network_of_a_node() -> None:
    whole = cluster(gpus=8, nodes=4, link_share=1)
    assert whole.ring_bandwidth(8) == 450e9
    assert whole.ring_bandwidth(32) == 8 * 50e9
    assert whole.ring_bandwidth(4, neighbors=8) == 50e9, "eight rings share the network cards"
