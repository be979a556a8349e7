"""`soak.py elastic`: `prove.py elastic`, every data-parallel and tensor-parallel size and ZeRO stage, on the record.

Sizes given after the record's name go to `prove.py elastic`. An interrupted matrix goes on with what is there.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from megacog.training.soak_ranks import ROOT
from megacog.training.soak_record import SoakRecord


def main(argv: Sequence[str] | None = None) -> int:
    """Run the matrix, or the rest of it; 0 if every pair of layouts is accepted."""
    parser = argparse.ArgumentParser(prog="soak.py elastic", description=__doc__)
    parser.add_argument("--record", type=Path, required=True, help="JSON lines, to which the verdict is added")
    parser.add_argument("--folder", type=Path, help="of its results (default: the record's name with .elastic)")
    arguments, sizes = parser.parse_known_args(argv)
    record = SoakRecord(arguments.record, "elastic")
    folder = arguments.folder or arguments.record.with_suffix(".elastic")
    record.begin({"sizes": sizes, "folder": str(folder)})
    started = time.monotonic()
    command = [sys.executable, str(ROOT / "launch/prove.py"), "elastic", "--folder", str(folder), *sizes]
    result = subprocess.run(command, stdout=subprocess.PIPE, text=True)
    seconds = round(time.monotonic() - started)
    record.add("end", sizes=sizes, code=result.returncode, told=result.stdout.strip(), seconds=seconds)
    print(result.stdout, end="")
    return result.returncode
