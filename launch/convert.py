"""Weights of CogView2 and CogVideo to exports and back; parity. See `python launch/convert.py --help`."""

from __future__ import annotations

from megacog.interop.main import main
from megacog.runtime.cli import run

if __name__ == "__main__":
    run(main)
