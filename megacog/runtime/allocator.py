"""How the C library keeps freed memory."""

from __future__ import annotations

import ctypes

_M_MMAP_THRESHOLD = -3
"""From glibc's malloc.h."""
_LARGE_BYTES = 1 << 20


def return_large_blocks() -> None:
    """Give freed blocks above 1 MiB back to the system at once, in this process from now on.

    By default glibc raises its limit up to 32 MiB as such blocks are freed, and then keeps them in a heap that
    fragments: streaming many tensors of some MiB would slowly take the memory of all of them. Elsewhere nothing
    happens.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        mallopt(_M_MMAP_THRESHOLD, _LARGE_BYTES)
