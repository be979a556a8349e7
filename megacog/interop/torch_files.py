"""Opening `.pt` files of others: without running what they say, and with words for the usual bad downloads."""

from __future__ import annotations

import os
import re
import warnings
import zipfile
from collections.abc import Mapping, Sequence
from difflib import get_close_matches
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from megacog.errors import CheckpointError
from megacog.runtime.log import get_logger

# Rebuilding a numpy array of numbers; numpy 1 calls the module numpy.core, numpy 2 numpy._core. Typical use:
# `np_rng_state`, which SwissArmyTransformer saves beside the weights.
_RECONSTRUCT = np.empty(0).__reduce__()[0]
NUMPY_ARRAYS: tuple[Any, ...] = (
    *((_RECONSTRUCT, f"numpy.{core}.multiarray._reconstruct") for core in ("core", "_core")),
    np.ndarray,
    np.dtype,
    *sorted({type(np.dtype(code)) for code in np.typecodes["AllInteger"] + np.typecodes["Float"] + "?"}, key=str),
)
"""An `allow` of `open_torch_file`."""

_ZIP = b"PK\x03\x04"
# Head of torch.save's format before 1.6: the pickle of a magic number.
_LEGACY = b"\x80\x02\x8a\x0al\xfc\x9cF\xf9 j\xa8P\x19."
_GIT_LFS = b"version https://git-lfs.github.com/spec/"
_HTML = (b"<!doctype", b"<html", b"<head", b"<body", b"<?xml")
_ARCHIVES = {b"\x1f\x8b": "gzip", b"7z\xbc\xaf\x27\x1c": "7z", b"BZh": "bzip2", b"\xfd7zXZ": "xz", b"Rar!": "RAR"}
_HEAD_BYTES = 1024
_LISTED = 8  # names in a message
_REFUSED = re.compile(r"GLOBAL (\S+)")
_FOREIGN = re.compile("Can only build|allowlist|Unsupported operand", re.IGNORECASE)
_UNPICKLER = re.compile(r"WeightsUnpickler error:\s*(.+)")
logger = get_logger(__name__)


def open_torch_file(path: Path | str, mmap: bool = True, allow: Sequence[Any] = ()) -> dict[str, Any]:
    """Returns the dict in a file of `torch.save`, tensors on the CPU, without running code from the file.

    Args:
        path: the file.
        mmap: map tensors instead of reading them (copy on write: the file stays as it is). Files of torch
            before 1.6 cannot be mapped and are read, with a warning.
        allow: classes and functions besides tensors and plain containers that the file may construct, as in
            `torch.serialization.safe_globals`.

    Raises:
        CheckpointError: the file is missing, truncated, something else under this name (a packed zip, an HTML
            page, a git-lfs pointer, ...), wants to construct something else, or holds no dict with string keys.
    """
    path = Path(path)
    legacy = _require_torch_file(path)
    if legacy and mmap:
        logger.warning("%s: format of torch before 1.6, which cannot be mapped; it is read into memory", path)
    try:
        with torch.serialization.safe_globals(list(allow)), warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)  # on typed storages of old files
            stored = torch.load(path, map_location="cpu", weights_only=True, mmap=mmap and not legacy)
    # torch reports damage by whatever the damaged bytes led to.
    except Exception as error:
        raise CheckpointError(_reason(path, error)) from error
    if not isinstance(stored, dict) or not all(isinstance(key, str) for key in stored):
        kind = type(stored).__name__
        raise CheckpointError(f"{path} holds a {kind}, not a dict with string keys; is it another file?")
    return stored


def require_tensors(path: Path, found: Mapping[str, object], expected: Mapping[str, Sequence[int]]) -> None:
    """Checks that `found` holds a tensor of the expected shape under each name; further names are allowed.

    Raises:
        CheckpointError: a name is missing (each comes with the nearest name that is there), is no tensor, or
            has another shape.
    """
    missing = [name for name in expected if name not in found]
    if missing:
        unused = sorted(set(found) - set(expected))
        lines = ", ".join(_missing(name, unused) for name in missing)
        raise CheckpointError(f"{path} lacks {len(missing)} of {len(expected)} tensors: {lines}.")
    wrong = []
    for name, shape in expected.items():
        tensor = found[name]
        if not isinstance(tensor, Tensor):
            wrong.append(f"{name} is a {type(tensor).__name__}, not a tensor")
        elif list(tensor.shape) != list(shape):
            wrong.append(f"{name} is {list(tensor.shape)}, expected {list(shape)}")
    if wrong:
        raise CheckpointError(f"{path}: {len(wrong)} tensor(s) do not fit: {', '.join(wrong)}.")


def require_no_stand_in(path: Path, what: str) -> bytes:
    """Returns the first bytes of a file that was downloaded, after checking that it is not what failed downloads leave.

    Args:
        path: the file.
        what: it should be, for messages.

    Raises:
        CheckpointError: it is missing, unreadable, empty, an HTML page or a git-lfs pointer.
    """
    if path.is_dir():
        raise CheckpointError(f"{path} is a folder; name the file of {what} in it.")
    try:
        with open(path, "rb") as file:
            head = file.read(_HEAD_BYTES)
    except OSError as error:
        raise CheckpointError(f"{path}: {error.strerror}; it should be {what}. Correct the path.") from error
    if not head:
        raise CheckpointError(f"{path} is empty; it should be {what}. Download it again.")
    if head.startswith(_GIT_LFS):
        size = re.search(rb"^size (\d+)", head, re.MULTILINE)
        whole = f" ({int(size[1])} bytes)" if size else ""
        raise CheckpointError(
            f"{path} is a git-lfs pointer, {path.stat().st_size} bytes that only name the real file{whole}. "
            "Fetch it with `git lfs pull` in its repository, or download it from its page."
        )
    if head.lstrip(b"\xef\xbb\xbf \t\r\n").lower().startswith(_HTML):
        raise CheckpointError(
            f"{path} is an HTML page, not {what}: the server answered with a page (a login, a confirmation, an "
            "error). Open it in a browser to see what it says, then download the file itself."
        )
    return head


def _require_torch_file(path: Path) -> bool:
    """Returns whether a file of torch.save has the format before torch 1.6."""
    head = require_no_stand_in(path, "a file of torch.save")
    if head.startswith(_ZIP):
        _require_torch_zip(path)
        return False
    if head.startswith(_LEGACY):
        return True
    for magic, kind in _ARCHIVES.items():
        if head.startswith(magic):
            raise CheckpointError(f"{path} is packed with {kind}. Unpack it and name the .pt file.")
    if head[8:9] == b"{" and int.from_bytes(head[:8], "little") < path.stat().st_size:
        raise CheckpointError(f"{path} is a safetensors file; a file of torch.save (.pt) is expected here.")
    raise CheckpointError(
        f"{path} is no file of torch.save (it starts with {head[:16]!r}): damaged, or something else under this "
        "name. Download it again."
    )


def _require_torch_zip(path: Path) -> None:
    size = os.path.getsize(path)
    try:
        with zipfile.ZipFile(path) as archive:
            names = archive.namelist()
    except (zipfile.BadZipFile, OSError, ValueError, NotImplementedError) as error:
        raise CheckpointError(
            f"{path} is truncated or damaged: its {size} bytes ({size / 2**30:.2f} GiB) lack the table of contents "
            f"that ends a file of torch.save ({error}). Download it again and compare the size with the source."
        ) from error
    if any(name.split("/")[1:] == ["data.pkl"] for name in names):
        return
    inside = [name for name in names if not name.endswith("/")]
    shown = ", ".join(inside[:_LISTED]) + (", ..." if len(inside) > _LISTED else "")
    raise CheckpointError(f"{path} is a zip archive still packed (it holds {shown}). Unpack it, name what is inside.")


def _reason(path: Path, error: Exception) -> str:
    text = str(error)
    refused = _REFUSED.search(text)
    if refused:
        return (
            f"{path} wants to construct {refused[1]}, which megacog refuses: a foreign file must hold tensors and "
            "plain containers only, since anything else can run code. Where you trust the file, save its tensors "
            "alone in a process of your own: torch.save({'module': torch.load(path, weights_only=False)['module']}, "
            "new)."
        )
    if _FOREIGN.search(text):
        return (
            f"{path} holds something other than tensors, plain containers and arrays of numbers, which megacog refuses "
            f"({_line(text, error)}): objects in it could run code. Where you trust the file, save its tensors alone."
        )
    if isinstance(error, MemoryError):
        return f"{path}: not enough memory to open it."
    why = _line(text, error)
    return f"{path} is truncated or damaged ({why}). Download it again and compare the size with the source."


def _line(text: str, error: Exception) -> str:
    unpickler = _UNPICKLER.search(text)
    return unpickler[1] if unpickler else next(iter(text.splitlines()), type(error).__name__)


def _missing(name: str, unused: Sequence[str]) -> str:
    near = get_close_matches(name, unused, 1)
    return f"{name} (the file has {near[0]})" if near else name
