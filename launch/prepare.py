"""Make, inspect and verify shards of coded videos. See `python launch/prepare.py --help`."""

from __future__ import annotations

from megacog.prepare.main import main
from megacog.runtime.cli import run

if __name__ == "__main__":
    run(main)
