"""Files of a checkpoint: records, manifest, random states."""

from __future__ import annotations

import json
import random
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from megacog.checkpoint.manifest import FILE_NAME, FileEntry, Manifest, check_contents, check_sizes, read_manifest
from megacog.checkpoint.records import RecordReader, RecordWriter, Snapshot, assign_owners, copied
from megacog.checkpoint.rng import capture_rng, restore_rng, seed_everything
from megacog.errors import CheckpointError


def manifest(**changes: object) -> Manifest:
    fields = dict(
        step=3, samples=24, config={"train": {"stage": "base"}}, config_hash="c", world={"ranks": 1}, fingerprints={},
        versions={}, frozen=None, parameters={"w": "a.safetensors"},
        files={"a.safetensors": FileEntry(3, 891568578)},
    )  # fmt: skip
    return Manifest(**(fields | changes))  # type: ignore[arg-type]


def test_records_come_back_bitwise_in_their_dtypes_from_several_files(tmp_path: Path) -> None:
    writer = RecordWriter(tmp_path, "records", 1, file_bytes=100)
    records = {
        f"layers.{index}.weight": {
            "weight": torch.randn(5, 4).bfloat16(), "exp_avg": torch.randn(5, 4), "step": torch.tensor(7.0),
        }
        for index in range(3)
    }  # fmt: skip
    for name, record in records.items():
        writer.add(name, record)
    files = writer.finish()
    assert sorted(files) == [f"records-00001-{index:02d}.safetensors" for index in range(3)]
    placement = {name: file for file, names in files.items() for name in names}
    reader = RecordReader(tmp_path, placement)
    for name, record in records.items():
        found = reader.read(name)
        assert found.keys() == record.keys()
        for field in record:
            assert found[field].dtype == record[field].dtype and torch.equal(found[field], record[field])


@pytest.mark.parametrize("by", ["copy", "snapshot"])
def test_views_are_written_whole_and_as_they_were_when_copied(tmp_path: Path, by: str) -> None:
    tensor = torch.zeros(3, 4)
    snapshot = Snapshot()
    snapshot.add("a", {"weight": tensor.T})  # the memory is used again
    tensor.copy_(torch.arange(12.0).view(3, 4))
    snapshot.add("a", {"weight": tensor.T})
    snapshot.wait_for_device()
    snapshot.copy()
    held = copied({"weight": tensor.T}) if by == "copy" else snapshot.records["a"]
    tensor.zero_()
    writer = RecordWriter(tmp_path, "r", 0)
    writer.add("a", held)
    placement = {name: file for file, names in writer.finish().items() for name in names}
    assert torch.equal(RecordReader(tmp_path, placement).read("a")["weight"], torch.arange(12.0).view(3, 4).T)


def test_an_error_while_writing_waits_for_finish(tmp_path: Path) -> None:
    writer = RecordWriter(tmp_path / "missing", "r", 0, file_bytes=1)
    writer.add("a", {"weight": torch.ones(4)})
    writer.add("b", {"weight": torch.ones(4)})
    with pytest.raises(OSError):
        writer.finish()


def test_missing_parameters_and_files_are_named(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="no parameter w"):
        RecordReader(tmp_path, {}).read("w")
    with pytest.raises(CheckpointError, match="gone.safetensors"):
        RecordReader(tmp_path, {"w": "gone.safetensors"}).read("w")


@given(st.dictionaries(st.text("abc.", min_size=1), st.integers(1, 1000)), st.integers(1, 8))
def test_every_parameter_has_one_owner_and_no_rank_has_far_more_than_its_share(
    sizes: dict[str, int], ranks: int
) -> None:
    owners = assign_owners(sizes, ranks)
    assert owners.keys() == sizes.keys() and all(0 <= rank < ranks for rank in owners.values())
    load: Counter[int] = Counter()
    for name, rank in owners.items():
        load[rank] += sizes[name]
    if sizes:
        assert max(load.values()) <= sum(sizes.values()) / ranks + max(sizes.values())


def test_manifest_comes_back_equal(tmp_path: Path) -> None:
    (tmp_path / FILE_NAME).write_text(manifest().to_json())
    assert read_manifest(tmp_path) == manifest()


@pytest.mark.parametrize("damage", ["", "{}", "[1]", "not json"])
def test_a_damaged_manifest_is_refused(tmp_path: Path, damage: str) -> None:
    (tmp_path / FILE_NAME).write_text(damage)
    with pytest.raises(CheckpointError, match="damaged"):
        read_manifest(tmp_path)


def test_a_changed_number_in_the_manifest_is_noticed(tmp_path: Path) -> None:
    (tmp_path / FILE_NAME).write_text(manifest().to_json().replace('"step": 3', '"step": 4'))
    with pytest.raises(CheckpointError, match="checksum"):
        read_manifest(tmp_path)


def test_a_manifest_of_a_later_version_says_so(tmp_path: Path) -> None:
    import zlib

    content = json.loads(manifest().to_json())
    content.pop("crc32")
    content["version"] = 2
    content["crc32"] = zlib.crc32(json.dumps(content, indent=1, sort_keys=True).encode())
    (tmp_path / FILE_NAME).write_text(json.dumps(content))
    with pytest.raises(CheckpointError, match="version 2"):
        read_manifest(tmp_path)


def test_missing_truncated_and_flipped_files_are_told_apart(tmp_path: Path) -> None:
    path = tmp_path / "a.safetensors"
    path.write_bytes(b"abc")
    files = {"a.safetensors": FileEntry.of(path)}
    check_sizes(tmp_path, files)
    check_contents(tmp_path, files)
    path.write_bytes(b"abd")
    check_sizes(tmp_path, files)
    with pytest.raises(CheckpointError, match="checksum"):
        check_contents(tmp_path, files)
    path.write_bytes(b"ab")
    with pytest.raises(CheckpointError, match="2 bytes instead of 3"):
        check_sizes(tmp_path, files)
    path.unlink()
    with pytest.raises(CheckpointError, match="missing"):
        check_sizes(tmp_path, files)


def draws() -> tuple[float, float, float, float]:
    return random.random(), random.gauss(0, 1), float(np.random.standard_normal()), float(torch.rand(()))


def test_generators_go_on_where_they_were() -> None:
    seed_everything(5)
    draws()
    state = capture_rng()
    expected = [draws() for _ in range(3)]
    seed_everything(6)
    restore_rng(state)
    assert [draws() for _ in range(3)] == expected
