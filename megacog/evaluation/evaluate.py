"""The command that judges an export on the demo captions: `python launch/evaluate.py EXPORT --clips 200`.

Generates clips of all captions, each with several seeds, lets the judge look at them, and sets its
verdicts beside what it says of real held-out clips and of their tokenizer reconstructions (the true
ceiling). Writes one mp4 per clip (where PyAV is installed), a picture grid and report.json; files of an
earlier evaluation in the same folder are replaced.

Tensor suffixes: T frames, H/W pixels, C channels.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from megacog.checkpoint.export import Export, open_export
from megacog.config.load import apply_overrides
from megacog.errors import ConfigError, DataError, EnvError
from megacog.evaluation.judge import Judge, enlarge, load_or_train_judge, shrink
from megacog.evaluation.scores import ClipScore, by_key, score_clip, summarize
from megacog.generation.hierarchy import ClipGenerator, ClipRequest, plan_clip, sampled_frames, whole_clips
from megacog.generation.infer import FrameMeter, load_generator, slug
from megacog.generation.output import (
    Strip,
    can_write_mp4,
    spread,
    watchable_scale,
    write_contact_sheet,
    write_mp4,
)
from megacog.prepare import digits
from megacog.runtime import log
from megacog.runtime.files import write_json
from megacog.runtime.hardware import usable_device
from megacog.tokenizers.frames import FrameTokenizer

# Small models on a CPU are fastest with many sequences at once.
LARGE_BATCH = 128
_REAL_SEED = 4711
_GRID_CLIPS = 40


@dataclass(frozen=True)
class Task:
    """One captioned clip to generate."""

    digit: int
    directions: tuple[str, ...]
    seed: int

    @property
    def caption(self) -> str:
        return digits.caption(self.digit, self.directions)


def tasks(num_clips: int, seed: int, two_part: bool = False) -> list[Task]:
    """All captions with seed `seed`, then all with the next seed, and so on: `num_clips` in all."""
    ways = digits.TWO_PART_DIRECTIONS if two_part else tuple((name,) for name in digits.DIRECTIONS)
    every = [(digit, way) for digit in range(10) for way in ways]
    return [Task(*every[index % len(every)], seed + index // len(every)) for index in range(num_clips)]


def real_clips(num_clips: int, num_frames: int, fps: float, two_part: bool) -> Iterator[tuple[Task, np.ndarray]]:
    """Clips of held-out handwriting in the length and rate of the generated ones."""
    images, labels = digits.scans("heldout")
    rng = np.random.default_rng(_REAL_SEED)
    for task in tasks(num_clips, 0, two_part):
        scan = images[rng.choice(np.flatnonzero(labels == task.digit))]
        motion = digits.sample_motion(rng, task.directions, num_frames, fps)
        yield task, digits.render_clip(scan, motion.directions, motion.speed, motion.start, num_frames, fps)


def reconstruct(tokenizer: FrameTokenizer, frames_THWC: np.ndarray) -> np.ndarray:
    """The frames after a round trip through the frame tokenizer."""
    return tokenizer.decode(tokenizer.encode(torch.from_numpy(frames_THWC))).cpu().numpy()


def ceilings(
    judge: Judge, generator: ClipGenerator, num_clips: int, two_part: bool
) -> dict[str, dict[str, Any]]:
    """What the judge says of real clips, and of the same clips after the frame tokenizer."""
    settings, scale = generator.settings, judged_scale(generator)
    plan = plan_clip(settings.seconds, generator.num_frames, settings)
    step = 2**settings.levels
    real, rebuilt, squared_errors = [], [], []
    for task, frames_THWC in real_clips(num_clips, plan.frames, plan.fps, two_part):
        shown_THWC = enlarge(frames_THWC, scale)
        again_THWC = reconstruct(generator.frames, shown_THWC)
        squared_errors.append(np.square(shown_THWC.astype(np.float64) - again_THWC).mean())
        real.append(score_clip(judge, frames_THWC, task.digit, task.directions, step))
        rebuilt.append(score_clip(judge, shrink(again_THWC, scale), task.digit, task.directions, step))
    psnr = 10 * np.log10(255.0**2 / max(float(np.mean(squared_errors)), 1e-12))
    return {"real": summarize(real), "reconstruction": {**summarize(rebuilt), "psnr_db": round(psnr, 2)}}


def judged_scale(generator: ClipGenerator) -> int:
    """How many times larger the model's frames are than those that the judge knows.

    Raises:
        DataError: They are no enlarged frames of the demo.
    """
    height, width = (side * generator.frames.downsample for side in generator.model.config.grid)
    if height != width or height % digits.SIZE:
        raise DataError(
            f"the model makes frames of {height}x{width} pixels; the judge knows the demo's digits of "
            f"{digits.SIZE}x{digits.SIZE}, or enlarged by a whole number"
        )
    return height // digits.SIZE


def generate_and_score(
    judge: Judge, generator: ClipGenerator, wanted: Sequence[Task], out: Path
) -> tuple[list[ClipScore], list[dict[str, Any]], list[Strip]]:
    """Scores, rows of the report and strips of the grid, in the order of `wanted`; writes the mp4 files if it can."""
    writes_mp4 = can_write_mp4()
    settings, scale = generator.settings, judged_scale(generator)
    requests = [ClipRequest(task.caption, settings.seconds, task.seed) for task in wanted]
    plan = plan_clip(settings.seconds, generator.num_frames, settings)
    meter = FrameMeter(len(requests) * sampled_frames(plan, generator.num_frames, 0, settings))
    generator.on_frame = meter
    scores, rows, strips = [], [], []
    for index, frames_THWC, fps in whole_clips(generator.generate(requests)):
        task = wanted[index]
        seen_THWC = shrink(frames_THWC, scale)
        score = score_clip(judge, seen_THWC, task.digit, task.directions, 2**settings.levels)
        path = out / "clips" / f"{index:04d}_{slug(task.caption)}.mp4"
        if writes_mp4:
            write_mp4(path, frames_THWC, fps, watchable_scale(*frames_THWC.shape[1:3]))
        scores.append(score)
        rows.append({
            "path": str(path) if writes_mp4 else None, "caption": task.caption, "seed": task.seed,
            "judged_digit": score.judged_digit, "judged_directions": list(score.judged_directions),
        })  # fmt: skip
        if index < _GRID_CLIPS:
            right = f"{'' if score.digit_right else 'NOT '}the digit, {'' if score.direction_right else 'NOT '}the way"
            strips.append(Strip(f"{task.caption} [{right}]", spread(frames_THWC, 9)))
    meter.close()
    return scores, rows, strips


def evaluate(
    export: Export,
    num_clips: int,
    out: Path,
    *,
    overrides: Sequence[str] = (),
    two_part: bool = False,
    real: int = 80,
    judge_cache: Path | None = None,
    device: str = "cpu",
) -> dict[str, Any]:
    """Generate, judge and write; returns what is in report.json.

    Args:
        export: the model.
        num_clips: clips to generate; multiples of the number of captions use each equally often.
        out: folder for clips/, grid.png and report.json.
        overrides: `key=value` generation settings.
        two_part: the harder captions with two directions.
        real: held-out clips for the ceilings; 0 = none, which needs no scans.
        judge_cache: folder where a trained judge is kept; None = train it here and now.
        device: where the model runs.
    """
    start = time.monotonic()
    settings = apply_overrides(export.config.generation, overrides, "generation")
    if not any(override.split("=")[0].split(".")[-1] == "batch_size" for override in overrides):
        settings = settings.model_copy(update={"batch_size": max(LARGE_BATCH, settings.batch_size)})
    generator = load_generator(export, settings, device)
    judged_scale(generator)  # fails now, before anything is generated
    wanted = tasks(num_clips, settings.seed, two_part)
    for task in wanted:
        generator.check(ClipRequest(task.caption, settings.seconds, task.seed))
    _make_folder(out / "clips")
    judge = load_or_train_judge(judge_cache)
    judge_seconds = time.monotonic() - start
    reference = ceilings(judge, generator, real, two_part) if real else {"real": None, "reconstruction": None}
    reference_seconds = time.monotonic() - start - judge_seconds
    scores, rows, strips = generate_and_score(judge, generator, wanted, out)
    seconds = time.monotonic() - start
    write_contact_sheet(out / "grid.png", strips, scale=2)
    report = {
        **summarize(scores),
        **by_key(scores),
        "digit_verdict": "mean of the frames' log probabilities over the whole clip",
        "direction_verdict": "straight line through the ink's center over the whole clip",
        **reference,
        "model": str(export.path),
        "model_fingerprint": export.fingerprint,
        "settings": settings.model_dump(mode="json"),
        "seconds": {
            "judge": round(judge_seconds, 2),
            "real_and_reconstruction": round(reference_seconds, 2),
            "generation": round(seconds - judge_seconds - reference_seconds, 2),
            "total": round(time.monotonic() - start, 2),
        },
        "clips": rows,
    }
    write_json(out / "report.json", report)
    return report


def _make_folder(folder: Path) -> None:
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise EnvError(f"folder {folder} cannot be made ({error.strerror}); choose another with --out") from error


def _print_summary(report: dict[str, Any], out: Path) -> None:
    print(f"{'':24}{'digit':>8}{'direction':>11}{'position error':>17}")
    for name, part in (
        (f"generated ({report['num_clips']})", report),
        (f"real held-out ({(report['real'] or {}).get('num_clips')})", report["real"]),
        ("  through the tokenizer", report["reconstruction"]),
    ):
        if part is None:
            continue
        error = part["position_error_px"]
        shown = "n/a" if error is None else f"{error:.2f} px"
        print(f"{name:24}{part['digit_accuracy']:8.3f}{part['direction_accuracy']:11.3f}{shown:>17}")
    by_frame = report["digit_accuracy_by_frame"]
    print(f"digit accuracy of single frames: first {by_frame[0]:.3f}, last {by_frame[-1]:.3f}")
    seconds = report["seconds"]
    print(f"{seconds['generation']:.1f} s for the clips, {seconds['total']:.1f} s in all")
    print(f"clips: {out / 'clips'}, picture: {out / 'grid.png'}, report: {out / 'report.json'}")


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="evaluate.py",
        description="Generate clips of the demo captions and judge them: the right digit, the right way?",
        epilog="key=value sets a generation setting, e.g. guidance=3 seed=7 (batch_size is at least 128 unless given).",
    )
    parser.add_argument("export", type=Path, help="export folder of a model trained on the demo corpus")
    parser.add_argument(
        "--clips", type=int, default=40, help="clips to generate (default: %(default)s, each caption once)"
    )
    parser.add_argument("--out", type=Path, help="folder for the results (default: `evaluation` beside the export)")
    parser.add_argument("--two-part", action="store_true", help="captions such as `the digit 3 moves right then down`")
    parser.add_argument(
        "--real-clips", type=int, default=80, help="real held-out clips beside them (default: %(default)s, 0 = none)"
    )
    parser.add_argument(
        "--judge-cache",
        type=Path,
        default=Path("runs/judge"),
        help="where the trained judge is kept (default: %(default)s)",
    )
    parser.add_argument("--device", help="cpu, cuda, ... (default: cuda if there is one)")
    parser.add_argument("overrides", nargs="*", default=[], metavar="key=value", help="generation settings")
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; returns its exit code."""
    arguments = _parser().parse_intermixed_args(argv)
    log.setup()
    for name, least in (("clips", 1), ("real_clips", 0)):
        if getattr(arguments, name) < least:
            raise ConfigError(f"--{name.replace('_', '-')} must be at least {least}, not {getattr(arguments, name)}")
    out = arguments.out if arguments.out is not None else arguments.export.parent / "evaluation"
    report = evaluate(
        open_export(arguments.export),
        arguments.clips,
        out,
        overrides=arguments.overrides,
        two_part=arguments.two_part,
        real=arguments.real_clips,
        judge_cache=arguments.judge_cache,
        device=usable_device(arguments.device or ("cuda" if torch.cuda.is_available() else "cpu")),
    )
    _print_summary(report, out)
    return 0
