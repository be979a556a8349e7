"""A caption file of many small videos, made quickly: a few real files, and links to them."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

from run_ranks import ROOT, python_environment
from tiny_videos import ramp, random_tokenizer, write_captions, write_video

CLIPS_PER_SHARD = 4


def make_corpus(folder: Path, clips: int, seconds: float = 4.0) -> Path:
    """Returns a folder with captions.csv, its videos (every ninth row has none) and a frame tokenizer.

    Args:
        folder: to be filled.
        clips: rows.
        seconds: of the longest video; the others are shorter.
    """
    random_tokenizer(folder / "tokenizer")
    frames = max(3, round(8 * seconds))
    for kind in range(3):
        write_video(folder / f"source{kind}.mp4", ramp(frames // (kind + 1), step=1, start=30 * kind, size=(64, 64)), 8)
    rows = []
    for number in range(clips):
        name = f"clip{number:04d}.mp4"
        if number % 9 != 4:
            (folder / name).hardlink_to(folder / f"source{number % 3}.mp4")
        rows.append((name, f"clip number {number}"))
    write_captions(folder / "captions.csv", rows)
    return folder


def prepare_words(corpus: Path, out: Path, **options: object) -> list[str]:
    """What python runs to prepare the corpus."""
    given = {
        "out": out, "tokenizer": corpus / "tokenizer", "size": 16, "workers": 1, "clips-per-shard": CLIPS_PER_SHARD,
    } | options  # fmt: skip
    words = [str(word) for name, value in given.items() for word in (f"--{name}", value)]
    return [str(ROOT / "launch/prepare.py"), "run", str(corpus / "captions.csv"), *words]


def prepare_alone(corpus: Path, out: Path) -> dict[str, bytes]:
    """The files that one undisturbed process makes."""
    command = [sys.executable, *prepare_words(corpus, out)]
    done = subprocess.run(command, cwd=ROOT, env=python_environment(), capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stderr
    return made(out.parent)


def made(folder: Path) -> dict[str, bytes]:
    """Contents of all files of a finished preparation, which has left nothing else."""
    found = {path.name: path.read_bytes() for path in folder.iterdir()}
    assert [shard["file"] for shard in json.loads(found["clips.json"])["shards"]] == sorted(
        name for name in found if name.endswith(".h5")
    )
    assert set(found) == {name for name in found if name.endswith(".h5")} | {"clips.json", "failed.jsonl"}
    return found
