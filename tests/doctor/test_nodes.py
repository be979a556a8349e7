"""The doctor under several ranks, which stand for nodes."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from run_ranks import free_port, python_environment

ROOT = Path(__file__).resolve().parents[2]


def start(ranks: list[int], world_size: int, folder: Path, seconds: int) -> list[tuple[int, str, str]]:
    """Code and outputs of each rank of a job whose ranks are all nodes of their own."""
    port, processes = free_port(), []
    for rank in ranks:
        place = {
            "RANK": rank, "WORLD_SIZE": world_size, "LOCAL_RANK": 0, "LOCAL_WORLD_SIZE": 1, "MASTER_PORT": port,
            "MASTER_ADDR": "127.0.0.1", "SLURMD_NODENAME": f"node-{rank}",
        }  # fmt: skip
        command = [sys.executable, str(ROOT / "launch/doctor.py"), "--folder", str(folder), "--need-gib", "0.1"]
        command += ["--json", "--seconds", str(seconds)]
        environment = python_environment() | os.environ | {name: str(value) for name, value in place.items()}
        processes.append(
            subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        )
    outputs = [process.communicate(timeout=240) for process in processes]
    return [(process.returncode, *output) for process, output in zip(processes, outputs, strict=True)]


@pytest.mark.distributed
def test_three_nodes_are_checked_together(tmp_path: Path) -> None:
    first, *others = start([0, 1, 2], 3, tmp_path, seconds=60)
    found = json.loads(first[1])
    assert set(found["nodes"]) == {"node-0", "node-1", "node-2"}
    for checks in found["nodes"].values():
        names = [check["name"] for check in checks]
        assert {"torch", "matmul, CPU", "copy, CPU", "all-reduce between nodes"} <= set(names)
        assert len(names) == len(set(names))
    assert {code for code, *_ in (first, *others)} == {1 if found["sick"] else 0}
    assert all(out == "" for _, out, _ in others)


@pytest.mark.slow
@pytest.mark.distributed
def test_ranks_that_never_appear_are_named(tmp_path: Path) -> None:
    first, second = start([0, 2], 4, tmp_path, seconds=45)  # on a busy machine the second imports torch for some 12 s
    found = json.loads(first[1])
    (sick,) = (check for check in found["nodes"]["node-0"] if check["name"] == "ranks")
    assert "2 of 4 after 45 s; missing: [1, 3]" in sick["value"]
    assert first[0] == second[0] == 1


@pytest.mark.slow
@pytest.mark.distributed
def test_a_rank_without_rank_0_says_where_it_looked(tmp_path: Path) -> None:
    ((code, out, errors),) = start([1], 2, tmp_path, seconds=5)
    assert code == 1 and out == ""
    assert "error: rank 1 on node-1 cannot reach rank 0 at 127.0.0.1:" in errors
