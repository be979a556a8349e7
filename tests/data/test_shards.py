"""Shards: what is written is read, twice the same bytes, and nothing damaged passes."""

from __future__ import annotations

import copy
import errno
import os
import random
import signal
import subprocess
import sys
import time
import zlib
from collections.abc import Callable
from pathlib import Path

import h5py
import numpy as np
import pytest

from megacog.data.shards import Shard, ShardMeta, ShardWriter, expand_shards, shard_path
from megacog.errors import DataError, EnvError

META = ShardMeta((2, 3), 50, "ab" * 32, "av 1.0", '{"fps": 8}')


def clip_codes(clip: int) -> np.ndarray:
    return np.random.default_rng(clip).integers(0, 50, (3 + clip, 2, 3))


def write_shard(path: Path, clips: int = 3, meta: ShardMeta = META, tokens: bool = False) -> Path:
    with ShardWriter(path, meta, "text-fingerprint" if tokens else None) as writer:
        for clip in range(clips):
            ids = [7, 8, 9 + clip] if tokens else None
            writer.add(f"clip-{clip}", f"caption {clip} \u79d2", clip_codes(clip), 8.0, ids)
    return path


def flip(path: Path, needle: bytes, offset: int = 0) -> None:
    data = bytearray(path.read_bytes())
    assert data.count(needle) == 1
    data[data.index(needle) + offset] ^= 1
    path.write_bytes(data)


def test_a_shard_gives_back_what_was_written(tmp_path: Path) -> None:
    shard = Shard(write_shard(tmp_path / "a.h5", tokens=True))
    assert shard.meta == META
    assert shard.num_clips == 3
    assert list(shard.clip_ids) == ["clip-0", "clip-1", "clip-2"]
    assert list(shard.captions) == [f"caption {clip} \u79d2" for clip in range(3)]
    assert shard.captions[-1] == "caption 2 \u79d2"
    assert shard.captions[1:] == ["caption 1 \u79d2", "caption 2 \u79d2"]
    assert shard.num_frames.tolist() == [3, 4, 5]
    assert shard.fps.tolist() == [8.0] * 3
    assert shard.text_tokenizer == "text-fingerprint"
    assert shard.token_ids(2).tolist() == [7, 8, 11]
    for clip in range(3):
        np.testing.assert_array_equal(shard.read(clip, slice(None)), clip_codes(clip))
    np.testing.assert_array_equal(shard.read(2, [4, 0, 0]), clip_codes(2)[[4, 0, 0]])
    np.testing.assert_array_equal(shard.read(2, np.array([1, 3])), clip_codes(2)[[1, 3]])
    np.testing.assert_array_equal(shard.read(2, slice(0, 5, 2)), clip_codes(2)[::2])
    shard.verify()
    assert os.listdir(tmp_path) == ["a.h5"]


@pytest.mark.parametrize(("codebook_size", "dtype"), [(65536, "<u2"), (65537, "<u4")])
def test_codes_are_as_wide_as_the_codebook_needs(tmp_path: Path, codebook_size: int, dtype: str) -> None:
    meta = ShardMeta((1, 1), codebook_size, "f", "d", "s")
    with ShardWriter(tmp_path / "a.h5", meta) as writer:
        writer.add("a", "b", np.full((1, 1, 1), codebook_size - 1), 1.0)
    codes = Shard(tmp_path / "a.h5").read(0, [0])
    assert codes.dtype == np.dtype(dtype)
    assert codes.item() == codebook_size - 1


def test_an_empty_shard_is_a_shard(tmp_path: Path) -> None:
    shard = Shard(write_shard(tmp_path / "a.h5", clips=0))
    shard.verify()
    assert shard.num_clips == 0 and list(shard.captions) == []


def test_the_same_clips_give_the_same_bytes(tmp_path: Path) -> None:
    first = write_shard(tmp_path / "a.h5", tokens=True).read_bytes()
    time.sleep(1.1)  # time stamps in HDF5 count whole seconds
    assert write_shard(tmp_path / "b.h5", tokens=True).read_bytes() == first


def test_an_error_while_writing_leaves_nothing(tmp_path: Path) -> None:
    with pytest.raises(ZeroDivisionError), ShardWriter(tmp_path / "a.h5", META) as writer:
        writer.add("a", "b", clip_codes(0), 8.0)
        raise ZeroDivisionError
    assert os.listdir(tmp_path) == []


def test_an_error_while_writing_keeps_the_old_shard(tmp_path: Path) -> None:
    before = write_shard(tmp_path / "a.h5").read_bytes()
    with pytest.raises(ZeroDivisionError), ShardWriter(tmp_path / "a.h5", META):
        raise ZeroDivisionError
    assert (tmp_path / "a.h5").read_bytes() == before


def test_a_full_disk_is_an_environment_error_and_leaves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object) -> None:
        raise RuntimeError("Unable to flush (file write failed: errno = 28, error message = 'No space left')")

    monkeypatch.setattr(h5py.File, "flush", full)
    with pytest.raises(EnvError, match="a.h5.*no space"), ShardWriter(tmp_path / "a.h5", META) as writer:
        writer.add("a", "b", clip_codes(0), 8.0)
    assert os.listdir(tmp_path) == []


def test_a_disk_that_fills_up_while_frames_arrive_is_an_environment_error(tmp_path: Path) -> None:
    with pytest.raises(EnvError, match="a.h5.*no space"), ShardWriter(tmp_path / "a.h5", META):
        raise OSError(errno.ENOSPC, "No space left on device")
    assert os.listdir(tmp_path) == []


def test_a_shard_that_reads_back_wrong_is_not_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ShardWriter, "_copy_frames", lambda *_: None)
    with pytest.raises(DataError, match="clip-0"):
        write_shard(tmp_path / "a.h5")
    assert os.listdir(tmp_path) == []


def test_a_killed_writer_leaves_no_shard(tmp_path: Path) -> None:
    script = (
        "import numpy as np, time\n"
        "from megacog.data.shards import ShardMeta, ShardWriter\n"
        f"with ShardWriter({str(tmp_path / 'a.h5')!r}, ShardMeta((1, 1), 2, 'f', 'd', 's')) as writer:\n"
        "    writer.add('a', 'b', np.zeros((1, 1, 1), int), 1.0)\n"
        "    print('ready', flush=True)\n"
        "    time.sleep(60)\n"
    )
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(path for path in sys.path if path)}
    with subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE, env=environment) as process:
        assert process.stdout is not None and process.stdout.readline() == b"ready\n"
        process.send_signal(signal.SIGKILL)
    assert not list(tmp_path.glob("*.h5"))
    with pytest.raises(DataError, match="no shard matches"):
        expand_shards(str(tmp_path / "*.h5"))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"clip_id": ""}, "id is empty"),
        ({"clip_id": "clip-0"}, "used twice"),
        ({"caption": "  "}, "empty caption"),
        ({"caption": "\ud800"}, "not valid Unicode"),
        ({"codes": np.zeros((0, 2, 3), int)}, "integers"),
        ({"codes": np.zeros((1, 3, 2), int)}, "integers"),
        ({"codes": np.zeros((1, 2, 3))}, "integers"),
        ({"codes": np.full((1, 2, 3), 50)}, "codebook 0..49"),
        ({"codes": np.full((1, 2, 3), -1)}, "codebook 0..49"),
        ({"fps": 0.0}, "positive"),
        ({"fps": float("nan")}, "positive"),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, dict) else "",
)
def test_a_bad_clip_is_refused_by_name(tmp_path: Path, change: dict, message: str) -> None:
    clip = {"clip_id": "new", "caption": "text", "codes": clip_codes(0), "fps": 8.0}
    with pytest.raises(DataError, match=message), ShardWriter(tmp_path / "a.h5", META) as writer:
        writer.add("clip-0", "text", clip_codes(0), 8.0)
        writer.add(**{**clip, **change})


def test_a_missing_shard_is_named(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="gone.h5"):
        Shard(tmp_path / "gone.h5")


def test_a_file_that_is_not_hdf5_is_refused(tmp_path: Path) -> None:
    (tmp_path / "a.h5").write_text("video,caption\n")
    with pytest.raises(DataError, match="a.h5 is not an HDF5 file"):
        Shard(tmp_path / "a.h5")


def test_an_hdf5_file_of_another_kind_is_refused(tmp_path: Path) -> None:
    with h5py.File(tmp_path / "a.h5", "w") as file:
        file["frames"] = np.zeros(3)
    with pytest.raises(DataError, match="no megacog-frames shard"):
        Shard(tmp_path / "a.h5")


def test_another_version_is_refused_with_both_numbers(tmp_path: Path) -> None:
    path = write_shard(tmp_path / "a.h5")
    with h5py.File(path, "r+", libver="latest") as file:
        file.attrs["version"] = np.int64(2)
    with pytest.raises(DataError, match="version 2.*version 1"):
        Shard(path)


def test_every_truncation_is_noticed_at_open(tmp_path: Path) -> None:
    path = write_shard(tmp_path / "a.h5")
    data = path.read_bytes()
    for size in range(0, len(data), 97):
        path.write_bytes(data[:size])
        with pytest.raises(DataError, match="a.h5"):
            Shard(path)


def test_a_damaged_frame_is_named_at_every_read(tmp_path: Path) -> None:
    path = write_shard(tmp_path / "a.h5")
    flip(path, clip_codes(1)[2].astype("<u2").tobytes())
    shard = Shard(path)
    shard.read(1, [0, 1, 3])
    for _ in range(2):
        with pytest.raises(DataError, match="a.h5: frame 2 of clip 'clip-1'"):
            shard.read(1, [0, 2])
    with pytest.raises(DataError, match="frame 2 of clip 'clip-1'"):
        shard.verify()


def test_a_damaged_caption_is_noticed_at_open(tmp_path: Path) -> None:
    path = write_shard(tmp_path / "a.h5")
    flip(path, b"caption 1")
    with pytest.raises(DataError, match="/clips/captions is damaged"):
        Shard(path)


def test_codes_outside_the_codebook_are_refused_though_their_checksum_fits(tmp_path: Path) -> None:
    path = write_shard(tmp_path / "a.h5")
    with h5py.File(path, "r+", libver="latest") as file:
        file.attrs["codebook_size"] = np.int64(3)
    with pytest.raises(DataError, match=r"codebook_size 3"):
        Shard(path).read(0, [0])
    with pytest.raises(DataError, match="outside the codebook"):
        Shard(path).verify()


def test_a_disk_that_fails_is_told_with_the_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shard = Shard(write_shard(tmp_path / "a.h5"))

    def fail(*_: object) -> int:
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    monkeypatch.setattr(os, "preadv", fail)
    for use in (lambda: shard.read(1, [0]), shard.verify):
        with pytest.raises(DataError, match=r"a.h5 cannot be read at byte \d+: Input/output error"):
            use()


@pytest.mark.parametrize(("name", "index", "value"), [("token_ids", 4, -1), ("token_offsets", 1, 0)])
def test_impossible_token_ids_are_refused_though_their_checksum_fits(
    tmp_path: Path, name: str, index: int, value: int
) -> None:
    path = write_shard(tmp_path / "a.h5", tokens=True)
    with h5py.File(path, "r+", libver="latest") as file:
        stored = file[f"clips/{name}"]
        values = stored[...]
        values[index] = value
        stored[...] = values
        stored.attrs["crc32"] = np.uint32(zlib.crc32(values))
    with pytest.raises(DataError, match="a.h5: /clips/token_ids has clips without ids, or impossible ids"):
        Shard(path)


@pytest.mark.parametrize("kind", ["external link", "soft link", "external storage", "chunks", "virtual"])
def test_data_from_elsewhere_is_refused(tmp_path: Path, kind: str) -> None:
    path = write_shard(tmp_path / "a.h5")
    other = write_shard(tmp_path / "other.h5")
    frames = np.zeros((12, 2, 3), "<u2")
    with h5py.File(path, "r+", libver="latest") as file:
        del file["frames"]
        if kind == "external link":
            file["frames"] = h5py.ExternalLink(str(other), "/frames")
        elif kind == "soft link":
            file["frames"] = h5py.SoftLink("/frames_crc32")
        elif kind == "external storage":
            (tmp_path / "raw").write_bytes(frames.tobytes())
            file.create_dataset("frames", frames.shape, frames.dtype, external=str(tmp_path / "raw"))
        elif kind == "chunks":
            file.create_dataset("frames", data=frames, chunks=(1, 2, 3))
        else:
            layout = h5py.VirtualLayout(frames.shape, frames.dtype)
            layout[:] = h5py.VirtualSource(str(other), "frames", frames.shape)
            file.create_virtual_dataset("frames", layout)
    with pytest.raises(DataError, match="/frames is (a link|not stored)"):
        Shard(path)


def test_a_shard_survives_copying_and_forking(tmp_path: Path) -> None:
    shard = Shard(write_shard(tmp_path / "a.h5"))
    shard.read(0, [0])
    np.testing.assert_array_equal(copy.copy(shard).read(1, [1]), clip_codes(1)[[1]])
    child = os.fork()
    if child == 0:
        os._exit(0 if (shard.read(2, [4]) == clip_codes(2)[[4]]).all() else 1)
    assert os.waitpid(child, 0)[1] == 0
    np.testing.assert_array_equal(shard.read(0, [2]), clip_codes(0)[[2]])


def test_an_index_outside_the_clip_is_an_error(tmp_path: Path) -> None:
    shard = Shard(write_shard(tmp_path / "a.h5"))
    for index in (3, -1):
        with pytest.raises(IndexError, match="3 frames"):
            shard.read(0, [index])


def test_patterns_expand_in_order_and_miss_nothing(tmp_path: Path) -> None:
    paths = [shard_path(tmp_path / "clips", index, 3) for index in range(3)]
    assert paths[1].name == "clips-00001-of-00003.h5"
    for path in reversed(paths):
        path.touch()
    assert expand_shards(tmp_path / "clips-*.h5") == paths
    assert expand_shards(str(paths[1])) == [paths[1]]
    paths[1].unlink()
    with pytest.raises(DataError, match="clips-00001-of-00003.h5 is missing"):
        expand_shards(tmp_path / "clips-*.h5")
    assert expand_shards(tmp_path / "clips-0000[02]*.h5") == [paths[0], paths[2]]
    with pytest.raises(DataError, match="no shard matches.*other"):
        expand_shards(tmp_path / "other-*.h5")


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_every_byte_is_covered_by_a_checksum_or_is_padding(
    tmp_path: Path, record_property: Callable[[str, object], None]
) -> None:
    """Flips every byte of a small shard, one at a time."""
    path = write_shard(tmp_path / "a.h5", clips=1, tokens=True)
    data = path.read_bytes()

    def content(shard: Shard) -> list[object]:
        clips = range(shard.num_clips)
        frames = [shard.read(clip, slice(None)).tolist() for clip in clips]
        tokens = [shard.token_ids(clip).tolist() for clip in clips]
        lists = [list(shard.captions), list(shard.clip_ids), shard.fps.tolist()]
        return [shard.meta, shard.text_tokenizer, frames, tokens, *lists]

    original = content(Shard(path))
    rng = random.Random(0)
    detected = 0
    for position in range(len(data)):
        changed = bytearray(data)
        changed[position] ^= rng.randrange(1, 256)
        path.write_bytes(changed)
        try:
            with Shard(path) as shard:
                shard.verify()
                assert content(shard) == original, f"byte {position} changed the content unnoticed"
        except DataError:
            detected += 1
    record_property("bytes flipped", len(data))
    record_property("detected", detected)
    record_property("in padding, content unchanged", len(data) - detected)
    assert detected > len(data) // 2
