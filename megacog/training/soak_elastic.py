"""`soak.py elastic`: `prove.py elastic`, every data-parallel and tensor-parallel size and ZeRO stage, on the record.

Sizes given after the record's name go to `prove.py elastic`. A record that holds its verdict over these sizes already
is only told again.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from megacog.errors import EXIT_DONE
from megacog.training.soak_ranks import ROOT
from megacog.training.soak_record import SoakRecord

SOAK = "elastic"


def main(argv: Sequence[str] | None = None) -> int:
    """Run the matrix, unless the record has it; 0 if every pair of layouts is accepted."""
    parser = argparse.ArgumentParser(prog="soak.py elastic", description=__doc__)
    parser.add_argument("--record", type=Path, required=True, help="JSON lines, to which the verdict is added")
    arguments, sizes = parser.parse_known_args(argv)
    record = SoakRecord(arguments.record, SOAK)
    done = [line for line in record.lines("end") if line["sizes"] == sizes and line["code"] == EXIT_DONE]
    if not done:
        record.begin({"sizes": sizes})
        started = time.monotonic()
        command = [sys.executable, str(ROOT / "launch/prove.py"), "elastic", *sizes]
        result = subprocess.run(command, stdout=subprocess.PIPE, text=True)
        seconds = round(time.monotonic() - started)
        record.add("end", sizes=sizes, code=result.returncode, told=result.stdout.strip(), seconds=seconds)
        done = list(record.lines("end"))
    print(done[-1]["told"])
    return int(done[-1]["code"])
