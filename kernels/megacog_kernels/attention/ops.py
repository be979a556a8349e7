"""Public attention over text + video grids, for eager and compiled models, with gradients.

Legend: B batch, L text length, T frames, P cells of a frame, F = T * P, N heads, M key/value heads
(a divisor of N), D head dim, R query rows.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple, get_args

import torch
from torch import Tensor

from megacog_kernels.attention.dispatch import choose
from megacog_kernels.attention.reference import grouped_attention, grouped_text_attention, masked_decode
from megacog_kernels.attention.reference_gradient import ReferenceAttention
from megacog_kernels.dispatch import Implementation
from megacog_kernels.grid import MaskSpec, Order, Space, SpaceKind, VideoGrid
from megacog_kernels.keep import kept

_KINDS = get_args(SpaceKind)


class AttentionOutput(NamedTuple):
    """What `attention` returns; None where not asked for."""

    frames: Tensor
    """[B, F, N, D]."""
    text: Tensor | None
    """[B, L, N, D], of text_q."""
    lse: Tensor | None
    """fp32 [B, N, F]: log-sum-exp of the scaled scores of every frame query, without gradient."""


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: MaskSpec,
    grid: VideoGrid,
    *,
    text_k: Tensor | None = None,
    text_v: Tensor | None = None,
    text_valid: Tensor | None = None,
    text_q: Tensor | None = None,
    scale: float | None = None,
    text_bias: float = 0.0,
    query_frames: tuple[int, ...] | None = None,
    return_lse: bool = False,
    deterministic: bool = True,
    implementation: Implementation = "auto",
) -> AttentionOutput:
    """One softmax of every frame query over the valid text keys and the frame keys that the mask shows it.

    Only gradients that are needed are computed.

    Args:
        q: [B, F, N, D], F = grid.tokens in frame-major raster order. As all of q, k, v and text: any
            strides with channels adjacent, such as thirds of a fused projection.
        k, v: [B, F, M, D].
        mask, grid: The rule of `megacog_kernels.grid`.
        text_k, text_v: [B, L, M, D]; None = no text.
        text_valid: bool [B, L], False on padding; None = all valid.
        text_q: [B, L, N, D], queries of the text, which see the valid text keys only; None = frame
            queries only.
        scale: Factor of the scores; None = 1 / sqrt(D).
        text_bias: Added to the scaled scores of frame queries and text keys; not with gradients.
        query_frames: Frames whose rows q holds, ascending, where not all ask; outputs then have rows as q has.
        return_lse: Also the log-sum-exp.
        deterministic: Triton's gradients are bitwise the same in every run; False lets that of q be summed
            in any order, with less work.
        implementation: `auto` runs Triton where it can; `triton` insists on it.

    Raises:
        ValueError: An argument does not fit, by name and shape, or Triton cannot run as asked.
    """
    if text_k is None and text_v is None and text_q is None:
        text_k = text_v = k[:, :0]
    if text_k is None or text_v is None:
        raise ValueError("text_k and text_v go together, and text_q needs both")
    if text_valid is None:
        text_valid = torch.ones(text_k.shape[:2], dtype=torch.bool, device=text_k.device)
    _check(q, k, v, mask, grid, text_k, text_v, text_valid, text_q, query_frames)
    scale = _scale(scale, q)
    differentiated = torch.is_grad_enabled() and any(part.requires_grad for part in (q, k, v, text_k, text_v))
    if text_bias and differentiated:
        raise ValueError(f"text_bias is {text_bias}, which gives no gradients; call it under torch.no_grad()")
    text = None
    if text_q is not None:
        text = text_attention(text_q, text_k, text_v, text_valid, scale=scale, implementation=implementation)
    if grid.tokens == 0:
        lse = q.new_empty(q.shape[0], q.shape[2], 0, dtype=torch.float32) if return_lse else None
        return AttentionOutput(q.clone(), text, lse)
    if choose(implementation, q.device, q.dtype, q.shape[-1]) == "reference":
        if differentiated and not return_lse and not torch.compiler.is_compiling():  # which plan memory themselves
            out = ReferenceAttention.apply(q, k, v, text_k, text_v, text_valid, mask, grid, scale, query_frames)
            return AttentionOutput(out, text, None)
        out, lse = grouped_attention(
            q, k, v, text_k, text_v, text_valid, mask, grid, scale, text_bias, return_lse, query_frames
        )
        return AttentionOutput(out, text, lse)
    _check_strides(q=q, k=k, v=v, text_k=text_k, text_v=text_v)
    code, text_valid = _encode(mask, grid, query_frames), text_valid.contiguous()
    if text_bias:
        out, lse2 = _favor_text(q, k, v, text_k, text_v, text_valid, code, scale, text_bias)
    else:
        out, lse2 = torch.ops.megacog.attend(q, k, v, text_k, text_v, text_valid, code, scale, deterministic)
    return AttentionOutput(out, text, lse2.detach() * math.log(2) if return_lse else None)


def _favor_text(
    q: Tensor, k: Tensor, v: Tensor, text_k: Tensor, text_v: Tensor, text_valid: Tensor, code: Sequence[int],
    scale: float, text_bias: float,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """What `megacog::attend` gives, text keys weighing exp(text_bias) as much: text and frames alone, then joined."""
    no_text = (part[:, :0] for part in (text_k, text_v, text_valid))
    frames, frames_lse2 = torch.ops.megacog.attend(q, k, v, *no_text, code, scale, True)
    text, text_lse2 = torch.ops.megacog.attend(q, None, None, text_k, text_v, text_valid, [], scale, True)
    text_lse2 = text_lse2 + text_bias * math.log2(math.e)
    lse2 = torch.logaddexp2(frames_lse2, text_lse2)
    share = torch.exp2(text_lse2 - lse2).transpose(1, 2)[..., None]  # [B, F, N, 1]
    return torch.lerp(frames.float(), text.float(), share).to(q.dtype), lse2


def text_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    valid: Tensor,
    *,
    scale: float | None = None,
    implementation: Implementation = "auto",
) -> Tensor:
    """Bidirectional attention among the valid text tokens: [B, L, N, D].

    Args:
        q: [B, L, N, D]; as k and v with any strides with channels adjacent.
        k, v: [B, L, M, D].
        valid: bool [B, L], False on padding; a sample without valid text gets zeros.
        scale: Factor of the scores; None = 1 / sqrt(D).
        implementation: As for `attention`.

    Raises:
        ValueError: An argument does not fit, by name and shape, or Triton cannot run as asked.
    """
    if q.dim() != 4:
        raise ValueError(f"q {tuple(q.shape)} is not [B, L, N, D]")
    B, L, N, D = q.shape
    keys = (B, L, _key_heads(q, k), D)
    _check_shapes(q, k=(k, keys), v=(v, keys), valid=(valid, (B, L)))
    scale = _scale(scale, q)
    if L == 0:
        return q.clone()
    if choose(implementation, q.device, q.dtype, D) == "reference":
        return grouped_text_attention(q, k, v, valid, scale)
    _check_strides(q=q, k=k, v=v)
    out: Tensor = torch.ops.megacog.attend(q, None, None, k, v, valid.contiguous(), [], scale, True)[0]
    return out


def decode_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    text_valid: Tensor,
    tokens: Tensor,
    mask: MaskSpec,
    grid: VideoGrid,
    *,
    scale: float | None = None,
    text_bias: float = 0.0,
    splits: int = 8,
    implementation: Implementation = "auto",
) -> Tensor:
    """Attention of a few new tokens over static buffers that hold the text, then a slot per frame token.

    The new tokens' own keys and values are in the buffers already. Nothing depends on the values of
    `tokens` on the host, so a call can be captured in a CUDA graph, after one call outside of it with the same
    mask, grid and shapes. No gradients.

    Args:
        q: [B, R, N, D].
        k, v: [B, L + F, M, D], any strides with channels adjacent.
        text_valid: bool [B, L], L may be 0.
        tokens: int32 [B, R] on the device of q: frame * P + cell of every row of q.
        mask, grid: The rule of `megacog_kernels.grid`.
        scale: Factor of the scores; None = 1 / sqrt(D).
        text_bias: Added to the scaled scores of text keys: each weighs exp(text_bias) times as much.
        splits: Programs that share the keys of one token and head, a power of 2.

    Returns:
        [B, R, N, D].

    Raises:
        ValueError: An argument does not fit, by name and shape, or Triton cannot run as asked.
    """
    _check_decode(q, k, v, text_valid, tokens, grid, splits)
    scale = _scale(scale, q)
    if q.numel() == 0:
        return torch.empty_like(q)
    if choose(implementation, q.device, q.dtype, q.shape[-1]) == "reference":
        return masked_decode(q, k, v, text_valid, tokens, mask, grid, scale, text_bias)
    _check_strides(q=q, k=k, v=v)
    code, text_valid = _encode(mask, grid), text_valid.contiguous()
    out: Tensor = torch.ops.megacog.decode_attend(q, k, v, text_valid, tokens, code, scale, text_bias, splits)
    return out


def _check_decode(
    q: Tensor, k: Tensor, v: Tensor, text_valid: Tensor, tokens: Tensor, grid: VideoGrid, splits: int
) -> None:
    if q.dim() != 4 or text_valid.dim() != 2:
        raise ValueError(f"q {tuple(q.shape)} is not [B, R, N, D], or text_valid {tuple(text_valid.shape)} not [B, L]")
    (B, R, _, D), L = q.shape, text_valid.shape[1]
    buffer = (B, L + grid.tokens, _key_heads(q, k), D)
    _check_shapes(q, k=(k, buffer), v=(v, buffer), text_valid=(text_valid, (B, L)), tokens=(tokens, (B, R)))
    if splits < 1 or splits & (splits - 1):
        raise ValueError(f"splits is {splits}, not a power of 2")


def _check(
    q: Tensor, k: Tensor, v: Tensor, mask: MaskSpec, grid: VideoGrid, text_k: Tensor, text_v: Tensor,
    text_valid: Tensor, text_q: Tensor | None, query_frames: tuple[int, ...] | None,
) -> None:  # fmt: skip
    if q.dim() != 4:
        raise ValueError(f"q {tuple(q.shape)} is not [B, F, N, D]")
    if len(mask.order.level) != grid.frames:
        raise ValueError(f"mask: the order covers {len(mask.order.level)} frames, the grid has {grid.frames}")
    (B, R, N, D), F = q.shape, grid.tokens
    if query_frames is None and F != R:
        raise ValueError(f"q {tuple(q.shape)} has {R} rows, the grid {grid} has {F} tokens")
    if query_frames is not None:
        if not query_frames or sorted(set(query_frames) & set(range(grid.frames))) != list(query_frames):
            raise ValueError(f"query_frames {query_frames} are not ascending frames of the grid {grid}")
        if len(query_frames) * grid.cells != R:
            raise ValueError(f"q {tuple(q.shape)} has {R} rows, {len(query_frames)} frames of {grid} have others")
    M, L = _key_heads(q, k), text_k.shape[1] if text_k.dim() == 4 else 0
    keys, text = (B, F, M, D), (B, L, M, D)
    queries = {} if text_q is None else {"text_q": (text_q, (B, L, N, D))}
    _check_shapes(
        q, k=(k, keys), v=(v, keys), text_k=(text_k, text), text_v=(text_v, text), text_valid=(text_valid, (B, L)),
        **queries,
    )  # fmt: skip


def _scale(scale: float | None, q: Tensor) -> float:
    if scale is None:
        return 1 / math.sqrt(q.shape[-1])
    if not 0 < scale < math.inf:  # the kernels take the maximum of scores before they scale them
        raise ValueError(f"scale is {scale}, not positive and finite")
    return scale


def _key_heads(q: Tensor, k: Tensor) -> int:
    M, N = k.shape[2] if k.dim() == 4 else 0, q.shape[2]
    if M == 0 or N % M:
        raise ValueError(f"k {tuple(k.shape)} has {M} heads, which do not divide the {N} heads of q {tuple(q.shape)}")
    return M


_DTYPES = {"valid": torch.bool, "text_valid": torch.bool, "tokens": torch.int32}


def _check_shapes(q: Tensor, **expected: tuple[Tensor, tuple[int, ...]]) -> None:
    for name, (tensor, shape) in expected.items():
        dtype = _DTYPES.get(name, q.dtype)
        if tensor.shape != shape or tensor.dtype != dtype or tensor.device != q.device:
            got = f"{tuple(tensor.shape)} {tensor.dtype} on {tensor.device}"
            raise ValueError(f"{name} is {got}; {shape} {dtype} on {q.device} fits q {tuple(q.shape)}")


def _check_strides(**tensors: Tensor | None) -> None:
    for name, tensor in tensors.items():
        if tensor is None or tensor.numel() == 0:
            continue
        if tensor.stride(3) != 1:
            raise ValueError(f"{name} {tuple(tensor.shape)} has strides {tensor.stride()}: channels must be adjacent")


def _encode(mask: MaskSpec, grid: VideoGrid, queries: tuple[int, ...] | None = None) -> list[int]:
    """A mask, its grid and the frames that ask, as operators can take them."""
    space, asking = mask.space, queries or ()
    head = [len(asking), *asking, grid.frames, grid.height, grid.width, _KINDS.index(space.kind)]
    head += [*(space.window or (0, 0)), space.frames or 0, *space.shift]
    return [*head, *mask.order.level, *map(int, mask.order.open)]


def decode_mask(code: Sequence[int]) -> tuple[MaskSpec, VideoGrid, tuple[int, ...] | None]:
    """The mask and grid in an operator's argument, and the frames that ask (None = all)."""
    asking, rest = tuple(code[1 : 1 + code[0]]), code[1 + code[0] :]
    frames, height, width, kind, window_y, window_x, near, shift_y, shift_x, *order = rest
    window = (window_y, window_x) if window_y else None
    space = Space(_KINDS[kind], window, near or None, (shift_y, shift_x))
    is_open = tuple(map(bool, order[frames:]))
    return MaskSpec(Order(tuple(order[:frames]), is_open), space), VideoGrid(frames, height, width), asking or None


def _prepare(
    q: Tensor, k: Tensor | None, v: Tensor | None, text_k: Tensor, text_v: Tensor, text_valid: Tensor,
    code: Sequence[int], scale: float,
) -> tuple[Any, Any]:  # fmt: skip
    """The kernels' inputs and configurations. Imports Triton, which only this path needs."""
    from megacog_kernels.attention.calls import Inputs, text_rows
    from megacog_kernels.attention.configurations import configurations, is_dense

    mask, grid, queries = decode_mask(code) if code else (*text_rows(q.shape[1]), None)
    inputs = Inputs(q, k, v, text_k, text_v, text_valid, mask, grid, scale, queries)
    capability = torch.cuda.get_device_capability(q.device)[0] if q.device.type == "cuda" else 9
    return inputs, configurations(q.shape[3], q.dtype, bool(code) and is_dense(mask), capability)


@torch.library.custom_op("megacog::decode_attend", mutates_args=())
def _decode_attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    text_valid: Tensor,
    tokens: Tensor,
    code: Sequence[int],
    scale: float,
    text_bias: float,
    splits: int,
) -> Tensor:
    """[B, R, N, D], contiguous."""
    from megacog_kernels.attention.decode import decode

    return decode(q, k, v, text_valid, tokens, *decode_mask(code)[:2], scale, text_bias, splits)


@_decode_attend.register_fake
def _(
    q: Tensor, k: Any, v: Any, text_valid: Any, tokens: Any, code: Any, scale: Any, text_bias: Any, splits: Any
) -> Tensor:  # fmt: skip
    return q.new_empty(q.shape)


@torch.library.custom_op("megacog::attend", mutates_args=())
def _attend(
    q: Tensor,
    k: Tensor | None,
    v: Tensor | None,
    text_k: Tensor,
    text_v: Tensor,
    text_valid: Tensor,
    code: Sequence[int],
    scale: float,
    deterministic: bool,
) -> tuple[Tensor, Tensor]:
    """out [B, R, N, D] and log2-sum-exp2 fp32 [B, N, R]; without k and v the rows are text."""
    from megacog_kernels.attention.calls import run_forward

    out, lse = kept(lambda: run_forward(*_prepare(q, k, v, text_k, text_v, text_valid, code, scale)))
    return out, lse


@_attend.register_fake
def _(
    q: Tensor, k: Any, v: Any, text_k: Any, text_v: Any, text_valid: Any, code: Any, scale: Any, deterministic: Any
) -> Any:  # fmt: skip
    B, R, N, D = q.shape
    return kept(lambda: (q.new_empty(B, R, N, D), q.new_empty(B, N, R, dtype=torch.float32)))


@torch.library.custom_op("megacog::attend_backward", mutates_args=())
def _attend_backward(
    grad_out: Tensor,
    out: Tensor,
    lse: Tensor,
    q: Tensor,
    k: Tensor | None,
    v: Tensor | None,
    text_k: Tensor,
    text_v: Tensor,
    text_valid: Tensor,
    code: Sequence[int],
    scale: float,
    deterministic: bool,
    needed: Sequence[bool],
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients of q, k, v, text_k and text_v; `needed` for q, frames and text. Empty where not needed."""
    from megacog_kernels.attention.calls import Needed, run_backward

    inputs, chosen = _prepare(q, k, v, text_k, text_v, text_valid, code, scale)
    if grad_out.stride(3) != 1:
        grad_out = grad_out.contiguous()
    got = run_backward(inputs, out, lse, grad_out, Needed(*needed), chosen, deterministic)
    gradients = (got.q, got.frame_k, got.frame_v, got.text_k, got.text_v)
    first, second, third, fourth, fifth = (q.new_empty(0) if part is None else part for part in gradients)
    return first, second, third, fourth, fifth


@_attend_backward.register_fake
def _(
    grad_out: Any, out: Any, lse: Any, q: Tensor, k: Tensor | None, v: Tensor | None, text_k: Tensor, text_v: Tensor,
    text_valid: Any, code: Any, scale: Any, deterministic: Any, needed: Sequence[bool],
) -> Any:  # fmt: skip
    wanted = (needed[0], needed[1], needed[1], needed[2], needed[2])
    parts = zip((q, k, v, text_k, text_v), wanted, strict=True)
    return tuple(q.new_empty(part.shape if part is not None and want else 0) for part, want in parts)


def _save(ctx: Any, inputs: tuple, output: tuple) -> None:
    *tensors, ctx.code, ctx.scale, ctx.deterministic = inputs
    ctx.save_for_backward(*tensors, *output)


def _backward(ctx: Any, grad_out: Tensor, grad_lse: Tensor) -> tuple[Tensor | None, ...]:
    *tensors, out, lse = ctx.saved_tensors
    q, k, v, text_k, text_v = ctx.needs_input_grad[:5]
    needed = [q, k or v, text_k or text_v]
    options = (ctx.code, ctx.scale, ctx.deterministic, needed)
    gradients = torch.ops.megacog.attend_backward(grad_out, out, lse, *tensors, *options)
    wanted = zip(gradients, (q, k, v, text_k, text_v), strict=True)
    return (*(part if want else None for part, want in wanted), None, None, None, None)


_attend.register_autograd(_backward, setup_context=_save)
