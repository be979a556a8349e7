"""What the attention kernels share: loads of rows, lists of tiles, and the mask inside of a tile."""

from __future__ import annotations

import triton
import triton.language as tl

NOT_SPECIALIZED = [
    "text_length", "rows_total", "keys_total", "key_tokens", "query_tiles", "key_tiles", "heads", "key_heads", "group",
    "box_constant", "box_guards", "text_tiles", "total_slots", "new_rows",
]  # fmt: skip
"""Numbers that change with grid, batch and text: kernels are not compiled anew for them."""


@triton.jit
def place(tiles, heads):
    """Number in the order of tiles, sample and head of this program."""
    program = tl.program_id(0)
    return program % tiles, (program // tiles // heads).to(tl.int64), program // tiles % heads


@triton.jit
def load_rows(pointer, rows, stride, HEAD_DIM: tl.constexpr):
    """Rows of one head: [len(rows), HEAD_DIM]. Offsets within a sample have 32 bits (calls.py checks)."""
    channel = tl.arange(0, HEAD_DIM)
    return tl.load(pointer + rows[:, None] * stride + channel[None, :])


@triton.jit
def store_rows(pointer, rows, stride, real, value, HEAD_DIM: tl.constexpr):
    """Write rows of one head where `real`, in the pointer's dtype."""
    channel = tl.arange(0, HEAD_DIM)
    target = pointer + rows[:, None] * stride + channel[None, :]
    tl.store(target, value.to(pointer.dtype.element_ty), mask=real[:, None])


@triton.jit
def rows_of(table, slots, tokens, CONTIGUOUS: tl.constexpr):
    """Token rows of slots: the slots themselves where the layout keeps the order of memory."""
    if CONTIGUOUS:
        return tl.minimum(slots, tokens - 1)
    return tl.load(table + slots)


@triton.jit
def text_tile(text_valid, first_key, text_length, TILE_K: tl.constexpr):
    """Rows of one tile of the text, and which of them are valid keys."""
    at = first_key + tl.arange(0, TILE_K)
    valid = tl.load(text_valid + at, mask=at < text_length, other=0) != 0
    return tl.minimum(at, text_length - 1), valid


@triton.jit
def query_words(table, slots, total, SIMPLE: tl.constexpr):
    """point, last, before and first of query slots; the last two only where the order needs them."""
    point = tl.load(table + slots)
    last = tl.load(table + total + slots)
    if SIMPLE:
        return point, last, point, point
    return point, last, tl.load(table + 2 * total + slots), tl.load(table + 3 * total + slots)


@triton.jit
def words_of(table, slots, BOX: tl.constexpr):
    """Words of key slots (see layout.py)."""
    if BOX:
        return tl.load(table + slots)
    return slots


@triton.jit
def sees(point, last, before, first, key, constant, guards, BOX: tl.constexpr, SIMPLE: tl.constexpr):
    """Whether queries see keys, by the words of both, broadcast against each other."""
    if BOX:
        offset = key - point
        near = ((constant + offset) & (constant - offset) & guards) == guards
    else:
        near = key >= point
    if SIMPLE:
        return near & (key <= last)
    return near & ((key < before) | ((key >= first) & (key <= last)))
