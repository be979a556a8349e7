"""Submit a run to SLURM: `python launch/submit.py --config FILE [--dry-run] [key=value ...]`. See docs/cluster.md."""

from __future__ import annotations

from pathlib import Path

from megacog.planning.jobs import main
from megacog.runtime.cli import run

if __name__ == "__main__":
    run(lambda: main(Path(__file__).parent / "slurm"))
