"""Job scripts on a real SLURM cluster of two nodes: to the end, through a dead node, through the time limit."""

from __future__ import annotations

import json
import os
import re
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from mpi_ranks import ALLOWED
from run_ranks import ROOT
from slurm_cluster import PROGRAMS, SlurmCluster
from small_export import make_export
from tiny_run import make_inputs, settings, write_config
from video_corpus import made, make_corpus, prepare_alone, prepare_words

from megacog.checkpoint.discovery import list_checkpoints
from megacog.checkpoint.export import open_export
from megacog.metrics.record import read_records

pytestmark = [pytest.mark.distributed, pytest.mark.timeout(600)]


@pytest.fixture(scope="module")
def cluster() -> Iterator[SlurmCluster]:
    missing = [program for program in PROGRAMS if shutil.which(program) is None]
    if os.geteuid() != 0:
        pytest.skip("SLURM IS NOT TESTED: only root can run its daemons; run this as root or in a container")
    if missing:
        pytest.fail(f"no {', '.join(missing)}: apt-get install slurm-wlm munge")
    with SlurmCluster() as cluster:
        yield cluster


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_inputs(tmp_path_factory.mktemp("inputs"))


@pytest.fixture(scope="module")
def undisturbed(cluster: SlurmCluster, inputs: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Run folder of a job on two nodes that nobody disturbed."""
    run_dir = tmp_path_factory.mktemp("runs") / "undisturbed"
    job = submit(cluster, config_of(inputs, run_dir))
    wait_for_state(cluster, job, "COMPLETED", run_dir, 240)
    return run_dir


def config_of(inputs: Path, run_dir: Path, steps: int = 40, **cluster: Any) -> Path:
    values = settings(inputs, run_dir, "base", engine="deepspeed", zero_stage=1, steps=steps, eval_every=0)
    values["cluster"] = {"nodes": 2} | cluster
    return write_config(run_dir.with_suffix(".yaml"), values)


def submit(cluster: SlurmCluster, config: Path, *words: str) -> str:
    """Number of the job that launch/submit.py has submitted."""
    shown = cluster.run(sys.executable, str(ROOT / "launch/submit.py"), "--config", str(config), *words)
    assert shown.startswith("#!/usr/bin/env bash")
    return re.findall(r"^Submitted batch job (\d+)$", shown, re.MULTILINE)[0]


def hold(monkeypatch: pytest.MonkeyPatch, folder: Path, rank: int, step: int, seconds: float) -> Path:
    """Makes the next job sleep once in a step of a rank; returns the file that is there from then on."""
    mark = folder / "sleeping"
    monkeypatch.setenv(
        "MEGACOG_FAULT", f"phase:data,kind:sleep,rank:{rank},step:{step},seconds:{seconds},once:{mark}"
    )
    return mark


def restarts(cluster: SlurmCluster, job: str) -> int:
    """How often the job was requeued: once more when the machine is so busy that SLURM misses a node."""
    return int(cluster.job(job)["Restarts"])


def wait_for_state(cluster: SlurmCluster, job: str, state: str, run_dir: Path, seconds: float) -> dict[str, str]:
    """What SLURM knows of the job once it has reached a state; fails at once when it can no longer reach it."""
    ended = {"COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL", "BOOT_FAIL"} - {state}

    def reached() -> bool:
        found = cluster.job(job)["JobState"]
        assert found not in ended, f"job {job} is {found}:\n{output(run_dir)}"
        return found == state

    cluster.wait_for(f"job {job} in state {state}:\n{output(run_dir)}", reached, seconds)
    return cluster.job(job)


def output(run_dir: Path) -> str:
    """What the run's jobs have printed."""
    return "".join(path.read_text() for path in sorted((run_dir / "slurm").glob("*.out")))


def numbers(run_dir: Path) -> list[tuple[int, float, float]]:
    records = read_records(run_dir / "metrics.jsonl")
    return [(record["step"], record["loss"], record["grad_norm"]) for record in records if record["kind"] == "train"]


def tensors(run_dir: Path) -> dict[str, torch.Tensor]:
    export = open_export(run_dir / "export", verify=True)
    return {name: export.tensor(name) for name in export.files}


def test_a_job_on_two_nodes_trains_to_its_export(cluster: SlurmCluster, undisturbed: Path) -> None:
    said = output(undisturbed)
    assert re.search(
        rf"rank 0 of 2, local rank 0 of 1 on \S+, from srun \(.*ranks meet at {cluster.nodes[0]}:[23]\d{{4}} "
        r"\(host from MASTER_ADDR, port from job step \d+\.0\)",
        said,
    ), said
    assert "2 ranks by slurm: tensor 1 x sequence 1 x data 2" in said
    assert [step for step, *_ in numbers(undisturbed)] == list(range(1, 41))
    assert tensors(undisturbed)


def test_a_run_survives_the_death_of_a_node_bitwise(
    cluster: SlurmCluster, inputs: Path, undisturbed: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run_dir = undisturbed.parent / "struck"
    sleeping = hold(monkeypatch, undisturbed.parent, rank=1, step=20, seconds=60)
    job = submit(cluster, config_of(inputs, run_dir))
    cluster.wait_for("step 20", sleeping.exists, 120)
    assert list_checkpoints(run_dir)
    victim = cluster.nodes[1]
    assert list(cluster.processes(victim)), "a task runs there"
    cluster.kill_node(victim)
    assert not (run_dir / "export").exists(), "too late: the run is over"
    cluster.wait_for("requeue", lambda: restarts(cluster, job), 60)
    cluster.start_node(victim)
    wait_for_state(cluster, job, "COMPLETED", run_dir, 240)
    assert "resumed at step" in output(run_dir)
    assert numbers(run_dir) == numbers(undisturbed)
    found, expected = tensors(run_dir), tensors(undisturbed)
    assert found.keys() == expected.keys() and all(torch.equal(found[name], expected[name]) for name in found)


def test_the_time_limit_saves_and_requeues_and_scancel_leaves_nothing_behind(
    cluster: SlurmCluster, inputs: Path, tmp_path: Path
) -> None:
    run_dir = tmp_path / "long"
    # SLURM looks at time limits every 30 s, and sends the signal up to 30 s early.
    job = submit(cluster, config_of(inputs, run_dir, steps=100_000, time="1", save_seconds=1))
    cluster.wait_for("requeue", lambda: restarts(cluster, job), 120)
    said = output(run_dir)
    stopped = re.search(r"stopped at step (\d+) by SIGUSR1", said)
    assert stopped and "saved and stopped: goes on in the next job" in said, said
    step = int(stopped[1])
    assert numbers(run_dir)[-1][0] == step, "no step was lost"
    assert list_checkpoints(run_dir)[0].name == f"step-{step:07d}"
    cluster.wait_for("resumption", lambda: f"resumed at step {step} from" in output(run_dir), 120)
    cluster.wait_for("progress", lambda: numbers(run_dir)[-1][0] > step, 60)
    assert list(cluster.processes())
    before = restarts(cluster, job)
    cluster.run("scancel", job)
    wait_for_state(cluster, job, "CANCELLED", run_dir, 30)
    assert restarts(cluster, job) == before
    cluster.wait_for("end of all processes", lambda: not list(cluster.processes()), 30)


def test_a_configuration_that_asks_for_other_ranks_is_not_started_again(
    cluster: SlurmCluster, inputs: Path, tmp_path: Path
) -> None:
    run_dir = tmp_path / "refused"
    config = config_of(inputs, run_dir)
    job = submit(cluster, config, "cluster.nodes=1")
    run_dir_script = run_dir / "slurm/pretrain.sbatch"
    # As someone would who edits the header and forgets the configuration.
    edited = run_dir_script.read_text().replace("cluster.nodes=1", "")
    cluster.run("scancel", job)
    run_dir_script.write_text(edited)
    job = cluster.run("sbatch", "--parsable", str(run_dir_script)).strip()
    found = wait_for_state(cluster, job, "FAILED", run_dir, 120)
    assert found["ExitCode"] == "75:0"
    assert "asks for 2 ranks (cluster.nodes 2 x 1 on each), but there are 1" in output(run_dir)
    assert output(run_dir).count("not started again") == 1


@pytest.mark.parametrize(
    ("limit", "told"),
    [
        ("--nofile=512:512", "open files (ulimit -n): 512"),
        ("--as=400000000:400000000", "it does not start Python with torch and megacog"),
    ],
)
def test_a_sick_node_is_left_out_of_a_job_with_spare_ones(
    cluster: SlurmCluster, inputs: Path, tmp_path: Path, limit: str, told: str
) -> None:
    run_dir, (sick, healthy) = tmp_path / "spared", cluster.nodes
    cluster.kill_node(sick)
    cluster.start_node(sick, limit)
    try:
        cluster.wait_for("idle nodes", lambda: cluster.idle_nodes() == 2, 60)
        job = submit(cluster, config_of(inputs, run_dir, steps=2, nodes=1, spare_nodes=1))
        wait_for_state(cluster, job, "COMPLETED", run_dir, 240)
        said = output(run_dir)
        assert f"{sick} is sick: {told}" in said
        assert f"nodes {healthy}\n" in said and f"ranks meet at {healthy}:" in said
    finally:
        cluster.kill_node(sick)
        cluster.start_node(sick)


def test_the_doctor_names_the_host_whose_rank_never_appears(cluster: SlurmCluster) -> None:
    doctor = f"{sys.executable} {ROOT}/launch/doctor.py --need-gib 0.1 --seconds 8 --json"
    task = f"[ $SLURM_NODEID = 1 ] || {doctor} || [ $? = 1 ]"
    said = cluster.run("srun", "--nodes=2", "--ntasks-per-node=1", "bash", "-c", task, timeout=240)
    first, second = cluster.nodes
    found = json.loads(said)
    assert found["sick"] == [second]
    assert found["nodes"][second][0]["value"] == "0 of 1 seen in 8 s"
    assert "torch" in [check["name"] for check in found["nodes"][first]]


def test_clips_are_made_from_the_export_of_a_run(cluster: SlurmCluster, inputs: Path, tmp_path: Path) -> None:
    run_dir, prompts, out = tmp_path / "run", tmp_path / "prompts.txt", tmp_path / "clips"
    run_dir.mkdir()
    make_export(run_dir, levels=0)
    prompts.write_text("a digit moves\n")
    words = ("--kind", "infer", "--", str(prompts), "--out", str(out), "samples=1")
    job = submit(cluster, config_of(inputs, run_dir), *words)
    wait_for_state(cluster, job, "COMPLETED", run_dir, 120)
    assert len((out / "results.jsonl").read_text().splitlines()) == 1


def test_a_chain_of_jobs_ends_with_the_run(
    cluster: SlurmCluster, inputs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run_dir = tmp_path / "chain"
    hold(monkeypatch, tmp_path, rank=0, step=2, seconds=8)
    submit(cluster, config_of(inputs, run_dir, steps=2), "--kind", "pretrain_array", "--jobs", "3")
    cluster.wait_for("waiting jobs", lambda: "JobArrayTaskLimit" in cluster.run("squeue"), 20)
    cluster.wait_for("end of the chain", lambda: not cluster.run("squeue", "--noheader").strip(), 120)
    assert output(run_dir).count("start 0: done") == 1
    assert [step for step, *_ in numbers(run_dir)] == [1, 2]


def test_deepspeed_can_use_its_slurm_launcher(cluster: SlurmCluster, inputs: Path, tmp_path: Path) -> None:
    run_dir, hostfile = tmp_path / "run", tmp_path / "hostfile"
    hostfile.write_text("".join(f"{node} slots=1\n" for node in cluster.nodes))
    said = cluster.run(
        str(Path(sys.executable).parent / "deepspeed"), "--hostfile", str(hostfile), "--launcher", "slurm",
        "--no_ssh_check", "--master_addr", cluster.nodes[0], "--launcher_args=--nodes=2",
        str(ROOT / "launch/pretrain.py"), "--config", str(config_of(inputs, run_dir, steps=2)), timeout=240,
    )  # fmt: skip
    assert "cmd = srun -n 2 --nodes=2" in said
    assert [step for step, *_ in numbers(run_dir)] == [1, 2]


@pytest.fixture(scope="module")
def videos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_corpus(tmp_path_factory.mktemp("videos"), 80, seconds=24)


def test_a_preparation_on_two_nodes_survives_the_death_of_one_bytewise(
    cluster: SlurmCluster, inputs: Path, videos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in ALLOWED.items():
        monkeypatch.setenv(name, value)
    run_dir, out = tmp_path / "prepare", tmp_path / "made/clips"
    words = prepare_words(videos, out)[1:]
    job = submit(cluster, config_of(inputs, run_dir), "--kind", "prepare", "--", *words)
    cluster.wait_for("shards", lambda: list(out.parent.glob("clips.partial/clips-*.json")), 120)
    victim = cluster.nodes[1]
    assert any(name == "python" for _, name in cluster.processes(victim)), "a rank is there"
    cluster.kill_node(victim)
    assert not (out.parent / "clips.json").exists(), "too late: all is done"
    cluster.wait_for("requeue", lambda: restarts(cluster, job), 60)
    cluster.start_node(victim)
    wait_for_state(cluster, job, "COMPLETED", run_dir, 240)
    said = output(run_dir)
    assert said.count("2 ranks (openmpi) share the work") >= 2 and "rows are done" in said, said
    assert made(out.parent) == prepare_alone(videos, tmp_path / "alone/clips")


def test_tasks_of_srun_that_mpi_does_not_know_prepare_nothing(
    cluster: SlurmCluster, videos: Path, tmp_path: Path
) -> None:
    words = prepare_words(videos, tmp_path / "made/clips")
    with pytest.raises(AssertionError, match="slurm has started 2 ranks, but in MPI's world there is only this one"):
        cluster.run("srun", "--nodes=2", "--ntasks-per-node=1", sys.executable, *words)
    assert not (tmp_path / "made").exists()
