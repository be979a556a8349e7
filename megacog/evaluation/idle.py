"""Proof that training one attention-plus leaves the base and the other set bitwise as they were."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

import torch

from megacog.checkpoint.export import open_export
from megacog.errors import CheckpointError


def main(argv: Sequence[str] | None = None) -> int:
    """Run `prove.py idle`; returns 0 if all tensors of BEFORE stand in AFTER with the same bits, else 1."""
    parser = argparse.ArgumentParser(prog="prove.py idle", description=__doc__)
    parser.add_argument("before", type=Path, help="export that the other run inherited")
    parser.add_argument("after", type=Path, help="export of the run that trained another attention-plus")
    arguments = parser.parse_args(argv)
    before, after = (open_export(path, verify=True) for path in (arguments.before, arguments.after))
    new = [stage for stage in after.plus if stage not in before.plus]
    if not before.plus or not new:
        raise CheckpointError(
            f"{before.path} holds {list(before.plus)} and {after.path} {list(after.plus)}: give the export with one "
            "attention-plus and the one of the run that inherited it and trained the other"
        )
    changed = []
    elements = 0
    for name in sorted(before.files):
        old, now = before.tensor(name), after.tensor(name)
        elements += old.numel()
        if old.dtype != now.dtype or not torch.equal(old.view(torch.uint8), now.view(torch.uint8)):
            changed.append(name)
    held = f"base and plus.{before.plus[0]}"
    print(f"{len(before.files)} tensors, {elements:,} elements of {held}: {len(changed)} changed")
    print(f"plus.{new[0]} was trained meanwhile")
    for name in changed:
        print(f"changed: {name}")
    return 1 if changed else 0
