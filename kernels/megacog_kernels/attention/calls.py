"""Arguments of the attention kernels from tensors and plans: to run them, or to compile them ahead of time.

The kernels, and Triton with them, are imported by the calls that use them.

Legend: B batch, R query rows, F frame rows, L text length, N heads, M key heads (N / group), D head dim.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from megacog_kernels.attention.configurations import Configuration, Configurations
from megacog_kernels.attention.tables import Tables, tables
from megacog_kernels.grid import MaskSpec, Order, Space, VideoGrid
from megacog_kernels.launch import Call

LOG2_E = math.log2(math.e)


@dataclass(frozen=True)
class Inputs:
    """What a query attends to. Without frame keys the queries are text rows, which see the text only."""

    q: Tensor
    """[B, R, N, D]."""
    frame_k: Tensor | None
    """[B, F, M, D]."""
    frame_v: Tensor | None
    text_k: Tensor
    """[B, L, M, D], L may be 0."""
    text_v: Tensor
    text_valid: Tensor
    """bool [B, L], contiguous."""
    mask: MaskSpec
    grid: VideoGrid
    scale: float
    queries: tuple[int, ...] | None = None
    """Frames whose rows q holds; None = all."""

    def tables(self, configuration: Configuration) -> Tables:
        """The plan for these tile sizes on the device of q."""
        return tables(self.mask, self.grid, configuration.tile_q, configuration.tile_k, self.q.device, self.queries)


def text_rows(length: int) -> tuple[MaskSpec, VideoGrid]:
    """A mask and grid whose query tiles are `length` rows in order: for text queries."""
    return MaskSpec(Order((0,), (True,)), Space()), VideoGrid(1, 1, length)


def forward_call(inputs: Inputs, out: Tensor, lse: Tensor, configuration: Configuration) -> Call:
    """Fills out [B, R, N, D] and lse fp32 [B, N, R] (log2-sum-exp2)."""
    from megacog_kernels.attention.forward import attention_forward

    return _query_call(attention_forward, inputs, configuration, strided(out=out) | {"lse": lse}, {})


def backward_query_call(
    inputs: Inputs,
    out: Tensor,
    grad_out: Tensor,
    lse: Tensor,
    delta: Tensor,
    grad_q: Tensor | None,
    configuration: Configuration,
) -> Call:
    """Fills delta fp32 [B, N, R], and grad_q [B, R, N, D] unless None."""
    from megacog_kernels.attention.backward import attention_backward_query

    tensors = strided(out=out, grad_out=grad_out, grad_q=out if grad_q is None else grad_q)
    tensors |= {"lse": lse, "delta": delta, "softmax_scale": inputs.scale}
    constants = {"GRAD_Q": True} if grad_q is not None else {"GRAD_Q": False, "FRAMES": False, **_NO_MASK}
    return _query_call(attention_backward_query, inputs, configuration, tensors, constants)


def backward_key_call(
    inputs: Inputs,
    grad_out: Tensor,
    lse: Tensor,
    delta: Tensor,
    grad_k: Tensor,
    grad_v: Tensor,
    configuration: Configuration,
    text: bool,
    add_grad_q: Tensor | None = None,
) -> Call:
    """Fills the gradients of the text's or of the frames' keys and values; adds to add_grad_q [B, R, N, D] if given.

    add_grad_q is fp32, gets its parts in any order, and still lacks the factor `inputs.scale`.
    """
    from megacog_kernels.attention.backward import attention_backward_key

    table = inputs.tables(configuration)
    k, v = (inputs.text_k, inputs.text_v) if text else (inputs.frame_k, inputs.frame_v)
    assert k is not None and v is not None
    grad_q = lse.new_empty(1, 1, 1, 1) if add_grad_q is None else add_grad_q
    arguments = strided(q=inputs.q, k=k, v=v, grad_out=grad_out, grad_k=grad_k, grad_v=grad_v, grad_q=grad_q)
    arguments |= table.by_key | {"lse": lse, "delta": delta, "softmax_scale": inputs.scale}
    key_tiles = -(-k.shape[1] // configuration.tile_k) if text else len(table.plan.key.count)
    arguments |= {"key_count": table.key_count, "keys_total": k.shape[1]}
    arguments |= {"key_tiles": key_tiles, "key_heads": k.shape[2]}
    constants = {"TEXT": text, "GRAD_Q": add_grad_q is not None, "GROUP": inputs.q.shape[2] // k.shape[2]}
    constants |= _NO_MASK if text else {}
    return _call(attention_backward_key, inputs, configuration, arguments, constants, key_tiles * k.shape[2])


def _query_call(
    kernel: Any, inputs: Inputs, configuration: Configuration, tensors: dict[str, Any], constants: dict[str, Any]
) -> Call:
    """A call with a program per query tile and head."""
    table = inputs.tables(configuration)
    frame_k = inputs.text_k if inputs.frame_k is None else inputs.frame_k
    frame_v = inputs.text_v if inputs.frame_v is None else inputs.frame_v
    arguments = strided(q=inputs.q, k=frame_k, v=frame_v, text_k=inputs.text_k, text_v=inputs.text_v)
    arguments |= tensors | table.by_query
    arguments |= {"text_length": inputs.text_k.shape[1], "key_tokens": frame_k.shape[1]}
    heads = inputs.q.shape[2]
    arguments |= {"heads": heads, "group": heads // inputs.text_k.shape[2]}
    options = {"FRAMES": inputs.frame_k is not None} | constants
    return _call(kernel, inputs, configuration, arguments, options, len(table.plan.query.count) * heads)


def _call(
    kernel: Any,
    inputs: Inputs,
    configuration: Configuration,
    arguments: dict[str, Any],
    constants: dict[str, Any],
    programs: int,
) -> Call:
    """A call with the arguments that all kernels take; `programs` per sample."""
    (B, R, _, D), table = inputs.q.shape, inputs.tables(configuration)
    plan, box = table.plan, table.plan.box
    arguments |= {"text_valid": inputs.text_valid.view(torch.uint8), "words": table.words}
    arguments |= {"query_rows": table.query_rows, "query_count": table.query_count}
    arguments |= {"key_rows": table.key_rows, "key_words": table.key_words}
    arguments |= {"scale": inputs.scale * LOG2_E, "rows_total": R, "query_tiles": len(plan.query.count)}
    arguments |= {"box_constant": box.constant if box else 0, "box_guards": box.guards if box else 0}
    given = {"HEAD_DIM": D, "TILE_Q": configuration.tile_q, "TILE_K": configuration.tile_k}
    given |= {"CONTIGUOUS": table.contiguous, "BOX": box is not None, "SIMPLE": plan.simple}
    return Call(kernel, arguments, given | constants, programs * B, configuration)


_NO_MASK = {"BOX": False, "SIMPLE": True}
"""Constants of calls that evaluate no mask, so that they are compiled once for all masks."""


def strided(**named: Tensor) -> dict[str, Any]:
    """Tensors [B, rows, heads, D] and their strides, by the names of the kernels' arguments."""
    arguments: dict[str, Any] = {}
    for name, tensor in named.items():
        # Expanded dimensions have stride 0.
        span = sum((size - 1) * abs(step) for size, step in zip(tensor.shape[1:], tensor.stride()[1:], strict=True))
        if span >= 2**31:
            raise ValueError(f"{name} {tuple(tensor.shape)} spans {span} elements per sample, the kernels reach 2^31")
        arguments |= {name: tensor, f"{name}_batch": tensor.stride(0), f"{name}_row": tensor.stride(1)}
        arguments[f"{name}_head"] = tensor.stride(2)
    return arguments


def run_forward(inputs: Inputs, chosen: Configurations) -> tuple[Tensor, Tensor]:
    """out [B, R, N, D] in the dtype of q, and log2-sum-exp2 fp32 [B, N, R]."""
    B, R, N, D = inputs.q.shape
    out = inputs.q.new_empty(B, R, N, D)
    lse = inputs.q.new_empty(B, N, R, dtype=torch.float32)
    forward_call(inputs, out, lse, chosen.forward).run()
    return out, lse


@dataclass(frozen=True)
class Needed:
    """Which gradients a backward pass has to make."""

    q: bool = True
    frames: bool = True
    text: bool = True


@dataclass(frozen=True)
class Gradients:
    """None where not needed."""

    q: Tensor | None
    frame_k: Tensor | None
    frame_v: Tensor | None
    text_k: Tensor | None
    text_v: Tensor | None


def run_backward(
    inputs: Inputs,
    out: Tensor,
    lse: Tensor,
    grad_out: Tensor,
    needed: Needed,
    chosen: Configurations,
    deterministic: bool,
) -> Gradients:
    """The needed gradients, in the dtypes of their tensors.

    Where all are needed, not being deterministic saves two of seven matrix products and costs a buffer
    of q's shape in fp32.
    """

    def empty(like: Tensor | None, wanted: bool) -> Tensor | None:
        return torch.empty(like.shape, dtype=like.dtype, device=like.device) if wanted and like is not None else None

    delta = torch.empty_like(lse)
    everything = needed.q and needed.frames and (needed.text or inputs.text_k.shape[1] == 0)
    added = None if deterministic or not everything else inputs.q.new_zeros(inputs.q.shape, dtype=torch.float32)
    grad_q = empty(inputs.q, needed.q and added is None)
    backward_query_call(inputs, out, grad_out, lse, delta, grad_q, chosen.query).run()
    frame_k, frame_v = empty(inputs.frame_k, needed.frames), empty(inputs.frame_v, needed.frames)
    text_k, text_v = empty(inputs.text_k, needed.text), empty(inputs.text_v, needed.text)
    for text, grad_k, grad_v in ((True, text_k, text_v), (False, frame_k, frame_v)):
        if grad_k is not None and grad_v is not None:
            backward_key_call(inputs, grad_out, lse, delta, grad_k, grad_v, chosen.key, text, added).run()
    if added is not None:
        grad_q = (added * inputs.scale).to(inputs.q.dtype)
    return Gradients(grad_q, frame_k, frame_v, text_k, text_v)
