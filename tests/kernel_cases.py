"""Random masks for tests of the mask rule, the tile plans and the kernels."""

from __future__ import annotations

from hypothesis import strategies as st

from megacog_kernels.grid import MaskSpec, Order, Space, VideoGrid

spaces = st.one_of(
    st.just(Space()),
    st.just(Space("frame")),
    st.builds(
        lambda h, w, t: Space("local3d", (h, w), t),
        st.sampled_from([1, 3, 5]),
        st.sampled_from([1, 3, 5]),
        st.one_of(st.none(), st.integers(1, 3)),
    ),
    st.builds(
        lambda h, w, s: Space("shifted_window", (h, w), shift=(s % h, s % w)),
        st.integers(1, 4),
        st.integers(1, 4),
        st.integers(0, 3),
    ),
)


@st.composite
def masks(draw: st.DrawFn, max_frames: int = 6, max_tokens: int = 120) -> tuple[MaskSpec, VideoGrid]:
    """A random order table and space on a small grid."""
    frames = draw(st.integers(1, max_frames))
    level = tuple(draw(st.integers(0, 3)) for _ in range(frames))
    is_open = tuple(draw(st.booleans()) for _ in range(frames))
    height = draw(st.integers(1, min(4, max_tokens // frames)))
    grid = VideoGrid(frames, height, draw(st.integers(1, min(5, max_tokens // (frames * height)))))
    return MaskSpec(Order(level, is_open), draw(spaces)), grid
