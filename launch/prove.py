"""Proofs that docs/proof.md cites, one sub-command each. See `python launch/prove.py --help`."""

from __future__ import annotations

import argparse
import importlib
import os
import subprocess
import sys
from datetime import timedelta
from pathlib import Path

from megacog.runtime.cli import run

TOLERANCE = 1e-5
EXPORT_PROOFS = {
    "fresh": ("megacog.evaluation.fresh", "EXPORT: a fresh attention-plus starts with the base's logits"),
    "replay": ("megacog.evaluation.replay", "EXPORT: a clip through the decode caches gives the training logits"),
    "rates": ("megacog.evaluation.rates", "EXPORT: at twice the frame rate the digit moves half as far per frame"),
    "idle": ("megacog.evaluation.idle", "BEFORE AFTER: training one attention-plus leaves base and other set as is"),
}
"""Sub-commands with a command line of their own: module, help."""


def main() -> int:
    parser = argparse.ArgumentParser(prog="prove.py", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    engines = commands.add_parser(
        "engines", help="DeepSpeed ZeRO 0-3 x tensor parallelism against the plain engine, step by step, in fp32"
    )
    engines.add_argument("--steps", type=int, default=200)
    engines.add_argument("--ranks", type=int, default=2)
    engines.add_argument("--tensor", type=int, nargs="+", default=[1, 2], help="tensor-parallel sizes")
    engines.set_defaults(function=prove_engines)
    for name, (_, what) in EXPORT_PROOFS.items():
        commands.add_parser(name, help=what, add_help=False)
    if sys.argv[1:2] and sys.argv[1] in EXPORT_PROOFS:
        return importlib.import_module(EXPORT_PROOFS[sys.argv[1]][0]).main(sys.argv[2:])
    arguments = parser.parse_args()
    return arguments.function(arguments)


def prove_engines(arguments: argparse.Namespace) -> int:
    """Start the ranks, or be one of them; 0 when all differences are within the tolerance."""
    if "RANK" not in os.environ:
        launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
        launcher += ["--nproc_per_node", str(arguments.ranks)]
        environment = os.environ | {"OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", "1")}
        return subprocess.run([*launcher, str(Path(__file__)), *sys.argv[1:]], env=environment, check=False).returncode
    import torch.distributed as dist

    from megacog.parallel.groups import build_process_groups
    from megacog.training.comparison import compare_engines

    dist.init_process_group("gloo", timeout=timedelta(minutes=10))
    ok = True
    for tensor in arguments.tensor:
        groups = build_process_groups(tensor)
        for row in compare_engines(groups, arguments.steps):
            ok &= row.loss < TOLERANCE and row.grad_norm < TOLERANCE and row.clipped
            if dist.get_rank() == 0:
                print(
                    f"{row.engine:18} tensor {tensor} x data {groups.data_size}, {arguments.steps} steps: largest "
                    f"relative difference of losses {row.loss:.1e}, of gradient norms {row.grad_norm:.1e}",
                    flush=True,
                )
    if dist.get_rank() == 0:
        print("all within" if ok else "NOT within", TOLERANCE, "of the plain engine on one rank", flush=True)
    dist.destroy_process_group()
    return 0 if ok else 1


if __name__ == "__main__":
    run(main)
