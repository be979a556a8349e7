"""The record of a soak: one JSON object per line, each on disk before anything else happens.

What an interrupted soak has found stays, and the next one goes on after it. Lines are never changed or removed.
"""

from __future__ import annotations

import json
import math
import os
import platform
import time
from collections.abc import Iterator, Mapping
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from megacog import __version__
from megacog.errors import DataError
from megacog.runtime.hardware import available_cores, describe_device

Line = dict[str, Any]


class SoakRecord:
    """A file that several processes append to.

    Args:
        path: Made, with its folder, by the first line.
        soak: What is soaked, e.g. "kills"; lines of others may be in the same file.
    """

    def __init__(self, path: Path, soak: str) -> None:
        self.path = path
        self._soak = soak

    def add(self, event: str, **values: Any) -> None:
        """Append a line and sync it."""
        line = {"soak": self._soak, "event": event, "time": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())}
        data = (json.dumps(line | values, allow_nan=False) + "\n").encode()
        self.path.parent.mkdir(parents=True, exist_ok=True)
        descriptor = os.open(self.path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o644)
        try:
            if os.write(descriptor, data) != len(data):  # one write: lines of several processes do not mix
                raise OSError(f"{self.path}: a line could not be written completely")
            os.fsync(descriptor)
        finally:
            os.close(descriptor)

    def begin(self, options: Mapping[str, Any]) -> None:
        """Append what is about to run and on what."""
        self.add("start", options=dict(options), machine=describe_machine())

    def lines(self, event: str | None = None) -> Iterator[Line]:
        """The lines of this soak, in order.

        Raises:
            DataError: A line is no line of a record; a torn last one, of a machine that failed, is skipped.
        """
        if not self.path.exists():
            return
        text = self.path.read_text(encoding="utf-8", errors="replace")
        for number, content in enumerate(text.splitlines(keepends=True), 1):
            try:
                line = json.loads(content)
                soak, kind = line["soak"], line["event"]
            except (ValueError, TypeError, KeyError):
                if not content.endswith("\n"):
                    continue
                raise DataError(f"{self.path}:{number} is no line of a soak record; give another --record") from None
            if soak == self._soak and event in (None, kind):
                yield line


def describe_machine() -> Line:
    """Versions and hardware that figures depend on."""
    found = {
        "device": describe_device(), "cores": available_cores(), "system": platform.platform(),
        "python": platform.python_version(), "megacog": __version__,
    }  # fmt: skip
    for package in ("torch", "deepspeed"):
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    return found


def quantile(values: list[float], share: float) -> float:
    """The smallest value that at least this share of the values do not exceed."""
    ordered = sorted(values)
    return ordered[max(0, math.ceil(share * len(ordered)) - 1)]
