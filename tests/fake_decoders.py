"""Decoders that misbehave; each runs in a decoder process, which imports this module."""

from __future__ import annotations

import os
import time
from pathlib import Path

import numpy as np

from megacog.prepare.containers import ClipError
from megacog.prepare.decode import DecodedClip, DecodeSettings, decode_clip


def misbehave(video: str, settings: DecodeSettings) -> DecodedClip:
    """Does what the clip's name says; else one frame whose brightness is the number in the name."""
    if video == "hang":
        time.sleep(600)
    if video == "abort":
        os.abort()
    if video == "exit":
        os._exit(7)
    if video == "refuse":
        raise ClipError("not today")
    if video == "bug":
        raise KeyError("surprise")
    if video == "eat":
        return DecodedClip(np.ones((64, 1 << 14, 1 << 14, 3), dtype=np.uint8), 1.0)
    if video.startswith("slow"):
        time.sleep(0.3)
    number = int("".join(filter(str.isdecimal, video)))
    return DecodedClip(np.full((1, settings.height, settings.width, 3), number, dtype=np.uint8), 8.0)


def stall_at_five(video: str, settings: DecodeSettings) -> DecodedClip:
    """Decodes, but never returns from clip05; notes the process in the root folder first."""
    if "clip05" in video:
        note = Path(settings.root) / "stalled.pid"
        note.with_suffix(".new").write_text(str(os.getpid()))
        note.with_suffix(".new").replace(note)  # whoever sees it may kill this process at once
        time.sleep(600)
    return decode_clip(video, settings)
