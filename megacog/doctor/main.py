"""Checks this machine, or every node of a job, and says which ones are sick.

    python launch/doctor.py [--folder runs] [--json]
    srun --ntasks-per-node=8 python launch/doctor.py     all nodes of an allocation, with the links between them
    python launch/doctor.py --hostfile hostfile          does ssh reach the hosts of `deepspeed --hostfile`?

Under several ranks (srun, torchrun, deepspeed, mpirun) every node is checked, all-reduce is measured between all pairs
of nodes, and the names of sick nodes come last. Exit code: 0, or 1 when something is sick.
"""

from __future__ import annotations

import argparse
import json
import os
import socket
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

from megacog.doctor.check import Check, Nodes, report, table
from megacog.doctor.hosts import check_hosts, read_hostfile
from megacog.doctor.machine import (
    disk_checks,
    locked_memory_check,
    open_files_check,
    read_nvidia_smi,
    shared_memory_check,
)
from megacog.doctor.packages import compiler_check, package_checks
from megacog.errors import EXIT_DONE, EXIT_FAULT
from megacog.runtime.files import atomic_file
from megacog.runtime.ranks import discover


def main(argv: Sequence[str] | None = None) -> int:
    """Print the table, or JSON; 1 when something is sick."""
    arguments = parse_arguments(argv)
    if arguments.hostfile is not None:
        reached = check_hosts(read_hostfile(arguments.hostfile), Path.cwd(), arguments.seconds)
        show(reached, arguments.json)
        return EXIT_FAULT if report(reached)["sick"] else EXIT_DONE
    ranks, node, answer = discover(), node_name(os.environ), read_nvidia_smi()
    own = package_checks(gpu=answer is not None)
    torch_works = not any(check.sick for check in own if check.name == "torch")
    if ranks.local_rank == 0:
        own += machine_checks(arguments, gpu=answer is not None)
    else:
        own = [check for check in own if check.sick]  # local rank 0 says the rest
    nodes = {node: own}
    if torch_works:
        from megacog.doctor.nodes import device_and_job_checks

        nodes = device_and_job_checks(node, own, answer, ranks, arguments.seconds)
    if ranks.rank == 0 and arguments.report:
        tell_job(nodes, arguments.report)
    elif ranks.rank == 0:
        show(nodes, arguments.json)
    return EXIT_FAULT if report(nodes)["sick"] else EXIT_DONE


def parse_arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="doctor.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--folder", type=Path, default=Path("."), help="where runs will write (default: here)")
    parser.add_argument("--need-gib", type=float, default=20.0, help="free space that a run needs there (default 20)")
    parser.add_argument("--seconds", type=float, default=120.0, help="to wait for other ranks or hosts (default 120)")
    parser.add_argument("--hostfile", type=Path, help="only check that ssh reaches its hosts and finds megacog there")
    parser.add_argument("--json", action="store_true", help="print JSON: the sick nodes, and all checks by node")
    parser.add_argument(
        "--report", type=Path, metavar="FILE",
        help="for job scripts: write that JSON to FILE, what is sick to stderr and only the healthy nodes to stdout",
    )  # fmt: skip
    return parser.parse_args(argv)


def node_name(environ: Mapping[str, str]) -> str:
    """What the scheduler calls this machine, else its host name."""
    return environ.get("SLURMD_NODENAME") or socket.gethostname()


def machine_checks(arguments: argparse.Namespace, gpu: bool) -> list[Check]:
    """Compiler, limits and disks of this machine."""
    return [
        compiler_check(gpu),
        open_files_check(),
        locked_memory_check(),
        shared_memory_check(),
        *disk_checks(arguments.folder, arguments.need_gib * 2**30),
    ]


def show(nodes: Nodes, as_json: bool) -> None:
    """Everything on stdout; several nodes one after another, and the sick ones' names last."""
    found = report(nodes)
    if as_json:
        print(json.dumps(found, indent=1))
        return
    for name, checks in nodes.items():
        if len(nodes) > 1:
            print(f"\n{name}")
        print(table(checks, color=sys.stdout.isatty()))
    if len(nodes) > 1:
        print("\nsick nodes: " + (", ".join(found["sick"]) or "none"))


def tell_job(nodes: Nodes, path: Path) -> None:
    """Everything into a file, what is sick on stderr, and on stdout the name of each healthy node."""
    found = report(nodes)
    with atomic_file(path, "w") as file:
        json.dump(found, file, indent=1)
    for name, checks in nodes.items():
        for check in checks:
            if check.sick:
                print(f"{name} is sick: {check.name}: {check.value}; {check.fix}", file=sys.stderr)
    for name in nodes:
        if name not in found["sick"]:
            print(name)
