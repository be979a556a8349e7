"""Sub-commands of `launch/convert.py` for weights: import, export, parity, verification."""

from __future__ import annotations

import argparse
import json
import math
import time
from collections.abc import Callable
from pathlib import Path
from typing import get_args

from megacog.checkpoint.export import FRAME_TOKENIZER, TEXT_TOKENIZER, Export, add_tokenizers, open_export
from megacog.checkpoint.verify import is_run, verify_run
from megacog.config.load import load_config
from megacog.config.schema import PlusStage, Stage
from megacog.errors import CheckpointError, ConfigError, DataError
from megacog.interop import exporting, parity
from megacog.interop.importing import Imported, ImportOptions, import_sat
from megacog.interop.keys import name_problems, original_entries
from megacog.interop.parity_writing import write_parity_file
from megacog.interop.tokenizers import GivenTokenizers
from megacog.runtime.allocator import return_large_blocks
from megacog.runtime.files import atomic_file
from megacog.runtime.hardware import memory_gib
from megacog.runtime.tensor_files import save_tensors

_STAGES = get_args(Stage)


def add_parsers(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add the sub-commands."""
    _add_import(commands.add_parser("import-sat", help="checkpoint folders -> export", description=_IMPORT))
    sat = commands.add_parser("export-sat", help="export -> checkpoint folder of the original", description=_EXPORT_SAT)
    _add_export(sat, _export_sat)
    sat.add_argument("--ranks", type=int, default=1, help="model-parallel ranks (default 1)")
    sat.add_argument("--iteration", type=int, help="number of the inner folder (default: the stage's steps, if known)")
    tensors = commands.add_parser(
        "export-safetensors", help="export -> one safetensors file", description=_EXPORT_SAFETENSORS
    )
    _add_export(tensors, _export_safetensors)
    _add_parity(commands.add_parser("parity", help="our numbers against the original's", description=_PARITY))
    _add_parity_file(commands.add_parser("parity-file", help="make a parity file", description=_PARITY_FILE))
    add = commands.add_parser("add-tokenizers", help="put tokenizers into an export", description=_ADD_TOKENIZERS)
    add.add_argument("export", type=Path, metavar="EXPORT")
    _add_tokenizer_folders(add)
    add.set_defaults(command=_add_tokenizers)
    verify = commands.add_parser("verify", help="check what a run or an export holds", description=_VERIFY)
    verify.add_argument("export", type=Path, metavar="RUN|EXPORT")
    verify.add_argument("--full", action="store_true", help="of a run: read every byte (of an export: always)")
    verify.set_defaults(command=_verify)


_IMPORT = """Make an export of the released CogView2 or CogVideo weights, or of others in their format. Several
folders (coglm, cogvideo-stage1, cogvideo-stage2) become one export with one base and an attention-plus set per stage;
their bases must be the same to the bit. Afterwards the logits of random input are compared, all layers, with the
source's weights computed step by step."""
_EXPORT_SAT = """Write one stage's weights as SwissArmyTransformer does: latest, model_config.json and
<iteration>/mp_rank_XX_model_states.pt, under the original's keys and in the export's dtype."""
_EXPORT_SAFETENSORS = """Write one stage's weights as model.safetensors under the original's keys, with a
model_config.json; import-sat reads it back."""
_PARITY = """Compute what a parity file holds (logits, loss, gradients of the original) with our model and compare.
Exit code 1 if a relative difference, max|a-b| / max|b|, is above the tolerance."""
_PARITY_FILE = """Make a file for `parity` at any size: logits, loss and four gradients that the plain
step-by-step model computes in fp32 from random inputs, with random weights that the file holds, or with those
of an export."""
_ADD_TOKENIZERS = """Put a text tokenizer, a frame tokenizer or both into an export that was imported without them,
after checking that they are its model's."""
_VERIFY = """Of an export: check sizes and checksums of all files, and that its tensors and its tokenizers are those of
its model. Of a run: check manifests and sizes of all checkpoints, of the frozen weights and of the export; with --full
checksums, too. Exit code 1 if anything is damaged."""


def _add_import(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("folders", nargs="+", type=Path, metavar="DIR", help="checkpoint folders; each holds `latest`")
    add("--out", type=Path, required=True, metavar="EXPORT", help="folder to write")
    add("--force", action="store_true", help="replace an older export")
    add("--config", type=Path, metavar="FILE", help="configuration of the export, where model_config.json is missing")
    add("--set", action="append", default=[], metavar="key=value", help="override a key of --config; repeatable")
    add("--stages", nargs="+", default=[], choices=_STAGES, help="what each DIR holds, where it does not say")
    add("--base-from", type=Path, metavar="DIR", help="take the base of this DIR when they differ")
    _add_tokenizer_folders(parser)
    parser.set_defaults(command=_import_sat)


def _add_tokenizer_folders(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--text-tokenizer", type=Path, metavar="FOLDER", help="text tokenizer to put in")
    parser.add_argument("--frame-tokenizer", type=Path, metavar="FOLDER", help="frame tokenizer to put in")


def _add_export(parser: argparse.ArgumentParser, command: Callable[[argparse.Namespace], int]) -> None:
    parser.add_argument("export", type=Path, metavar="EXPORT")
    parser.add_argument("--out", type=Path, required=True, metavar="DIR", help="folder to write")
    parser.add_argument("--stage", choices=_STAGES, help="which weights, where the export holds several")
    parser.set_defaults(command=command)


def _add_parity(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("tensors", type=Path, metavar="TENSORS.safetensors")
    add("--export", type=Path, metavar="EXPORT", help="weights to compute with instead of the file's model.*")
    add("--json", action="store_true", help="print one JSON object")
    add("--tolerance", type=float, default=1e-4, help="largest relative difference (default 1e-4)")
    add("--write", type=Path, metavar="OUT.safetensors", help="store what was computed, under the same names")
    parser.set_defaults(command=_parity)


def _add_parity_file(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument("--config", type=Path, metavar="FILE", help="configuration whose model gets random weights")
    source.add_argument("--export", type=Path, metavar="EXPORT", help="compute with its weights, and store none")
    add("--set", action="append", default=[], metavar="key=value", help="override a key of --config; repeatable")
    add("--stage", choices=get_args(PlusStage), help="default: train.stage of --config; the stage of --export")
    add("--padding", nargs="+", type=int, default=[0], metavar="N", help="padding of each sample's text (default: 0)")
    add("--out", type=Path, required=True, metavar="OUT.safetensors", help="file to write")
    parser.set_defaults(command=_parity_file)


def _import_sat(options: argparse.Namespace) -> int:
    if options.set and options.config is None:
        raise ConfigError("--set changes keys of --config, which is not given")
    return_large_blocks()
    imported = import_sat(
        options.folders, options.out,
        ImportOptions(
            options.config, tuple(options.set), tuple(options.stages), options.base_from, options.text_tokenizer,
            options.frame_tokenizer, options.force,
        ),
    )  # fmt: skip
    print("\n".join(_report(imported, options.out)))
    return 0


def _report(imported: Imported, out: Path) -> list[str]:
    gigabytes = imported.bytes / 1e9
    lines = [
        f"{out}: {', '.join(imported.stages)}; {imported.tensors} tensors, {imported.parameters:,} parameters, "
        f"{gigabytes:.2f} GB of {' and '.join(imported.dtypes)}, {gigabytes / imported.seconds:.2f} GB/s"
    ]
    return lines + [
        f"{row.name}, random input: relative difference {row.relative:.1e} from the source's, step by step in fp32"
        for row in imported.parity
    ]


def _export_sat(options: argparse.Namespace) -> int:
    return_large_blocks()
    export = open_export(options.export)
    stage = exporting.stage_to_export(export, options.stage)
    iteration = exporting.iteration_of(export, stage, options.iteration)
    exporting.export_sat(export, options.out, stage, options.ranks, iteration)
    print(f"{options.out}: {stage}, iteration {iteration}, {options.ranks} model-parallel ranks")
    return 0


def _export_safetensors(options: argparse.Namespace) -> int:
    return_large_blocks()
    export = open_export(options.export)
    stage = exporting.stage_to_export(export, options.stage)
    exporting.export_safetensors(export, options.out, stage)
    print(f"{options.out}: {stage}")
    return 0


def _parity(options: argparse.Namespace) -> int:
    start = time.monotonic()
    file = parity.ParityFile(options.tensors)
    export = open_export(options.export) if options.export else None
    wanted = file.wanted or ([parity.LOGITS, parity.LOSS] if options.write else [])
    if not wanted:
        raise DataError(f"{options.tensors} holds no out.* or grad.* to compare with; --write computes and stores them")
    results = parity.compute(file, parity.build(file, export), wanted)
    if options.write:
        with atomic_file(options.write) as out:
            save_tensors(results, Path(out.name), file.metadata)
    rows = parity.compare(results, file) if file.wanted else []
    failed = [row.name for row in rows if not row.relative <= options.tolerance]
    facts = {"seconds": round(time.monotonic() - start, 1), "peak_memory_gib": round(memory_gib(), 2)}
    if options.json:
        # JSON has no NaN.
        values = {row.name: {"max_abs": row.max_abs, "relative": row.relative} for row in rows}
        tensors = {
            name: {key: number if math.isfinite(number) else None for key, number in row.items()}
            for name, row in values.items()
        }
        print(json.dumps({
            "file": str(options.tensors), "stage": file.stage, "tolerance": options.tolerance, "passed": not failed,
            "tensors": tensors, **facts,
        }))  # fmt: skip
    else:
        print("\n".join(_table(rows, options.tolerance)))
        print(f"stage {file.stage}, {facts['seconds']} s, peak memory {facts['peak_memory_gib']} GiB")
    return 1 if failed else 0


def _parity_file(options: argparse.Namespace) -> int:
    start = time.monotonic()
    export = open_export(options.export) if options.export else None
    if export is not None:
        if options.set:
            raise ConfigError("--set changes keys of --config, which is not given")
        model, stage = export.model, exporting.stage_to_export(export, options.stage)
    else:
        config = load_config(options.config, options.set)
        model, stage = config.model, options.stage or config.train.stage
    if stage == "base":
        raise ConfigError("parity files are of a video stage; give --stage sequential or --stage interpolation")
    write_parity_file(options.out, model, stage, options.padding, export)
    seconds = round(time.monotonic() - start, 1)
    print(f"{options.out}: {stage}, {seconds} s, peak memory {memory_gib():.2f} GiB")
    return 0


def _table(rows: list[parity.Difference], tolerance: float) -> list[str]:
    width = max([len("tensor"), *(len(row.name) for row in rows)])
    lines = [f"{'tensor':{width}}  max |a-b|   relative"]
    for row in rows:
        verdict = "" if row.relative <= tolerance else f"  above {tolerance:g}"
        lines.append(f"{row.name:{width}}  {row.max_abs:9.2e}  {row.relative:9.2e}{verdict}")
    return lines


def _add_tokenizers(options: argparse.Namespace) -> int:
    if options.text_tokenizer is None and options.frame_tokenizer is None:
        raise ConfigError("there is nothing to add; give --text-tokenizer FOLDER, --frame-tokenizer FOLDER or both")
    export = open_export(options.export)
    GivenTokenizers(options.text_tokenizer, options.frame_tokenizer).require(export.model)
    add_tokenizers(export, options.text_tokenizer, options.frame_tokenizer)
    print(f"{options.export}: {' and '.join(open_export(options.export).tokenizers)}")
    return 0


def _verify(options: argparse.Namespace) -> int:
    if not options.export.is_dir():
        raise CheckpointError(f"{options.export}: no such folder; give that of a run (train.run_dir) or of an export")
    if is_run(options.export):
        return _verify_run(options.export, options.full)
    export = open_export(options.export, verify=True)
    own = {name: export.path / name for name in export.tokenizers}
    tokenizers = GivenTokenizers(own.get(TEXT_TOKENIZER), own.get(FRAME_TOKENIZER))
    problems = _export_problems(export) + tokenizers.problems(export.model)
    if problems:
        raise CheckpointError(f"{options.export} does not hold what its model has:\n  " + "\n  ".join(problems))
    held, names = ", ".join(["base", *export.plus]), " and ".join(export.tokenizers)
    print(f"{options.export}: {held}; {len(export.files)} tensors, {names or 'no tokenizers'}")
    return 0


def _verify_run(run_dir: Path, full: bool) -> int:
    found = verify_run(run_dir, full)
    if not found:
        raise CheckpointError(f"{run_dir}: no checkpoints yet: the run has begun and saved nothing so far")
    width = max([len(row.name) for row in found], default=0)
    for row in found:
        state = "DAMAGED" if row.problem else "whole" if full else "sizes fit"
        size = f"{row.files:5} files {row.bytes / 1e6:12.3f} MB"
        print(f"{row.name:{width}} {size}  {state:9}  {row.problem or row.note}")
    damaged = sum(row.problem is not None for row in found)
    how = "every byte" if full else "manifests and sizes; --full reads every byte"
    print(f"{run_dir}: {len(found)} things checked ({how}), {damaged} damaged")
    return 1 if damaged else 0


def _export_problems(export: Export) -> list[str]:
    shapes: dict[str, tuple[int, ...]] = {}
    stages: list[Stage] = ["base", *export.plus]
    for stage in stages:
        for entry in original_entries(export.model, stage).values():
            shapes |= {
                name: (rows, *entry.shape[1:]) for name, rows in zip(entry.names, entry.rows, strict=True)
            }
    problems = name_problems(export.files, shapes)
    held = [name for name in shapes if name in export.files]
    found = {name: tuple(export.tensor(name).shape) for name in held}
    wrong = [name for name in held if found[name] != shapes[name]]
    return problems + [f"{name} is {list(found[name])}, expected {list(shapes[name])}" for name in wrong]
