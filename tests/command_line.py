"""Commands as a user meets them, inside the test's own process: exit code, output, and which files changed."""

from __future__ import annotations

import importlib
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import pytest

from megacog.runtime.cli import run

MAINS = {
    "pretrain": "megacog.training.pretrain",
    "prepare": "megacog.prepare.main",
    "train_tokenizer": "megacog.prepare.train_tokenizer",
    "infer": "megacog.generation.infer",
    "evaluate": "megacog.evaluation.evaluate",
    "convert": "megacog.interop.main",
}
"""Command in launch/ -> module with its main."""


@dataclass(frozen=True)
class Outcome:
    """How a command ended."""

    code: object
    out: str
    err: str

    @property
    def message(self) -> str:
        """What follows `error: ` on stderr; exactly one error is told."""
        starts = [index for index, line in enumerate(self.err.splitlines()) if line.startswith("error: ")]
        assert len(starts) == 1, self.err
        return "\n".join(self.err.splitlines()[starts[0] :]).removeprefix("error: ")


Command = Callable[..., Outcome]
"""`call` without its first argument."""
TrainingArguments = Callable[..., tuple[str, Path]]
"""Arguments of pretrain.py for a tiny run, its configuration written with the keys `section__key` changed."""


def prepare_arguments(world: Path, captions: Path, out: Path, **options: object) -> list[object]:
    """Arguments of prepare.py for the videos of the tests' world, with options such as `size` changed."""
    given = {"tokenizer": world / "tokenizer", "size": 16, "workers": 1, "root": world / "videos"} | options
    pairs = [part for name, value in given.items() for part in (f"--{name.replace('_', '-')}", value)]
    return ["run", captions, "--out", out, *pairs]


def call(capsys: pytest.CaptureFixture[str], name: str, *arguments: object) -> Outcome:
    """Run launch/<name>.py with these arguments; an exception that is no exit fails the test: a traceback."""
    main = importlib.import_module(MAINS[name]).main
    capsys.readouterr()
    with pytest.raises(SystemExit) as exit_info:
        run(lambda: main([str(argument) for argument in arguments]))
    captured = capsys.readouterr()
    return Outcome(exit_info.value.code, captured.out, captured.err)


def files(folder: Path) -> dict[str, tuple[int, int]]:
    """Size and time of every file below a folder, hidden ones too; folders count with size -1."""
    found = {}
    for path in folder.rglob("*"):
        status = path.lstat()
        found[str(path.relative_to(folder))] = (-1, 0) if path.is_dir() else (status.st_size, status.st_mtime_ns)
    return found


@contextmanager
def nothing_changes(*folders: Path) -> Iterator[None]:
    """Fail if a file below one of the folders appears, goes or changes."""
    before = [files(folder) for folder in folders]
    yield
    assert [files(folder) for folder in folders] == before


def assert_tells(text: str, message: str) -> None:
    """Fail unless the text holds the regular expression, and no traceback."""
    assert re.search(message, text, re.DOTALL), text
    assert "Traceback" not in text
