"""Compiles attention kernels ahead of time, without a GPU, and prints registers and shared memory (docs/kernels.md).

    python kernels/benchmarks/compile_attention.py [--arch 80 90 100] [--match TEXT] [--json]

Exits with 1 when a kernel spills, lacks wgmma on sm_90, or takes more than its configuration claims. Runs with
the Triton that is imported; put another one first on PYTHONPATH to look at that one.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass
from functools import partial
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch

from megacog_kernels.attention.calls import Inputs, backward_key_call, backward_query_call, forward_call
from megacog_kernels.attention.configurations import configurations
from megacog_kernels.grid import MaskSpec, Order, Space, VideoGrid
from megacog_kernels.launch import Call

TYPES = {torch.bfloat16: "*bf16", torch.float16: "*fp16", torch.float32: "*fp32", torch.int32: "*i32"}
TYPES |= {torch.uint8: "*u8"}
MIXED = Order((0, 0, 0), (True, False, True))
"""An order that `point` and `last` do not decide."""
MASKS = {
    "full": MaskSpec(Order.sequential(3), Space()),
    "full, rows": MaskSpec(Order.interpolation(3), Space()),
    "frame": MaskSpec(Order.sequential(3), Space("frame")),
    "window": MaskSpec(Order.interpolation(3), Space("shifted_window", (10, 10))),
    "local": MaskSpec(Order.sequential(3), Space("local3d", (9, 9))),
    "window, mixed": MaskSpec(MIXED, Space("shifted_window", (10, 10))),
    "local, mixed": MaskSpec(MIXED, Space("local3d", (9, 9))),
}
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16}
TARGETS = ((80, "bf16"), (90, "bf16"), (90, "fp16"), (100, "bf16"))
SHARED_MEMORY = {80: 164 * 1024, 90: 228 * 1024, 100: 228 * 1024}
"""Bytes of one multiprocessor."""


@dataclass(frozen=True)
class Figures:
    """What one compiled kernel takes."""

    arch: int
    dtype: str
    head_dim: int
    kernel: str
    mask: str
    tiles: str
    warps: int
    resident: int
    registers: int
    stack: int
    shared: int
    wgmma: int
    """Asynchronous warpgroup matrix instructions in the PTX."""


def inputs(mask: MaskSpec, dtype: torch.dtype, head_dim: int) -> Inputs:
    """Tensors without storage, strided as views of a fused qkv."""
    grid, heads = VideoGrid(3, 20, 20), 2

    def fused(rows: int) -> tuple[torch.Tensor, ...]:
        qkv = torch.empty(1, rows, 3 * heads * head_dim, dtype=dtype, device="meta")
        return tuple(part.unflatten(-1, (heads, head_dim)) for part in qkv.chunk(3, dim=-1))

    (q, k, v), (_, text_k, text_v) = fused(grid.tokens), fused(64)
    valid = torch.empty(1, 64, dtype=torch.bool, device="meta")
    return Inputs(q, k, v, text_k, text_v, valid, mask, grid, head_dim**-0.5)


def calls(mask: MaskSpec, dtype: torch.dtype, head_dim: int, arch: int) -> Iterator[tuple[str, Call]]:
    """Every launch of a forward and a backward pass."""
    given = inputs(mask, dtype, head_dim)
    out = torch.empty(given.q.shape, dtype=dtype, device="meta")
    lse = torch.empty(1, given.q.shape[2], given.q.shape[1], device="meta")
    dense = mask.space.kind == "full" and mask.order != MIXED
    chosen = configurations(head_dim, dtype, dense, arch // 10)
    yield "forward", forward_call(given, out, lse, chosen.forward)
    yield "grad q", backward_query_call(given, out, out, lse, lse, out, chosen.query)
    yield "grad k, v", backward_key_call(given, out, lse, lse, out, out, chosen.key, text=False)
    yield "grad text k, v", backward_key_call(given, out, lse, lse, out[:, :64], out[:, :64], chosen.key, text=True)


def compiled(call: Call, arch: int) -> Any:
    """The call's kernel for one architecture, with the alignment that real tensors have."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    signature: dict[str, str] = {}
    divisible: dict[tuple[int], list] = {}
    for index, name in enumerate(call.kernel.arg_names):
        value = call.arguments.get(name)
        if name in call.constants:
            signature[name] = "constexpr"
        elif isinstance(value, torch.Tensor):
            signature[name] = TYPES[value.dtype]
        else:
            signature[name] = "fp32" if isinstance(value, float) else "i32"
        stride = name.endswith(("_batch", "_row", "_head"))
        if isinstance(value, torch.Tensor) or (stride and value is not None and value % 16 == 0):
            divisible[(index,)] = [["tt.divisibility", 16]]
    source = ASTSource(call.kernel, signature, constexprs=call.constants, attrs=divisible)
    return triton.compile(source, target=GPUTarget("cuda", arch, 32), options=call.configuration.options)


def figures(job: tuple[int, str, int, str], only: str = "") -> list[Figures]:
    """Figures of all kernels of one architecture, dtype, head dim and mask."""
    arch, dtype, head_dim, mask = job
    rows = []
    for name, call in calls(MASKS[mask], DTYPES[dtype], head_dim, arch):
        repeated = name == "grad text k, v" and mask not in ("full", "window")  # the mask plays no part
        if repeated or only not in f"{name} {mask} {dtype} d{head_dim}":
            continue
        kernel, cut = compiled(call, arch), call.configuration
        registers, stack = _resources(kernel.asm["cubin"])
        rows.append(
            Figures(
                arch, dtype, head_dim, name, mask, f"{cut.tile_q}x{cut.tile_k}", cut.num_warps,
                cut.resident, registers, stack, kernel.metadata.shared, kernel.asm["ptx"].count("wgmma.mma_async"),
            )
        )  # fmt: skip
    return rows


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
    if row.arch == 90 and row.wgmma == 0:
        found.append("no wgmma")
    if row.registers * row.warps * 32 * row.resident > 65536:
        found.append(f"registers for less than {row.resident} programs per multiprocessor")
    if row.resident * (row.shared + 1024) > SHARED_MEMORY[row.arch]:
        found.append(f"shared memory for less than {row.resident} programs per multiprocessor")
    return [f"{row.kernel}, {row.mask}, d{row.head_dim}, {row.dtype}, sm_{row.arch}: {fault}" for fault in found]


def table(rows: list[Figures]) -> str:
    """Tiles, warps, resident programs: registers and shared memory (KiB), as Markdown, a line per kernel."""
    columns = [f"sm_{arch} {dtype}" for arch, dtype in TARGETS]
    lines = [
        f"| kernel | mask | d | {' | '.join(columns)} |",
        f"|---|---|---|{'---|' * len(columns)}",
    ]
    cells: dict[str, dict[str, str]] = {}
    for row in rows:
        head = f"{row.kernel} | {row.mask} | {row.head_dim}"
        cell = f"{row.tiles} w{row.warps} x{row.resident}: {row.registers}, {row.shared / 1024:.0f} K"
        cell += f", **stack {row.stack}**" if row.stack else ""
        cells.setdefault(head, {})[f"sm_{row.arch} {row.dtype}"] = cell
    lines += [f"| {head} | {' | '.join(by.get(column, '') for column in columns)} |" for head, by in cells.items()]
    return "\n".join(lines)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--arch", type=int, nargs="+", default=[80, 90, 100])
    parser.add_argument("--match", default="", help="part of 'kernel mask dtype dHEAD_DIM'")
    parser.add_argument("--json", action="store_true", help="one JSON object a line instead of a table")
    args = parser.parse_args()
    jobs = [(arch, dtype, d, mask) for arch, dtype in TARGETS if arch in args.arch for d in (64, 128) for mask in MASKS]
    rows = []
    with ProcessPoolExecutor(len(os.sched_getaffinity(0)), mp_context=get_context("spawn")) as pool:
        for part in pool.map(partial(figures, only=args.match), jobs):
            rows += part
            for row in part if args.json else []:
                print(json.dumps(asdict(row)), flush=True)
    if not args.json:
        print(table(rows))
    found = [fault for row in rows for fault in faults(row)]
    print("\n".join(found), file=sys.stderr)
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main())
