"""Long runs that show whether megacog survives: `python launch/soak.py NAME --record FILE`, see `--help`."""

from __future__ import annotations

import argparse
import importlib
import os
import sys

from megacog.runtime.cli import run

SOAKS = {
    "kills": ("megacog.training.soak_trials", "runs killed at random end as if nobody had killed them"),
    "steps": ("megacog.training.soak_steps", "memory, open files and disk over ten thousand steps"),
    "goodput": ("megacog.training.soak_goodput", "share of the bare step rate with loading, logging, saves, a kill"),
    "elastic": ("megacog.training.soak_elastic", "resume on every layout of ranks from every other one"),
}
"""Sub-command -> module with its command line, help."""


def main() -> int:
    parser = argparse.ArgumentParser(prog="soak.py", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    for name, (_, what) in SOAKS.items():
        commands.add_parser(name, help=what, add_help=False)
    command = parser.parse_args(sys.argv[1:2]).command
    # Small runs on the CPU, each rank with one thread; before torch is imported.
    os.environ |= {"CUDA_VISIBLE_DEVICES": "", "DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}
    return importlib.import_module(SOAKS[command][0]).main(sys.argv[2:])


if __name__ == "__main__":
    run(main, leave=os._exit)  # frozen modules cannot be taken down in order
