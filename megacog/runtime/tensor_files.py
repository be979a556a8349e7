"""Writing safetensors files one tensor at a time, and reading what their headers say."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch
    from torch import Tensor

_CODES = {
    "float64": "F64", "float32": "F32", "float16": "F16", "bfloat16": "BF16", "int64": "I64", "int32": "I32",
    "int16": "I16", "int8": "I8", "uint64": "U64", "uint32": "U32", "uint16": "U16", "uint8": "U8", "bool": "BOOL",
}  # fmt: skip
"""Name of a torch dtype -> its code in a safetensors header."""
_ALIGNMENT = 8


@dataclass(frozen=True)
class Deferred:
    """A tensor that is made when it is written, so that a file may be larger than the memory."""

    dtype: torch.dtype
    shape: tuple[int, ...]
    make: Callable[[], Tensor]
    """Returns the tensor, on any device."""

    @property
    def nbytes(self) -> int:
        bytes_ = self.dtype.itemsize
        for length in self.shape:
            bytes_ *= length
        return bytes_


def stored_bytes(path: Path) -> dict[str, int]:
    """Bytes of every tensor in a safetensors file, by name, read from its header alone."""
    with open(path, "rb") as file:
        header = json.loads(file.read(int.from_bytes(file.read(8), "little")))
    spans = {name: entry["data_offsets"] for name, entry in header.items() if name != "__metadata__"}
    return {name: end - start for name, (start, end) in spans.items()}


def save_tensors(
    tensors: Mapping[str, Tensor | Deferred], path: Path, metadata: Mapping[str, str] | None = None
) -> None:
    """Write tensors, by name, as one safetensors file; of each only as long as it is being written a copy exists.

    Args:
        tensors: On any device, with any strides.
        path: The file.
        metadata: Strings for the header.

    Raises:
        OSError: It cannot be written; errno and path say why.
        ValueError: A deferred tensor came out with another dtype or shape, or a dtype is not known to the format.
    """
    # Wide elements first: so every tensor is aligned, as the format's own writer does it.
    names = sorted(tensors, key=lambda name: (-tensors[name].dtype.itemsize, name))
    header = _header({name: tensors[name] for name in names}, metadata)
    try:
        with open(path, "wb") as file:
            file.write(len(header).to_bytes(8, "little") + header)
            for name in names:
                file.write(_bytes(name, tensors[name]))
    except OSError as error:
        error.filename = str(path)  # writing names no file
        raise


def _header(tensors: Mapping[str, Tensor | Deferred], metadata: Mapping[str, str] | None) -> bytes:
    entries: dict[str, object] = {} if metadata is None else {"__metadata__": dict(metadata)}
    start = 0
    for name, tensor in tensors.items():
        dtype = str(tensor.dtype).removeprefix("torch.")
        if dtype not in _CODES:
            raise ValueError(f"{name} is {dtype}, which safetensors files cannot hold")
        entries[name] = {
            "dtype": _CODES[dtype], "shape": list(tensor.shape), "data_offsets": [start, start + tensor.nbytes]
        }  # fmt: skip
        start += tensor.nbytes
    text = json.dumps(entries, separators=(",", ":")).encode()
    return text + b" " * (-len(text) % _ALIGNMENT)


def _bytes(name: str, tensor: Tensor | Deferred) -> memoryview:
    import torch

    value = tensor.make() if isinstance(tensor, Deferred) else tensor
    if (value.dtype, tuple(value.shape)) != (tensor.dtype, tuple(tensor.shape)):
        found = f"{value.dtype} {tuple(value.shape)}"
        raise ValueError(f"{name} was to be {tensor.dtype} {tuple(tensor.shape)} and came out as {found}")
    return value.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data
