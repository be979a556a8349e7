"""The doctor under several ranks, which stand for nodes."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta
from pathlib import Path

import pytest
import torch.distributed as dist
from run_ranks import python_environment

from megacog.doctor import board
from megacog.doctor.board import Board
from megacog.doctor.nodes import missing_checks
from megacog.runtime.ranks import free_port

ROOT = Path(__file__).resolve().parents[2]


SPOILED = """
import os, sys
from megacog.doctor import network
from megacog.commands import doctor
def fail(*_):
    {what}
network._all_reduce_rate = fail
doctor()
"""


def start(
    ranks: list[int], world_size: int, folder: Path, seconds: int, spoiled: dict[int, str] | None = None
) -> list[tuple[int, str, str]]:
    """Code and outputs of each rank of a job whose ranks are all nodes of their own.

    Args:
        ranks: Those that start.
        world_size: How many are announced.
        folder: Where the doctor measures the disk.
        seconds: Of its patience.
        spoiled: By rank, what it does instead of an all-reduce.
    """
    port, processes = free_port(), []
    for rank in ranks:
        place = {
            "RANK": rank, "WORLD_SIZE": world_size, "LOCAL_RANK": 0, "LOCAL_WORLD_SIZE": 1, "MASTER_PORT": port,
            "MASTER_ADDR": "127.0.0.1", "SLURMD_NODENAME": f"node-{rank}",
        }  # fmt: skip
        program = [str(ROOT / "launch/doctor.py")]
        if rank in (spoiled or {}):
            program = ["-c", SPOILED.format(what=(spoiled or {})[rank])]
        command = [sys.executable, *program, "--folder", str(folder), "--need-gib", "0.1"]
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


def test_notes_reach_all_ranks_and_who_leaves_none_is_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    store = dist.HashStore()
    monkeypatch.setattr(board, "_FAREWELL_SECONDS", 60.0)
    with ThreadPoolExecutor(3) as pool:
        gathered = [pool.submit(Board(store, rank, 1.0).gather, "start", [rank], range(4)) for rank in (1, 3)]
        store.wait(["start/1", "start/3"], timedelta(seconds=60))  # rank 0 then waits for its second
        gathered.append(pool.submit(Board(store, 0, 1.0).gather, "start", [0], range(4)))
        assert [future.result() for future in gathered] == [{0: [0], 1: [1], 3: [3]}] * 3
        left = [pool.submit(Board(store, rank, 1.0).leave, (0, 1, 3)) for rank in (0, 1)]
        assert left[1].result() is None
        assert not left[0].done(), "rank 3 may still read in the store of rank 0"
        Board(store, 3, 1.0).leave((0, 1, 3))
        left[0].result(timeout=60)


def test_a_node_that_starts_too_few_ranks_is_sick_under_its_name() -> None:
    expected = {"gpu1": 2, "gpu2": 2, "gpu3": 2}
    found = missing_checks({"gpu1": [0, 2], "gpu2": [1]}, expected, 6, 120)
    assert {node: sick([vars(check) for check in checks]) for node, checks in found.items()} == {
        "gpu2": ["ranks: 1 of 2 seen in 120 s"], "gpu3": ["ranks: 0 of 2 seen in 120 s"],
    }  # fmt: skip
    assert missing_checks({"gpu1": [0, 1]}, {"gpu1": 2}, 2, 120) == {}
    assert set(missing_checks({"a": [0], "b": [2]}, {}, 4, 120)) == {"node of rank 1, 3"}


def sick(node: list[dict[str, str]]) -> list[str]:
    return [f"{check['name']}: {check['value']}" for check in node if check["verdict"] == "sick"]


@pytest.mark.slow
@pytest.mark.distributed
def test_ranks_that_never_appear_are_sick_and_the_others_are_checked_without_them(tmp_path: Path) -> None:
    # On a busy machine the second one imports torch for some 12 s.
    (code, out, errors), (other_code, _, other_errors) = start([0, 2], 4, tmp_path, seconds=40)
    found = json.loads(out)
    assert found["sick"] == ["node of rank 1, 3"]
    assert "ranks: not seen in 40 s" in sick(found["nodes"]["node of rank 1, 3"])
    for node in ("node-0", "node-2"):
        assert {"matmul, CPU", "all-reduce between nodes"} <= {check["name"] for check in found["nodes"][node]}
    assert (code, other_code) == (1, 1)
    assert errors == other_errors == "", "no rank blames the network when rank 0 has left"


@pytest.mark.slow
@pytest.mark.distributed
@pytest.mark.parametrize("what", ["raise RuntimeError('no route to host')", "os._exit(9)"])
def test_a_node_that_fails_in_the_all_reduce_is_sick_and_the_others_are_not(tmp_path: Path, what: str) -> None:
    first, second, _ = start([0, 1, 2], 3, tmp_path, 60, {2: what})
    found = json.loads(first[1])
    assert found["sick"] == ["node-2"], (found, first[2], second[2])
    assert {"node-0", "node-1", "node-2"} == set(found["nodes"])
    assert first[0] == second[0] == 1


@pytest.mark.slow
@pytest.mark.distributed
def test_a_rank_without_rank_0_says_where_it_looked(tmp_path: Path) -> None:
    ((code, out, errors),) = start([1], 2, tmp_path, seconds=5)
    assert code == 1 and out == ""
    assert "error: rank 1 on node-1 cannot reach rank 0 at 127.0.0.1:" in errors
