"""The import rules of the rooms, and calls that the code base does without."""

from __future__ import annotations

import ast
import importlib
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
# Lowest first: a room imports only from itself and from rooms before it.
FLOORS = (
    "errors megacog_kernels config runtime metrics parallel model tokenizers data prepare checkpoint interop "
    "planning generation evaluation training commands"
).split()
SOURCES = sorted(
    [*(ROOT / "megacog").rglob("*.py"), *(ROOT / "kernels").rglob("*.py"), *(ROOT / "launch").rglob("*.py")]
)
MODULES = sorted(
    ".".join(path.relative_to(base).with_suffix("").parts).removesuffix(".__init__")
    for base, folder in ((ROOT, "megacog"), (ROOT / "kernels", "megacog_kernels"))
    for path in (base / folder).rglob("*.py")
)
# Heavy or optional: `import megacog` must not need them.
HEAVY = "torch numpy deepspeed h5py av PIL sentencepiece tensorboard mpi4py triton yaml pydantic tqdm".split()
# Optional at run time, or slow to import: only inside functions, or in the rooms that exist for them.
LAZY = {"mpi4py", "tensorboard", "triton", "sklearn"}


def name(path: Path) -> str:
    return str(path.relative_to(ROOT))


def imports(tree: ast.AST, module: str) -> Iterator[tuple[str, int]]:
    """Yield (absolute module name, line) of every import, inside functions too."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield alias.name, node.lineno
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                package = module.split(".")[: -node.level]
                base = ".".join([*package, *([node.module] if node.module else [])])
            yield base, node.lineno
            if base in ("megacog", "kernels"):
                for alias in node.names:
                    yield f"{base}.{alias.name}", node.lineno


def room(module: str) -> str | None:
    parts = module.split(".")
    if parts[0] == "megacog_kernels":
        return "megacog_kernels"
    return parts[1] if parts[0] == "megacog" and len(parts) > 1 and parts[1] != "__version__" else None


def violations(source: str, path: Path) -> list[str]:
    """Return what a file imports against the rules."""
    relative = path.relative_to(ROOT / "kernels" if "kernels" in path.parts else ROOT)
    module = ".".join(relative.with_suffix("").parts)
    own = room(module)
    found = []
    for imported, line in imports(ast.parse(source), module):
        where = f"{name(path)}:{line}: imports {imported}"
        if imported.split(".")[0] == "deepspeed" and name(path) != "megacog/training/engine.py":
            found.append(f"{where}; only megacog/training/engine.py may")
        if own == "megacog_kernels" and imported.split(".")[0] == "megacog":
            found.append(f"{where}; kernels know nothing of megacog")
        other = room(imported)
        if own is not None and other is not None and FLOORS.index(other) > FLOORS.index(own):
            found.append(f"{where}, a room above {own}")
    return found


def banned_calls(source: str) -> list[int]:
    """Return the lines of calls that execute what a file or a user says."""
    lines = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import) and any(alias.name.split(".")[0] in ("pickle", "dill") for alias in node.names):
            lines.append(node.lineno)
        if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] in ("pickle", "dill"):
            lines.append(node.lineno)
        if not isinstance(node, ast.Call):
            continue
        called = ast.unparse(node.func)
        keywords = {keyword.arg: ast.unparse(keyword.value) for keyword in node.keywords}
        if (
            called in ("eval", "exec", "os.system", "os.popen", "yaml.load", "yaml.unsafe_load", "yaml.full_load")
            or keywords.get("shell") == "True"
            or keywords.get("allow_pickle") == "True"
            or (called.endswith("torch.load") and keywords.get("weights_only") != "True")
        ):
            lines.append(node.lineno)
    return lines


def test_there_are_sources_to_check() -> None:
    assert len(SOURCES) > 20
    assert "megacog.runtime.files" in MODULES and "megacog_kernels.grid" in MODULES


@pytest.mark.parametrize("folder", sorted(path.name for path in (ROOT / "megacog").iterdir() if path.is_dir()))
def test_every_room_has_a_floor(folder: str) -> None:
    assert folder in FLOORS or folder == "__pycache__"


@pytest.mark.parametrize("path", SOURCES, ids=name)
def test_a_file_imports_only_from_floors_below(path: Path) -> None:
    assert violations(path.read_text(encoding="utf-8"), path) == []


@pytest.mark.parametrize("path", SOURCES, ids=name)
def test_a_file_does_without_dangerous_calls(path: Path) -> None:
    assert banned_calls(path.read_text(encoding="utf-8")) == []


@pytest.mark.parametrize("path", SOURCES, ids=name)
def test_optional_packages_are_imported_where_they_are_used(path: Path) -> None:
    if "triton" in path.read_text(encoding="utf-8") and "megacog_kernels" in path.parts:
        pytest.skip("kernel files are made of triton; ops.py imports them lazily")
    top = ast.Module(body=[node for node in ast.parse(path.read_text(encoding="utf-8")).body], type_ignores=[])
    eager = [node for node in top.body if isinstance(node, (ast.Import, ast.ImportFrom))]
    names = {
        imported.split(".")[0] for node in eager for imported, _ in imports(ast.Module([node], []), "megacog.x")
    }
    assert not names & LAZY


@pytest.mark.parametrize(
    ("path", "source"),
    [
        ("megacog/model/x.py", "import deepspeed"),
        ("megacog/model/x.py", "def f():\n    from deepspeed import zero"),
        ("megacog/model/x.py", "from megacog.data import shards"),
        ("megacog/model/x.py", "from megacog import training"),
        ("megacog/model/x.py", "from ..data import shards"),
        ("megacog/config/x.py", "from megacog.runtime.files import atomic_file"),
        ("kernels/megacog_kernels/x.py", "from megacog.errors import DataError"),
    ],
)
def test_the_rules_catch_a_wrong_import(path: str, source: str) -> None:
    assert len(violations(source, ROOT / path)) >= 1


@pytest.mark.parametrize(
    "source",
    [
        "import pickle",
        "from pickle import loads",
        "yaml.load(x)",
        "eval(x)",
        "subprocess.run(x, shell=True)",
        "np.load(x, allow_pickle=True)",
        "torch.load(x)",
        "torch.load(x, weights_only=False)",
    ],
)
def test_the_rules_catch_a_dangerous_call(source: str) -> None:
    assert banned_calls(source) == [1]


def test_importing_megacog_takes_nothing_heavy() -> None:
    code = (
        f"import sys, megacog, megacog.errors, megacog.commands; print([m for m in {HEAVY!r} if m in sys.modules])"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, check=True)
    assert result.stdout.strip() == "[]"


@pytest.mark.parametrize("module", MODULES)
def test_every_module_can_be_imported(module: str) -> None:
    if module == "megacog.training.engine":
        pytest.importorskip("deepspeed")
    importlib.import_module(module)
