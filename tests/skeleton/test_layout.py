"""What the repository looks like: folders, sizes of files, packaging metadata."""

from __future__ import annotations

import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]


def tracked(pattern: str = "") -> list[Path]:
    result = subprocess.run(
        ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard", *([pattern] if pattern else [])],
        cwd=ROOT, capture_output=True, text=True, check=True,
    )  # fmt: skip
    return [ROOT / name for name in result.stdout.split("\0") if name and (ROOT / name).is_file()]


@pytest.mark.parametrize("folder", ["kernels", "launch", "configs", "tests"])
def test_folders_that_are_no_packages_have_no_init_file(folder: str) -> None:
    assert not (ROOT / folder / "__init__.py").exists()
    if folder == "tests":
        assert list((ROOT / folder).rglob("__init__.py")) == []


def test_names_of_test_files_are_unique() -> None:
    names = [path.name for path in (ROOT / "tests").rglob("test_*.py")]
    assert sorted(names) == sorted(set(names))


def test_every_package_folder_has_an_init_file() -> None:
    for base in (ROOT / "megacog", ROOT / "kernels" / "megacog_kernels"):
        for path in base.rglob("*.py"):
            assert (path.parent / "__init__.py").exists(), path


def test_no_file_has_outgrown_its_reason() -> None:
    long = {
        str(path.relative_to(ROOT)): lines
        for path in tracked("*.py")
        if (lines := len(path.read_text(encoding="utf-8").splitlines())) > 500
    }
    assert long == {}


def test_sources_are_ascii() -> None:
    # Chinese captions and templates are data; they are written as they are read.
    allowed = re.compile(r"[\u3000-\u9fff\uff00-\uffef]")
    for path in tracked("*.py"):
        if "tests" not in path.parts:
            text = allowed.sub("", path.read_text(encoding="utf-8"))
            assert text.isascii(), f"{path}: {[c for c in text if not c.isascii()][:5]}"


def test_no_source_is_named_after_nothing() -> None:
    vague = {"utils.py", "util.py", "helpers.py", "misc.py", "common.py"}
    assert [path for path in tracked("*.py") if path.name in vague] == []


def test_contributing_stays_short() -> None:
    assert len((ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8").splitlines()) <= 150


def test_the_license_is_apache_2() -> None:
    text = (ROOT / "LICENSE").read_text(encoding="utf-8")
    assert "Apache License" in text and "Version 2.0, January 2004" in text
    assert "END OF TERMS AND CONDITIONS" in text


def test_setup_lists_both_packages_and_their_folders() -> None:
    result = subprocess.run(
        [sys.executable, "setup.py", "--name", "--version", "--license"],
        cwd=ROOT, capture_output=True, text=True, check=True,
    )  # fmt: skip
    import megacog

    assert result.stdout.split()[-3:] == ["megacog", megacog.__version__, "Apache-2.0"]
    assert 'package_dir={"megacog_kernels": "kernels/megacog_kernels"}' in (ROOT / "setup.py").read_text()


def test_console_commands_lead_to_functions() -> None:
    from megacog import commands

    targets = re.findall(r'"megacog-[a-z-]+=megacog\.commands:(\w+)"', (ROOT / "setup.py").read_text())
    own = commands.__name__
    functions = [name for name, value in vars(commands).items() if getattr(value, "__module__", "") == own]
    assert sorted(targets) == sorted(functions)


def test_markers_of_tests_are_declared() -> None:
    settings = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["pytest"]["ini_options"]
    declared = {marker.split(":")[0] for marker in settings["markers"]}
    assert {"slow", "distributed", "gpu"} <= declared


def test_scripts_are_valid_bash_and_executable_python_is_importable_as_text() -> None:
    for path in [*tracked("*.sh"), *tracked("*.sbatch"), ROOT / ".ci" / "run"]:
        subprocess.run(["bash", "-n", str(path)], check=True)
    for path in tracked("launch/*.py"):
        compile(path.read_text(encoding="utf-8"), str(path), "exec")


def test_no_file_names_a_machine_of_ours() -> None:
    private = re.compile(r"/work/|/tmp/venv|/root/|pypi\.tsv|index-url +https?://(?!download\.pytorch\.org)")
    here = Path(__file__).resolve()
    for path in tracked():
        if path.suffix in (".py", ".sh", ".sbatch", ".md", ".toml", ".yaml", "") and path.resolve() != here:
            try:
                text = path.read_text(encoding="utf-8")
            except UnicodeDecodeError:
                continue
            assert not private.search(text), f"{path}: {private.search(text)}"
