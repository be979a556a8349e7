"""Attention over text + video grids in plain torch: the definition, and what CPUs run.

Shapes: B batch, L text length, T frames, P cells of a frame, F = T * P, N heads, M key heads, D head
dim, R rows of queries, K keys. Masked is masked: a key outside the mask has no weight, and a query
without any key gives zeros.
"""

from __future__ import annotations

from functools import lru_cache

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from megacog_kernels.grid import MaskSpec, VideoGrid, dense_mask, visible, visible_keys
from megacog_kernels.products import through_fp32


def video_attention(
    q_BFND: Tensor,
    k_BFND: Tensor,
    v_BFND: Tensor,
    text_k_BLND: Tensor,
    text_v_BLND: Tensor,
    text_valid_BL: Tensor,
    mask: MaskSpec,
    grid: VideoGrid,
    scale: float | None = None,
    text_bias: float = 0.0,
    queries: tuple[int, ...] | None = None,
) -> Tensor:
    """One softmax of every frame query over the valid text keys and its visible frame keys.

    Goes frame by frame over the frames that one sees, so most of what is masked is not computed.

    Args:
        q_BFND, k_BFND, v_BFND: Frame tokens, F = grid.tokens in frame-major raster order.
        text_k_BLND, text_v_BLND: Keys and values of the text.
        text_valid_BL: bool, False where the text is padding.
        mask: Order and space of `megacog_kernels.grid`.
        grid: The video grid.
        scale: Factor of the scores; None = 1 / sqrt(D).
        text_bias: Added to the scaled scores of text keys.
        queries: Frames whose rows q holds; None = all.

    Returns:
        As q.

    Raises:
        ValueError: The frame rows do not fit the grid.
    """
    asking = tuple(range(grid.frames)) if queries is None else queries
    if q_BFND.shape[1] != len(asking) * grid.cells or k_BFND.shape[1] != grid.tokens:
        raise ValueError(f"q has {q_BFND.shape[1]} and k {k_BFND.shape[1]} rows, the grid {grid} has {grid.tokens}")
    q_BPND, k_BPND, v_BPND = (rows.unflatten(1, (-1, grid.cells)).unbind(1) for rows in (q_BFND, k_BFND, v_BFND))
    masks, outputs = _frame_masks(mask, grid), []
    for index, frame in enumerate(asking):
        keys, allowed = masks[frame]
        allowed_PK = torch.from_numpy(allowed).to(q_BFND.device)
        k_BKND = torch.cat([text_k_BLND, *(k_BPND[key] for key in keys)], dim=1)
        v_BKND = torch.cat([text_v_BLND, *(v_BPND[key] for key in keys)], dim=1)
        allowed_BPK = _join(text_valid_BL, allowed_PK)
        added_BPK = _favor_text(allowed_BPK, text_k_BLND.shape[1], text_bias, k_BKND)
        outputs.append(_attend(q_BPND[index], k_BKND, v_BKND, added_BPK, scale))
    return torch.cat(outputs, dim=1)


def grouped_attention(
    q_BFND: Tensor, k_BFMD: Tensor, v_BFMD: Tensor, text_k_BLMD: Tensor, text_v_BLMD: Tensor, text_valid_BL: Tensor,
    mask: MaskSpec, grid: VideoGrid, scale: float, text_bias: float, return_lse: bool,
    queries: tuple[int, ...] | None = None,
) -> tuple[Tensor, Tensor | None]:  # fmt: skip
    """`video_attention` with N / M query heads per key head and a scale of the scores.

    Returns:
        [B, F, N, D]; log-sum-exp fp32 [B, N, F] if asked for.
    """
    group = q_BFND.shape[2] // k_BFMD.shape[2]
    k, v, text_k, text_v = (_repeat(part, group) for part in (k_BFMD, v_BFMD, text_k_BLMD, text_v_BLMD))
    frames = video_attention(q_BFND, k, v, text_k, text_v, text_valid_BL, mask, grid, scale, text_bias, queries)
    if not return_lse:
        return frames, None
    keys = torch.cat([text_k, k], dim=1)
    return frames, _log_sum_exp(q_BFND, keys, text_valid_BL, mask, grid, scale, text_bias, queries)


def grouped_text_attention(q_BLND: Tensor, k_BLMD: Tensor, v_BLMD: Tensor, valid_BL: Tensor, scale: float) -> Tensor:
    """Bidirectional attention among the valid text tokens: [B, L, N, D]."""
    group = q_BLND.shape[2] // k_BLMD.shape[2]
    return _attend(q_BLND, _repeat(k_BLMD, group), _repeat(v_BLMD, group), valid_BL[:, None, :], scale)


def _repeat(x_BRMD: Tensor, group: int) -> Tensor:
    return x_BRMD if group == 1 else x_BRMD.repeat_interleave(group, dim=2)


def _log_sum_exp(
    q_BFND: Tensor, k_BKND: Tensor, text_valid_BL: Tensor, mask: MaskSpec, grid: VideoGrid, scale: float,
    text_bias: float, queries: tuple[int, ...] | None,
) -> Tensor:  # fmt: skip
    with torch.no_grad():
        allowed = _dense_mask(mask, grid)
        if queries is not None:
            allowed = np.concatenate([allowed[f * grid.cells : (f + 1) * grid.cells] for f in queries])
        allowed_BFK = _join(text_valid_BL, torch.from_numpy(allowed).to(q_BFND.device))
        scores_BNFK = torch.einsum("bfnd,bknd->bnfk", q_BFND.float(), k_BKND.float()) * scale
        scores_BNFK[..., : text_valid_BL.shape[1]] += text_bias
        return scores_BNFK.masked_fill(~allowed_BFK[:, None], float("-inf")).logsumexp(dim=-1)


def masked_decode(
    q_BRND: Tensor, k_BSMD: Tensor, v_BSMD: Tensor, text_valid_BL: Tensor, tokens_BR: Tensor,
    mask: MaskSpec, grid: VideoGrid, scale: float, text_bias: float,
) -> Tensor:  # fmt: skip
    """New tokens against buffers of text and frame slots, S = L + F: [B, R, N, D].

    `text_bias` is added to the scaled scores of text keys. Reads the tokens on the host, and only keys that one of
    them sees: in place where these adjoin.
    """
    rows, L, device = tokens_BR.tolist(), text_valid_BL.shape[1], q_BRND.device
    tokens_U = tuple(sorted({token for row in rows for token in row}))
    places, seen = _seen(mask, grid, tokens_U, L)
    slots = places if isinstance(places, slice) else torch.from_numpy(places).to(device)
    group = q_BRND.shape[2] // k_BSMD.shape[2]
    k_BKND, v_BKND = (_repeat(_read(part, slots), group) for part in (k_BSMD, v_BSMD))
    allowed_BRK = None
    if seen is not None:
        index_BR = [[tokens_U.index(token) for token in row] for row in rows]
        allowed_BRK = torch.from_numpy(seen[index_BR]).to(device)
    if not text_valid_BL.all():
        text_B1K = F.pad(text_valid_BL, (0, k_BKND.shape[1] - L), value=True)[:, None]
        allowed_BRK = text_B1K if allowed_BRK is None else allowed_BRK & text_B1K
    return _attend(q_BRND, k_BKND, v_BKND, _favor_text(allowed_BRK, L, text_bias, k_BKND), scale)


def _read(x_BSMD: Tensor, slots: slice | Tensor) -> Tensor:
    if isinstance(slots, slice):
        return x_BSMD[:, slots]
    # Copied with heads first, which attention on a CPU reads twice as fast.
    return x_BSMD.transpose(1, 2).index_select(2, slots).transpose(1, 2)


@lru_cache(maxsize=8192)
def _seen(
    mask: MaskSpec, grid: VideoGrid, tokens: tuple[int, ...], text_length: int
) -> tuple[slice | np.ndarray, np.ndarray | None]:
    """Slots that any of the tokens sees, the text's first; which each sees: bool [U, K], None = all of them."""
    tokens_K, seen_UK = visible_keys(mask, grid, tokens)
    places = np.concatenate([np.arange(text_length), text_length + tokens_K])
    first, end = int(places[0]), int(places[0]) + len(places)
    slots = slice(first, end) if (places == np.arange(first, end)).all() else places
    if seen_UK.all():
        return slots, None
    text_UL = np.ones((len(tokens), text_length), dtype=bool)
    return slots, np.hstack([text_UL, seen_UK])


def _join(text_valid_BL: Tensor, allowed_RK: Tensor) -> Tensor:
    """The mask of text and frame keys together: bool [B, R, L + K]."""
    B, R = len(text_valid_BL), len(allowed_RK)
    return torch.cat([text_valid_BL[:, None].expand(B, R, -1), allowed_RK.expand(B, -1, -1)], dim=2)


def _favor_text(mask_BRK: Tensor | None, text_length: int, text_bias: float, k_BKND: Tensor) -> Tensor | None:
    """The mask of keys, text first, as what is added to their scores; the mask itself if nothing is."""
    if not text_bias:
        return mask_BRK
    added_11K = k_BKND.new_zeros(1, 1, k_BKND.shape[1])
    added_11K[..., :text_length] = text_bias
    return added_11K if mask_BRK is None else added_11K.masked_fill(~mask_BRK, float("-inf"))


def _attend(
    q_BRND: Tensor, k_BKND: Tensor, v_BKND: Tensor, allowed_BRK: Tensor | None, scale: float | None
) -> Tensor:
    """Masked attention; `allowed_BRK` is bool, or added to the scores."""
    mask = None if allowed_BRK is None else allowed_BRK[:, None]
    if through_fp32(q_BRND):
        added = mask if mask is None or mask.dtype == torch.bool else mask.float()
        q, k, v = (part.float().transpose(1, 2) for part in (q_BRND, k_BKND, v_BKND))
        out = F.scaled_dot_product_attention(q, k, v, attn_mask=added, scale=scale)
        return out.transpose(1, 2).to(q_BRND.dtype)
    out_BNRD = F.scaled_dot_product_attention(
        q_BRND.transpose(1, 2), k_BKND.transpose(1, 2), v_BKND.transpose(1, 2), attn_mask=mask, scale=scale
    )
    return out_BNRD.transpose(1, 2)


@lru_cache(maxsize=64)
def _dense_mask(mask: MaskSpec, grid: VideoGrid) -> np.ndarray:
    return dense_mask(mask, grid).copy()


@lru_cache(maxsize=64)
def _frame_masks(mask: MaskSpec, grid: VideoGrid) -> list[tuple[list[int], np.ndarray]]:
    """For every query frame: the frames of which it sees anything, and what of them: bool [P, K]."""
    frames, cells = np.arange(grid.frames), np.arange(grid.cells, dtype=np.int32)
    masks = []
    for query in frames:
        # One pair of frames at a time: over all at once, a large grid would take gigabytes.
        pairs = (visible(mask, grid, query, cells[:, None], key, cells) for key in frames)
        seen = {key: pair for key, pair in enumerate(pairs) if pair.any()}
        masks.append((list(seen), np.concatenate(list(seen.values()), axis=1)))
    return masks
