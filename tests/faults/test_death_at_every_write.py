"""A run that dies after any single write, sync, rename, creation or removal: what has a name is whole, nothing is lost.

The asynchronous saver's own operations are in tests/checkpoint/test_saver.py; here is a whole run, from its first file
over frozen weights and checkpoints to the export, and a save of two ranks of which one dies.
"""

from __future__ import annotations

import multiprocessing
import os
import re
import shutil
from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest
import torch.distributed as dist
from deaths import arm, count_operations, die_after
from small_checkpoints import EVERYTHING, newest, save, save_with
from tiny_run import make_inputs, settings, write_config

from megacog.checkpoint.commit import verify_folder
from megacog.checkpoint.discovery import find_checkpoint, list_checkpoints
from megacog.checkpoint.export import open_export
from megacog.checkpoint.saver import Saver
from megacog.checkpoint.store import open_frozen
from megacog.metrics.record import read_records
from megacog.runtime.files import sha256_file
from megacog.training import pretrain

pytestmark = pytest.mark.timeout(600)
STEPS = 2
DEATHS = 8
"""Real ones; of all others only what they would leave is made and looked at."""


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Inputs and the export of a base."""
    folder = tmp_path_factory.mktemp("world")
    make_inputs(folder / "inputs")
    values = settings(folder / "inputs", folder / "base", "base", engine="torch", steps=1, eval_every=0)
    assert pretrain.main(["--config", str(write_config(folder / "base.yaml", values))]) == 0
    return folder


def train(world: Path, run_dir: Path) -> int:
    """A run on a frozen base that keeps one checkpoint, so that it also removes one."""
    os.environ.pop("MASTER_PORT", None)  # of a former run in this process
    values = settings(
        world / "inputs", run_dir, "sequential", engine="torch", steps=STEPS, eval_every=0, global_batch_size=2
    )
    values["model"]["inherit"] = str(world / "base/export")
    values["data"]["eval"] = []
    values["watch"] = {"enabled": False}  # a watcher outlives its rank by a moment, in which it writes
    values["checkpoint"] = {"every": 1, "keep_last": 1, "asynchronous": False}
    return pretrain.main(["--config", str(write_config(run_dir.with_suffix(".yaml"), values))])


def whole_checkpoint(run_dir: Path) -> int:
    """The step of the newest checkpoint; everything that has a name must be whole."""
    for path in list_checkpoints(run_dir):
        manifest = verify_folder(path)
        assert manifest.frozen is not None
        open_frozen(run_dir, manifest.frozen)
    if (run_dir / "frozen").exists():
        verify_folder(run_dir / "frozen")
    if (run_dir / "export").exists():
        open_export(run_dir / "export", verify=True)
    found = find_checkpoint(run_dir, "auto")
    return found[1].step if found else 0


def state(run_dir: Path) -> tuple[str, ...]:
    """Which files there are, random parts of names left out."""
    names = [str(path.relative_to(run_dir)) for path in run_dir.rglob("*")]
    return tuple(sorted(re.sub(r"-[0-9a-f]{12}\b", "", name) for name in names))


def outcome(run_dir: Path) -> tuple[list[float], dict[str, str], list[str]]:
    """What must not depend on a death: losses, weights, and that nothing else is left."""
    losses = [record["loss"] for record in read_records(run_dir / "metrics.jsonl") if record["kind"] == "train"]
    weights = [*run_dir.glob("export/model-*"), *run_dir.glob("checkpoints/*/*.safetensors")]
    left = [path.name for path in run_dir.rglob(".*")]
    return losses, {str(path.relative_to(run_dir)): sha256_file(path) for path in weights}, left


def test_a_run_that_dies_after_any_operation_goes_on_as_if_it_had_not(
    world: Path, tmp_path: Path, figure: Callable[[str], None]
) -> None:
    run_dir = tmp_path / "undisturbed"
    run_dir.mkdir()
    # What has been written is what a death leaves.
    total = count_operations(lambda: train(world, run_dir), lambda last: shutil.copytree(run_dir, tmp_path / str(last)))
    expected = outcome(run_dir)
    assert len(expected[0]) == STEPS and expected[2] == [] and total > 50
    newest_after = [whole_checkpoint(tmp_path / str(last)) for last in range(1, total + 1)]
    assert newest_after == sorted(newest_after), "a checkpoint was lost"
    assert set(newest_after) == set(range(STEPS + 1))
    for last in range(total // DEATHS, total + 1, total // DEATHS):
        killed = tmp_path / f"killed-{last}"
        killed.mkdir()
        die_after(last, partial(train, world, killed))
        assert state(killed) == state(tmp_path / str(last)), "a death leaves something else"
    first = {state(tmp_path / str(last)): last for last in range(total, 0, -1)}
    for last in first.values():  # starting again takes longest; once for each state of the disk
        assert train(world, tmp_path / str(last)) == 0
        assert outcome(tmp_path / str(last)) == expected, f"after operation {last}"
    figure(f"death at every write: {total} of {total} operations of a run, {len(first)} states of the disk, 0 losses")


def save_and_die(run_dir: Path, store: Path, rank: int, dying: int, last: int) -> None:
    """One of two ranks of a save; `dying` leaves after its operation `last`."""
    try:
        dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=2)
        if rank == dying:
            arm(last)
        save_with(Saver(run_dir, EVERYTHING, asynchronous=True), 2)
    except Exception:
        os._exit(1)
    os._exit(0)


@pytest.mark.parametrize("dying", [0, 1])
def test_when_one_of_two_ranks_dies_in_a_save_the_other_fails_and_the_checkpoint_before_stays(
    dying: int, tmp_path: Path, figure: Callable[[str], None]
) -> None:
    save(tmp_path / "before", 1)
    context, found, last = multiprocessing.get_context("fork"), [], 0
    while True:
        last += 1
        run_dir = tmp_path / f"run-{last}"
        shutil.copytree(tmp_path / "before", run_dir)
        store = tmp_path / f"store-{last}"
        ranks = [context.Process(target=save_and_die, args=(run_dir, store, rank, dying, last)) for rank in (0, 1)]
        for process in ranks:
            process.start()
        for process in ranks:
            process.join(60)
        codes = [process.exitcode for process in ranks]
        if codes == [0, 0]:  # it has not so many operations
            break
        assert codes[dying] == 77 and codes[1 - dying] in (0, 1), codes
        found.append(newest(run_dir))
        if codes[1 - dying] == 0:
            assert found[-1] == 2, "the other one says that all is well"
        save(run_dir, 3)
        assert newest(run_dir) == 3
    assert found == sorted(found) and set(found) <= {1, 2} and 1 in found and len(found) >= (10 if dying == 0 else 3)
    figure(f"death of rank {dying} of 2 at every write of a save: {len(found)} of {len(found)} operations, 0 losses")
