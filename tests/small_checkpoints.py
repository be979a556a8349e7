"""Checkpoints of two small parameters, on one rank."""

from __future__ import annotations

from pathlib import Path

import torch

from megacog.checkpoint.discovery import find_checkpoint
from megacog.checkpoint.manifest import Manifest
from megacog.checkpoint.records import Record
from megacog.checkpoint.retention import Retention
from megacog.checkpoint.saver import Saved, Saver

ELEMENTS = {"a.weight": 6, "b.weight": 2}
SIZES = {name: 4 * elements for name, elements in ELEMENTS.items()}
EVERYTHING = Retention(last=9)


def header(step: int = 3, loss: float | None = None, frozen: str | None = None) -> Manifest:
    return Manifest(
        step=step, samples=24, config={}, config_hash="c", world={"ranks": 1}, fingerprints={}, versions={},
        frozen=frozen, parameters={}, evaluation_loss=loss,
    )  # fmt: skip


def record(name: str) -> Record:
    return {"weight": torch.full((ELEMENTS[name],), float(len(name)))}


def save(
    run: Path, step: int, retention: Retention = EVERYTHING, loss: float | None = None, frozen: str | None = None
) -> Path:
    """One process's only checkpoint."""
    return save_with(Saver(run, retention, asynchronous=False), step, loss, frozen).path


def save_with(saver: Saver, step: int, loss: float | None = None, frozen: str | None = None) -> Saved:
    """One of several, completely."""
    saver.start(header(step, loss, frozen), SIZES, record)
    saved = saver.finish()
    saver.close()
    assert saved is not None
    return saved


def newest(run: Path) -> int:
    found = find_checkpoint(run, "auto")
    assert found is not None
    return found[1].step


def steps_in(run: Path) -> list[int]:
    """Steps of all folders that are named as checkpoints, ascending."""
    return sorted(int(path.name.removeprefix("step-")) for path in (run / "checkpoints").glob("step-*"))


def flip_byte(path: Path, place: int = -1) -> None:
    data = bytearray(path.read_bytes())
    data[place] ^= 1
    path.write_bytes(bytes(data))
