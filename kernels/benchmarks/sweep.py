"""Which tiles and warps are fastest on this GPU, kernel by kernel, for the cases of the attention benchmark.

    python launch/benchmark.py tiles [--json FILE] [--only TEXT]

Every candidate's result is compared with that of the configuration in use before it is timed. Times are medians
in ms; the fastest candidate of each kernel and the one in use are marked. Candidates that do not compile or run
out of shared memory are left out.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from itertools import product

import torch
from cases import Case, Tensors, cases, relative
from program import options, write_rows
from torch import Tensor

from megacog_kernels.attention.calls import Inputs, backward_key_call, backward_query_call, forward_call
from megacog_kernels.attention.configurations import Configuration, configurations, is_dense
from megacog_kernels.launch import Call

LIMIT = 2e-2


def candidates() -> Iterator[Configuration]:
    """Sensible tiles; registers are limited for as many resident programs as there are."""
    for (tile_q, tile_k), warps, stages in product(((64, 64), (64, 128), (128, 64), (128, 128)), (4, 8), (2, 3)):
        for resident in (1, 2, 3, 4):
            if 256 <= resident * warps * 32 <= 512:
                yield Configuration(tile_q, tile_k, warps, stages, resident)
    yield Configuration(32, 128, 8, 2, 1)


def kernels(case: Case, tensors: Tensors) -> dict[str, tuple[Configuration, Callable[[Configuration], tuple]]]:
    """For each kernel: the configuration in use, and a function from another one to its call and outputs."""
    q, k, v, text_k, text_v = (part.detach() for part in tensors.all)
    valid = torch.ones(text_k.shape[:2], dtype=torch.bool, device=q.device)
    inputs = Inputs(q, k, v, text_k, text_v, valid, case.mask, case.grid, case.head_dim**-0.5)
    capability = torch.cuda.get_device_capability()[0]
    chosen = configurations(case.head_dim, q.dtype, is_dense(case.mask), capability)
    out, lse = torch.empty_like(q, memory_format=torch.contiguous_format), q.new_empty(
        q.shape[0], q.shape[2], q.shape[1], dtype=torch.float32
    )
    delta = torch.empty_like(lse)
    forward_call(inputs, out, lse, chosen.forward).run()
    backward_query_call(inputs, out, tensors.grad_out, lse, delta, None, chosen.query).run()
    given = (inputs, tensors.grad_out, lse, delta)

    def forward(cut: Configuration) -> tuple[Call, Tensor]:
        made = torch.empty_like(out)
        return forward_call(inputs, made, torch.empty_like(lse), cut), made

    def query(cut: Configuration) -> tuple[Call, Tensor]:
        made = torch.empty_like(out)
        return backward_query_call(inputs, out, tensors.grad_out, lse, torch.empty_like(lse), made, cut), made

    def key(cut: Configuration) -> tuple[Call, Tensor]:
        made = torch.empty_like(out)
        return backward_key_call(*given, made, torch.empty_like(out), cut, text=False), made

    def key_and_query(cut: Configuration) -> tuple[Call, Tensor]:
        made, added = torch.empty_like(out), torch.zeros_like(out, dtype=torch.float32)
        return backward_key_call(*given, made, torch.empty_like(out), cut, False, added), made

    found = {"forward": (chosen.forward, forward)}
    if case.backward:
        found |= {"grad q": (chosen.query, query), "grad k, v": (chosen.key, key)}
        found["grad k, v and q"] = (chosen.key, key_and_query)
    return found


def measure(case: Case, tensors: Tensors) -> list[dict]:
    """A row per kernel and candidate, the fastest first."""
    rows = []
    for name, (used, make) in kernels(case, tensors).items():
        call, wanted = make(used)
        call.run()
        timed = [row for cut in dict.fromkeys([used, *candidates()]) if (row := _time(make, cut, wanted))]
        timed.sort(key=lambda row: row["ms"])
        for row in timed:
            row |= {"case": case.name, "kernel": name, "used": row["configuration"] == str(used)}
        print(f"{case.name}, {name}")
        for row in [row for index, row in enumerate(timed) if index < 3 or row["used"]]:
            print(f"  {row['ms']:8.3f} ms  {row['configuration']}{'  in use' if row['used'] else ''}", flush=True)
        rows += timed
    return rows


def _time(make: Callable[[Configuration], tuple], cut: Configuration, wanted: Tensor) -> dict | None:
    from triton.errors import TritonError
    from triton.testing import do_bench

    try:
        call, made = make(cut)
        call.run()
        torch.cuda.synchronize()
    except (RuntimeError, TritonError) as error:  # does not compile, or does not fit
        print(f"  left out: {cut}: {str(error).splitlines()[0]}", file=sys.stderr)
        return None
    error = relative(made, wanted)
    if not error <= LIMIT:
        sys.exit(f"error: {cut} gives other results: relative difference {error:.1e}")
    return {"configuration": str(cut), "ms": do_bench(call.run, warmup=5, rep=30, return_mode="median")}


def main() -> None:
    args = options(__doc__, checks=False)
    rows: list[dict] = []
    for case in cases():
        if args.only in case.name:
            rows += measure(case, Tensors.make(case, "cuda", torch.bfloat16))
    write_rows(args.json, rows)


if __name__ == "__main__":
    main()
