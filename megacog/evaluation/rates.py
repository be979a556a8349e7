"""Proof that the frame rate in the text is obeyed: at twice the rate the digit moves half as far per frame.

Key frames of one caption and seed at 1, 2 and 4 frames per second; the digit's shift per frame along
the captioned direction, measured at the center of its ink.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from megacog.checkpoint.export import open_export
from megacog.config.load import apply_overrides
from megacog.evaluation.evaluate import LARGE_BATCH, Task, tasks
from megacog.evaluation.judge import ink, ink_centers
from megacog.generation.hierarchy import ClipGenerator, ClipRequest, whole_clips
from megacog.generation.infer import load_generator
from megacog.prepare.digits import VECTORS
from megacog.runtime import log
from megacog.runtime.files import write_json

RATES = (1.0, 2.0, 4.0)
"""Key frames per second."""
TOLERANCE = 0.1
"""Largest distance of a ratio from one half that counts as obeyed: a model trained for minutes is not exact."""


def shift_per_frame(frames_THWC: np.ndarray, direction: str) -> float:
    """Pixels that the digit moves per frame in `direction`, of the line that fits best; NaN without ink."""
    centers_T2 = ink_centers(ink(frames_THWC))
    times = np.flatnonzero(~np.isnan(centers_T2[:, 0]))
    if len(times) < 2:
        return float("nan")
    return float(np.dot(np.polyfit(times, centers_T2[times], 1)[0], VECTORS[direction]))


def measure(generator: ClipGenerator, wanted: Sequence[Task], rates: Sequence[float] = RATES) -> np.ndarray:
    """Shift per frame in pixels, [tasks, rates], of key frames made at each rate with the same seeds."""
    requests = [
        ClipRequest(task.caption, (generator.num_frames - 1) / rate, task.seed) for task in wanted for rate in rates
    ]
    shifts = np.empty(len(requests))
    for index, frames_THWC, _ in whole_clips(generator.generate(requests)):
        shifts[index] = shift_per_frame(frames_THWC, wanted[index // len(rates)].directions[0])
    return shifts.reshape(len(wanted), len(rates))


def main(argv: Sequence[str] | None = None) -> int:
    """Run `prove.py rates`; returns its exit code."""
    parser = argparse.ArgumentParser(prog="prove.py rates", description=__doc__)
    parser.add_argument("export", type=Path, help="export folder of a model trained on the demo corpus")
    parser.add_argument("--json", type=Path, help="also write the table to this file")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="generation settings")
    arguments = parser.parse_intermixed_args(argv)
    log.setup()
    export = open_export(arguments.export)
    settings = apply_overrides(export.config.generation, arguments.overrides, "generation")
    longest = (export.model.num_frames - 1) / min(RATES)
    settings = settings.model_copy(update={"levels": 0, "batch_size": LARGE_BATCH, "seconds": longest})
    wanted = tasks(40, settings.seed)
    shifts = measure(load_generator(export, settings, "cpu"), wanted)

    print(f"{'pixels per frame at':28}" + "".join(f"{rate:>6g} fps" for rate in RATES))
    for task, row in zip(wanted, shifts, strict=True):
        print(f"{task.caption:28}" + "".join(f"{shift:10.2f}" for shift in row))
    means = np.nanmean(shifts, axis=0)
    ratios = (means[1:] / means[:-1]).tolist()
    print(f"{'mean':28}" + "".join(f"{shift:10.2f}" for shift in means))
    print(f"{'ratio (0.5 = obeyed)':28}{'':10}" + "".join(f"{ratio:10.3f}" for ratio in ratios))
    if arguments.json is not None:
        rows = {task.caption: row.round(4).tolist() for task, row in zip(wanted, shifts, strict=True)}
        write_json(arguments.json, {"fps": RATES, "mean": means.tolist(), "ratios": ratios, "captions": rows})
    obeyed = all(abs(ratio - 0.5) <= TOLERANCE for ratio in ratios)
    print(f"the frame rate is {'obeyed' if obeyed else 'NOT obeyed'}: ratios within 0.5 +- {TOLERANCE}")
    return 0 if obeyed else 1
