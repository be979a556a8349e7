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
    "errors megacog_kernels config runtime doctor metrics parallel model tokenizers data prepare checkpoint interop "
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


def eager_imports(source: str, module: str) -> set[str]:
    """Return what a module imports when it is itself imported: outside functions and `if TYPE_CHECKING`.

    Of `from a import b` both `a` and `a.b` are returned: b may be a module.
    """
    found = set()
    waiting: list[ast.AST] = list(ast.parse(source).body)
    while waiting:
        node = waiting.pop()
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda)):
            continue
        if isinstance(node, ast.If) and ast.unparse(node.test).endswith("TYPE_CHECKING"):
            waiting += node.orelse
            continue
        if isinstance(node, (ast.Import, ast.ImportFrom)):
            found |= {imported for imported, _ in imports(node, module)}
        if isinstance(node, ast.ImportFrom):
            found |= {f"{base}.{alias.name}" for base, _ in imports(node, module) for alias in node.names}
        waiting += ast.iter_child_nodes(node)
    return found


def module_name(path: Path) -> str:
    """Return the name of a file as a module; a package's own file is its `__init__`."""
    base = ROOT / "kernels" if path.is_relative_to(ROOT / "kernels") else ROOT
    return ".".join(path.relative_to(base).with_suffix("").parts)


def triton_modules(sources: dict[str, str]) -> set[str]:
    """Return the modules of the kernels (module -> source) that are made of Triton: they import it at once.

    A package's `__init__` is never one: whoever imports one of its modules would import Triton with it.
    """
    return {
        module
        for module, source in sources.items()
        if room(module) == "megacog_kernels"
        and not module.endswith("__init__")
        and any(imported.split(".")[0] == "triton" for imported in eager_imports(source, module))
    }


def imported_too_early(source: str, module: str, triton: set[str]) -> set[str]:
    """Return the optional packages, and the modules of `triton`, that a module imports outside functions."""
    allowed = {"triton"} if module in triton else set()
    forbidden = LAZY - allowed | (set() if allowed else triton)
    return {
        imported
        for imported in eager_imports(source, module)
        if any(f"{imported}.".startswith(f"{other}.") for other in forbidden)
    }


@pytest.fixture(scope="module")
def sources() -> dict[str, str]:
    return {module_name(path): path.read_text(encoding="utf-8") for path in SOURCES}


@pytest.mark.parametrize("path", SOURCES, ids=name)
def test_optional_packages_are_imported_where_they_are_used(path: Path, sources: dict[str, str]) -> None:
    module = module_name(path)
    assert imported_too_early(sources[module], module, triton_modules(sources)) == set()


BACKWARD = {"megacog_kernels.attention.backward": "import triton"}


@pytest.mark.parametrize(
    ("module", "source", "found"),
    [
        ("megacog.model.x", "import triton", {"triton"}),
        ("megacog.model.x", "try:\n    import mpi4py.MPI\nexcept ImportError:\n    pass", {"mpi4py.MPI"}),
        ("megacog.model.x", "class A:\n    import sklearn", {"sklearn"}),
        ("megacog_kernels.attention.__init__", "import triton.language as tl", {"triton.language"}),
        ("megacog_kernels.attention.forward", "import triton\nimport tensorboard", {"tensorboard"}),
        ("megacog_kernels.attention.ops", "# calls triton\nimport mpi4py", {"mpi4py"}),
        ("megacog_kernels.attention.ops", "from megacog_kernels.attention import backward", set(BACKWARD)),
        ("megacog_kernels.attention.ops", "from . import backward", set(BACKWARD)),
        ("megacog.model.x", "import megacog_kernels.attention.backward as b", set(BACKWARD)),
    ],
)
def test_the_rules_catch_an_optional_package_imported_too_early(module: str, source: str, found: set[str]) -> None:
    assert imported_too_early(source, module, triton_modules(BACKWARD | {module: source})) == found


@pytest.mark.parametrize(
    ("module", "source"),
    [
        ("megacog_kernels.attention.forward", "import triton\nimport triton.language as tl"),
        ("megacog_kernels.attention.forward", "import triton\nfrom megacog_kernels.attention import backward"),
        ("megacog_kernels.attention.ops", "def f():\n    from megacog_kernels.attention import backward"),
        ("megacog.metrics.x", "def f():\n    import tensorboard"),
        ("megacog.metrics.x", "if TYPE_CHECKING:\n    import triton"),
    ],
)
def test_the_rules_allow_optional_packages_in_functions_and_triton_in_kernels(module: str, source: str) -> None:
    assert imported_too_early(source, module, triton_modules(BACKWARD | {module: source})) == set()


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
    importlib.import_module(module)
