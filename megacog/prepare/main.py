"""`launch/prepare.py`: videos and captions to shards (run, records), shards to other shards (merge), a look into
them (inspect), a check (verify), what a large corpus takes (plan).

Heavy packages are imported by the sub-command that needs them.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any

from megacog.errors import ConfigError

if TYPE_CHECKING:
    from megacog.prepare.pipeline import Summary


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the sub-command and returns its exit code."""
    from megacog.runtime import log

    argv = sys.argv[1:] if argv is None else list(argv)
    log.setup()
    if argv[:1] == ["digits"]:
        from megacog.prepare.digits import main as digits

        return digits(argv[1:]) or 0
    options = _parser().parse_args(argv)
    command: Callable[[argparse.Namespace], int] = options.command
    return command(options)


class _Parser(argparse.ArgumentParser):
    """Takes no abbreviated options: job scripts look for --out and --overwrite among the words."""

    def __init__(self, **keywords: Any) -> None:
        super().__init__(allow_abbrev=False, **keywords)


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(
        prog="prepare.py", description="Make, inspect and verify shards of coded videos."
    )
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    _add_run(commands.add_parser("run", help="videos + captions -> shards", description=_RUN))
    _add_records(
        commands.add_parser("records", help="the original's token records -> shards", description=_RECORDS)
    )
    _add_merge(
        commands.add_parser(
            "merge", aliases=["reshard"], help="shards -> one set of other shards, same clips", description=_MERGE
        )
    )
    _add_inspect(
        commands.add_parser("inspect", help="statistics and contact sheet of shards", description=_INSPECT)
    )
    _add_plan(commands.add_parser("plan", help="what a large corpus takes", description=_PLAN))
    verify = commands.add_parser(
        "verify",
        help="check every byte of shards",
        description="Check every byte of shards. Exit code 1 if any is bad.",
    )
    verify.add_argument("shards", nargs="+", metavar="SHARD", help="shard files or quoted glob patterns")
    verify.add_argument("--json", action="store_true", help="print one JSON object instead of text")
    verify.set_defaults(command=_verify)
    commands.add_parser("digits", help="make the demo corpus of moving digits (prepare.py digits --help)")
    return parser


_RUN = """Decode, resample, crop and code the videos of a caption file, or of webdataset tars, into HDF5 shards. A
stopped run continues when the same command is given again. Rows without a clip are listed in failed.jsonl beside
the shards, with reasons. Under mpirun the ranks share the work; the result is the same."""
_RECORDS = """Turn flat int32 records of the original's data tool (64 text ids, then 5 frames of 20 x 20 codes) into
HDF5 shards with token ids. Nothing is coded again. A stopped run continues when the same command is given again."""
_MERGE = """Make one set of shards of several, or other shards of one: the same clips bit for bit, in the same order.
Nothing is coded again. A stopped run continues when the same command is given again; the old shards stay."""
_PLAN = """Print disk, files, memory and time for a corpus that is not there yet, from the format's real sizes; with
--like from the average clip of shards that are there."""
_INSPECT = """Print statistics of shards; with --tokenizer check that this one made them, and with --sheet as well
draw clips decoded back from codes;
with --config print the clips x rates table of the shards (else of its data.train) under that config."""


def _add_run(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add(
        "captions",
        type=Path,
        nargs="+",
        help=".csv or .tsv (header video,caption) or .jsonl (objects), UTF-8; or webdataset tars (KEY.mp4 with KEY.txt "
        "or KEY.json): files, globs or quoted brace patterns",
    )
    add(
        "--out", type=Path, required=True, metavar="DIR/STEM", help="shards become DIR/STEM-00000-of-000NN.h5"
    )
    add(
        "--tokenizer",
        type=Path,
        required=True,
        metavar="FOLDER",
        help="frame tokenizer (launch/train_tokenizer.py)",
    )
    add("--root", type=Path, help="folder that video paths (or tars' names) start from (default: the caption file's)")
    add("--video-column", help="column or key with the video's path (default: video or the like)")
    add("--caption-column", help="column or key with the caption (default: caption or the like)")
    add("--allow-absolute", action="store_true", help="allow paths and links that lead out of the root")
    add(
        "--fps",
        type=_positive,
        default=8.0,
        help="rate of stored frames; slower videos keep theirs (default: 8)",
    )
    add("--folder-fps", type=_positive, help="rate of folders of frames (png, jpg)")
    add("--size", type=_size, default=(32, 32), metavar="N|HxW", help="pixels of stored frames (default: 32)")
    add(
        "--workers",
        type=_count,
        help="decoders of this rank (default: number of cores; ranks of one machine share them)",
    )
    add(
        "--clips-per-shard",
        type=_count,
        default=1000,
        help="rows of the caption file per shard (default: 1000)",
    )
    add(
        "--eval-fraction",
        type=_fraction,
        default=0.0,
        help="share of videos for STEM-eval; the rest is STEM-train",
    )
    add(
        "--timeout",
        type=_positive,
        default=60.0,
        help="seconds that decoding one video may take (default: 60)",
    )
    add("--memory-gib", type=_positive, default=4.0, help="address space of one decoder (default: 4)")
    add(
        "--max-frames", type=_count, default=2048, help="refuse clips with more stored frames (default: 2048)"
    )
    add("--max-pixels", type=_count, default=1 << 25, help="refuse larger source frames (default: 33554432)")
    add("--batch", type=_count, default=64, help="frames coded at once (default: 64)")
    add("--device", default="cpu", help="where frames are coded: cpu, cuda, ... (default: cpu)")
    add(
        "--overwrite",
        action="store_true",
        help="remove shards that an earlier run made under this stem first",
    )
    add("--json", action="store_true", help="print the summary as one JSON object")
    parser.set_defaults(command=_run)


def _add_records(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("files", type=Path, nargs="+", metavar="FILE", help="files of 8256-byte records, without a header")
    add(
        "--out", type=Path, required=True, metavar="DIR/STEM", help="shards become DIR/STEM-00000-of-000NN.h5"
    )
    add("--text", type=Path, required=True, metavar="FOLDER", help="text tokenizer (convert.py import-icetk-text)")
    add(
        "--tokenizer",
        type=Path,
        required=True,
        metavar="FOLDER",
        help="frame tokenizer (convert.py import-icetk-frames)",
    )
    add("--clips-per-shard", type=_count, default=10_000, help="records per shard (default: 10000)")
    add(
        "--eval-fraction",
        type=_fraction,
        default=0.0,
        help="share of every file's records, its last ones, for STEM-eval; the rest is STEM-train",
    )
    add("--overwrite", action="store_true", help="remove shards that an earlier run made under this stem first")
    add("--json", action="store_true", help="print the summary as one JSON object")
    parser.set_defaults(command=_records)


def _add_merge(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("shards", nargs="+", metavar="SHARD", help="shard files or quoted glob patterns, in the order wanted")
    add("--out", type=Path, required=True, metavar="DIR/STEM", help="shards become DIR/STEM-00000-of-000NN.h5")
    size = parser.add_mutually_exclusive_group()
    size.add_argument("--clips-per-shard", type=_count, default=1000, help="clips per shard (default: 1000)")
    size.add_argument("--shards", type=_count, dest="num_shards", metavar="N", help="shards to make, of equal sizes")
    add(
        "--mixed-settings",
        action="store_true",
        help="merge sets that were prepared in different ways (rate, size, decoder) all the same",
    )
    add("--overwrite", action="store_true", help="remove shards that an earlier run made under this stem first")
    add("--json", action="store_true", help="print the summary as one JSON object")
    parser.set_defaults(command=_merge)


def _add_inspect(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add(
        "shards",
        nargs="*",
        metavar="SHARD",
        help="shard files or quoted glob patterns (default: --config's data.train)",
    )
    add("--tokenizer", type=Path, metavar="FOLDER", help="frame tokenizer that made the shards")
    add("--sheet", type=Path, metavar="PNG", help="contact sheet to write; needs --tokenizer")
    add("--clips", type=_count, default=8, help="clips on the sheet (default: 8)")
    add("--frames", type=_count, default=8, help="frames of a clip on the sheet (default: 8)")
    add(
        "--config", type=Path, metavar="YAML", help="print the clips x rates table under this training config"
    )
    add(
        "--code-frames", type=_count_or_all, default=100_000, help="frames to count codes in, 0 = all (default: 100000)"
    )
    add("--json", action="store_true", help="print one JSON object instead of text")
    parser.set_defaults(command=_inspect)


def _add_plan(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("--clips", type=_count, required=True, help="clips of the corpus")
    add("--like", nargs="+", metavar="SHARD", help="shards of a sample; instead of the next six options")
    add("--grid", type=_size, default=(20, 20), metavar="HxW", help="codes of a frame (default: 20x20)")
    add("--codebook", type=_count, default=20_000, help="size of the codebook (default: 20000)")
    add("--seconds", type=_positive, default=4.0, help="length of a clip (default: 4)")
    add("--fps", type=_positive, default=8.0, help="rate of stored frames (default: 8)")
    add("--caption-bytes", type=_count, default=60, help="caption in UTF-8 (default: 60)")
    add("--id-bytes", type=_count, default=30, help="id, the video's path (default: 30)")
    add("--clips-per-shard", type=_count, default=10_000, help="as for run (default: 10000)")
    add("--clips-per-second", type=_positive, help="measured speed of all ranks together")
    add("--json", action="store_true", help="print one JSON object instead of text")
    parser.set_defaults(command=_plan)


def _run(options: argparse.Namespace) -> int:
    from megacog.prepare.mpi import join

    _require_stem(options.out)
    job = join()  # before torch is imported, which takes seconds: until then a rank would outlive a killed mpirun
    with nullcontext() if job is None else job.all_or_none():
        from megacog.prepare.run import run

        summary = run(options, job)
    if summary is not None:
        _show_summary(summary, options.json)
    return 0


def _records(options: argparse.Namespace) -> int:
    from megacog.prepare.records import RecordSettings, prepare_records
    from megacog.tokenizers.frames import load_frame_tokenizer
    from megacog.tokenizers.text import TextTokenizer

    _require_stem(options.out)
    settings = RecordSettings(options.out, options.clips_per_shard, options.eval_fraction, options.overwrite)
    text, frames = TextTokenizer.load(options.text), load_frame_tokenizer(options.tokenizer)
    _show_summary(prepare_records(options.files, text, frames, settings), options.json)
    return 0


def _merge(options: argparse.Namespace) -> int:
    from megacog.prepare.merge import MergeSettings, merge

    _require_stem(options.out)
    settings = MergeSettings(
        options.out, options.clips_per_shard, options.num_shards, options.mixed_settings, options.overwrite
    )
    _show_summary(merge(options.shards, settings), options.json)
    return 0


def _plan(options: argparse.Namespace) -> int:
    from megacog.prepare.plan import as_record, as_table, assumed_shape, measured_shape, plan

    shape = measured_shape(options.like) if options.like else assumed_shape(
        options.grid, options.codebook, options.seconds, options.fps, options.id_bytes, options.caption_bytes
    )
    made = plan(options.clips, shape, options.clips_per_shard, options.clips_per_second)
    print(json.dumps(as_record(made)) if options.json else as_table(made))
    return 0


def _require_stem(out: Path) -> None:
    if not out.name or out.name in (".", ".."):
        raise ConfigError(f"--out {out} names no stem; give a folder and a name, e.g. data/clips")


def _show_summary(summary: Summary, as_json: bool) -> None:
    if as_json:
        print(
            json.dumps(
                {
                    "shards": [str(path) for path in summary.shards],
                    "clips": summary.clips,
                    "frames": summary.frames,
                    "hours": summary.hours,
                    "bytes": summary.num_bytes,
                    "failed": summary.failed,
                    "failed_path": str(summary.failed_path) if summary.failed_path else None,
                    "seconds": summary.seconds,
                    "earlier": summary.earlier,
                }
            )
        )
        return
    if summary.earlier:
        print("prepared earlier with these settings; --overwrite would make it again")
    for path in summary.shards:
        print(f"  {path}")
    failed = f"{summary.failed} failed (see {summary.failed_path})" if summary.failed else "0 failed"
    print(
        f"{summary.clips} clips, {summary.frames} frames, {summary.hours:.3f} hours, {failed}, "
        f"{summary.seconds:.1f} s, {summary.num_bytes / 1e6:.2f} MB"
    )


def _inspect(options: argparse.Namespace) -> int:
    from megacog.prepare.inspect import ShardSet, default_patterns, describe, rates, statistics

    if options.sheet is not None and options.tokenizer is None:
        raise ConfigError("--sheet needs --tokenizer: codes are drawn by the tokenizer that made them")
    config = None
    if options.config is not None:
        from megacog.config.load import load_config

        config = load_config(options.config)
    patterns = options.shards or (default_patterns(config) if config is not None else [])
    if not patterns:
        raise ConfigError("name shards to inspect, or a --config whose data.train names them")
    with ShardSet(patterns) as shards:
        tokenizer = None
        if options.tokenizer is not None:
            from megacog.tokenizers.frames import load_frame_tokenizer

            tokenizer = load_frame_tokenizer(options.tokenizer)
            shards.require_tokenizer(tokenizer)
        report = statistics(shards, options.code_frames)
        text = [describe(report)]
        if options.sheet is not None:
            from megacog.prepare.sheet import write_sheet

            assert tokenizer is not None
            write_sheet(shards, tokenizer, options.sheet, options.clips, options.frames)
            text.append(f"contact sheet: {options.sheet}")
            report["sheet"] = str(options.sheet)
    if config is not None:
        report["rates"], lines = rates(config, options.shards)
        text.append(lines)
    print(json.dumps(report) if options.json else "\n".join(text))
    return 0


def _verify(options: argparse.Namespace) -> int:
    from megacog.prepare.verify import verify

    result = verify(options.shards)
    if options.json:
        shards = [str(path) for path in result.shards]
        record = {
            "shards": shards,
            "clips": result.clips,
            "frames": result.frames,
            "failures": result.failures,
        }
        print(json.dumps(record))
    else:
        for failure in result.failures:
            print(f"BAD {failure}")
        state = f"{len(result.failures)} failures" if result.failures else "all intact"
        print(f"{len(result.shards)} shards, {result.clips} clips, {result.frames} frames: {state}")
    return 1 if result.failures else 0


def _number(text: str) -> float:
    try:
        return float(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is no number") from None


def _whole(text: str) -> int:
    try:
        return int(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is no whole number") from None


def _positive(text: str) -> float:
    value = _number(text)
    if not 0 < value <= 1e6:
        raise argparse.ArgumentTypeError(f"{text} is not a number above 0 and up to a million")
    return value


def _count(text: str) -> int:
    value = _whole(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"{text} is not 1 or more")
    return value


def _count_or_all(text: str) -> int:
    value = _whole(text)
    if value < 0:
        raise argparse.ArgumentTypeError(f"{text} is not 0 or more")
    return value


def _fraction(text: str) -> float:
    value = _number(text)
    if not 0 <= value < 1:
        raise argparse.ArgumentTypeError(f"{text} is not in [0, 1)")
    return value


def _size(text: str) -> tuple[int, int]:
    sides = text.lower().split("x")
    if len(sides) > 2 or not all(side.isascii() and side.isdecimal() and int(side) > 0 for side in sides):
        raise argparse.ArgumentTypeError(f"{text} is no size; write 32 or 32x48 (height x width)")
    return int(sides[0]), int(sides[-1])
