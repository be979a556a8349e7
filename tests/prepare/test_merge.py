"""Merged and resharded sets hold the same clips, bit for bit, and train in the same order."""

from __future__ import annotations

import itertools
import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from megacog.config.schema import Config
from megacog.data.dataset import StageDataset, open_sources
from megacog.data.shards import Shard, ShardMeta, ShardWriter
from megacog.errors import ConfigError, DataError
from megacog.prepare.main import main
from megacog.prepare.merge import MergeSettings, merge
from megacog.prepare.verify import verify
from megacog.tokenizers.text import TextTokenizer, train_text_tokenizer

GRID, CODEBOOK = (2, 2), 16
META = {
    "grid": GRID,
    "codebook_size": CODEBOOK,
    "tokenizer_fingerprint": "f" * 64,
    "decoder": "av",
    "settings": '{"fps": 8}',
}


def _write(path: Path, ids: Sequence[str], text_tokenizer: str | None = None, **changes: Any) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    meta = ShardMeta(**{**META, **changes})
    with ShardWriter(path, meta, text_tokenizer) as writer:
        for clip_id in ids:
            rng = np.random.default_rng(int.from_bytes(clip_id.encode(), "little"))
            codes = rng.integers(0, meta.codebook_size, (int(rng.integers(5, 12)), *meta.grid))
            tokens = rng.integers(0, 99, 3).tolist() if text_tokenizer else None
            writer.add(clip_id, f"up {clip_id}", codes, 8.0 if rng.random() < 0.7 else 24000 / 1001, tokens)
    return path


def _clips(paths: Sequence[Path]) -> list[tuple[Any, ...]]:
    found = []
    for path in paths:
        with Shard(path) as shard:
            for clip, clip_id in enumerate(shard.clip_ids):
                tokens = shard.token_ids(clip).tolist() if shard.text_tokenizer else None
                codes, fps = shard.read(clip, slice(None)), shard.fps[clip].tobytes()
                found.append((clip_id, shard.captions[clip], fps, codes.dtype, codes.tobytes(), tokens))
    return found


@pytest.fixture
def sets(tmp_path: Path) -> list[Path]:
    """Two sets: one of three shards with 4, 1 and 5 clips, one of a single shard with 3."""
    names = (f"clip{k:02d}" for k in itertools.count())
    paths = [
        _write(tmp_path / f"in/one-{index:05d}-of-00003.h5", list(itertools.islice(names, count)))
        for index, count in enumerate((4, 1, 5))
    ]
    return [*paths, _write(tmp_path / "in/two.h5", list(itertools.islice(names, 3)))]


@pytest.mark.parametrize("options", [["--clips-per-shard", "4"], ["--shards", "1"], ["--shards", "3"]])
@pytest.mark.parametrize("tokens", [None, "t" * 64])
def test_the_clips_stay_as_they_are_and_in_order(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], options: list[str], tokens: str | None
) -> None:
    paths = [
        _write(tmp_path / "in/a-00000-of-00002.h5", ["x/0.mp4", "y"], tokens),
        _write(tmp_path / "in/a-00001-of-00002.h5", [], tokens),
        _write(tmp_path / "in/b.h5", [f"clip{k}" for k in range(11)], tokens),
    ]
    before = _clips(paths)
    assert main(["merge", f"{tmp_path}/in/a-*.h5", f"{tmp_path}/in/b.h5", "--out", f"{tmp_path}/out/c", *options]) == 0
    made = sorted((tmp_path / "out").glob("*.h5"))
    sizes = [Shard(path).num_clips for path in made]
    assert sizes == {"4": [4, 4, 4, 1], "1": [13], "3": [4, 4, 5]}[options[1]]
    assert _clips(made) == before == _clips(paths)
    assert "13 clips" in capsys.readouterr().out
    checked = verify([str(path) for path in made])
    assert checked.failures == [] and checked.clips == 13
    with Shard(paths[0]) as old, Shard(made[0]) as new:
        assert (new.meta, new.text_tokenizer) == (old.meta, tokens)
    # Back again, in the old cuts: even the file is the same.
    assert main(["reshard", f"{tmp_path}/out/c-*.h5", "--out", f"{tmp_path}/back/c", "--clips-per-shard", "2"]) == 0
    assert (tmp_path / "back/c-00000-of-00007.h5").read_bytes() == paths[0].read_bytes()


def test_training_sees_the_same_samples_in_the_same_order(sets: list[Path], tmp_path: Path) -> None:
    train_text_tokenizer(["up clip00", "up clip11"], tmp_path / "text", 60)
    text = TextTokenizer.load(tmp_path / "text")
    merge([f"{tmp_path}/in/one-*.h5"], MergeSettings(tmp_path / "out/c", num_shards=2))

    def samples(pattern: Path) -> Any:
        model = {"num_layers": 1, "hidden_size": 16, "num_heads": 1, "grid": GRID, "text_length": 24}
        model |= {"image_vocab_size": CODEBOOK, "text_vocab_size": 99, "inherit": "base"}
        config = Config.model_validate(
            {
                "model": model,
                "tokenizer": {"text": str(tmp_path / "text"), "frames": "none"},
                "data": {"train": [{"path": str(pattern)}]},
                "train": {"stage": "sequential", "run_dir": "run", "steps": 9}
                | {"global_batch_size": 8, "micro_batch_size": 8},
            }
        )
        dataset = StageDataset(config, open_sources(config.data.train, "data.train"), text, training=True)
        return dataset.batch(0, range(64))

    old, new = samples(tmp_path / "in/one-*.h5"), samples(tmp_path / "out/c-*.h5")
    assert (old.sample_ids, old.texts, old.fps) == (new.sample_ids, new.texts, new.fps)
    assert len(set(old.sample_ids)) > 10
    np.testing.assert_array_equal(old.frames_BTP, new.frames_BTP)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"tokenizer_fingerprint": "0" * 64}, "z.h5 has tokenizer_fingerprint 0000"),
        ({"grid": (2, 3)}, r"z.h5 has grid \(2, 3\), .* has \(2, 2\)"),
        ({"codebook_size": 17}, "z.h5 has codebook_size 17"),
        ({"temporal_factor": 2}, "z.h5 has temporal_factor 2"),
        ({"text_tokenizer": "t" * 64}, "z.h5 has text_tokenizer t*, .* has None"),
        ({"settings": '{"fps": 4}'}, r'z.h5 was prepared with settings {"fps": 4}, .*--mixed-settings'),
        ({"decoder": "new"}, "z.h5 was prepared with decoder new"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_sets_that_do_not_go_together_are_named(
    sets: list[Path], tmp_path: Path, changes: dict[str, Any], message: str
) -> None:
    other = _write(tmp_path / "z.h5", ["new"], **changes)
    with pytest.raises(DataError, match=message):
        merge([*map(str, sets), str(other)], MergeSettings(tmp_path / "out/c"))
    assert not (tmp_path / "out").exists()


def test_sets_that_were_prepared_differently_can_be_merged_on_demand(sets: list[Path], tmp_path: Path) -> None:
    other = _write(tmp_path / "z.h5", ["new"], settings='{"fps": 4}', decoder="new")
    made = merge([str(sets[0]), str(other)], MergeSettings(tmp_path / "out/c", mixed_settings=True)).shards
    meta = Shard(made[0]).meta
    assert meta.decoder == "av; new" and json.loads(meta.settings) == {"merged": [{"fps": 8}, {"fps": 4}]}
    assert _clips(made) == _clips([sets[0], other])


def test_a_clip_in_two_sets_is_refused(sets: list[Path], tmp_path: Path) -> None:
    other = _write(tmp_path / "z.h5", ["new", "clip03", "clip12"])
    with pytest.raises(DataError, match=r"2 clip\(s\) are in two shards, e.g. 'clip03' in .*one-00000.* and .*z.h5"):
        merge([*map(str, sets), str(other)], MergeSettings(tmp_path / "out/c"))


def test_the_inputs_are_never_overwritten(sets: list[Path], tmp_path: Path) -> None:
    before = _clips(sets)
    for overwrite in (False, True):
        with pytest.raises(ConfigError, match="is read and would be replaced: choose another --out"):
            merge([f"{tmp_path}/in/one-*.h5"], MergeSettings(tmp_path / "in/one", overwrite=overwrite))
    (tmp_path / "link").symlink_to(tmp_path / "in")
    with pytest.raises(ConfigError, match="is read and would be replaced"):
        merge([f"{tmp_path}/link/one-*.h5"], MergeSettings(tmp_path / "in/one", overwrite=True))
    assert _clips(sets) == before


def test_a_stopped_merge_continues_and_a_second_one_does_nothing(
    sets: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = MergeSettings(tmp_path / "out/c", clips_per_shard=4)
    patterns = [f"{tmp_path}/in/one-*.h5", str(sets[3])]
    read, calls = Shard.read, []

    def stop_at_the_sixth(self: Shard, *where: Any) -> Any:
        calls.append(where)
        if len(calls) == 6:
            raise KeyboardInterrupt
        return read(self, *where)

    monkeypatch.setattr(Shard, "read", stop_at_the_sixth)
    with pytest.raises(KeyboardInterrupt):
        merge(patterns, settings)
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["c.partial"]
    kept = os.stat(tmp_path / "out/c.partial/c-00000.h5").st_ino
    calls.clear()
    monkeypatch.setattr(Shard, "read", lambda self, *where: (calls.append(where), read(self, *where))[1])
    made = merge(patterns, settings)
    assert len(calls) == 13 - 4 and os.stat(made.shards[0]).st_ino == kept
    assert merge(patterns, settings).earlier and len(calls) == 13 - 4
    monkeypatch.undo()
    assert _clips(made.shards) == _clips(sets) and not made.earlier
    with pytest.raises(ConfigError, match="merged_clips: 13 before, 10 now.*--overwrite"):
        merge(patterns[:1], settings)


def test_damage_in_an_input_is_found_and_makes_no_shard(sets: list[Path], tmp_path: Path) -> None:
    content = bytearray(sets[3].read_bytes())
    with Shard(sets[3]) as shard:
        content[content.index(shard.read(1, slice(None)).tobytes())] ^= 1
    sets[3].write_bytes(content)
    with pytest.raises(DataError, match=r"two.h5: frame 0 of clip 'clip11' is damaged"):
        merge(list(map(str, sets)), MergeSettings(tmp_path / "out/c", num_shards=1))
    assert not list((tmp_path / "out").glob("*.h5"))


def test_more_shards_than_clips_and_empty_sets_are_refused(sets: list[Path], tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="--shards 4: there are only 3 clips"):
        merge([str(sets[3])], MergeSettings(tmp_path / "out/c", num_shards=4))
    with pytest.raises(DataError, match="nothing to merge"):
        merge([str(_write(tmp_path / "empty.h5", []))], MergeSettings(tmp_path / "out/c"))
    with pytest.raises(DataError, match="no shard matches"):
        merge([f"{tmp_path}/gone-*.h5"], MergeSettings(tmp_path / "out/c"))
    assert not (tmp_path / "out").exists()
