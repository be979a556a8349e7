"""`launch/convert.py`: weights and tokenizers of the original CogView2 and CogVideo to ours and back, and parity."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence

from megacog.interop import commands as weights
from megacog.interop import icetk_frames, icetk_text
from megacog.runtime import log


def main(argv: Sequence[str] | None = None) -> int:
    """Run the sub-command and return its exit code."""
    log.setup()
    options = _parser().parse_args(argv)
    command: Callable[[argparse.Namespace], int] = options.command
    return command(options)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="convert.py", description=__doc__)
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    weights.add_parsers(commands)
    icetk_text.add_parser(commands)
    icetk_frames.add_parser(commands)
    return parser
