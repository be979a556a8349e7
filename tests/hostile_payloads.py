"""Files that would run code, fill memory or reach for other files, if a reader trusted them.

Code that runs makes the file `canary`, in the folder that is named.
"""

from __future__ import annotations

import io
import json
import os
import pickle
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import torch


class Runs:
    """Unpickling an instance runs a shell command."""

    def __init__(self, canary: Path) -> None:
        self._command = f"touch {canary}"

    def __reduce__(self) -> tuple[Any, ...]:
        return os.system, (self._command,)


class Executes(Runs):
    """Unpickling an instance runs Python code."""

    def __reduce__(self) -> tuple[Any, ...]:
        return exec, (f"import os; os.system({self._command!r})",)


def saved(value: Any) -> bytes:
    """Bytes of a file of torch.save."""
    buffer = io.BytesIO()
    torch.save(value, buffer)
    return buffer.getvalue()


def packed(**files: bytes) -> bytes:
    """Bytes of a zip archive; `data__data` is data/data.pkl."""
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        for name, content in files.items():
            archive.writestr(name.replace("__", "/") + ".pkl", content)
    return buffer.getvalue()


def array_of_objects(value: Any) -> bytes:
    """Bytes of a .npy file whose array is pickled."""
    buffer = io.BytesIO()
    np.save(buffer, np.array([value], dtype=object), allow_pickle=True)
    return buffer.getvalue()


def pickles(canary: Path) -> dict[str, bytes]:
    """Files that run code when they are unpickled, by kind."""
    text = f"cposix\nsystem\n(S'touch {canary}'\ntR."
    return {
        "pickle": pickle.dumps(Runs(canary)),
        "pickle of protocol 0": text.encode(),
        "file of torch.save": saved(Runs(canary)),
        "weights with a passenger": saved({"module": {"weight": torch.zeros(2), "more": Executes(canary)}}),
        "old file of torch.save": b"\x80\x02\x8a\x0al\xfc\x9cF\xf9 j\xa8P\x19." + pickle.dumps(Runs(canary)),
        "zip with a bare pickle": packed(data__data=text.encode()),
        "array of objects": array_of_objects(Runs(canary)),
    }


def liars() -> dict[str, bytes]:
    """Files that claim to be larger, deeper or other than they are, by kind."""
    endless = {"dtype": "F32", "shape": [1 << 40, 1 << 20], "data_offsets": [0, 1 << 62]}
    header = json.dumps({"weight": endless}).encode()
    return {
        "safetensors, endless header": (1 << 62).to_bytes(8, "little") + b"{",
        "safetensors, endless tensor": len(header).to_bytes(8, "little") + header,
        "nested JSON": b"[" * 200_000 + b"]" * 200_000,
        "JSON of other things": b'{"format": {}, "version": [], "files": 3, "tensors": "x", "kind": null}',
        "npy, endless array": b"\x93NUMPY\x01\x00v\x00"
        + b"{'descr': '<i8', 'fortran_order': False, 'shape': (1000000000000000,), }".ljust(117) + b"\n",
        "an HDF5 signature": b"\x89HDF\r\n\x1a\n" + bytes(range(256)) * 16,
        "nothing": b"",
    }  # fmt: skip


def laughs() -> str:
    """YAML whose nine aliases stand for 10^9 words."""
    lines = ["a0: &a0 [lol, lol, lol, lol, lol, lol, lol, lol, lol, lol]"]
    for level in range(1, 10):
        lines.append(f"a{level}: &a{level} [" + ", ".join([f"*a{level - 1}"] * 10) + "]")
    return "\n".join(lines)


def yaml_texts(canary: Path) -> dict[str, str]:
    """Configurations that run code or fill memory in trusting readers, by kind."""
    command = f"touch {canary}"
    return {
        "python/object/apply": f"model: !!python/object/apply:os.system ['{command}']",
        "python/object/new": f"model: !!python/object/new:subprocess.Popen [['touch', '{canary}']]",
        "python/name": "model: !!python/name:os.system",
        "python/module": "model: !!python/module:os",
        "a tag on a key": f"? !!python/object/apply:os.system ['{command}']\n: 1",
        "a local tag": "model: !include /etc/passwd",
        "billion laughs": laughs(),
        "a merge key": "base: &b {x: 1}\nmodel:\n  <<: *b",
        "an alias of itself": "model: &m [*m]",
        "nested lists": "model: " + "[" * 100_000,
        "nested maps": "model: " + "{a: " * 100_000,
        "a number of a million digits": "model: {num_layers: " + "9" * 900_000 + "}",
        "too much": "# " + "x" * (2 << 20),
        "two documents": "model: {}\n---\nmodel: {}",
        "binary": "model: !!binary aGVsbG8=",
        "a set": "model: !!set {a, b}",
        "nothing that ends": "model: 'never closed",
        "control characters": "model: \x07\x1b[2J",
    }
