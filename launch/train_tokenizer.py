"""Train the frame or text tokenizer of your corpus. See `python launch/train_tokenizer.py --help`."""

from __future__ import annotations

from megacog.prepare.train_tokenizer import main
from megacog.runtime.cli import run

# The processes that decode videos import this file again; it stays light.
if __name__ == "__main__":
    run(main)
