"""`prepare.py run`: from its command line to shards, alone or as a rank of an MPI job."""

from __future__ import annotations

import argparse
from pathlib import Path

import torch

from megacog.prepare.decode import DecodeSettings
from megacog.prepare.inputs import read_clips, source_root
from megacog.prepare.mpi import MpiJob
from megacog.prepare.pipeline import PrepareSettings, Summary, assist, prepare, what_shards_depend_on
from megacog.prepare.sharing import Desk, RemoteWork
from megacog.prepare.sources import Source
from megacog.prepare.workers import WorkerLimits
from megacog.runtime import log
from megacog.runtime.hardware import available_cores, usable_device
from megacog.runtime.ranks import gpu_index
from megacog.tokenizers.frames import load_frame_tokenizer

logger = log.get_logger(__name__)
_ROWS_SHOWN = 3


def run(options: argparse.Namespace, job: MpiJob | None = None) -> Summary | None:
    """Makes the shards that the command line asks for and returns what was made; None on ranks other than 0.

    Args:
        options: of `prepare.py run`.
        job: whose ranks share the work; all of them call this.

    Raises:
        MegacogError: see `prepare` and `assist`.
    """
    root = source_root(options.captions, options.root)
    cores = available_cores() if job is None else job.cores()
    settings = _settings(options, root, cores)
    if job is not None:
        log.setup(job.rank)
        torch.set_num_threads(min(torch.get_num_threads(), cores))
        started = f"{job.size} ranks ({job.ranks.source})"
        logger.info("%s share the work; decoders on rank 0: %d", started, settings.workers)
        if job.rank != 0:
            tokenizer = load_frame_tokenizer(options.tokenizer, usable_device(_device(options.device, job)))
            assist(RemoteWork(job, job.name, what_shards_depend_on(tokenizer, settings)), tokenizer, settings)
            return None
    source = read_clips(
        options.captions, root, options.video_column, options.caption_column, options.allow_absolute
    )
    if not options.json:
        _show_source(source, root)
    tokenizer = load_frame_tokenizer(options.tokenizer, usable_device(_device(options.device, job)))
    desk = None if job is None else Desk(job, job.abort, what_shards_depend_on(tokenizer, settings))
    try:
        return prepare(source, tokenizer, settings, desk=desk)
    except KeyboardInterrupt:
        logger.warning("stopped; finished shards are kept, the same command continues")
        raise


def _settings(options: argparse.Namespace, root: Path, cores: int) -> PrepareSettings:
    height, width = options.size
    decode = DecodeSettings(
        fps=options.fps,
        height=height,
        width=width,
        root=str(root),
        allow_absolute=options.allow_absolute,
        folder_fps=options.folder_fps,
        max_frames=options.max_frames,
        max_pixels=options.max_pixels,
    )
    return PrepareSettings(
        out=options.out,
        decode=decode,
        limits=WorkerLimits(options.timeout, int(options.memory_gib * 2**30)),
        workers=options.workers or cores,
        clips_per_shard=options.clips_per_shard,
        eval_fraction=options.eval_fraction,
        batch=options.batch,
        overwrite=options.overwrite,
    )


def _device(name: str, job: MpiJob | None) -> str:
    """Returns where this rank codes frames: of `cuda`, every rank of a machine gets its own GPU."""
    if job is None or name != "cuda":
        return name
    return f"cuda:{gpu_index(job.ranks, torch.cuda.device_count())}"


def _show_source(source: Source, root: Path) -> None:
    print(
        f"{source.path}: {len(source.rows)} rows, {len(source.failures)} bad ones; video = column "
        f"{source.video_column!r}, caption = column {source.caption_column!r}"
    )
    for row in source.rows[:_ROWS_SHOWN]:
        state = "found" if row.place or (root / row.clip_id).exists() else "MISSING"
        print(f"  line {row.line}: {root / row.clip_id} ({state}) {row.caption[:60]!r}")
