"""Prompt files: what is read, and what is said about every kind of bad line."""

from __future__ import annotations

from pathlib import Path

import pytest

from megacog.errors import DataError
from megacog.generation.prompts import Prompt, read_prompts


def write(folder: Path, content: str | bytes) -> Path:
    path = folder / "prompts.txt"
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return path


def test_plain_and_json_lines_are_read_and_blank_ones_skipped(tmp_path: Path) -> None:
    (tmp_path / "lion.png").touch()
    path = write(
        tmp_path,
        "\ufeffa red square\r\n\n  # not a comment \n"
        '{"text": "\u72ee\u5b50", "image": "lion.png", "seconds": 8, "seed": 0}\n',
    )
    prompts, bad = read_prompts(path)
    assert prompts == [
        Prompt(1, "a red square"),
        Prompt(3, "# not a comment"),
        Prompt(4, "\u72ee\u5b50", image=tmp_path / "lion.png", seconds=8.0, seed=0),
    ]
    assert bad == []


BAD_LINES = {
    '{"text": "x"': "is not a JSON object",
    '{"txet": "x"}': "unknown key 'txet'; did you mean 'text'",
    '{"text": "x", "zoom": 1}': "unknown key 'zoom'; known keys: text, image, video, seconds, seed",
    '{"seed": 1}': 'no "text"',
    '{"text": 5}': '"text" must be a string',
    '{"text": "  "}': "the text is empty",
    '{"text": "a\\u0000b"}': "control character",
    '{"text": "x", "image": "none.png"}': "none.png does not exist",
    '{"text": "x", "image": 3}': '"image" must be a path',
    '{"text": "x", "video": ".", "image": "."}': "cannot be given together",
    '{"text": "x", "seconds": 0}': '"seconds" must be a positive number',
    '{"text": "x", "seconds": true}': '"seconds" must be a positive number',
    '{"text": "x", "seconds": Infinity}': '"seconds" must be a positive number',
    '{"text": "x", "seed": -1}': '"seed" must be a whole number',
    '{"text": "x", "seed": 1.5}': '"seed" must be a whole number',
    '{"text": "x", "text": "y"}': "'text' is given twice",
}


@pytest.mark.parametrize("line", BAD_LINES)
def test_a_bad_line_is_named_and_does_not_stop_the_rest(tmp_path: Path, line: str) -> None:
    prompts, bad = read_prompts(write(tmp_path, f"good\n{line}\nalso good\n"))
    assert [prompt.text for prompt in prompts] == ["good", "also good"]
    assert [(item.line, item.text) for item in bad] == [(2, line)]
    assert bad[0].error.startswith(f"{tmp_path / 'prompts.txt'}:2: ")
    assert BAD_LINES[line] in bad[0].error


@pytest.mark.parametrize("content", ["", "\n \n\t\n"], ids=["nothing", "blank lines"])
def test_an_empty_file_is_an_error(tmp_path: Path, content: str) -> None:
    with pytest.raises(DataError, match="holds no prompt"):
        read_prompts(write(tmp_path, content))


def test_a_file_that_is_not_utf8_is_an_error_with_its_line(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"prompts.txt:2: not UTF-8 \(byte 0xe9\)"):
        read_prompts(write(tmp_path, b"ok\ncaf\xe9\n"))


def test_missing_files_and_folders_are_errors(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="does not exist"):
        read_prompts(tmp_path / "none.txt")
    with pytest.raises(DataError, match="is a folder"):
        read_prompts(tmp_path)
