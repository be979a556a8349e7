"""Compiles attention kernels ahead of time, without a GPU, and prints registers, spills and shared memory.

    python kernels/benchmarks/compile_attention.py [--arch 80 90 100] [--match TEXT] [--json]

Runs with the Triton that is imported; put another one first on PYTHONPATH to look at that one.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import subprocess
import tempfile
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from megacog_kernels.attention.calls import Call, Inputs, backward_key_call, backward_query_call, forward_call
from megacog_kernels.attention.configurations import configurations
from megacog_kernels.grid import MaskSpec, Order, Space, VideoGrid

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


def calls(mask: MaskSpec, dtype: torch.dtype, head_dim: int) -> Iterator[tuple[str, Call]]:
    """Every launch of a forward and a backward pass."""
    given = inputs(mask, dtype, head_dim)
    out = torch.empty(given.q.shape, dtype=dtype, device="meta")
    lse = torch.empty(1, given.q.shape[2], given.q.shape[1], device="meta")
    chosen = configurations(head_dim, dtype, mask.space.kind == "full" and mask.order != MIXED)
    yield "forward", forward_call(given, out, lse, chosen.forward)
    yield "grad q", backward_query_call(given, out, out, lse, lse, out, chosen.query)
    yield "grad k, v", backward_key_call(given, out, lse, lse, out, out, chosen.key, text=False)
    yield "grad text k, v", backward_key_call(given, out, lse, lse, out[:, :64], out[:, :64], chosen.key, text=True)


def compiled(call: Call, arch: int) -> Any:
    """The call's kernel for one architecture, with the alignment that real tensors have."""
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
    for name, call in calls(MASKS[mask], DTYPES[dtype], head_dim):
        repeated = name == "grad text k, v" and mask not in ("full", "window")  # the mask plays no part
        if repeated or only not in f"{name} {mask} {dtype} d{head_dim}":
            continue
        kernel, cut = compiled(call, arch), call.configuration
        registers, stack = _resources(kernel.asm["cubin"])
        rows.append(
            Figures(
                arch, dtype, head_dim, name, mask, f"{cut.tile_q}x{cut.tile_k}", cut.num_warps,
                registers, stack, kernel.metadata.shared, kernel.asm["ptx"].count("wgmma.mma_async"),
            )
        )  # fmt: skip
    return rows


def _resources(cubin: bytes) -> tuple[int, int]:
    """Registers per thread and bytes of stack."""
    tool = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        text = subprocess.run([tool, "-res-usage", file.name], check=True, capture_output=True, text=True).stdout
    found = re.search(r"REG:(\d+) STACK:(\d+)", text)
    assert found is not None, text
    return int(found[1]), int(found[2])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--arch", type=int, nargs="+", default=[80, 90, 100])
    parser.add_argument("--match", default="", help="part of 'kernel mask dtype dHEAD_DIM'")
    parser.add_argument("--json", action="store_true", help="one JSON object a line")
    args = parser.parse_args()
    jobs = [(a, t, d, m) for a in args.arch for t in DTYPES for d in (64, 128) for m in MASKS]
    with ProcessPoolExecutor(len(os.sched_getaffinity(0))) as pool:
        for rows in pool.map(partial(figures, only=args.match), jobs):
            for row in rows:
                text = " ".join(f"{name}={value}" for name, value in asdict(row).items())
                print(json.dumps(asdict(row)) if args.json else text, flush=True)


if __name__ == "__main__":
    main()
