"""How much memory the tensors of a piece of code take at once."""

from __future__ import annotations

import weakref
from typing import Any

from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class TrackedMemory(TorchDispatchMode):
    """Counts the bytes of all storages that come to life inside, and raises when they pass a cap.

    What an operator allocates for itself while it runs is seen if it is made of other operators.
    """

    def __init__(self, cap: int | None = None) -> None:
        super().__init__()
        self.cap = cap
        self.live = self.peak = 0
        self._known: set[int] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        inputs = {leaf.untyped_storage()._cdata for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)}
        for tensor in tree_leaves(out):
            if isinstance(tensor, Tensor) and tensor.device.type != "meta":
                self._enter(tensor, inputs)
        return out

    def _enter(self, tensor: Tensor, inputs: set[int]) -> None:
        storage = tensor.untyped_storage()
        key, size = storage._cdata, storage.nbytes()
        if key in self._known or key in inputs:  # a view of something, perhaps older than this count
            return
        self._known.add(key)
        self.live += size
        self.peak = max(self.peak, self.live)
        weakref.finalize(storage, self._strike_out, key, size)
        if self.cap is not None and self.live > self.cap:
            raise MemoryError(f"{self.live:,} bytes of tensors at once, {self.cap:,} are allowed")

    def _strike_out(self, key: int, size: int) -> None:
        self._known.discard(key)
        self.live -= size
