"""Decoding kernels: one token and head is split over several programs, and a second kernel joins their parts.

A program reads only keys that its token sees: with one query neither the scores nor the sum over
values gains from tensor cores, so masked rows are simply not loaded.
"""

from __future__ import annotations

import triton
import triton.language as tl

from megacog_kernels.attention.tile import NOT_SPECIALIZED, sees, words_of


@triton.jit(do_not_specialize=NOT_SPECIALIZED)
def decode_partial(
    q, k, v, text_valid, tokens, slot_of, parts, statistics, words, start, end, visited, key_rows, key_count,
    key_words, q_batch, q_row, q_head, k_batch, k_row, k_head, v_batch, v_row, v_head, tokens_batch, tokens_row,
    scale, text_bias, text_length, text_tiles, total_slots, new_rows, heads, group, box_constant, box_guards,
    HEAD_DIM: tl.constexpr, TILE_Q: tl.constexpr, TILE_K: tl.constexpr, SPLITS: tl.constexpr, BOX: tl.constexpr,
    SIMPLE: tl.constexpr,
):  # fmt: skip
    """One share of one token's keys, for one head: unnormalized output, maximum and sum of the softmax.

    q [B, R, N, D]; k, v [B, S, M, D]; text_valid uint8 [B, L]; tokens int32 [B, R]; slot_of int32 [F]:
    slot of every frame token among the plan's queries; parts fp32 [B * R * N, SPLITS, D]; statistics
    fp32 [B * R * N, SPLITS, 2]. `scale` includes log2(e).
    """
    share = tl.program_id(0) % SPLITS
    item = tl.program_id(0) // SPLITS
    batch = (item // heads // new_rows).to(tl.int64)
    row = item // heads % new_rows
    head = item % heads
    channel = tl.arange(0, HEAD_DIM)
    query = tl.load(q + batch * q_batch + row * q_row + head * q_head + channel).to(tl.float32)
    k += batch * k_batch + head // group * k_head
    v += batch * v_batch + head // group * v_head
    text_valid += batch * text_length

    slot = tl.load(slot_of + tl.load(tokens + batch * tokens_batch + row * tokens_row))
    point, last = tl.load(words + slot), tl.load(words + total_slots + slot)
    before, first = tl.load(words + 2 * total_slots + slot), tl.load(words + 3 * total_slots + slot)
    first_entry = tl.load(start + slot // TILE_Q)
    # The text's tiles come first, then those of the plan; every share takes its part of both together.
    tiles = text_tiles + tl.load(end + slot // TILE_Q) - first_entry
    per_share = (tiles + SPLITS - 1) // SPLITS

    maximum = -1e30  # finite: see forward.py
    total = 0.0
    acc = tl.zeros([HEAD_DIM], tl.float32)
    inside = tl.arange(0, TILE_K)
    for index in range(share * per_share, tl.minimum(tiles, (share + 1) * per_share)):
        if index < text_tiles:
            at = index * TILE_K + inside
            allowed = tl.load(text_valid + at, mask=at < text_length, other=0) != 0
        else:
            tile = tl.load(visited + first_entry + index - text_tiles)
            key = words_of(key_words, tile * TILE_K + inside, BOX)
            allowed = sees(point, last, before, first, key, box_constant, box_guards, BOX, SIMPLE)
            allowed = allowed & (inside < tl.load(key_count + tile))
            at = text_length + tl.load(key_rows + tile * TILE_K + inside)
        rows = at.to(tl.int64)[:, None]
        keys = tl.load(k + rows * k_row + channel[None, :], mask=allowed[:, None], other=0.0).to(tl.float32)
        values = tl.load(v + rows * v_row + channel[None, :], mask=allowed[:, None], other=0.0).to(tl.float32)
        bias = tl.where(index < text_tiles, text_bias, 0.0)
        scores = tl.where(allowed, tl.sum(keys * query[None, :], 1) * scale + bias, float("-inf"))
        new_maximum = tl.maximum(maximum, tl.max(scores, 0))
        weights = tl.exp2(scores - new_maximum)
        decay = tl.exp2(maximum - new_maximum)
        total = total * decay + tl.sum(weights, 0)
        acc = acc * decay + tl.sum(weights[:, None] * values, 0)
        maximum = new_maximum

    part = item * SPLITS + share
    tl.store(parts + part.to(tl.int64) * HEAD_DIM + channel, acc)
    tl.store(statistics + part * 2, maximum)
    tl.store(statistics + part * 2 + 1, total)


@triton.jit
def decode_join(parts, statistics, out, HEAD_DIM: tl.constexpr, SPLITS: tl.constexpr):
    """The shares of one token and head as one output: out [B, R, N, D] contiguous."""
    item = tl.program_id(0)
    channel = tl.arange(0, HEAD_DIM)
    share = item * SPLITS + tl.arange(0, SPLITS)
    maximum, total = tl.load(statistics + share * 2), tl.load(statistics + share * 2 + 1)
    factor = tl.exp2(maximum - tl.max(maximum, 0))
    total = tl.sum(total * factor, 0)
    acc = tl.load(parts + share.to(tl.int64)[:, None] * HEAD_DIM + channel[None, :])
    value = tl.sum(acc * factor[:, None], 0) / tl.where(total == 0.0, 1.0, total)
    tl.store(out + item.to(tl.int64) * HEAD_DIM + channel, value.to(out.dtype.element_ty))
