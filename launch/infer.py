"""Turn a prompt file into clips. See `bash launch/infer.sh --help`."""

from __future__ import annotations

from megacog.generation.infer import main
from megacog.runtime.cli import run

if __name__ == "__main__":
    run(main)
