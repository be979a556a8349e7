"""What `prepare.py run` is given: a caption table or webdataset tars."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

from megacog.errors import ConfigError, DataError
from megacog.prepare.sources import Source, read_source
from megacog.prepare.tar_source import fixed_folder, names_tars, read_tars


def source_root(captions: Sequence[Path], root: Path | None) -> Path:
    """Returns the folder that video paths, or the names of tars, start from; reads nothing.

    Args:
        captions: a caption table, or patterns for tars.
        root: as the user says; None = the table's folder, or the deepest one above all patterns' wildcards.

    Raises:
        ConfigError: these are several tables, or compressed tars.
        DataError: the folder does not exist.
    """
    if names_tars(captions):
        default = Path(os.path.commonpath([fixed_folder(pattern) for pattern in captions]))
    elif len(captions) > 1:
        raise ConfigError(f"one caption table at a time, not {len(captions)}; only tars may be several")
    else:
        default = captions[0].parent
    found = (root or default).resolve()
    if not found.is_dir():
        raise DataError(f"{f'--root {root}' if root else found} is no folder")
    return found


def read_clips(
    captions: Sequence[Path],
    root: Path,
    video_column: str | None = None,
    caption_column: str | None = None,
    allow_absolute: bool = False,
) -> Source:
    """Returns the rows of a caption table or of tars.

    Args:
        captions: a caption table, or patterns for tars.
        root: of `source_root`.
        video_column: see `read_source`; not for tars.
        caption_column: see `read_source`; of tars, the key in their .json members.
        allow_absolute: paths, or tars, may lie outside the root.

    Raises:
        ConfigError: `video_column` with tars.
        DataError: see `read_source` and `read_tars`.
    """
    if not names_tars(captions):
        return read_source(captions[0], video_column, caption_column, allow_absolute)
    if video_column is not None:
        raise ConfigError("--video-column is for caption tables; tars name videos by their endings")
    return read_tars(captions, root, caption_column, allow_absolute)
