"""Proofs that docs/proof.md cites, one sub-command each. See `python launch/prove.py --help`."""

from __future__ import annotations

import argparse
import importlib
import sys

from megacog.runtime.cli import run

PROOFS = {
    "fresh": ("megacog.evaluation.fresh", "EXPORT: a fresh attention-plus starts with the base's logits"),
    "replay": ("megacog.evaluation.replay", "EXPORT: a clip through the decode caches gives the training logits"),
    "rates": ("megacog.evaluation.rates", "EXPORT: at twice the frame rate the digit moves half as far per frame"),
    "engines": (
        "megacog.training.comparison",
        "every layout of ranks and engine against the plain engine on one rank, step by step, in fp32",
    ),
    "predict": ("megacog.training.predict", "step time and memory of a deep model from two shallow ones"),
    "memorize": ("megacog.training.memorize", "RUN_DIR: 16 clips by heart, through a kill and a bitwise resume"),
    "world": (
        "megacog.training.dry_world",
        "--config FILE: a run of 13 x 8 ranks on fake tensors covers every parameter and is as large as planned",
    ),
    "fp8": ("megacog.training.fp8_gap", "a base in e4m3 trains as in bf16: loss gap against the spread over seeds"),
    "fits": (
        "megacog.training.one_card",
        "a run's model, engine and micro batch within a given memory of a GPU, on random weights",
    ),
    "elastic": (
        "megacog.training.elastic",
        "a run resumes on any data- and tensor-parallel size and ZeRO stage: state bitwise, next loss within 1e-6",
    ),
    "idle": ("megacog.evaluation.idle", "BEFORE AFTER: training one attention-plus leaves base and other set as is"),
}
"""Sub-command -> module with its command line, help."""


def main() -> int:
    what = "Proofs that docs/proof.md cites, one each; `prove.py NAME --help` tells more."
    parser = argparse.ArgumentParser(prog="prove.py", description=what)
    commands = parser.add_subparsers(dest="command", required=True)
    for name, (_, what) in PROOFS.items():
        commands.add_parser(name, help=what, add_help=False)
    command = parser.parse_args(sys.argv[1:2]).command
    return importlib.import_module(PROOFS[command][0]).main(sys.argv[2:])


if __name__ == "__main__":
    run(main)
