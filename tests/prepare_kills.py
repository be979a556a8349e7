"""Kills preparations at random moments, and compares what they come to with an undisturbed one.

    python tests/prepare_kills.py [--kills 50] [--seed 0] [--json FILE]

A preparation runs alone or under mpirun. It is killed when a random number of its shards is done, up to three times,
then left to finish: its files must be those of the undisturbed one, byte for byte, and no finished shard made again.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

from mpi_ranks import MPIRUN, mpi_environment
from run_ranks import ROOT
from video_corpus import CLIPS_PER_SHARD, made, make_corpus, prepare_alone, prepare_words

CLIPS = 64
KILLS_OF_ONE = 3
_MARK = "MEGACOG_TEST_PREPARATION"


@dataclass
class Record:
    """What the kills have come to."""

    kills: int = 0
    preparations: int = 0
    victims: Counter[str] = field(default_factory=Counter)
    shards_made_again: int = 0
    most_seconds_to_end: float = 0.0


class Preparation:
    """One start of prepare.py, alone or with two ranks."""

    def __init__(self, corpus: Path, out: Path, ranks: int) -> None:
        command = [sys.executable, *prepare_words(corpus, out)]
        if ranks > 1:
            command = [MPIRUN, "-n", str(ranks), "--bind-to", "none", *command]
        self.ranks = ranks
        self._mark = f"{os.getpid()}-{time.monotonic_ns()}"
        self._log = tempfile.TemporaryFile("w+")
        self.process = subprocess.Popen(
            command, cwd=ROOT, env=mpi_environment() | {_MARK: self._mark}, stdout=self._log, stderr=self._log,
            start_new_session=True,
        )  # fmt: skip

    def processes(self) -> Iterator[tuple[int, str]]:
        """Process ids of everything that belongs to it: mpirun, ranks, decoders and their kind."""
        for entry in Path("/proc").iterdir():
            if entry.name.isdigit():
                try:
                    environment = (entry / "environ").read_bytes()
                    if f"{_MARK}={self._mark}".encode() in environment.split(b"\0"):
                        yield int(entry.name), _kind((entry / "cmdline").read_bytes().split(b"\0"))
                except OSError:  # gone meanwhile
                    continue

    def kill(self, rng: random.Random, everything: bool) -> str | None:
        """Kill one of its processes but a decoder, which costs only a clip, or all; returns which, None if none was."""
        found = [(pid, kind) for pid, kind in self.processes() if kind in ("rank", "mpirun")]
        if not found:
            return None
        if everything:
            for pid, _ in found:
                _kill(pid)
            return "all"
        pid, kind = rng.choice(sorted(found))
        _kill(pid)
        return kind

    def wait(self, seconds: float) -> tuple[int, str]:
        """Exit code and output."""
        code = self.process.wait(seconds)
        self._log.seek(0)
        return code, self._log.read()

    def wait_until_gone(self, seconds: float) -> None:
        """Fail if any of its processes is still there after so long."""
        deadline = time.monotonic() + seconds
        while left := list(self.processes()):
            assert time.monotonic() < deadline, f"orphans: {left}"
            time.sleep(0.02)


def _kind(words: list[bytes]) -> str:
    if words[0].endswith(b"mpirun") or words[0].endswith(b"prterun"):
        return "mpirun"
    return "rank" if any(word.endswith(b"launch/prepare.py") for word in words[:2]) else "decoder"


def _kill(pid: int) -> None:
    try:
        os.kill(pid, signal.SIGKILL)
    except ProcessLookupError:
        pass


def kill_at_random(folder: Path, kills: int, seed: int = 0) -> Record:
    """Kill preparations until so many kills have struck; every one must come to the undisturbed one's files.

    Args:
        folder: Empty; for videos and shards.
        kills: How many.
        seed: Of the choice of moments and victims.
    """
    corpus = make_corpus(folder / "corpus", CLIPS)
    expected = prepare_alone(corpus, folder / "alone/clips")
    rng, record = random.Random(seed), Record()
    while record.kills < kills:
        out = folder / "killed/clips"
        shutil.rmtree(out.parent, ignore_errors=True)
        for _ in range(min(KILLS_OF_ONE, kills - record.kills)):
            if not _kill_once(corpus, out, rng, record):
                break
        else:
            last = Preparation(corpus, out, 1 + record.preparations % 2)
            code, said = last.wait(200)
            assert code == 0, said
        assert made(out.parent) == expected, f"seed {seed}, kill {record.kills}"
        record.preparations += 1
    return record


def _kill_once(corpus: Path, out: Path, rng: random.Random, record: Record) -> bool:
    """Start and kill; False when it was finished before the blow."""
    partial = out.with_name("clips.partial")
    shards = [path for path in partial.glob("clips-*.h5") if path.with_suffix(".json").exists()]
    finished = {path.name: path.stat().st_ino for path in shards}
    preparation = Preparation(corpus, out, 1 + record.kills // 2 % 2)  # in turn: few kills, too, have all kinds
    # From before its first shard to the naming of the finished ones.
    enough = rng.randint(len(finished), -(-CLIPS // CLIPS_PER_SHARD))
    deadline = time.monotonic() + 200
    while len(list(partial.glob("clips-*.json"))) < enough and preparation.process.poll() is None:
        assert time.monotonic() < deadline, preparation.wait(0)[1]
        time.sleep(0.005)
    time.sleep(rng.random() * 0.1)
    victim, start = preparation.kill(rng, everything=record.kills % 5 == 3), time.monotonic()
    code, said = preparation.wait(30)
    if victim is None:
        assert code == 0, said
        return False
    preparation.wait_until_gone(60)
    assert code != 0 or not partial.exists(), f"{victim} was killed, and the exit code is 0: {said}"
    for name, inode in finished.items():
        path = partial / name
        record.shards_made_again += path.exists() and path.stat().st_ino != inode
    assert record.shards_made_again == 0
    record.kills += 1
    record.victims[f"{victim} of {preparation.ranks}"] += 1
    record.most_seconds_to_end = max(record.most_seconds_to_end, time.monotonic() - start)
    return True


def main() -> None:
    parser = argparse.ArgumentParser(description="Kill preparations at random and compare what they come to.")
    parser.add_argument("--kills", type=int, default=50)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", type=Path, help="file that gets the record")
    options = parser.parse_args()
    start = time.monotonic()
    with tempfile.TemporaryDirectory() as folder:
        record = kill_at_random(Path(folder), options.kills, options.seed)
    text = json.dumps({**vars(record), "seed": options.seed, "seconds": round(time.monotonic() - start)})
    print(text)
    if options.json is not None:
        options.json.write_text(text + "\n")


if __name__ == "__main__":
    main()
