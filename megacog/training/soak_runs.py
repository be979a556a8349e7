"""The small runs that `soak.py kills` disturbs: of every kind, and as they must end."""

from __future__ import annotations

import fcntl
import gc
import hashlib
import importlib
import itertools
import json
import random
import shutil
import statistics
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path

from megacog.metrics.record import FILE_NAME as METRICS
from megacog.metrics.record import read_records
from megacog.runtime.files import sha256_file, write_json
from megacog.training import pretrain
from megacog.training.soak_inputs import settings, write_config
from megacog.training.soak_ranks import ForkedRanks, LaunchedRanks, StartedRanks

STEPS = 12
EVERY = 2
"""Steps between checkpoints."""
PATIENCE = 600.0
"""Seconds after which something that should have happened counts as hanging; the machine may be very busy."""
_TIMES = ("seconds", "tokens_per_second", "tflops", "hardware_tflops", "mfu", "hfu", "memory_gib", "data_wait", "time")
"""What metrics say about the machine, not about the run."""
_MODULES = "modules.txt"


class Failed(Exception):
    """Something that must hold does not."""


@dataclass(frozen=True)
class Layout:
    """A kind of run."""

    engine: str
    zero_stage: int
    ranks: int
    tensor: int
    asynchronous: bool
    stage: str
    """base, or sequential on a frozen base."""

    def __str__(self) -> str:
        engine = f"zero{self.zero_stage}" if self.engine == "deepspeed" else self.engine
        split = "" if self.ranks == 1 else "-tensor" if self.tensor > 1 else "-data"
        return f"{engine}-{self.ranks}{split}-{'async' if self.asynchronous else 'sync'}-{self.stage}"


def all_layouts() -> list[Layout]:
    """Every engine on one rank and on two, that share the data or the tensors, both ways of saving, both stages."""
    engines = [("torch", 0), ("deepspeed", 1), ("deepspeed", 2), ("deepspeed", 3)]
    found = []
    for (engine, zero), (ranks, tensor), asynchronous, stage in itertools.product(
        engines, [(1, 1), (2, 1), (2, 2)], (True, False), ("base", "sequential")
    ):
        if zero < 3 or tensor == 1:
            found.append(Layout(engine, zero, ranks, tensor, asynchronous, stage))
    random.Random(0).shuffle(found)  # so that a few trials in a row are already a mix
    return found


@dataclass(frozen=True)
class Ended:
    """What a finished run has left."""

    files: dict[str, str]
    """Below the run's folder, with their sha256."""
    metrics: str
    """sha256 of all records of training and evaluation, without times."""


@dataclass(frozen=True)
class Reference:
    """The run that nobody kills."""

    ended: Ended
    seconds: float
    save_seconds: float
    """Median of its checkpoints."""


class Runs:
    """Where trials take place.

    Args:
        folder: Holds inputs and an export to inherit, as `prepare` has made them; trials get folders of their own.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    @cached_property
    def layouts(self) -> list[Layout]:
        return all_layouts()

    def prepare(self, make_inputs: Callable[[Path], object]) -> int:
        """Make inputs and, in this process, the base that frozen stages inherit; 0 if all is well."""
        make_inputs(self.folder / "inputs")
        layout = Layout("deepspeed", 1, 1, 1, False, "base")
        code = pretrain.main(self._arguments(layout, self.folder / "base"))
        (self.folder / _MODULES).write_text("\n".join(sys.modules))
        return code

    def warm_up(self) -> None:
        """Import what the run of `prepare` has imported, so that forked ranks need not."""
        for name in (self.folder / _MODULES).read_text().splitlines():
            with suppress(Exception):  # some modules exist only where something else has made them
                importlib.import_module(name)
        gc.freeze()  # a child's collector must not touch, and so copy, the memory that it shares

    def start(self, layout: Layout, folder: Path, number: int, launcher: str | None = None) -> StartedRanks:
        """Start, or start again, a run; `number` counts its starts."""
        arguments, log = self._arguments(layout, folder), folder / f"start-{number}.log"
        if launcher is None:
            return ForkedRanks(arguments, layout.ranks, log)
        return LaunchedRanks(launcher, arguments, layout.ranks, log)

    def _arguments(self, layout: Layout, folder: Path) -> list[str]:
        """Of pretrain.py, whose run is `folder/run`."""
        values = settings(
            self.folder / "inputs", folder / "run", layout.stage, engine=layout.engine, zero_stage=layout.zero_stage,
            steps=STEPS, precision="fp32" if layout.stage == "base" else "bf16", global_batch_size=4,
            eval_every=8, eval_batches=1, learning_rate=3e-3, gradient_clip=1.0,
        )  # fmt: skip
        values["model"] |= {"embedding_dropout": 0.1, "mlp_dropout": 0.1}  # so that generators matter
        if layout.stage != "base":
            values["model"]["inherit"] = str(self.folder / "base/run/export")
        values["checkpoint"] = {"every": EVERY, "keep_last": 2, "asynchronous": layout.asynchronous}
        values["parallel"] = {"tensor": layout.tensor}
        folder.mkdir(parents=True, exist_ok=True)
        return ["--config", str(write_config(folder / "config.yaml", values))]

    def reference(self, layout: Layout) -> Reference:
        """What a run must end as; made by whoever needs it first."""
        folder = self.folder / "references"
        folder.mkdir(exist_ok=True)
        path = folder / f"{layout}.json"
        with open(folder / f"{layout}.lock", "w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            if not path.exists():
                write_json(path, asdict(self._make_reference(layout, folder / str(layout))))
        content = json.loads(path.read_text())
        return Reference(Ended(**content.pop("ended")), **content)

    def _make_reference(self, layout: Layout, folder: Path) -> Reference:
        shutil.rmtree(folder, ignore_errors=True)
        started = time.monotonic()
        finish(self.start(layout, folder, 0), folder)
        seconds = time.monotonic() - started
        saves = [r["seconds"] for r in read_records(folder / "run" / METRICS) if r["kind"] == "checkpoint"]
        ended = look_at(folder / "run")
        shutil.rmtree(folder)
        return Reference(ended, seconds, statistics.median(saves))


def look_at(run_dir: Path) -> Ended:
    """What a finished run has left.

    Raises:
        Failed: Steps are missing or recorded twice, or temporary files are left.
    """
    if left := [path.name for path in run_dir.rglob(".*")]:
        raise Failed(f"left over: {', '.join(left)}")
    numbers = [
        {name: value for name, value in record.items() if name not in _TIMES}
        for record in read_records(run_dir / METRICS)
        if record["kind"] in ("train", "eval")
    ]
    steps = [record["step"] for record in numbers if record["kind"] == "train"]
    if steps != list(range(1, STEPS + 1)):
        raise Failed(f"the metrics have steps {steps}")
    folders = [*(run_dir / "checkpoints").glob("step-*"), run_dir / "export"]
    files = [path for folder in folders for path in sorted(folder.rglob("*.safetensors"))]
    hashes = {str(path.relative_to(run_dir)): sha256_file(path) for path in files}
    return Ended(hashes, hashlib.sha256(json.dumps(numbers).encode()).hexdigest())


def finish(ranks: StartedRanks, folder: Path) -> None:
    """Wait for a start that nobody kills.

    Raises:
        Failed: It does not end, or not with code 0.
    """
    codes = ranks.wait(PATIENCE)
    ranks.kill()
    if any(code != 0 for code in codes):
        last = sorted(folder.glob("start-*.log"))[-1]
        raise Failed(f"exit codes {codes} of a start that nobody killed: {last.read_text(errors='replace')[-1500:]}")
