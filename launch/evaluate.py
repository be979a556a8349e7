"""Judge the clips that an export generates for the demo captions. See `python launch/evaluate.py --help`."""

from __future__ import annotations

from megacog.evaluation.evaluate import main
from megacog.runtime.cli import run

if __name__ == "__main__":
    run(main)
