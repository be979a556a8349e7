"""Forward kernel: one program per query tile and head walks the text, then its full, then its partial key tiles.

Softmax runs online in fp32 with base-2 exponentials; scale and log2(e) are folded into one factor.
"""

from __future__ import annotations

import triton
import triton.language as tl

from megacog_kernels.attention.tile import (
    NOT_SPECIALIZED,
    load_rows,
    place,
    query_words,
    rows_of,
    sees,
    store_rows,
    text_tile,
    words_of,
)


@triton.jit
def _accumulate(scores, v, maximum, total, acc, scale):
    """One step of the online softmax: `scores` [TILE_Q, TILE_K] unscaled, -inf where masked."""
    new_maximum = tl.maximum(maximum, tl.max(scores, 1) * scale)
    weights = tl.exp2(scores * scale - new_maximum[:, None])
    decay = tl.exp2(maximum - new_maximum)
    acc = tl.dot(weights.to(v.dtype), v, acc * decay[:, None], input_precision="ieee")
    return new_maximum, total * decay + tl.sum(weights, 1), acc


@triton.jit(do_not_specialize=NOT_SPECIALIZED)
def attention_forward(
    q, k, v, text_k, text_v, text_valid, out, lse, order, query_rows, query_count, words, start, partial, end,
    visited, key_rows, key_words, q_batch, q_row, q_head, k_batch, k_row, k_head, v_batch, v_row, v_head,
    text_k_batch, text_k_row, text_k_head, text_v_batch, text_v_row, text_v_head, out_batch, out_row, out_head,
    scale, text_length, rows_total, key_tokens, query_tiles, heads, group, box_constant, box_guards,
    HEAD_DIM: tl.constexpr, TILE_Q: tl.constexpr, TILE_K: tl.constexpr, CONTIGUOUS: tl.constexpr, BOX: tl.constexpr,
    SIMPLE: tl.constexpr, FRAMES: tl.constexpr,
):
    """Attention of one query tile of one head, and its log2-sum-exp2.

    q, out [B, R, N, D] and k, v [B, F, N / group, D] by strides of batch, row and head; text_k, text_v
    [B, L, N / group, D]; text_valid uint8 [B, L]; lse fp32 [B, N, R]; tables of tile_plan. `scale`
    includes log2(e). FRAMES False: there are no frame keys.
    """
    number, batch, head = place(query_tiles, heads)
    tile = tl.load(order + number)
    slots = tile * TILE_Q + tl.arange(0, TILE_Q)
    rows = rows_of(query_rows, slots, rows_total, CONTIGUOUS)
    query = load_rows(q + batch * q_batch + head * q_head, rows, q_row, HEAD_DIM)
    key_head = head // group

    # Finite, so that rows whose keys are all masked so far give exp2(-inf) = 0 and never inf - inf.
    maximum = tl.full([TILE_Q], -1e30, tl.float32)
    total = tl.zeros([TILE_Q], tl.float32)
    acc = tl.zeros([TILE_Q, HEAD_DIM], tl.float32)

    text_k += batch * text_k_batch + key_head * text_k_head
    text_v += batch * text_v_batch + key_head * text_v_head
    text_valid += batch * text_length
    for first_key in range(0, text_length, TILE_K):
        at, valid = text_tile(text_valid, first_key, text_length, TILE_K)
        scores = tl.dot(query, tl.trans(load_rows(text_k, at, text_k_row, HEAD_DIM)), input_precision="ieee")
        scores = tl.where(valid[None, :], scores, float("-inf"))
        value = load_rows(text_v, at, text_v_row, HEAD_DIM)
        maximum, total, acc = _accumulate(scores, value, maximum, total, acc, scale)

    if FRAMES:
        k += batch * k_batch + key_head * k_head
        v += batch * v_batch + key_head * v_head
        point, last, before, first = query_words(words, slots, query_tiles * TILE_Q, SIMPLE)
        first_partial = tl.load(partial + tile)
        for entry in range(tl.load(start + tile), tl.load(end + tile)):
            key_slots = tl.load(visited + entry) * TILE_K + tl.arange(0, TILE_K)
            at = rows_of(key_rows, key_slots, key_tokens, CONTIGUOUS)
            scores = tl.dot(query, tl.trans(load_rows(k, at, k_row, HEAD_DIM)), input_precision="ieee")
            if entry >= first_partial:
                allowed = sees(
                    point[:, None], last[:, None], before[:, None], first[:, None],
                    words_of(key_words, key_slots, BOX)[None, :], box_constant, box_guards, BOX, SIMPLE,
                )
                scores = tl.where(allowed, scores, float("-inf"))
            value = load_rows(v, at, v_row, HEAD_DIM)
            maximum, total, acc = _accumulate(scores, value, maximum, total, acc, scale)

    real = tl.arange(0, TILE_Q) < tl.load(query_count + tile)
    empty = total == 0.0  # no key at all: zeros, and log(0)
    out += batch * out_batch + head * out_head
    store_rows(out, rows, out_row, real, acc / tl.where(empty, 1.0, total)[:, None], HEAD_DIM)
    log_total = tl.where(empty, float("-inf"), maximum + tl.log2(tl.where(empty, 1.0, total)))
    tl.store(lse + (batch * heads + head) * rows_total + rows, log_total, mask=real)
