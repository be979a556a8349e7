"""The command that turns a prompt file into clips: `bash launch/infer.sh prompts.txt`.

Writes an mp4 (where PyAV is installed), a gif and a contact sheet per clip and one line per clip (or failed
prompt) to results.jsonl. A bad prompt is reported and the others go on; the exit code is then 1.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import sys
import time
import unicodedata
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import torch
from torch import Tensor

from megacog.checkpoint.export import Export, load_model, open_export
from megacog.config.load import apply_overrides
from megacog.config.schema import GenerationConfig
from megacog.errors import EXIT_DONE, EXIT_FAULT, CheckpointError, ConfigError, DataError, EnvError, MegacogError
from megacog.generation.given import given_codes
from megacog.generation.hierarchy import ClipChunk, ClipGenerator, ClipRequest, plan_clip, sampled_frames
from megacog.generation.output import (
    FrameSample,
    Mp4Stream,
    Strip,
    can_write_mp4,
    mp4_stream,
    watchable_scale,
    write_contact_sheet,
    write_gif,
)
from megacog.generation.prompts import BadPrompt, Prompt, read_prompts
from megacog.runtime import log
from megacog.runtime.hardware import usable_device
from megacog.tokenizers.frames import load_frame_tokenizer
from megacog.tokenizers.text import TextTokenizer

RESULTS = "results.jsonl"
# Frames on a contact sheet: 33 frames of a default clip fit.
_SHEET_FRAMES = 36
# Of a prompt in file names, which may have 255 with numbers and endings.
_SLUG_BYTES = 60
# Longest side of an enlarged frame: what H.264 players can show.
_MAX_PIXELS = 4096
_logger = log.get_logger(__name__)


@dataclass(frozen=True)
class Job:
    """One clip of one prompt."""

    prompt: Prompt
    request: ClipRequest
    stem: str


def slug(text: str) -> str:
    """A file name part: letters and digits of any script and dashes, at most 60 bytes of UTF-8, possibly empty."""
    words = re.sub(r"[\W_]+", "-", unicodedata.normalize("NFC", text).lower()).strip("-")
    return words.encode()[:_SLUG_BYTES].decode(errors="ignore").strip("-")


def clip_stem(index: int, text: str, sample: int, samples: int) -> str:
    """The file name of a clip without its ending: 0003_the-digit-3; of one of several samples, 0003-2_the-digit-3."""
    number = f"{index:04d}" if samples == 1 else f"{index:04d}-{sample + 1}"
    return f"{number}_{slug(text)}".rstrip("_")


def find_export(model: str | None, roots: Sequence[Path]) -> Path:
    """The export to use: `model`, else $MEGACOG_MODEL, else the newest one in runs/ that can make clips.

    Args:
        model: what the command line says.
        roots: folders whose `runs/*/export` and `runs/*/*/export` are looked at.

    Raises:
        CheckpointError: there is none, or a damaged one is newer; the message names the best that can be used.
    """
    if model is not None:
        return Path(model)
    if os.environ.get("MEGACOG_MODEL"):
        return Path(os.environ["MEGACOG_MODEL"])
    manifests = {
        manifest.resolve()
        for root in roots
        for pattern in ("runs/*/export/manifest.json", "runs/*/*/export/manifest.json")
        for manifest in root.glob(pattern)
    }
    newest_first = sorted(manifests, key=lambda manifest: manifest.stat().st_mtime_ns, reverse=True)
    damage = ""
    for manifest in newest_first:
        path = manifest.parent
        try:
            usable = "sequential" in open_export(path).plus
        except MegacogError as error:
            damage = damage or f"the newest export, {path}, cannot be used: {error}."
            continue
        if usable and not damage:
            return path
        if usable:
            raise CheckpointError(f"{damage} The newest whole one is older: pass --model {path} to use it.")
    if damage:
        raise CheckpointError(f"{damage} There is no whole one that can make clips: train again or pass --model.")
    tried = ", ".join(sorted({str(root / "runs") for root in roots}))
    raise CheckpointError(
        f"no model: --model and $MEGACOG_MODEL are not given and no export that can make clips is in {tried}. "
        "Train one (`bash launch/quickstart.sh` trains a small one in minutes) or pass --model EXPORT."
    )


def check_stages(export: Export, settings: GenerationConfig) -> None:
    """Raise CheckpointError if the export lacks an attention-plus that generation needs."""
    needed = ["sequential"] + (["interpolation"] if settings.levels else [])
    missing = [stage for stage in needed if stage not in export.plus]
    if missing:
        mend = "train that stage first"
        if missing == ["interpolation"]:
            mend += ", or use levels=0 for key frames only"
        raise CheckpointError(f"{export.path} holds no attention-plus of stage {missing[0]}; {mend}")


def load_generator(export: Export, settings: GenerationConfig, device: str) -> ClipGenerator:
    """The export's model and tokenizers, ready to generate.

    Raises:
        CheckpointError: a needed stage is missing.
        DataError: a tokenizer is damaged or does not fit the model.
    """
    check_stages(export, settings)
    stages = [stage for stage in export.plus if stage == "sequential" or settings.levels]
    model = load_model(
        export.path, plus=stages, device=device, kernels=settings.kernels, base_precision=settings.base_precision
    )
    text = TextTokenizer.load(export.text_tokenizer)
    frames = load_frame_tokenizer(export.frame_tokenizer, device)
    if frames.codebook_size != model.config.image_vocab_size:
        raise DataError(
            f"{export.frame_tokenizer} has {frames.codebook_size} codes, the model {model.config.image_vocab_size}; "
            "the export was put together from two models"
        )
    return ClipGenerator(model, text, frames, settings)


class ClipFiles:
    """The files of one clip, written while its frames arrive."""

    def __init__(self, folder: Path, job: Job, scale: int | None) -> None:
        self._folder = folder
        self._job = job
        self._scale = scale
        self._stack = ExitStack()
        self._sample = FrameSample()
        self._mp4: Mp4Stream | None = None
        self.num_frames = 0
        self.fps = 0.0

    def path(self, suffix: str) -> Path:
        """The clip's file with an ending such as `.mp4`."""
        return self._folder / f"{self._job.stem}{suffix}"

    def __enter__(self) -> ClipFiles:
        return self

    def __exit__(self, *error: Any) -> None:
        self._stack.__exit__(*error)

    def append(self, chunk: ClipChunk) -> None:
        """Add the next frames; the last ones finish all files."""
        if self._scale is None:
            self._scale = watchable_scale(*chunk.frames_THWC.shape[1:3])
        if self._mp4 is None and can_write_mp4():
            self._mp4 = self._stack.enter_context(mp4_stream(self.path(".mp4"), chunk.fps, self._scale))
        if self._mp4 is not None:
            self._mp4.append(chunk.frames_THWC)
        self._sample.append(chunk.frames_THWC)
        self.num_frames += len(chunk.frames_THWC)
        self.fps = chunk.fps
        if chunk.last:
            self._finish()

    def _finish(self) -> None:
        assert self._scale is not None
        self._stack.close()
        frames_THWC = self._sample.frames_THWC
        write_gif(self.path(".gif"), frames_THWC, self.fps / self._sample.stride, self._scale)
        every = -(-len(frames_THWC) // _SHEET_FRAMES)
        strip = Strip(self._job.prompt.text, frames_THWC[::every])
        write_contact_sheet(self.path(".png"), [strip], scale=self._scale)
        self._sample = FrameSample()


def file_kinds() -> tuple[str, ...]:
    """Endings of a clip's files."""
    return ("mp4", "gif", "png") if can_write_mp4() else ("gif", "png")


class FrameMeter:
    """Progress over frames: a bar on a terminal, a line now and then elsewhere."""

    def __init__(self, total: int, doing: str = "sampling") -> None:
        from tqdm import tqdm

        terminal = sys.stderr.isatty()
        self._bar = tqdm(
            total=total, desc=doing, unit="frame", disable=not terminal, dynamic_ncols=True, mininterval=0.2
        )
        self._doing = doing
        self._total, self._done, self._terminal = total, 0, terminal
        self._last_line = time.monotonic()

    def __call__(self, frames: int) -> None:
        self._done += frames
        self._bar.update(frames)
        if not self._terminal and time.monotonic() - self._last_line > 10:
            self._last_line = time.monotonic()
            _logger.info("%s: %d of %d frames", self._doing, self._done, self._total)

    def close(self) -> None:
        """Leave the terminal in order."""
        self._bar.close()


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="infer.sh",
        description="Generate a clip for every line of a prompt file.",
        epilog="key=value sets a generation setting, e.g. guidance=3 top_k=12 seconds=2 levels=1 seed=7 samples=2.",
    )
    parser.add_argument("prompts", type=Path, help="text file: one prompt per line, plain or JSON")
    parser.add_argument("--model", help="export folder (default: $MEGACOG_MODEL, else the newest runs/*/export)")
    parser.add_argument("--out", type=Path, default=Path("out"), help="folder for the clips (default: out)")
    parser.add_argument("--force", action="store_true", help="replace clips of an earlier run in --out")
    parser.add_argument("--scale", type=int, help="enlarge every pixel this many times (default: to >= 128 pixels)")
    parser.add_argument("--device", help="cpu, cuda, ... (default: cuda if there is one)")
    parser.add_argument("overrides", nargs="*", default=[], metavar="key=value", help="generation settings")
    return parser


def _prompt_codes(prompt: Prompt, generator: ClipGenerator, seconds: float) -> Tensor | None:
    """Codes of the key frames that the prompt gives; None if it gives none."""
    path = prompt.image or prompt.video
    if path is None:
        return None
    num_frames = generator.num_frames
    key_rate = (num_frames - 1) / plan_clip(seconds, num_frames, generator.settings).span
    most = 1 if prompt.image else num_frames - 1
    return given_codes(path, generator.model.config.grid, generator.frames, key_rate, most)


def make_jobs(
    prompts: Sequence[Prompt], generator: ClipGenerator, file: Path
) -> tuple[list[Job], list[BadPrompt]]:
    """The clips to make, and the prompts that the model cannot take (too long, unreadable image, ...)."""
    settings = generator.settings
    jobs: list[Job] = []
    bad: list[BadPrompt] = []
    for prompt in prompts:
        seconds = prompt.seconds if prompt.seconds is not None else settings.seconds
        seed = prompt.seed if prompt.seed is not None else settings.seed
        try:
            given_KP = _prompt_codes(prompt, generator, seconds)
            requests = [
                ClipRequest(prompt.text, seconds, seed, sample, given_KP) for sample in range(settings.samples)
            ]
            generator.check(requests[0])
        except DataError as error:
            bad.append(BadPrompt(prompt.line, prompt.text, f"{file}:{prompt.line}: {error}"))
            continue
        for request in requests:
            stem = clip_stem(prompt.line, prompt.text, request.sample, settings.samples)
            jobs.append(Job(prompt, request, stem))
    return jobs, bad


def _prepare_folder(out: Path, jobs: Sequence[Job], force: bool) -> None:
    """Make the folder; refuse to overwrite an earlier run unless told to."""
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise EnvError(f"output folder {out} cannot be made: {error.strerror}") from error
    names = [f"{job.stem}{suffix}" for job in jobs for suffix in (".mp4", ".gif", ".png")]
    there = [name for name in [RESULTS, *names] if (out / name).exists()]
    if there and not force:
        raise EnvError(
            f"{out} already holds {there[0]}{f' and {len(there) - 1} more' if len(there) > 1 else ''}; "
            "choose another --out, or replace them with --force"
        )


def _check_scale(scale: int | None, generator: ClipGenerator) -> None:
    if scale is None:
        return
    side = max(generator.model.config.grid) * generator.frames.downsample
    most = max(1, _MAX_PIXELS // side)
    if not 1 <= scale <= most:
        raise ConfigError(f"--scale must be from 1 to {most} for frames of {side} pixels, not {scale}")


@contextmanager
def _results_file(path: Path) -> Iterator[IO[str]]:
    """Yield results.jsonl to write lines to; a failure before the first line leaves no file."""
    try:
        with open(path, "w", encoding="utf-8") as file:
            yield file
    finally:
        if path.is_file() and path.stat().st_size == 0:
            path.unlink()


def _write_result(file: IO[str], **fields: Any) -> None:
    file.write(json.dumps(fields, ensure_ascii=False) + "\n")
    file.flush()


def _record(
    job: Job, files: ClipFiles, export: Export, settings: GenerationConfig, wall_seconds: float
) -> dict[str, Any]:
    request, prompt = job.request, job.prompt
    return {
        "line": prompt.line,
        "prompt": request.text,
        "seed": request.seed,
        "sample": request.sample,
        "seconds": request.seconds,
        "frames": files.num_frames,
        "fps": files.fps,
        "image": str(prompt.image) if prompt.image else None,
        "video": str(prompt.video) if prompt.video else None,
        "given_frames": 0 if request.given_KP is None else len(request.given_KP),
        "paths": {kind: str(files.path(f".{kind}")) for kind in file_kinds()},
        "wall_seconds": round(wall_seconds, 3),
        "model": str(export.path),
        "model_fingerprint": export.fingerprint,
        "settings": settings.model_dump(mode="json"),
    }


def run_jobs(
    jobs: Sequence[Job], generator: ClipGenerator, export: Export, out: Path, results: IO[str], scale: int | None
) -> int:
    """Generate every job's clip, write its files and its line in `results`; returns the number of frames written."""
    settings, num_frames = generator.settings, generator.num_frames
    given_counts = [0 if job.request.given_KP is None else len(job.request.given_KP) for job in jobs]
    plans = [plan_clip(job.request.seconds, num_frames, settings) for job in jobs]
    total = sum(
        sampled_frames(plan, num_frames, given, settings) for plan, given in zip(plans, given_counts, strict=True)
    )
    sampled, decoded = FrameMeter(total), FrameMeter(sum(plan.frames for plan in plans), "decoding to pixels")
    generator.on_frame, generator.on_pixels = sampled, decoded
    written = 0
    start = time.monotonic()
    try:
        with ExitStack() as open_clips:
            files: dict[int, ClipFiles] = {}
            for chunk in generator.generate([job.request for job in jobs]):
                if chunk.clip not in files:
                    files[chunk.clip] = open_clips.enter_context(ClipFiles(out, jobs[chunk.clip], scale))
                files[chunk.clip].append(chunk)
                if chunk.last:
                    clip = files.pop(chunk.clip)
                    wall_seconds = time.monotonic() - start
                    _write_result(results, **_record(jobs[chunk.clip], clip, export, settings, wall_seconds))
                    written += clip.num_frames
    finally:
        sampled.close()
        decoded.close()
    return written


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; returns its exit code: 0, or 1 if a prompt failed."""
    arguments = _parser().parse_intermixed_args(argv)
    log.setup()
    prompts, bad = read_prompts(arguments.prompts)
    repository = Path(__file__).resolve().parents[2]
    path = find_export(arguments.model, [Path.cwd(), repository])
    export = open_export(path)
    print(f"model: {path}")
    settings = apply_overrides(export.config.generation, arguments.overrides, "generation")
    device = usable_device(arguments.device or ("cuda" if torch.cuda.is_available() else "cpu"))
    generator = load_generator(export, settings, device)
    _check_scale(arguments.scale, generator)
    jobs, unusable = make_jobs(prompts, generator, arguments.prompts)
    bad = sorted([*bad, *unusable], key=lambda prompt: prompt.line)
    _prepare_folder(arguments.out, jobs, arguments.force)
    can_write_mp4()  # warns now, before hours of sampling

    start = time.monotonic()
    with _results_file(arguments.out / RESULTS) as results:
        for prompt in bad:
            print(f"error: {prompt.error}", file=sys.stderr)
            _write_result(results, line=prompt.line, prompt=prompt.text, error=prompt.error)
        frames = run_jobs(jobs, generator, export, arguments.out, results, arguments.scale)
    seconds = time.monotonic() - start
    if frames:
        print(f"{frames} frames of {len(jobs)} clips in {seconds:.1f} s: {seconds / frames:.3f} s per frame")
        first, *others = (f".{kind}" for kind in file_kinds())
        print(f"clips: {arguments.out}/*{first} (also {', '.join(others)}), what was done: {arguments.out / RESULTS}")
    if bad:
        print(f"{len(bad)} of {len(bad) + len(prompts) - len(unusable)} prompts failed, see above", file=sys.stderr)
        return EXIT_FAULT
    return EXIT_DONE
