"""Every check with a healthy and a sick input."""

from __future__ import annotations

import json
import os
import re
import resource
import subprocess
import sys
from pathlib import Path

import pytest

from megacog.doctor import machine, packages
from megacog.doctor.check import Check, report, table
from megacog.doctor.devices import DeviceSpeed, device_checks, lagging_checks
from megacog.doctor.main import tell_job
from megacog.doctor.network import node_checks, pair_checks, pair_rounds

ROOT = Path(__file__).resolve().parents[2]
HEALTHY = "0, NVIDIA H100 80GB HBM3, 550.54.15, 81559, 4, 0, 41\n1, NVIDIA H100 80GB HBM3, 550.54.15, 81559, 4, 0, 43\n"


def verdicts(checks: list[Check]) -> dict[str, str]:
    return {check.name: check.verdict for check in checks}


def assert_mendable(check: Check, verdict: str, value: str, fix: str) -> None:
    assert check.verdict == verdict and value in check.value and fix in check.fix, check


def test_required_versions_are_those_of_setup() -> None:
    listed = dict(re.findall(r'^        "([a-z0-9]+)>=([0-9.]+)', (ROOT / "setup.py").read_text(), re.MULTILINE))
    ours = packages.REQUIRED | {"deepspeed": packages._DEEPSPEED}
    assert ours.items() <= {name: tuple(map(int, number.split("."))) for name, number in listed.items()}.items()


def test_packages_that_are_old_or_missing_are_named_with_the_pip_command() -> None:
    found = {"torch": "2.10.1+cu128", "numpy": "1.26.0", "deepspeed": None, "triton": None, "mpi4py": None}
    checks = packages.package_checks(True, lambda name: found.get(name, "99.0"))
    by_name = {check.name: check for check in checks}
    assert_mendable(by_name["torch"], "sick", "older than 2.11", "pip install 'torch>=2.11'")
    assert by_name["numpy"].verdict == "ok"
    assert_mendable(by_name["deepspeed"], "warning", "train.engine: torch only", "pip install")
    assert_mendable(by_name["triton"], "sick", "not installed", "pip install")
    assert by_name["mpi4py"] == Check("mpi4py", "ok", "not installed; only prepare.py under mpirun needs it")
    without_gpu = packages.package_checks(False, lambda name: None if name == "triton" else "99.0")
    assert verdicts(without_gpu)["triton"] == "ok"


def test_the_interpreter_must_be_new_enough() -> None:
    assert packages.python_check((3, 12, 1)).verdict == "ok"
    assert_mendable(packages.python_check((3, 10, 9)), "sick", "3.10.9", "3.11")


def test_a_compiler_is_asked_for_only_where_triton_compiles() -> None:
    assert packages.compiler_check(False, lambda name: None).verdict == "ok"
    assert_mendable(packages.compiler_check(True, lambda name: None), "sick", "none", "install gcc")
    assert "/usr/bin/gcc" in packages.compiler_check(True, lambda n: "/usr/bin/gcc" if n == "gcc" else None).value


@pytest.mark.parametrize(
    ("limit", "verdict"), [(resource.RLIM_INFINITY, "ok"), (65536, "ok"), (1024, "warning"), (256, "sick")]
)
def test_open_files(limit: int, verdict: str) -> None:
    check = machine.open_files_check(limit)
    assert check.verdict == verdict and ("ulimit -n" in check.fix) == (verdict != "ok")


def test_the_limit_of_this_process_is_what_is_read() -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (900, hard))
    try:
        assert_mendable(machine.open_files_check(), "sick", "900", "ulimit")
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


def test_locked_memory_matters_with_infiniband() -> None:
    assert machine.locked_memory_check(8 << 20, infiniband=False).verdict == "ok"
    assert machine.locked_memory_check(resource.RLIM_INFINITY, infiniband=True).verdict == "ok"
    assert_mendable(machine.locked_memory_check(8 << 20, infiniband=True), "sick", "8 MiB", "memlock")


def test_shared_memory(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    usage = type("Usage", (), {"total": 64 << 20})
    assert machine.shared_memory_check(tmp_path).verdict == "ok"
    monkeypatch.setattr(machine.shutil, "disk_usage", lambda folder: usage)
    assert_mendable(machine.shared_memory_check(tmp_path), "sick", "0.1 GiB", "--shm-size")
    monkeypatch.undo()
    assert_mendable(machine.shared_memory_check(tmp_path / "none"), "sick", "No such file", "mount")


def test_disks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    probe = 1 << 20
    assert set(verdicts(machine.disk_checks(tmp_path, 1.0, probe))) == {
        f"space in {tmp_path}", f"write speed in {tmp_path}"
    }  # fmt: skip
    assert list(tmp_path.iterdir()) == []
    monkeypatch.setattr(machine, "write_rate", lambda folder, size: 1e9)
    assert [check.verdict for check in machine.disk_checks(tmp_path, 1.0, probe)] == ["ok", "ok"]
    full, _ = machine.disk_checks(tmp_path, 1e18, probe)
    assert_mendable(full, "sick", "wanted", "free some space")
    monkeypatch.setattr(machine, "write_rate", lambda folder, size: 50e6)
    assert_mendable(machine.disk_checks(tmp_path, 1.0, probe)[1], "warning", "50 MB/s", "checkpoints")
    (missing,) = machine.disk_checks(tmp_path / "none", 1.0, probe)
    assert_mendable(missing, "sick", "No such file", "create it")


def test_a_disk_that_refuses_is_sick_and_keeps_no_probe(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(machine.os, "fsync", full)
    assert_mendable(machine.disk_checks(tmp_path, 1.0, 1 << 20)[1], "sick", "No space left", "quota")
    assert list(tmp_path.iterdir()) == []


def test_healthy_gpus(monkeypatch: pytest.MonkeyPatch) -> None:
    checks = machine.gpu_checks(HEALTHY, 2)
    assert verdicts(checks) == {"GPU 0": "ok", "GPU 1": "ok", "GPUs that torch sees": "ok"}
    assert "550.54.15" in checks[0].value
    assert verdicts(machine.gpu_checks(None, 0)) == {"GPUs": "ok"}
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "1")
    assert machine.gpu_checks(HEALTHY, 1)[-1].verdict == "ok"


@pytest.mark.parametrize(
    ("change", "verdict", "fix"),
    [
        ((", 0, 41", ", 3, 41"), "sick", "memory errors"),
        (("550.54.15, 81559", "[Unknown Error], [Unknown Error]"), "sick", "does not answer"),
        ((", 0, 41", ", 0, 93"), "warning", "fans"),
        (("81559, 4,", "81559, 70000,"), "warning", "another process"),
    ],
)
def test_a_sick_gpu(change: tuple[str, str], verdict: str, fix: str) -> None:
    check = machine.gpu_checks(HEALTHY.replace(*change, 1), 2)[0]
    assert check.verdict == verdict and fix in check.fix


def test_gpus_that_torch_or_the_driver_does_not_show(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    assert_mendable(machine.gpu_checks(HEALTHY, 0)[-1], "sick", "0 of 2", "reinstall")
    assert_mendable(machine.gpu_checks("", 0)[0], "sick", "nvidia-smi fails", "driver")
    assert machine.gpu_checks(None, 1)[0].verdict == "warning"


def test_nvidia_smi_is_asked_and_may_be_missing_or_fail(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    assert machine.read_nvidia_smi() is None
    tool = tmp_path / "nvidia-smi"
    tool.write_text("#!/bin/sh\nexit 9\n")
    tool.chmod(0o755)
    assert machine.read_nvidia_smi() == ""
    tool.write_text('#!/bin/sh\necho "$@"\n')
    assert (machine.read_nvidia_smi() or "").startswith("--query-gpu=index,name,driver_version")


def test_devices_are_judged_by_the_data_sheet_where_it_is_known() -> None:
    h200 = DeviceSpeed("NVIDIA H200", 770.0, 4.2e12)
    assert verdicts(device_checks(h200, "GPU 0")) == {"matmul, GPU 0": "ok", "copy, GPU 0": "ok"}
    assert_mendable(device_checks(DeviceSpeed("NVIDIA H200", 500.0, 1e12), "GPU 0")[0], "warning", "51%", "heat")
    assert_mendable(device_checks(DeviceSpeed("NVIDIA H200", 300.0, 1e12), "GPU 0")[0], "sick", "30%", "power")
    assert "unknown" in device_checks(DeviceSpeed("Some CPU", 0.1, 1e10), "CPU")[0].value


def test_a_device_slower_than_the_others_is_named_by_rank() -> None:
    speeds = {rank: DeviceSpeed("NVIDIA H200", 770.0 + rank, 4e12) for rank in range(7)}
    assert lagging_checks(speeds) == {}
    found = lagging_checks(speeds | {7: DeviceSpeed("NVIDIA H200", 600.0, 4e12)})
    assert list(found) == [7]
    assert_mendable(found[7], "sick", "78% of the median", "leave this node out")


@pytest.mark.parametrize("count", [2, 3, 4, 7, 13])
def test_every_pair_of_nodes_meets_once_and_no_node_twice_at_a_time(count: int) -> None:
    nodes = [f"n{index}" for index in range(count)]
    rounds = pair_rounds(nodes)
    assert len(rounds) == count - 1 + count % 2
    met = [tuple(sorted(pair)) for pairs in rounds for pair in pairs]
    assert len(met) == len(set(met)) == count * (count - 1) // 2
    assert all(len({node for pair in pairs for node in pair}) == 2 * len(pairs) for pairs in rounds)


def test_a_slow_node_is_told_from_a_slow_link() -> None:
    nodes = [f"n{index}" for index in range(5)]
    rates = {(a, b): 50e9 for index, a in enumerate(nodes) for b in nodes[index + 1 :]}
    assert {check.verdict for checks in pair_checks(rates).values() for check in checks} == {"ok"}
    slow_node = {pair: 5e9 if "n3" in pair else rate for pair, rate in rates.items()}
    found = {node: checks[0] for node, checks in pair_checks(slow_node).items()}
    assert_mendable(found.pop("n3"), "sick", "the median pair has 50", "leave this node out")
    assert {check.verdict for check in found.values()} == {"warning"} and "see n3" in found["n0"].fix
    slow_link = pair_checks(rates | {("n0", "n1"): 5e9})
    assert {node: checks[0].verdict for node, checks in slow_link.items()} == {
        "n0": "warning", "n1": "warning", "n2": "ok", "n3": "ok", "n4": "ok"
    }  # fmt: skip
    assert pair_checks({("a", "b"): 1e6})["a"][0].verdict == "ok"  # nothing to compare with
    dead_node = {pair: 0.0 if "n1" in pair else rate for pair, rate in rates.items()}
    found = {node: checks[0] for node, checks in pair_checks(dead_node).items()}
    assert_mendable(found.pop("n1"), "sick", "fails with every other node", "NCCL_DEBUG=INFO")
    assert {check.verdict for check in found.values()} == {"warning"} and "none with n1" in found["n0"].value
    three = pair_checks({("a", "b"): 1e9, ("a", "c"): 0.0, ("b", "c"): 0.0})
    assert {node: checks[0].verdict for node, checks in three.items()} == {"a": "warning", "b": "warning", "c": "sick"}
    assert pair_checks({("a", "b"): 0.0})["a"][0].verdict == "sick"
    assert node_checks({"n0": 0.0})["n0"][0].verdict == "sick"
    within = node_checks({"n0": 300e9, "n1": 290e9, "n2": 30e9})
    assert {node: checks[0].verdict for node, checks in within.items()} == {"n0": "ok", "n1": "ok", "n2": "sick"}


def test_the_table_shows_fixes_and_the_report_names_sick_nodes() -> None:
    good, bad = Check("disk", "ok", "fast"), Check("memory", "sick", "bad", "replace it")
    lines = table([good, bad], color=False).splitlines()
    assert lines[0].split() == ["ok", "disk", "fast"] and lines[2].strip() == "-> replace it"
    assert "\033[31msick" in table([bad], color=True)
    found = report({"a": [good], "b": [good, bad]})
    assert found["sick"] == ["b"]
    assert found["nodes"]["b"][1] == {"name": "memory", "verdict": "sick", "value": "bad", "fix": "replace it"}


def test_a_job_script_is_told_the_healthy_nodes_only(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    good, bad = Check("disk", "ok", "fast"), Check("memory", "sick", "bad", "replace it")
    tell_job({"a": [good], "b": [good, bad]}, tmp_path / "report.json")
    out, errors = capsys.readouterr()
    assert out == "a\n" and errors == "b is sick: memory: bad; replace it\n"
    assert json.loads((tmp_path / "report.json").read_text()) == report({"a": [good], "b": [good, bad]})


def test_the_command_ends_with_1_and_names_the_folder_when_a_disk_is_missing(tmp_path: Path) -> None:
    command = [sys.executable, str(ROOT / "launch/doctor.py"), "--json", "--folder", str(tmp_path / "none")]
    done = subprocess.run(command, capture_output=True, text=True, env=os.environ | {"SLURMD_NODENAME": "node-7"})
    assert done.returncode == 1, done.stderr
    found = json.loads(done.stdout)
    assert found["sick"] == ["node-7"]
    sick = [check["name"] for check in found["nodes"]["node-7"] if check["verdict"] == "sick"]
    assert f"space in {tmp_path / 'none'}" in sick
