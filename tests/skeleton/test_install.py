"""launch/install.sh and the packages it installs, in environments of their own."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import venv
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]


def copy_repository(target: Path) -> Path:
    """Copy what a fresh clone would hold, changes that are not committed yet included."""
    listing = subprocess.run(
        ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"],
        cwd=ROOT, capture_output=True, text=True, check=True,
    )  # fmt: skip
    for name in filter(None, listing.stdout.split("\0")):
        if (ROOT / name).is_file():
            (target / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(ROOT / name, target / name)
    return target


def bare_environment(home: Path) -> dict[str, str]:
    """Return the environment of a user without virtualenv, with the system's Python and pip's settings."""
    base = Path(sys.base_prefix) / "bin"
    dropped = ("VIRTUAL_ENV", "CONDA_PREFIX", "PYTHONPATH", "PYTHONHOME")
    environ = {name: value for name, value in os.environ.items() if name not in dropped}
    path = [entry for entry in environ["PATH"].split(os.pathsep) if not Path(entry, "../pyvenv.cfg").exists()]
    return {**environ, "HOME": str(home), "PATH": os.pathsep.join([str(base), *path])}


def without_compilers(environ: dict[str, str], folder: Path) -> dict[str, str]:
    """Put compilers first on the PATH that fail (DeepSpeed's set-up asks them which libraries are there)."""
    folder.mkdir()
    for name in ("cc", "c++", "gcc", "g++", "clang", "nvcc", "ninja", "cmake"):
        (folder / name).write_text("#!/bin/sh\nexit 1\n")
        (folder / name).chmod(0o755)
    return {**environ, "PATH": f"{folder}{os.pathsep}{environ['PATH']}"}


def bash(command: str, folder: Path, environ: dict[str, str], seconds: int = 1800) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        ["bash", "-c", command], cwd=folder, env=environ, capture_output=True, text=True, timeout=seconds
    )


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_a_bare_machine_gets_a_working_environment_without_a_compiler(tmp_path: Path) -> None:
    repository = copy_repository(tmp_path / "clone")
    (tmp_path / "home").mkdir()
    environ = without_compilers(bare_environment(tmp_path / "home"), tmp_path / "compilers")
    # An interrupted first try left a half-made environment.
    (repository / ".venv" / "bin").mkdir(parents=True)

    first = bash("bash launch/install.sh --target cpu", repository, environ)
    assert first.returncode == 0, first.stdout + first.stderr
    torch_lines = [line for line in first.stdout.splitlines() if line.startswith("torch ")]
    assert len(torch_lines) == 1 and "from" in torch_lines[0]

    check = (
        "source launch/environment.sh && cd / && python -c '"
        "import megacog, megacog_kernels, deepspeed, torch, sys; "
        "print(megacog.__file__, megacog_kernels.__file__, sys.prefix)'"
        " && megacog-infer --help >/dev/null"
    )
    found = bash(check, repository, environ)
    assert found.returncode == 0, found.stderr
    places = found.stdout.splitlines()[-1].split()
    assert places == [
        str(repository / "megacog/__init__.py"),
        str(repository / "kernels/megacog_kernels/__init__.py"),
        str(repository / ".venv"),
    ]
    assert list((repository / ".venv").glob("lib/*/site-packages/deepspeed/ops/**/*.so")) == []

    again = bash("time -p bash launch/install.sh --target cpu", repository, environ)
    assert again.returncode == 0 and again.stdout == ""
    real = next(line for line in again.stderr.splitlines() if line.startswith("real"))
    assert float(real.split()[1]) < 5.0  # 0.2 s on an idle machine


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_a_foreign_package_named_kernels_is_not_shadowed(tmp_path: Path) -> None:
    repository = copy_repository(tmp_path / "clone")
    environ = bare_environment(tmp_path)
    environment = tmp_path / "env"
    venv.create(environment, with_pip=True)
    python = environment / "bin" / "python"
    where = bash(f"{python} -c 'import sysconfig; print(sysconfig.get_path(\"purelib\"))'", tmp_path, environ)
    site = Path(where.stdout.strip())
    (site / "kernels").mkdir()
    (site / "kernels" / "__init__.py").write_text("WHO = 'foreign'\n")

    installed = bash(f"{python} -m pip install --quiet --no-deps -e .", repository, environ, seconds=500)
    assert installed.returncode == 0, installed.stderr
    show = "import kernels, importlib.util as u; print(kernels.WHO, u.find_spec(\"megacog_kernels\").origin)"
    for folder in (Path("/"), repository):
        result = bash(f"{python} -c '{show}'", folder, environ)
        assert result.stdout.split() == ["foreign", str(repository / "kernels/megacog_kernels/__init__.py")]


def test_an_unknown_option_or_target_is_refused(tmp_path: Path) -> None:
    environ = bare_environment(tmp_path)
    for options, message in (("--targt gpu", "unknown option"), ("--target tpu", "cpu or gpu")):
        result = bash(f"bash launch/install.sh {options}", ROOT, environ)
        assert result.returncode == 2 and message in result.stderr


def test_a_python_that_is_too_old_is_told(tmp_path: Path) -> None:
    old = tmp_path / "env" / "bin"
    old.mkdir(parents=True)
    (old / "python").write_text(
        '#!/bin/sh\n[ "$1" = --version ] && echo Python 3.10.1 || printf "/old/env\\told\\tincomplete\\n"\n'
    )
    (old / "python").chmod(0o755)
    environ = {**bare_environment(tmp_path), "VIRTUAL_ENV": str(tmp_path / "env")}
    result = bash("bash launch/install.sh", ROOT, environ)
    assert result.returncode == 1
    assert "Python 3.10.1; Python >= 3.11 is needed" in result.stderr


def test_the_environment_script_prefers_the_active_environment(tmp_path: Path) -> None:
    active, local = tmp_path / "active" / "bin", tmp_path / ".venv" / "bin"
    for folder in (active, local):
        folder.mkdir(parents=True)
        (folder / "python").write_text("#!/bin/sh\n")
        (folder / "python").chmod(0o755)
    (tmp_path / "launch").mkdir()
    shutil.copy(ROOT / "launch" / "environment.sh", tmp_path / "launch")
    environ = bare_environment(tmp_path)
    show = "source launch/environment.sh; command -v python"
    assert bash(show, tmp_path, environ).stdout.strip() == str(local / "python")
    with_active = {**environ, "VIRTUAL_ENV": str(tmp_path / "active")}
    assert bash(show, tmp_path, with_active).stdout.strip() == str(active / "python")


@pytest.fixture
def recorded(tmp_path: Path) -> tuple[dict[str, str], Path]:
    """An active environment whose pip writes its arguments to a file, and fails where `fail` is in the way."""
    environment = tmp_path / "env"
    venv.create(environment, with_pip=False)
    calls = tmp_path / "pip-calls"
    (environment / "bin" / "python").unlink()
    (environment / "bin" / "python").write_text(
        f"""#!/bin/bash
if [ "$1 $2" = "-m pip" ]; then
    echo "$@" >>{calls}
    [ "$3" != install ] || [ ! -e {tmp_path}/fail ]
    exit
fi
exec {environment}/bin/python3 "$@"
"""
    )
    (environment / "bin" / "python").chmod(0o755)
    (environment / "bin" / "python3").unlink(missing_ok=True)
    (environment / "bin" / "python3").symlink_to(Path(sys.base_prefix) / "bin" / "python3")
    dropped = ("TORCH_INDEX_URL", "TORCH_VERSION")
    environ = {name: value for name, value in bare_environment(tmp_path).items() if name not in dropped}
    return {**environ, "VIRTUAL_ENV": str(environment)}, calls


def test_only_torch_is_taken_from_the_torch_index_and_it_comes_first(
    recorded: tuple[dict[str, str], Path],
) -> None:
    environ, calls = recorded
    url = "https://user:secret@example.org/simple"
    result = bash("bash launch/install.sh --target cpu", ROOT, {**environ, "TORCH_INDEX_URL": url})
    assert result.returncode == 0, result.stderr
    torch, rest = [line for line in calls.read_text().splitlines() if " install " in line]
    assert f"--index-url {url} --no-deps torch==2.13.0" in torch
    assert "example.org" not in rest and rest.endswith("-e .[logging,demo]")
    assert "from https://example.org/simple" in result.stdout and "secret" not in result.stdout


def test_an_install_that_fails_is_not_taken_for_done(
    recorded: tuple[dict[str, str], Path], tmp_path: Path
) -> None:
    environ, calls = recorded
    (tmp_path / "fail").touch()
    broken = bash("bash launch/install.sh --target cpu", ROOT, environ)
    assert broken.returncode != 0
    assert not (tmp_path / "env" / ".megacog-install").exists()
    (tmp_path / "fail").unlink()
    assert bash("bash launch/install.sh --target gpu --dev", ROOT, environ).returncode != 0  # no torch with CUDA
    assert calls.read_text().splitlines()[-1].endswith("-e .[logging,demo,gpu,dev]")


def test_the_scripts_explain_themselves_and_refuse_unknown_options() -> None:
    for script in ("install.sh", "test.sh"):
        shown = bash(f"bash launch/{script} --help", ROOT, dict(os.environ))
        assert shown.returncode == 0 and f"bash launch/{script} [" in shown.stdout
        refused = bash(f"bash launch/{script} --nonsense", ROOT, dict(os.environ))
        assert refused.returncode == 2 and "unknown option --nonsense" in refused.stderr
