"""Files from strangers for every reader: nothing in them is run, nothing is written but what was asked for."""

from __future__ import annotations

import json
import os
import shutil
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest
from command_line import Command, TrainingArguments, assert_tells, files, nothing_changes, prepare_arguments
from hostile_payloads import liars, pickles, yaml_texts
from sat_files import sat_model, write_config, write_sat
from small_icetk import write_text_model

from megacog.runtime.files import sha256_file

Figure = Callable[[str], None]
SECONDS = 20.0
"""No refusal takes longer; most take milliseconds."""


@pytest.fixture
def canary(tmp_path: Path) -> Path:
    return tmp_path / "canary"


@pytest.fixture
def refused(command: Command, tmp_path: Path, canary: Path) -> Iterator[Callable[..., None]]:
    """Calls a command that must end with a message that tells `about`, at once, and must change no file."""

    def check(about: str, name: str, *arguments: object) -> None:
        start = time.monotonic()
        with nothing_changes(tmp_path):
            outcome = command(name, *arguments)
        assert outcome.code in (1, 75), (outcome, arguments)
        assert_tells(outcome.err + outcome.out, about)
        assert time.monotonic() - start < SECONDS

    yield check
    assert not canary.exists()


def reseal(export: Path) -> None:
    """Make the manifest of an export fit what its files have become, as its attacker would."""
    path = export / "manifest.json"
    manifest = json.loads(path.read_text())
    for name in manifest["files"]:
        file = export / name
        manifest["files"][name] = {"bytes": file.stat().st_size, "sha256": sha256_file(file)}
    path.write_text(json.dumps(manifest))


def test_the_payloads_do_run_where_they_are_trusted(canary: Path) -> None:
    import pickle

    pickle.loads(pickles(canary)["pickle"])
    assert canary.exists()


# ---- code, and sizes that cannot be, in the place of every file ------------------------------------------------------


def payloads(canary: Path) -> dict[str, bytes]:
    return pickles(canary) | liars()


def test_no_file_of_an_export_or_tokenizer_runs_or_bursts(
    refused: Any, world: Path, tmp_path: Path, canary: Path, figure: Figure
) -> None:
    source = world / "made/export"
    names = [str(path.relative_to(source)) for path in source.rglob("*") if path.is_file()]
    export, count = tmp_path / "export", 0
    shutil.copytree(source, export)
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("the digit 3 moves left\n")
    for name in names:
        whole = (export / name).read_bytes()
        for kind, payload in payloads(canary).items():
            if name.endswith("report.json") and kind == "JSON of other things":
                continue  # only people read it, and it is JSON
            (export / name).write_bytes(payload)
            if name != "manifest.json":
                reseal(export)
            commands = []
            if not name.endswith("report.json"):  # nobody but `show` reads it
                commands.append(("infer", prompts, "--model", export, "--out", tmp_path / "out", "levels=0"))
            if name == "manifest.json" or name.startswith("model-"):
                commands.append(("convert", "verify", export))
            elif "tokenizer" in name:
                commands.append(("train_tokenizer", "show", (export / name).parent))
            for each in commands:
                refused(f"{tmp_path}", *each)
                count += 1
        (export / name).write_bytes(whole)
        reseal(export)
    figure(f"hostile exports and tokenizers: refused {count} of {count} ({len(names)} files, every payload)")


def test_no_file_of_the_original_s_formats_runs_or_bursts(
    refused: Any, tmp_path: Path, canary: Path, figure: Figure
) -> None:
    sat, weights = write_sat(tmp_path / "sat", sat_model(), "sequential"), "27000/mp_rank_00_model_states.pt"
    write_text_model(tmp_path / "ice_text.model")
    config, foreign, count = write_config(tmp_path, sat_model()), tmp_path / "foreign", 0
    out = ("--out", tmp_path / "out")
    for payload in payloads(canary).values():
        for name in (weights, "model_config.json", "latest"):
            whole = (sat / name).read_bytes()
            (sat / name).write_bytes(payload)
            refused("sat", "convert", "import-sat", sat, *out, "--config", config)
            (sat / name).write_bytes(whole)
        foreign.write_bytes(payload)
        refused("foreign", "convert", "import-icetk-text", foreign, *out)
        refused("foreign", "convert", "import-icetk-frames", foreign, *out)
        refused("foreign", "convert", "parity", foreign)
        count += 6
    figure(f"hostile files of the original's formats: refused {count} of {count}")


def test_no_file_that_stands_for_a_shard_records_or_clusters_runs_or_bursts(
    refused: Any, training: TrainingArguments, world: Path, tmp_path: Path, canary: Path, figure: Figure
) -> None:
    foreign, count = tmp_path / "foreign.h5", 0
    arguments = training(data__train=[{"path": str(foreign)}])
    (tmp_path / "prompts.txt").write_text("the digit 3 moves left\n")
    tokenizers = ("--text", world / "inputs/text", "--tokenizer", world / "tokenizer")
    infer = (tmp_path / "prompts.txt", "--model", world / "made/export", "--out", tmp_path / "out")
    for payload in payloads(canary).values():
        foreign.write_bytes(payload)
        refused("foreign", "pretrain", *arguments)
        refused("foreign", "prepare", "verify", foreign)
        refused("foreign", "prepare", "inspect", foreign)
        refused("foreign", "infer", *infer, "levels=0", "sampler=clusters", f"clusters={foreign}")
        refused("", "prepare", "records", foreign, "--out", tmp_path / "made/r", *tokenizers)
        tar = foreign.rename(tmp_path / "foreign.tar")
        refused("foreign", "prepare", *prepare_arguments(world, tar, tmp_path / "made/c", root=tmp_path))
        for name in ("foreign.csv", "foreign.jsonl"):
            table = tar.rename(tmp_path / name)
            refused("foreign", "train_tokenizer", "text", table, "--out", tmp_path / "made")
            table.rename(tar)
        tar.rename(foreign)
        count += 8
    figure(f"hostile files for shards, records, clusters, captions, tars: refused {count} of {count}")


# ---- YAML ------------------------------------------------------------------------------------------------------------


def test_no_configuration_runs_or_bursts(refused: Any, tmp_path: Path, canary: Path, figure: Figure) -> None:
    count = 0
    for text in yaml_texts(canary).values():
        (tmp_path / "bad.yaml").write_text(text)
        refused("bad.yaml", "pretrain", "--config", tmp_path / "bad.yaml")
        count += 1
    figure(f"hostile configurations: refused {count} of {count}")


def test_no_override_runs_or_bursts(
    refused: Any, training: TrainingArguments, canary: Path, figure: Figure
) -> None:
    arguments, count = training(), 0
    for text in yaml_texts(canary).values():
        value = text.partition("model: ")[2] or text
        if len(value) < 200_000 and "\n" not in value:
            refused("override", "pretrain", *arguments, f"train.steps={value}")
            count += 1
    figure(f"hostile overrides: refused {count} of {count}")


# ---- HDF5 that reaches for other files -------------------------------------------------------------------------------


def reach_out(path: Path, kind: str, secret: Path) -> None:
    """Replace a dataset of a shard by something that is elsewhere, or not what it seems."""
    with h5py.File(path, "r+", libver="latest") as file:
        frames = file["frames"][...]
        target = "clips/captions" if kind.startswith("captions") else "frames"
        shape, dtype = file[target].shape, file[target].dtype
        if kind == "whole group":
            del file["clips"]
            file["clips"] = h5py.ExternalLink(str(secret), "/clips")
            return
        del file[target]
        if "external link" in kind:
            file[target] = h5py.ExternalLink(str(secret), f"/{target}")
        elif "external storage" in kind:
            file.create_dataset(target, shape, dtype, external=[(str(secret), 0, h5py.h5f.UNLIMITED)])
        elif kind == "soft link":
            file[target] = h5py.SoftLink("/frames_crc32")
        elif kind == "virtual":
            layout = h5py.VirtualLayout(shape, dtype)
            layout[:] = h5py.VirtualSource(str(secret), "frames", shape)
            file.create_virtual_dataset(target, layout)
        elif kind == "compressed bomb":
            file.create_dataset(target, (1 << 40, *shape[1:]), dtype, chunks=(1 << 16, *shape[1:]), compression="gzip")
        elif kind == "loop":
            file["frames"] = file["/"]
        else:
            file.create_dataset(target, data=np.array([b"x" * 9] * len(frames)))


REACHING = (
    "external link", "external storage", "captions by external link", "captions by external storage", "whole group",
    "soft link", "virtual", "compressed bomb", "loop", "strings",
)  # fmt: skip


def test_no_shard_reaches_for_other_files(
    refused: Any, training: TrainingArguments, world: Path, tmp_path: Path, figure: Figure
) -> None:
    path, secret = tmp_path / "bad.h5", tmp_path / "secret.h5"
    arguments = training(data__train=[{"path": str(path)}])
    for kind in REACHING:
        for copy in (path, secret):
            shutil.copy(world / "inputs/train.h5", copy)
        reach_out(path, kind, secret)
        refused("bad.h5", "pretrain", *arguments)
        refused("bad.h5", "prepare", "verify", path)
        refused("bad.h5", "prepare", "inspect", path)
    figure(f"shards that reach for other files: refused {3 * len(REACHING)} of {3 * len(REACHING)}")


# ---- prompts and captions --------------------------------------------------------------------------------------------

PROMPTS = [
    "$(touch canary)", "`touch canary`", "; touch canary #", "| tee canary", "&& touch canary", "> canary",
    "'; touch canary '", '"; touch canary "', "../../../canary", "/etc/passwd", "..", ".", "-rf *", "--out=/tmp",
    "%s%n%x", "{0.__class__}", "<script>", "CON", "a" * 3000, "\u202etxt.exe", "\U0001f600" * 3, "\u0300" * 50,
    "e\u0301", "\ufeff", "two\u2028lines",
    "tab\tinside", "bell \a", "escape \x1b[2J", "null \0", '{"text": "a", "image": "/dev/zero"}',
    '{"text": "a", "image": "pipe"}', '{"text": "a", "image": "secret"}', '{"text": "a", "video": "list.mp4"}',
    '{"text": "a", "video": "http://127.0.0.1:9/a.mp4"}', '{"text": "a", "image": "a\\u0000b"}', '{"text": "\\ud800"}',
    '{"text": "a", "seed": 1e99}', '{"text": ["a"]}', '{"text": "a", "out": "/etc"}', "{" * 50_000,
    '{"text": "a"} {"text": "b"}',
    '{"text": "a", "seed": ' + "9" * 5000 + "}", '{"text": "a", "seconds": NaN}', '{"text": "a", "seconds": Infinity}',
]  # fmt: skip


def test_no_prompt_reaches_a_shell_or_another_folder(
    command: Command, world: Path, tmp_path: Path, canary: Path, monkeypatch: pytest.MonkeyPatch, figure: Figure
) -> None:
    monkeypatch.chdir(tmp_path)
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "secret").write_text("the secret")
    (tmp_path / "list.mp4").write_text("#EXTM3U\n#EXTINF:1,\nsecret\n")
    prompts = tmp_path / "$(touch canary).txt"
    prompts.write_text("\n".join(PROMPTS))
    before = files(tmp_path)
    options = ("--model", world / "made/export", "--out", tmp_path / "out", "levels=0", "--scale", 8)
    outcome = command("infer", prompts, *options)
    assert outcome.code == 1  # some could not be used, and are told
    assert "Traceback" not in outcome.err and "the secret" not in outcome.err + outcome.out
    after = files(tmp_path)
    assert not canary.exists() and {name: after[name] for name in before} == before
    made = {name for name in after.keys() - before.keys() if name != "out"}
    assert all(name.startswith("out/") and name.count("/") == 1 for name in made)
    results = [json.loads(line) for line in (tmp_path / "out/results.jsonl").read_text().strip("\n").split("\n")]
    clips = sum(name.endswith(".mp4") for name in made)
    errors = [line for line in outcome.err.splitlines() if line.startswith("error: ")]
    assert clips + len(errors) >= len(PROMPTS) and len(results) >= len(PROMPTS)
    figure(f"hostile prompts: {len(PROMPTS)}, harmless clips of {clips}, refused {len(errors)}, outside the folder 0")
