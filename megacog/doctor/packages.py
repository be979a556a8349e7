"""Versions of what megacog stands on."""

from __future__ import annotations

import re
import shutil
import sys
from collections.abc import Callable
from importlib.metadata import PackageNotFoundError, version

from megacog.doctor.check import Check

REQUIRED: dict[str, tuple[int, ...]] = {
    "torch": (2, 11), "numpy": (1, 26), "h5py": (3, 10), "pydantic": (2, 6), "pyyaml": (6,), "sentencepiece": (0, 2),
    "safetensors": (0, 4, 5), "av": (14,), "pillow": (10,), "tqdm": (4, 66),
}  # fmt: skip
"""Lowest versions, those of setup.py."""
_DEEPSPEED = (0, 19, 8)
_TRITON = (3, 6)
_MPI4PY = (4,)
_PYTHON = (3, 11)

Versions = Callable[[str], str | None]


def installed(name: str) -> str | None:
    """The version of an installed package."""
    try:
        return version(name)
    except PackageNotFoundError:
        return None


def package_checks(gpu: bool, versions: Versions = installed) -> list[Check]:
    """Python, what megacog requires, and what only some of it does.

    Args:
        gpu: This machine has a GPU, so kernels are compiled for it.
        versions: Looks a package up.
    """
    checks = [python_check(sys.version_info[:3])]
    checks += [package_check(name, versions(name), minimum) for name, minimum in REQUIRED.items()]
    checks.append(
        package_check(
            "deepspeed", versions("deepspeed"), _DEEPSPEED, without="warning",
            value="not installed: train.engine: torch only, without ZeRO",
        )
    )  # fmt: skip
    checks.append(
        package_check(
            "triton", versions("triton"), _TRITON, without="sick" if gpu else "ok",
            value="not installed" + ("" if gpu else "; only GPUs need it"),
        )
    )  # fmt: skip
    checks.append(
        package_check(
            "mpi4py", versions("mpi4py"), _MPI4PY, without="ok",
            value="not installed; only prepare.py under mpirun needs it",
        )
    )  # fmt: skip
    return checks


def python_check(found: tuple[int, ...]) -> Check:
    """Whether the interpreter is new enough."""
    value = ".".join(map(str, found))
    if found >= _PYTHON:
        return Check("python", "ok", value)
    return Check("python", "sick", value, f"use Python {_text(_PYTHON)} or newer; bash launch/install.sh makes a venv")


def package_check(
    name: str, found: str | None, minimum: tuple[int, ...], without: str = "sick", value: str = "not installed"
) -> Check:
    """Whether a package is there and new enough.

    Args:
        name: As pip spells it.
        found: Its version, None if it is not installed.
        minimum: Lowest version that megacog is tested with.
        without: Verdict when it is not installed.
        value: What to say then.
    """
    fix = f"pip install '{name}>={_text(minimum)}'"
    if found is None:
        verdict = "ok" if without == "ok" else "warning" if without == "warning" else "sick"
        return Check(name, verdict, value, "" if verdict == "ok" else fix)  # type: ignore[arg-type]
    if _numbers(found) < minimum:
        return Check(name, "sick", f"{found}, older than {_text(minimum)}", fix)
    return Check(name, "ok", found)


def compiler_check(gpu: bool, which: Callable[[str], str | None] = shutil.which) -> Check:
    """Triton links its launchers with a C compiler; DeepSpeed's ops, which would need nvcc, are not used."""
    if not gpu:
        return Check("C compiler", "ok", "not needed without a GPU")
    found = next((path for name in ("cc", "gcc", "clang") if (path := which(name))), None)
    if found is None:
        fix = "install gcc or set CC: Triton links its launchers with it (nvcc is not needed)"
        return Check("C compiler", "sick", "none found", fix)
    return Check("C compiler", "ok", f"{found}; nvcc is not needed")


def _numbers(found: str) -> tuple[int, ...]:
    return tuple(int(part) for part in re.findall(r"\d+", found.split("+")[0])[:3])


def _text(numbers: tuple[int, ...]) -> str:
    return ".".join(map(str, numbers))
