"""Backward kernels: dq walks key tiles, dk and dv walk query tiles.

Every gradient has one owner that adds up its parts in the order of the plan, so results are bitwise
the same in every run. Only GRAD_Q of the key kernel differs: it adds to dq by atomics, in any order.
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
def _add_key_tile(scores, grad, row_lse, row_delta, key, value, acc, scale):
    """acc of grad_q plus the part of one key tile: `scores` [TILE_Q, TILE_K] unscaled, -inf where masked."""
    weights = tl.exp2(scores * scale - row_lse[:, None])
    grad_weights = tl.dot(grad, tl.trans(value), input_precision="ieee")
    grad_scores = weights * (grad_weights - row_delta[:, None])
    return tl.dot(grad_scores.to(key.dtype), key, acc, input_precision="ieee")


@triton.jit(do_not_specialize=NOT_SPECIALIZED)
def attention_backward_query(
    q, k, v, text_k, text_v, text_valid, out, grad_out, lse, delta, grad_q, order, query_rows, query_count, words,
    start, partial, end, visited, key_rows, key_words, q_batch, q_row, q_head, k_batch, k_row, k_head, v_batch,
    v_row, v_head, text_k_batch, text_k_row, text_k_head, text_v_batch, text_v_row, text_v_head, out_batch, out_row,
    out_head, grad_out_batch, grad_out_row, grad_out_head, grad_q_batch, grad_q_row, grad_q_head, scale,
    softmax_scale, text_length, rows_total, key_tokens, query_tiles, heads, group, box_constant, box_guards,
    HEAD_DIM: tl.constexpr, TILE_Q: tl.constexpr, TILE_K: tl.constexpr, CONTIGUOUS: tl.constexpr, BOX: tl.constexpr,
    SIMPLE: tl.constexpr, FRAMES: tl.constexpr, GRAD_Q: tl.constexpr,
):
    """delta = sum(out * grad_out) of one query tile of one head, and its gradient if GRAD_Q.

    Tensors as in `attention_forward`; grad_out and grad_q like q, delta like lse.
    """
    number, batch, head = place(query_tiles, heads)
    tile = tl.load(order + number)
    slots = tile * TILE_Q + tl.arange(0, TILE_Q)
    rows = rows_of(query_rows, slots, rows_total, CONTIGUOUS)
    real = tl.arange(0, TILE_Q) < tl.load(query_count + tile)
    grad = load_rows(grad_out + batch * grad_out_batch + head * grad_out_head, rows, grad_out_row, HEAD_DIM)
    result = load_rows(out + batch * out_batch + head * out_head, rows, out_row, HEAD_DIM)
    row_delta = tl.sum(result.to(tl.float32) * grad.to(tl.float32), 1)
    statistics = (batch * heads + head) * rows_total + rows
    tl.store(delta + statistics, row_delta, mask=real)

    if GRAD_Q:
        query = load_rows(q + batch * q_batch + head * q_head, rows, q_row, HEAD_DIM)
        row_lse = tl.load(lse + statistics)
        row_lse = tl.where(row_lse == float("-inf"), float("inf"), row_lse)  # rows without keys: weights are 0
        key_head = head // group
        acc = tl.zeros([TILE_Q, HEAD_DIM], tl.float32)

        text_k += batch * text_k_batch + key_head * text_k_head
        text_v += batch * text_v_batch + key_head * text_v_head
        text_valid += batch * text_length
        for first_key in range(0, text_length, TILE_K):
            at, valid = text_tile(text_valid, first_key, text_length, TILE_K)
            key = load_rows(text_k, at, text_k_row, HEAD_DIM)
            value = load_rows(text_v, at, text_v_row, HEAD_DIM)
            scores = tl.dot(query, tl.trans(key), input_precision="ieee")
            scores = tl.where(valid[None, :], scores, float("-inf"))
            acc = _add_key_tile(scores, grad, row_lse, row_delta, key, value, acc, scale)

        if FRAMES:
            k += batch * k_batch + key_head * k_head
            v += batch * v_batch + key_head * v_head
            point, last, before, first = query_words(words, slots, query_tiles * TILE_Q, SIMPLE)
            first_partial = tl.load(partial + tile)
            for entry in range(tl.load(start + tile), tl.load(end + tile)):
                key_slots = tl.load(visited + entry) * TILE_K + tl.arange(0, TILE_K)
                at = rows_of(key_rows, key_slots, key_tokens, CONTIGUOUS)
                key = load_rows(k, at, k_row, HEAD_DIM)
                value = load_rows(v, at, v_row, HEAD_DIM)
                scores = tl.dot(query, tl.trans(key), input_precision="ieee")
                if entry >= first_partial:
                    allowed = sees(
                        point[:, None], last[:, None], before[:, None], first[:, None],
                        words_of(key_words, key_slots, BOX)[None, :], box_constant, box_guards, BOX, SIMPLE,
                    )
                    scores = tl.where(allowed, scores, float("-inf"))
                acc = _add_key_tile(scores, grad, row_lse, row_delta, key, value, acc, scale)

        grad_q += batch * grad_q_batch + head * grad_q_head
        store_rows(grad_q, rows, grad_q_row, real, acc * softmax_scale, HEAD_DIM)


@triton.jit(do_not_specialize=NOT_SPECIALIZED)
def attention_backward_key(
    q, k, v, text_valid, grad_out, lse, delta, grad_k, grad_v, grad_q, order, key_rows, key_count, key_words, start,
    partial, end, visited, query_rows, query_count, words, q_batch, q_row, q_head, k_batch, k_row, k_head, v_batch,
    v_row, v_head, grad_out_batch, grad_out_row, grad_out_head, grad_k_batch, grad_k_row, grad_k_head, grad_v_batch,
    grad_v_row, grad_v_head, grad_q_batch, grad_q_row, grad_q_head, scale, softmax_scale, keys_total, rows_total,
    key_tiles, query_tiles, key_heads, box_constant, box_guards, GROUP: tl.constexpr, HEAD_DIM: tl.constexpr,
    TILE_Q: tl.constexpr, TILE_K: tl.constexpr, CONTIGUOUS: tl.constexpr, BOX: tl.constexpr, SIMPLE: tl.constexpr,
    TEXT: tl.constexpr, GRAD_Q: tl.constexpr,
):
    """Gradients of one key tile of one key head, over all query heads of its group.

    Tensors as in the kernels above, with the plan's visits by key. TEXT: k, v and their gradients are
    the text's [B, L, N / group, D], which all query tiles see where text_valid. GRAD_Q: grad_q is fp32
    and gets the tile's part, not yet multiplied by softmax_scale, added to it.
    """
    tile, batch, key_head = place(key_tiles, key_heads)
    if not TEXT:
        tile = tl.load(order + tile)
    key_slots = tile * TILE_K + tl.arange(0, TILE_K)
    if TEXT:
        at, valid = text_tile(text_valid + batch * keys_total, tile * TILE_K, keys_total, TILE_K)
        real = key_slots < keys_total
        first_entry, first_partial, end_entry = 0, 0, query_tiles
    else:
        at = rows_of(key_rows, key_slots, keys_total, CONTIGUOUS)
        real = tl.arange(0, TILE_K) < tl.load(key_count + tile)
        first_entry, first_partial, end_entry = tl.load(start + tile), tl.load(partial + tile), tl.load(end + tile)
        word = words_of(key_words, key_slots, BOX)
    key = load_rows(k + batch * k_batch + key_head * k_head, at, k_row, HEAD_DIM)
    value = load_rows(v + batch * v_batch + key_head * v_head, at, v_row, HEAD_DIM)
    acc_k = tl.zeros([TILE_K, HEAD_DIM], tl.float32)
    acc_v = tl.zeros([TILE_K, HEAD_DIM], tl.float32)

    for member in range(0, GROUP):
        head = key_head * GROUP + member
        q_of_head = q + batch * q_batch + head * q_head
        grad_of_head = grad_out + batch * grad_out_batch + head * grad_out_head
        statistics = (batch * (key_heads * GROUP) + head) * rows_total
        for entry in range(first_entry, end_entry):
            query_tile = entry if TEXT else tl.load(visited + entry)
            slots = query_tile * TILE_Q + tl.arange(0, TILE_Q)
            rows = rows_of(query_rows, slots, rows_total, CONTIGUOUS)
            real_q = tl.arange(0, TILE_Q) < tl.load(query_count + query_tile)
            query = load_rows(q_of_head, rows, q_row, HEAD_DIM)
            row_lse = tl.load(lse + statistics + rows, mask=real_q, other=float("inf"))
            row_lse = tl.where(row_lse == float("-inf"), float("inf"), row_lse)  # rows without keys: weights are 0
            # Scores stand transposed: [TILE_K, TILE_Q].
            weights = tl.exp2(tl.dot(key, tl.trans(query), input_precision="ieee") * scale - row_lse[None, :])
            if TEXT:
                weights = tl.where(valid[:, None], weights, 0.0)
            elif entry >= first_partial:
                point, last, before, first = query_words(words, slots, query_tiles * TILE_Q, SIMPLE)
                allowed = sees(
                    point[None, :], last[None, :], before[None, :], first[None, :], word[:, None], box_constant,
                    box_guards, BOX, SIMPLE,
                )
                weights = tl.where(allowed, weights, 0.0)
            grad = load_rows(grad_of_head, rows, grad_out_row, HEAD_DIM)
            acc_v = tl.dot(weights.to(grad.dtype), grad, acc_v, input_precision="ieee")
            grad_weights = tl.dot(value, tl.trans(grad), input_precision="ieee")
            grad_scores = weights * (grad_weights - tl.load(delta + statistics + rows)[None, :])
            grad_scores = grad_scores.to(query.dtype)
            acc_k = tl.dot(grad_scores, query, acc_k, input_precision="ieee")
            if GRAD_Q:
                part = tl.dot(tl.trans(grad_scores), key, input_precision="ieee")
                target = grad_q + batch * grad_q_batch + head * grad_q_head + rows[:, None] * grad_q_row
                channel = tl.arange(0, HEAD_DIM)[None, :]
                tl.atomic_add(target + channel, part, mask=real_q[:, None], sem="relaxed")

    grad_k += batch * grad_k_batch + key_head * grad_k_head
    grad_v += batch * grad_v_batch + key_head * grad_v_head
    store_rows(grad_k, at, grad_k_row, real, acc_k * softmax_scale, HEAD_DIM)
    store_rows(grad_v, at, grad_v_row, real, acc_v, HEAD_DIM)
