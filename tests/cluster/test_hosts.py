"""Training over ssh hosts and under mpirun, with the real programs."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from mpi_ranks import BIN, MPIRUN, mpi_environment
from run_ranks import ROOT, python_environment
from ssh_hosts import HOSTS, PROGRAMS, SshHosts
from tiny_run import make_inputs, settings, write_config

from megacog.checkpoint.export import open_export
from megacog.metrics.record import read_records
from megacog.runtime.ranks import free_port

pytestmark = [pytest.mark.distributed, pytest.mark.timeout(300)]


@pytest.fixture(scope="module")
def hosts() -> Iterator[SshHosts]:
    missing = [program for program in PROGRAMS if shutil.which(program) is None]
    if os.geteuid() != 0:
        pytest.skip("SSH HOSTS ARE NOT TESTED: only root can run such an sshd; run this as root or in a container")
    if missing:
        pytest.fail(f"no {', '.join(missing)}: apt-get install openssh-server pdsh")
    with SshHosts() as hosts:
        yield hosts


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_inputs(tmp_path_factory.mktemp("inputs"))


@pytest.fixture
def hostfile(tmp_path: Path) -> Path:
    path = tmp_path / "hostfile"
    path.write_text("".join(f"{host} slots=1\n" for host in HOSTS))
    return path


def config_of(inputs: Path, run_dir: Path, **cluster: Any) -> Path:
    values = settings(inputs, run_dir, "base", engine="deepspeed", zero_stage=1, steps=4, eval_every=0)
    return write_config(run_dir.with_suffix(".yaml"), values | {"cluster": cluster})


def launch(command: list[str], environment: dict[str, str], timeout: float = 200) -> tuple[int, str]:
    """Exit code and output of a launcher."""
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=timeout)
    return done.returncode, done.stdout + done.stderr


def assert_trained(run_dir: Path, code: int, said: str) -> None:
    assert code == 0, said
    steps = [record["step"] for record in read_records(run_dir / "metrics.jsonl") if record["kind"] == "train"]
    assert steps == [1, 2, 3, 4], said
    assert open_export(run_dir / "export", verify=True).files


def test_a_supervisor_of_a_hostfile_finds_the_ranks_on_its_machine(
    hosts: SshHosts, inputs: Path, hostfile: Path, tmp_path: Path
) -> None:
    run_dir = tmp_path / "run"
    command = [
        sys.executable, "launch/supervise.py", str(BIN / "deepspeed"), "--hostfile", str(hostfile),
        "--master_addr", HOSTS[0], "--master_port", str(free_port()), "launch/pretrain.py",
        "--config", str(config_of(inputs, run_dir, nodes=2)), "train.steps=100000",
    ]  # fmt: skip
    with open(tmp_path / "log", "w+") as log:
        process = subprocess.Popen(command, cwd=ROOT, env=hosts.environment, stdout=log, stderr=log)
        try:
            deadline = time.monotonic() + 150
            while not (run_dir / "checkpoints/latest").exists():
                assert process.poll() is None and time.monotonic() < deadline, (tmp_path / "log").read_text()
                time.sleep(0.2)
        finally:
            process.terminate()
        code, said = process.wait(100), (tmp_path / "log").read_text()
    assert code == 85 and "SIGTERM to 2 ranks here" in said and "saved and stopped" in said, said


def test_deepspeed_trains_over_ssh_on_the_hosts_of_a_hostfile(
    hosts: SshHosts, inputs: Path, hostfile: Path, tmp_path: Path
) -> None:
    command = [
        str(BIN / "deepspeed"), "--hostfile", str(hostfile), "--master_addr", HOSTS[0],
        "--master_port", str(free_port()), "launch/pretrain.py",
        "--config", str(config_of(inputs, tmp_path / "run", nodes=2)),
    ]  # fmt: skip
    code, said = launch(command, hosts.environment)
    assert_trained(tmp_path / "run", code, said)
    assert "rank 0 of 2, local rank 0 of 1 on" in said and f"ranks meet at {HOSTS[0]}:" in said
    for host in HOSTS:
        assert "Accepted publickey for root" in (hosts.folder / f"{host}.log").read_text()


def test_the_doctor_names_the_hosts_that_ssh_does_not_reach(hosts: SshHosts, hostfile: Path) -> None:
    command = [sys.executable, "launch/doctor.py", "--hostfile", str(hostfile), "--json"]
    code, said = launch(command, hosts.environment)
    assert code == 0 and json.loads(said)["sick"] == [], said
    with open(hostfile, "a") as file:
        file.write("127.0.0.4 slots=1\n")
    code, said = launch(command, hosts.environment)
    assert code == 1 and json.loads(said)["sick"] == ["127.0.0.4"], said
    assert "Connection refused" in json.loads(said)["nodes"]["127.0.0.4"][0]["value"]


def test_a_forgotten_hostfile_does_not_train_on_one_machine(inputs: Path, tmp_path: Path) -> None:
    command = [
        str(BIN / "deepspeed"), "--hostfile", str(tmp_path / "nowhere"), "--num_accelerators", "1",
        "--master_port", str(free_port()), "launch/pretrain.py",
        "--config", str(config_of(inputs, tmp_path / "run", nodes=2)),
    ]  # fmt: skip
    code, said = launch(command, python_environment())
    assert code == 75, said
    assert "asks for 2 ranks (cluster.nodes 2 x 1 on each), but there are 1, 1 of them on" in said
    assert "give deepspeed a --hostfile that exists" in said
    assert not (tmp_path / "run").exists()


def test_mpirun_trains_on_two_ranks(inputs: Path, tmp_path: Path) -> None:
    config = config_of(inputs, tmp_path / "run", nodes=1, ranks_per_node=2)
    command = [MPIRUN, "-n", "2", sys.executable, "launch/pretrain.py", "--config", str(config)]
    code, said = launch(command, mpi_environment())
    assert_trained(tmp_path / "run", code, said)
    assert "from Open MPI's mpirun (OMPI_COMM_WORLD_RANK" in said and "2 ranks by openmpi" in said


def test_deepspeed_can_use_its_openmpi_launcher(inputs: Path, hostfile: Path, tmp_path: Path) -> None:
    hostfile.write_text("localhost slots=2\n")
    command = [
        str(BIN / "deepspeed"), "--hostfile", str(hostfile), "--launcher", "openmpi", "--force_multi",
        "--no_ssh_check", "--master_addr", "127.0.0.1", "--launcher_args", "--mca btl_tcp_if_include lo",
        "launch/pretrain.py", "--config", str(config_of(inputs, tmp_path / "run", nodes=1, ranks_per_node=2)),
    ]  # fmt: skip
    code, said = launch(command, mpi_environment())
    assert_trained(tmp_path / "run", code, said)
    assert "2 ranks by openmpi" in said
