"""Take over weights, tokenizers and data of others. See `python launch/convert.py --help`."""

from __future__ import annotations

import argparse
import importlib
import sys

from megacog.runtime.cli import run

COMMANDS = {
    "import-icetk-text": ("megacog.interop.icetk_text", "icetk's text vocabulary -> a text tokenizer folder"),
    "import-icetk-frames": ("megacog.interop.icetk_frames", "icetk's image tokenizer -> a frame tokenizer folder"),
}
"""Sub-command -> module with its command line, help."""


def main() -> int:
    parser = argparse.ArgumentParser(prog="convert.py", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    for name, (_, what) in COMMANDS.items():
        commands.add_parser(name, help=what, add_help=False)
    command = parser.parse_args(sys.argv[1:2]).command
    return importlib.import_module(COMMANDS[command][0]).main(sys.argv[2:])


if __name__ == "__main__":
    run(main)
