"""Compiles every kernel ahead of time, without a GPU, and prints registers and shared memory (docs/kernels.md).

    python kernels/benchmarks/compile_kernels.py [--target sm_90:bf16 ...] [--match TEXT] [--share K/N] [--json]
    python kernels/benchmarks/compile_kernels.py --write docs/kernels.md | --check docs/kernels.md --share 6

Exits with 1 when a kernel spills, lacks wgmma where it multiplies matrices on sm_90, or takes more than its
configuration claims. Runs with the Triton that is imported; put another one first on PYTHONPATH to look at that
one. --write replaces the table of that version in a Markdown file; --check compares with it: what it was made
from, and the figures. --share N compiles every N-th kernel, others whenever a kernel changes.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch

import megacog_kernels
from megacog_kernels.attention.variants import variants as attention_variants
from megacog_kernels.cross_entropy.calls import variants as cross_entropy_variants
from megacog_kernels.fp8.calls import variants as fp8_variants
from megacog_kernels.launch import Call
from megacog_kernels.mix.calls import variants as mix_variants
from megacog_kernels.norm.calls import variants as norm_variants

TYPES = {torch.bfloat16: "*bf16", torch.float16: "*fp16", torch.float32: "*fp32", torch.int32: "*i32"}
TYPES |= {torch.uint8: "*u8", torch.int64: "*i64", torch.float8_e4m3fn: "*fp8e4nv"}
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16}
TARGETS = [(arch, dtype) for arch in (80, 90, 100) for dtype in DTYPES]
SHARED_MEMORY = {80: 164 * 1024, 90: 228 * 1024, 100: 228 * 1024}
"""Bytes of one multiprocessor."""


@dataclass(frozen=True)
class Figures:
    """What one compiled kernel takes."""

    kernel: str
    arch: int
    dtype: str
    tiles: str
    """Queries x keys where there are tiles."""
    warps: int
    resident: int
    registers: int
    stack: int
    shared: int
    products: bool
    """Multiplies matrices."""
    wgmma: int
    """Asynchronous warpgroup matrix instructions in the PTX."""


def variants(dtype: torch.dtype, capability: int) -> dict[str, Call]:
    """All kernels by name; what compiles to the same code stands there once, under the first name."""
    named: dict[str, Call] = {}
    seen = set()
    for name, call in _all(dtype, capability):
        key = (call.kernel.__name__, str(_source(call)), str(call.configuration.options))
        if key not in seen:
            seen.add(key)
            assert name not in named, f"two kernels are called {name}"
            named[name] = call
    return named


def _all(dtype: torch.dtype, capability: int) -> Iterator[tuple[str, Call]]:
    yield from attention_variants(dtype, capability)
    yield from norm_variants(dtype)
    yield from mix_variants(dtype)
    yield from cross_entropy_variants(dtype)
    yield from fp8_variants(dtype, capability)


def _source(call: Call) -> tuple[dict[str, str], dict[str, Any], dict[tuple[int, ...], list]]:
    """Signature, constants and the alignment that real tensors have."""
    signature: dict[str, str] = {}
    divisible: dict[tuple[int, ...], list] = {}
    constants = dict(call.constants)
    for index, name in enumerate(call.kernel.arg_names):
        value = call.arguments.get(name)
        stride = name.endswith(("_batch", "_row", "_head"))
        if name in constants:
            signature[name] = "constexpr"
        elif isinstance(value, torch.Tensor):
            signature[name] = TYPES[value.dtype]
        else:
            signature[name] = "fp32" if isinstance(value, float) else "i32"
        if isinstance(value, torch.Tensor) or (stride and value is not None and value % 16 == 0):
            divisible[(index,)] = [["tt.divisibility", 16]]
    return signature, constants, divisible


def compiled(call: Call, arch: int) -> Any:
    """The call's kernel for one architecture."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    signature, constants, divisible = _source(call)
    source = ASTSource(call.kernel, signature, constexprs=constants, attrs=divisible)
    return triton.compile(source, target=GPUTarget("cuda", arch, 32), options=call.configuration.options)


def figures(job: tuple[int, str, str]) -> Figures:
    """Figures of one kernel for one architecture and dtype."""
    arch, dtype, name = job
    call = variants(DTYPES[dtype], arch // 10)[name]
    kernel, cut = compiled(call, arch), call.configuration
    registers, stack = _resources(kernel.asm["cubin"])
    tiles = f"{call.constants['TILE_Q']}x{call.constants['TILE_K']} " if "TILE_Q" in call.constants else ""
    return Figures(
        name, arch, dtype, tiles, cut.num_warps, cut.resident, registers, stack, kernel.metadata.shared,
        "tt.dot" in kernel.asm["ttir"], kernel.asm["ptx"].count("wgmma.mma_async"),
    )  # fmt: skip


def _resources(cubin: bytes) -> tuple[int, int]:
    """Registers per thread and bytes of stack."""
    import triton

    tool = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        text = subprocess.run([tool, "-res-usage", file.name], check=True, capture_output=True, text=True).stdout
    found = re.search(r"REG:(\d+) STACK:(\d+)", text)
    assert found is not None, text
    return int(found[1]), int(found[2])


def faults(row: Figures) -> list[str]:
    """What breaks the rules of docs/kernels.md."""
    found = []
    if row.stack:
        found.append(f"spills ({row.stack} bytes of stack)")
    if row.arch == 90 and row.products and row.wgmma == 0:
        found.append("no wgmma")
    if row.registers * row.warps * 32 * row.resident > 65536:
        found.append(f"{row.registers} registers for less than {row.resident} programs per multiprocessor")
    if row.resident * (row.shared + 1024) > SHARED_MEMORY[row.arch]:
        found.append(f"{row.shared} bytes shared for less than {row.resident} programs per multiprocessor")
    return [f"{row.kernel}, sm_{row.arch} {row.dtype}: {fault}" for fault in found]


def fingerprint() -> str:
    """Of all that the figures depend on: the sources of the kernels, and what they are compiled with."""
    digest = hashlib.sha256()
    for path in sorted(Path(megacog_kernels.__file__).parent.rglob("*.py")):
        source = path.read_bytes()
        if b"@triton.jit" in source:
            digest.update(source)
    for arch, dtype in TARGETS:
        for name, call in variants(DTYPES[dtype], arch // 10).items():
            digest.update(repr((arch, dtype, name, _source(call), call.configuration.options)).encode())
    return digest.hexdigest()[:16]


def cell(row: Figures) -> str:
    """Tiles, warps, resident programs: registers, shared memory in KiB."""
    text = f"{row.tiles}w{row.warps} x{row.resident}: {row.registers}, {row.shared / 1024:.0f} K"
    return text + (f", **stack {row.stack}**" if row.stack else "")


def table(rows: list[Figures]) -> str:
    """A Markdown line per kernel; one cell for both dtypes where they agree."""
    archs = sorted({row.arch for row in rows})
    cells: dict[str, dict[tuple[int, str], str]] = {}
    for row in rows:
        cells.setdefault(row.kernel, {})[(row.arch, row.dtype)] = cell(row)
    lines = [f"| kernel | {' | '.join(f'sm_{arch}' for arch in archs)} |", f"|---|{'---|' * len(archs)}"]
    for kernel, by in cells.items():
        texts = (_joined({dtype: by[arch, dtype] for dtype in DTYPES if (arch, dtype) in by}) for arch in archs)
        lines.append(f"| {kernel} | {' | '.join(texts)} |")
    return "\n".join(lines)


def _joined(by_dtype: dict[str, str]) -> str:
    if len(set(by_dtype.values())) == 1 and len(by_dtype) == len(DTYPES):
        return next(iter(by_dtype.values()))
    return "; ".join(f"{dtype} {text}" for dtype, text in by_dtype.items())


def made_from() -> str:
    """The line that says what a table was made from."""
    return f"Made from kernels {fingerprint()}."


def split(path: Path) -> tuple[str, str, str, str]:
    """A Markdown file around the imported Triton's table: what comes before, heading, section, what follows."""
    import triton

    heading = f"### Triton {triton.__version__}\n"
    before, _, after = path.read_text(encoding="utf-8").partition(heading)
    following = re.search(r"^##+ ", after, flags=re.MULTILINE)
    end = following.start() if following else len(after)
    return before, heading, after[:end], after[end:]


def write(path: Path, rows: list[Figures]) -> None:
    """Replace the imported Triton's table in a Markdown file, or append it."""
    before, heading, _, rest = split(path)
    body = f"{heading}\n{made_from()}\n\n{table(rows)}\n"
    path.write_text(f"{before.rstrip()}\n\n{body}" + (f"\n{rest}" if rest else ""), encoding="utf-8")


def differences(path: Path, rows: list[Figures]) -> list[str]:
    """Where a Markdown file's table of the imported Triton differs from what was compiled just now."""
    _, heading, body, _ = split(path)
    where = f"{path}, {heading.strip('# ').strip()}"
    if made_from() not in body:
        return [f"{where}: the kernels have changed since; make it again with --write"]
    lines = [[text.strip() for text in line.split("|")[1:-1]] for line in body.splitlines() if line.startswith("| ")]
    documented = {name: dict(zip(lines[0][1:], cells, strict=True)) for name, *cells in lines[1:]}
    found = []
    for row in rows:
        text = documented.get(row.kernel, {}).get(f"sm_{row.arch}", "nothing")
        parts = dict(part.split(" ", 1) for part in text.split("; ")) if text.startswith(tuple(DTYPES)) else {}
        if parts.get(row.dtype, text) != cell(row):
            found.append(f"{where}: {row.kernel}, sm_{row.arch} {row.dtype}: {text}; compiled just now: {cell(row)}")
    return found


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    names = [f"sm_{arch}:{dtype}" for arch, dtype in TARGETS]
    parser.add_argument("--target", nargs="+", default=names, choices=names)
    parser.add_argument("--match", default="", help="part of a kernel's name")
    parser.add_argument("--share", type=int, default=1, metavar="N", help="only every N-th kernel")
    parser.add_argument("--json", action="store_true", help="one JSON object a line instead of a table")
    parser.add_argument("--write", type=Path, metavar="FILE", help="put the table into this Markdown file")
    parser.add_argument("--check", type=Path, metavar="FILE", help="compare with the table in this Markdown file")
    args = parser.parse_args()
    chosen = [target for target, name in zip(TARGETS, names, strict=True) if name in args.target]
    jobs = [(arch, dtype, name) for arch, dtype in chosen for name in variants(DTYPES[dtype], arch // 10)]
    jobs = [job for job in jobs if args.match in job[2]][int(fingerprint(), 16) % args.share :: args.share]
    rows = []
    with ProcessPoolExecutor(len(os.sched_getaffinity(0)), mp_context=get_context("spawn")) as pool:
        for row in pool.map(figures, jobs, chunksize=8):
            rows.append(row)
            if args.json:
                print(json.dumps(asdict(row)), flush=True)
    found = [fault for row in rows for fault in faults(row)]
    if args.check:
        found += differences(args.check, rows)
    elif args.write:
        write(args.write, rows)
    elif not args.json:
        print(table(rows))
    print("\n".join(found), file=sys.stderr)
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main())
