"""Backward kernels: dq walks key tiles, dk and dv walk query tiles.

Every gradient has one owner that adds up its parts in the order of the plan, so results are bitwise
the same in every run, without atomics and without buffers in fp32.
"""

from __future__ import annotations

import triton
import triton.language as tl

from megacog_kernels.attention.tile import load_rows, query_words, rows_of, sees, store_rows, words_of


@triton.jit
def _add_key_tile(query, grad, row_lse, row_delta, key, value, acc, scale, allowed, MASKED: tl.constexpr):
    """acc of grad_q plus the part of one key tile."""
    weights = tl.exp2(tl.dot(query, tl.trans(key), input_precision="ieee") * scale - row_lse[:, None])
    if MASKED:
        weights = tl.where(allowed, weights, 0.0)
    grad_weights = tl.dot(grad, tl.trans(value), input_precision="ieee")
    grad_scores = weights * (grad_weights - row_delta[:, None])
    return tl.dot(grad_scores.to(key.dtype), key, acc, input_precision="ieee")


@triton.jit
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
    program = tl.program_id(0)
    tile = tl.load(order + program % query_tiles)
    batch = (program // query_tiles // heads).to(tl.int64)
    head = program // query_tiles % heads
    slots = tile * TILE_Q + tl.arange(0, TILE_Q)
    rows = tl.load(query_rows + slots)
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
            at = first_key + tl.arange(0, TILE_K)
            inside = at < text_length
            valid = tl.load(text_valid + at, mask=inside, other=0) != 0
            at = tl.minimum(at, text_length - 1)
            key = load_rows(text_k, at, text_k_row, HEAD_DIM)
            value = load_rows(text_v, at, text_v_row, HEAD_DIM)
            acc = _add_key_tile(query, grad, row_lse, row_delta, key, value, acc, scale, valid[None, :], True)

        if FRAMES:
            k += batch * k_batch + key_head * k_head
            v += batch * v_batch + key_head * v_head
            first_partial = tl.load(partial + tile)
            for entry in range(tl.load(start + tile), first_partial):
                key_slots = tl.load(visited + entry) * TILE_K + tl.arange(0, TILE_K)
                at = rows_of(key_rows, key_slots, key_tokens, CONTIGUOUS)
                key = load_rows(k, at, k_row, HEAD_DIM)
                value = load_rows(v, at, v_row, HEAD_DIM)
                acc = _add_key_tile(query, grad, row_lse, row_delta, key, value, acc, scale, real, False)

            point, last, before, first = query_words(words, slots, query_tiles * TILE_Q, SIMPLE)
            for entry in range(first_partial, tl.load(end + tile)):
                key_slots = tl.load(visited + entry) * TILE_K + tl.arange(0, TILE_K)
                at = rows_of(key_rows, key_slots, key_tokens, CONTIGUOUS)
                word = words_of(key_words, key_slots, BOX)[None, :]
                allowed = sees(
                    point[:, None], last[:, None], before[:, None], first[:, None], word, box_constant, box_guards,
                    BOX, SIMPLE,
                )
                key = load_rows(k, at, k_row, HEAD_DIM)
                value = load_rows(v, at, v_row, HEAD_DIM)
                acc = _add_key_tile(query, grad, row_lse, row_delta, key, value, acc, scale, allowed, True)

        grad_q += batch * grad_q_batch + head * grad_q_head
        store_rows(grad_q, rows, grad_q_row, real, acc * softmax_scale, HEAD_DIM)


@triton.jit
def _add_query_tile(
    key, value, acc_k, acc_v, q, grad_out, lse, delta, rows, real, q_row, grad_out_row, scale, allowed,
    MASKED: tl.constexpr, HEAD_DIM: tl.constexpr,
):
    """acc_k and acc_v, [TILE_K, HEAD_DIM], plus the parts of one query tile; scores stand transposed."""
    query = load_rows(q, rows, q_row, HEAD_DIM)
    row_lse = tl.load(lse + rows, mask=real, other=float("inf"))
    row_lse = tl.where(row_lse == float("-inf"), float("inf"), row_lse)  # rows without keys: weights are 0
    weights = tl.exp2(tl.dot(key, tl.trans(query), input_precision="ieee") * scale - row_lse[None, :])
    if MASKED:
        weights = tl.where(allowed, weights, 0.0)
    grad = load_rows(grad_out, rows, grad_out_row, HEAD_DIM)
    acc_v = tl.dot(weights.to(grad.dtype), grad, acc_v, input_precision="ieee")
    grad_weights = tl.dot(value, tl.trans(grad), input_precision="ieee")
    grad_scores = weights * (grad_weights - tl.load(delta + rows)[None, :])
    acc_k = tl.dot(grad_scores.to(query.dtype), query, acc_k, input_precision="ieee")
    return acc_k, acc_v


@triton.jit
def attention_backward_key(
    q, k, v, text_valid, grad_out, lse, delta, grad_k, grad_v, order, key_rows, key_count, key_words, start, partial,
    end, visited, query_rows, query_count, words, q_batch, q_row, q_head, k_batch, k_row, k_head, v_batch, v_row,
    v_head, grad_out_batch, grad_out_row, grad_out_head, grad_k_batch, grad_k_row, grad_k_head, grad_v_batch,
    grad_v_row, grad_v_head, scale, softmax_scale, keys_total, rows_total, key_tiles, query_tiles, key_heads,
    box_constant, box_guards, GROUP: tl.constexpr, HEAD_DIM: tl.constexpr, TILE_Q: tl.constexpr, TILE_K: tl.constexpr,
    CONTIGUOUS: tl.constexpr, BOX: tl.constexpr, SIMPLE: tl.constexpr, TEXT: tl.constexpr,
):
    """Gradients of one key tile of one key head, over all query heads of its group.

    Tensors as in the kernels above, with the plan's visits by key. TEXT: k, v and their gradients are
    the text's [B, L, N / group, D], which all query tiles see where text_valid.
    """
    program = tl.program_id(0)
    tile = program % key_tiles
    if not TEXT:
        tile = tl.load(order + tile)
    batch = (program // key_tiles // key_heads).to(tl.int64)
    key_head = program // key_tiles % key_heads
    key_slots = tile * TILE_K + tl.arange(0, TILE_K)
    if TEXT:
        at = tl.minimum(key_slots, keys_total - 1)
        real = key_slots < keys_total
        valid = tl.load(text_valid + batch * keys_total + at) != 0
    else:
        at = tl.load(key_rows + key_slots)
        real = tl.arange(0, TILE_K) < tl.load(key_count + tile)
        word = words_of(key_words, key_slots, BOX)[:, None]
    key = load_rows(k + batch * k_batch + key_head * k_head, at, k_row, HEAD_DIM)
    value = load_rows(v + batch * v_batch + key_head * v_head, at, v_row, HEAD_DIM)
    acc_k = tl.zeros([TILE_K, HEAD_DIM], tl.float32)
    acc_v = tl.zeros([TILE_K, HEAD_DIM], tl.float32)

    for member in range(0, GROUP):
        head = key_head * GROUP + member
        q_of_head = q + batch * q_batch + head * q_head
        grad_of_head = grad_out + batch * grad_out_batch + head * grad_out_head
        statistics = (batch * (key_heads * GROUP) + head) * rows_total
        if TEXT:
            for query_tile in range(0, query_tiles):
                slots = query_tile * TILE_Q + tl.arange(0, TILE_Q)
                rows = rows_of(query_rows, slots, rows_total, CONTIGUOUS)
                real_q = tl.arange(0, TILE_Q) < tl.load(query_count + query_tile)
                acc_k, acc_v = _add_query_tile(
                    key, value, acc_k, acc_v, q_of_head, grad_of_head, lse + statistics, delta + statistics, rows,
                    real_q, q_row, grad_out_row, scale, valid[:, None], True, HEAD_DIM,
                )
        else:
            first_partial = tl.load(partial + tile)
            for entry in range(tl.load(start + tile), first_partial):
                query_tile = tl.load(visited + entry)
                slots = query_tile * TILE_Q + tl.arange(0, TILE_Q)
                rows = rows_of(query_rows, slots, rows_total, CONTIGUOUS)
                real_q = tl.arange(0, TILE_Q) < tl.load(query_count + query_tile)
                acc_k, acc_v = _add_query_tile(
                    key, value, acc_k, acc_v, q_of_head, grad_of_head, lse + statistics, delta + statistics, rows,
                    real_q, q_row, grad_out_row, scale, real_q[None, :], False, HEAD_DIM,
                )
            for entry in range(first_partial, tl.load(end + tile)):
                query_tile = tl.load(visited + entry)
                slots = query_tile * TILE_Q + tl.arange(0, TILE_Q)
                rows = rows_of(query_rows, slots, rows_total, CONTIGUOUS)
                real_q = tl.arange(0, TILE_Q) < tl.load(query_count + query_tile)
                point, last, before, first = query_words(words, slots, query_tiles * TILE_Q, SIMPLE)
                allowed = sees(
                    point[None, :], last[None, :], before[None, :], first[None, :], word, box_constant, box_guards,
                    BOX, SIMPLE,
                )
                acc_k, acc_v = _add_query_tile(
                    key, value, acc_k, acc_v, q_of_head, grad_of_head, lse + statistics, delta + statistics, rows,
                    real_q, q_row, grad_out_row, scale, allowed, True, HEAD_DIM,
                )

    grad_k += batch * grad_k_batch + key_head * grad_k_head
    grad_v += batch * grad_v_batch + key_head * grad_v_head
    store_rows(grad_k, at, grad_k_row, real, acc_k * softmax_scale, HEAD_DIM)
    store_rows(grad_v, at, grad_v_row, real, acc_v, HEAD_DIM)
