"""`launch/test_gpu.sh` says what parts lack and runs the others; `launch/fetch_wheels.sh` fetches what it may lack."""

from __future__ import annotations

import os
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

# No site-packages where modules are looked for; a GPU is there; every part runs at once.
PYTHON = f"""#!/usr/bin/env bash
case "$1 ${{2:-}}" in
    "- "*) exec {sys.executable} -S "$@" ;;
    "-m pip") exec {sys.executable} "$@" ;;
    "-c "*) exit 0 ;;
    *) echo "RAN $*"; [[ "$*" != *test_replay* ]] ;;
esac
"""
PIP = """#!/usr/bin/env bash
case "$1" in
    -c) [ "${3:-}" != nosuch ] && echo 1.2.3 ;;
    -m) echo "$*" >>"$CALLS"; touch "$FOLDER/$(echo "$CALLS" | tr -dc a-z)-$WHEEL.whl" ;;
esac
"""


def environment(folder: Path, python: str) -> dict[str, str]:
    """One with this python first."""
    (folder / "venv/bin").mkdir(parents=True)
    (folder / "venv/pyvenv.cfg").touch()
    (folder / "venv/bin/python").write_text(python)
    (folder / "venv/bin/python").chmod(0o755)
    return {**os.environ, "VIRTUAL_ENV": str(folder / "venv"), "PYTHONPATH": ""}


def bash(
    repository: Path, script: str, environ: dict[str, str], *arguments: object
) -> subprocess.CompletedProcess[str]:
    command = ["bash", str(repository / "launch" / script), *map(str, arguments)]
    return subprocess.run(command, env=environ, capture_output=True, text=True, timeout=120)


def write_wheel(folder: Path, module: str) -> None:
    folder.mkdir(exist_ok=True)
    info = f"{module}-1.0.dist-info"
    with zipfile.ZipFile(folder / f"{module}-1.0-py3-none-any.whl", "w") as wheel:
        wheel.writestr(f"{module}.py", "")
        wheel.writestr(f"{info}/METADATA", f"Metadata-Version: 2.1\nName: {module}\nVersion: 1.0\n")
        wheel.writestr(f"{info}/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        wheel.writestr(f"{info}/RECORD", f"{module}.py,,\n{info}/METADATA,,\n{info}/WHEEL,,\n{info}/RECORD,,\n")


def test_parts_without_their_packages_are_named_first_and_the_others_run(repository: Path, tmp_path: Path) -> None:
    out, wheels, environ = tmp_path / "out", tmp_path / "wheels", environment(tmp_path, PYTHON)
    for module in ("torch", "triton", "numpy", "pytest", "hypothesis"):
        write_wheel(wheels, module)
    done = bash(repository, "test_gpu.sh", environ, "--wheels", wheels, out, "replay", "tests", "kernels", "fits")
    assert done.returncode == 1
    told, _, _ = done.stderr.partition("\n")
    lacking = "pydantic pydantic_core annotated_types typing_inspection yaml safetensors tqdm sentencepiece h5py"
    assert told == f"part replay will not run: {lacking} missing here (see --help)"
    assert f"part fits will not run: {lacking} deepspeed hjson missing" in done.stderr
    lines = (out / "report.txt").read_text().strip().splitlines()
    report = {line.split()[0]: line.partition(" s  ")[2] for line in lines}
    assert report["tests"] == report["kernels"] == "passed" and report["replay"].startswith("NOT RUN: pydantic ")
    assert "tests/kernels" in (out / "tests.log").read_text() and not (out / "replay.log").exists()
    assert "generation" not in (out / "tests.log").read_text()  # which needs more than kernels do
    assert f"launch/benchmark.py kernels --json {out}/kernels.json" in (out / "kernels.log").read_text()
    # Nothing is left of what was installed for the run.
    assert bash(repository, "test_gpu.sh", environ, out, "kernels").returncode == 1


def test_a_part_that_fails_stops_no_other(repository: Path, tmp_path: Path) -> None:
    everything = PYTHON.replace(" -S ", " ")
    out, environ = tmp_path / "out", environment(tmp_path, everything)
    done = bash(repository, "test_gpu.sh", environ | {"MEMORIZE_SETTINGS": "a=1 b=2"}, out, "replay", "fp8", "memorize")
    assert done.returncode == 1, done.stderr
    report = [line.split() for line in (out / "report.txt").read_text().strip().splitlines()]
    assert [(line[0], line[-1]) for line in report] == [("replay", "FAILED"), ("fp8", "passed"), ("memorize", "passed")]
    assert f"launch/prove.py fp8 --json {out}/fp8.json" in (out / "fp8.log").read_text()
    memorize = (out / "memorize.log").read_text()
    assert "--seconds 480" in memorize and memorize.rstrip().endswith("a=1 b=2")


def test_mistakes_are_told_before_anything_runs(repository: Path, tmp_path: Path) -> None:
    environ, out = environment(tmp_path, PYTHON), tmp_path / "out"
    for arguments, message in (
        ([out, "tests", "tets"], "unknown part tets"),
        (["--wheel", out], "unknown option --wheel"),
        (["--wheels", tmp_path / "none", out, "tests"], "no wheels in"),
    ):
        done = bash(repository, "test_gpu.sh", environ, *arguments)
        assert done.returncode in (1, 2) and message in done.stderr and not out.exists()


@pytest.mark.parametrize(("wheel", "code"), [("1-py3-none-any", 0), ("1-cp312-cp312-x", 0), ("1-cp311-cp311-x", 1)])
def test_wheels_are_fetched_in_the_versions_of_this_machine(
    repository: Path, tmp_path: Path, wheel: str, code: int
) -> None:
    calls, folder = tmp_path / "calls", tmp_path / "wheels"
    environ = environment(tmp_path, PIP) | {"CALLS": str(calls), "FOLDER": str(folder), "WHEEL": wheel}
    done = bash(repository, "fetch_wheels.sh", environ, folder, "deepspeed", "av")
    assert done.returncode == code, done.stderr
    deepspeed, av = calls.read_text().splitlines()
    assert "pip wheel" in deepspeed and "deepspeed==1.2.3" in deepspeed
    assert "--python-version 3.12" in av and av.endswith("av==1.2.3")
    assert "no wheel for Python 3.12" in done.stderr or code == 0
    unknown = bash(repository, "fetch_wheels.sh", environ, folder, "nosuch")
    assert unknown.returncode == 1 and "nosuch is not installed here" in unknown.stderr
