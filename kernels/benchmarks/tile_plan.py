"""Prints how much work the tile plans leave: `python kernels/benchmarks/tile_plan.py [--json] [--grid TxHxW]`.

Score elements are counted per head, text keys and padding included. Efficiency is useful / executed;
the ratio compares with dense causal attention in raster order at the same tile sizes.

With --json, one JSON object a line: grid [T, H, W], text, levels, open, space, window ([h, w], [t, h, w]
where local3d limits the frames, null), shift, tile_q, tile_k, useful, executed, dense_executed.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator

from megacog_kernels.attention.plan import dense_executed, tile_plan
from megacog_kernels.grid import MaskSpec, Order, Space, VideoGrid

TEXT = 64
TILES = ((64, 64), (128, 64))
KEY_FRAMES = VideoGrid(5, 20, 20)
LARGE = (VideoGrid(16, 32, 32), VideoGrid(32, 60, 60))


def cases() -> Iterator[tuple[VideoGrid, MaskSpec]]:
    """Masks and grids of the report."""
    orders = (Order.sequential(5), Order.interpolation(5))
    yield KEY_FRAMES, MaskSpec(orders[0], Space())
    for order in orders:
        yield KEY_FRAMES, MaskSpec(order, Space("frame"))
    for order in orders:
        for shift in (0, 5):
            yield KEY_FRAMES, MaskSpec(order, Space("shifted_window", (10, 10), shift=(shift, shift)))
    for window, frames in ((7, None), (9, None), (11, None), (11, 3)):
        yield KEY_FRAMES, MaskSpec(orders[0], Space("local3d", (window, window), frames))
    for grid in LARGE:
        for window, frames in ((9, None), (11, None), (17, None), (25, None), (11, 3), (17, 3)):
            space = Space("local3d", (window, window), frames)
            yield grid, MaskSpec(Order.sequential(grid.frames), space)


def row(grid: VideoGrid, mask: MaskSpec, tile_q: int, tile_k: int) -> dict[str, object]:
    """Counts of one mask on one grid."""
    plan, space = tile_plan(mask, grid, tile_q, tile_k), mask.space
    window = None if space.window is None else list(space.window)
    return {
        "grid": [grid.frames, grid.height, grid.width],
        "text": TEXT,
        "levels": list(mask.order.level),
        "open": list(mask.order.open),
        "space": space.kind,
        "window": window if window is None or space.frames is None else [space.frames, *window],
        "shift": list(space.shift),
        "tile_q": tile_q,
        "tile_k": tile_k,
        "useful": plan.visible + grid.tokens * TEXT,
        "executed": plan.executed(TEXT),
        "dense_executed": dense_executed(grid, TEXT, tile_q, tile_k),
    }


def line(counts: dict) -> str:
    """One row of the printed table."""
    order = "interpolation" if counts["open"][0] else "sequential"
    window = "x".join(map(str, counts["window"] or []))
    window += f" shift {counts['shift'][0]}" if any(counts["shift"]) else ""
    name = f"{'x'.join(map(str, counts['grid'])):10s} {order:13s} {counts['space']:14s} {window:14s}"
    tiles = f"{counts['tile_q']}x{counts['tile_k']}"
    share, ratio = counts["useful"] / counts["executed"], counts["dense_executed"] / counts["executed"]
    return f"{name} {tiles:>7s} {counts['useful']:>13,} {counts['executed']:>13,} {share:>7.1%} {ratio:>7.2f}x"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", action="store_true", help="one JSON object a line")
    parser.add_argument("--grid", help="only this grid, e.g. 5x20x20")
    args = parser.parse_args()
    if not args.json:
        names = f"{'grid':10s} {'order':13s} {'space':14s} {'window':14s} {'tiles':>7s}"
        print(f"{names} {'useful':>13s} {'executed':>13s}  useful  vs dense")
    for grid, mask in cases():
        if args.grid not in (None, f"{grid.frames}x{grid.height}x{grid.width}"):
            continue
        for tile_q, tile_k in TILES:
            counts = row(grid, mask, tile_q, tile_k)
            print(json.dumps(counts) if args.json else line(counts), flush=True)


if __name__ == "__main__":
    main()
