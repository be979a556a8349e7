"""Opening foreign .pt files: what loads, what is refused, what the messages say."""

from __future__ import annotations

import os
import random
import re
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from megacog.errors import CheckpointError
from megacog.interop.torch_files import NUMPY_ARRAYS, open_torch_file, require_tensors

WEIGHTS = {"a.weight": torch.arange(6.0).reshape(2, 3), "a.bias": torch.zeros(2, dtype=torch.float16)}


class Runner:
    """Unpickling one would run a command."""

    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> tuple[object, ...]:
        return os.system, (f"touch {self.marker}",)


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "model.pt"


def save(content: object, path: Path, **options: bool) -> Path:
    torch.save(content, path, **options)
    return path


def message(path: Path, **options: object) -> str:
    with pytest.raises(CheckpointError) as caught:
        open_torch_file(path, **options)  # type: ignore[arg-type]
    assert str(path) in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize("mmap", [True, False])
@pytest.mark.parametrize("zipped", [True, False], ids=["zip", "before-1.6"])
def test_tensors_load_bitwise_from_both_formats(path: Path, mmap: bool, zipped: bool) -> None:
    save({"module": WEIGHTS, "iteration": 3, "none": None}, path, _use_new_zipfile_serialization=zipped)
    stored = open_torch_file(path, mmap=mmap)
    assert stored["iteration"] == 3 and stored["none"] is None
    for name, tensor in WEIGHTS.items():
        assert stored["module"][name].dtype == tensor.dtype and torch.equal(stored["module"][name], tensor)


def test_mapped_tensors_do_not_change_the_file(path: Path) -> None:
    before = save({"module": WEIGHTS}, path).read_bytes()
    open_torch_file(path)["module"]["a.weight"].zero_()
    assert path.read_bytes() == before


@pytest.mark.parametrize("core", ["numpy.core", "numpy._core"])
def test_random_states_of_numpy_load_when_allowed_under_both_names_of_its_core(path: Path, core: str) -> None:
    states = {"np_rng_state": np.random.get_state(), "random_rng_state": random.getstate()}
    save({"module": WEIGHTS, "torch_rng_state": torch.get_rng_state(), **states}, path)
    rename(path, b"numpy._core.multiarray", f"{core}.multiarray".encode())
    assert "_reconstruct" in message(path)
    stored = open_torch_file(path, allow=NUMPY_ARRAYS)
    assert np.array_equal(stored["np_rng_state"][1], states["np_rng_state"][1])
    assert stored["random_rng_state"] == states["random_rng_state"]


def rename(path: Path, old: bytes, new: bytes) -> None:
    """Replace a module's name in the pickle of a file of torch.save."""
    with zipfile.ZipFile(path) as archive:
        members = {info.filename: archive.read(info) for info in archive.infolist()}
    with zipfile.ZipFile(path, "w") as archive:
        for name, content in members.items():
            archive.writestr(name, content.replace(old, new) if name.endswith("data.pkl") else content)


@pytest.mark.parametrize("allow", [(), NUMPY_ARRAYS], ids=["nothing", "numpy"])
def test_code_in_a_file_is_refused_by_name_and_not_run(path: Path, allow: tuple[object, ...]) -> None:
    marker = path.with_name("ran")
    save({"module": WEIGHTS, "extra": Runner(marker)}, path)
    said = message(path, allow=allow)
    assert re.search(r"posix.system|os.system", said) and "refuses" in said
    assert not marker.exists()


@pytest.mark.parametrize("dtype", [object, "U3"])
def test_arrays_of_anything_but_numbers_are_refused_not_called_damage(path: Path, dtype: Any) -> None:
    save({"module": WEIGHTS, "extra": np.array(["a", "b"], dtype=dtype)}, path)
    said = message(path, allow=NUMPY_ARRAYS)
    assert "refuses" in said and "damaged" not in said


def test_objects_of_other_classes_are_refused_by_name(path: Path) -> None:
    import argparse

    save({"module": WEIGHTS, "args": argparse.Namespace(a=1)}, path)
    assert "argparse.Namespace" in message(path, allow=NUMPY_ARRAYS)


@pytest.mark.parametrize("zipped", [True, False], ids=["zip", "before-1.6"])
@pytest.mark.parametrize("share", [0.3, 0.7, 0.95])
def test_a_truncated_file_is_told_as_such(path: Path, zipped: bool, share: float) -> None:
    save({"module": {"a": torch.zeros(4000)}}, path, _use_new_zipfile_serialization=zipped)
    path.write_bytes(path.read_bytes()[: int(share * path.stat().st_size)])
    assert "truncated" in message(path)


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b"", "is empty"),
        (b"\n <!DOCTYPE html><html><body>Confirm</body></html>", "HTML page"),
        (b"<html>", "HTML page"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 123456\n", "git-lfs pointer.*123456 bytes"),
        (b"\x1f\x8b\x08\x00rest", "packed with gzip"),
        ((40).to_bytes(8, "little") + b'{"a":{}}' + bytes(99), "safetensors"),
        (b"something else", "no file of torch.save"),
    ],
)
def test_other_content_is_told_for_what_it_is(path: Path, content: bytes, said: str) -> None:
    path.write_bytes(content)
    assert re.search(said, message(path))


def test_a_zip_still_packed_is_told_with_what_it_holds(path: Path) -> None:
    inner = save({"module": WEIGHTS}, path.with_name("inner.pt"))
    with zipfile.ZipFile(path, "w") as archive:
        archive.write(inner, "coglm/27000/mp_rank_00_model_states.pt")
    said = message(path)
    assert "still packed" in said and "coglm/27000/mp_rank_00_model_states.pt" in said


def test_missing_files_folders_and_lists_are_told(path: Path) -> None:
    assert "No such file" in message(path)
    assert "is a folder" in message(path.parent)
    save([1, 2], path)
    assert "holds a list" in message(path)


def test_required_tensors_are_told_by_name_and_shape(path: Path) -> None:
    require_tensors(path, WEIGHTS, {"a.weight": (2, 3)})
    with pytest.raises(CheckpointError, match=r"lacks 1 of 2 tensors: a.weights \(the file has a.weight\)"):
        require_tensors(path, WEIGHTS, {"a.weights": (2, 3), "a.bias": (2,)})
    with pytest.raises(CheckpointError, match=r"a.weight is \[2, 3\], expected \[3, 2\]"):
        require_tensors(path, WEIGHTS, {"a.weight": (3, 2), "a.bias": (2,)})
    with pytest.raises(CheckpointError, match="a is a int, not a tensor"):
        require_tensors(path, {"a": 1}, {"a": ()})
