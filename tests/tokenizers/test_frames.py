from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from megacog.errors import ConfigError, DataError
from megacog.tokenizers.frames import (
    ConvTokenizer,
    ConvTokenizerConfig,
    load_frame_tokenizer,
    write_frame_tokenizer,
)


def make(quantizer: str = "fsq", **changes: object) -> ConvTokenizer:
    """Returns an untrained tokenizer whose codes vary."""
    config = ConvTokenizerConfig(quantizer=quantizer, width=8, blocks=1, codebook_size=32, code_dim=4, **changes)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        tokenizer = ConvTokenizer(config)
        for parameter in tokenizer.parameters():
            torch.nn.init.normal_(parameter, std=0.15)
        if quantizer == "ema_vq":
            tokenizer.quantizer.embedding_KD.normal_()
        # Gives the normalization of the codes its statistics.
        tokenizer.train()(torch.rand(16, 3, 32, 32) * 2 - 1)
    return tokenizer.eval().requires_grad_(False)


def random_frames(count: int, height: int = 32, width: int = 32) -> torch.Tensor:
    generator = torch.Generator().manual_seed(count)
    return torch.randint(0, 256, (count, height, width, 3), dtype=torch.uint8, generator=generator)


@pytest.mark.parametrize("quantizer", ["fsq", "ema_vq"])
def test_codes_do_not_depend_on_the_batch(quantizer: str) -> None:
    tokenizer, frames = make(quantizer), random_frames(37)
    codes = tokenizer.encode(frames)
    assert codes.shape == (37, 8, 8) and codes.dtype == torch.int64
    assert len(codes.unique()) > 8
    order = torch.randperm(37, generator=torch.Generator().manual_seed(0))
    assert torch.equal(tokenizer.encode(frames[order]), codes[order])
    for size in (1, 5, 16):
        assert torch.equal(torch.cat([tokenizer.encode(part) for part in frames.split(size)]), codes)


@pytest.mark.parametrize("quantizer", ["fsq", "ema_vq"])
def test_decoded_frames_do_not_depend_on_the_batch(quantizer: str) -> None:
    tokenizer = make(quantizer)
    codes = torch.randint(0, tokenizer.codebook_size, (19, 8, 8), generator=torch.Generator().manual_seed(0))
    frames = tokenizer.decode(codes)
    assert frames.shape == (19, 32, 32, 3) and frames.dtype == torch.uint8
    assert torch.equal(torch.cat([tokenizer.decode(part) for part in codes.split(3)]), frames)


@pytest.mark.parametrize("downsample", [2, 4, 8])
def test_grid_follows_size_and_downsampling(downsample: int) -> None:
    tokenizer = make(downsample=downsample)
    assert tokenizer.grid(32, 48) == (32 // downsample, 48 // downsample)
    codes = tokenizer.encode(random_frames(2, 32, 48))
    assert codes.shape[1:] == tokenizer.grid(32, 48)
    assert tokenizer.decode(codes).shape == (2, 32, 48, 3)


def test_empty_batches_keep_their_shape() -> None:
    tokenizer = make()
    assert tokenizer.encode(random_frames(0)).shape == (0, 8, 8)
    assert tokenizer.decode(torch.zeros((0, 8, 8), dtype=torch.int64)).shape == (0, 32, 32, 3)


def test_a_local_change_of_pixels_changes_codes_nearby_only() -> None:
    tokenizer, frames = make(), random_frames(1, 64, 64)
    changed = frames.clone()
    changed[0, :4, :4] = 255 - changed[0, :4, :4]
    different = (tokenizer.encode(frames) != tokenizer.encode(changed))[0]
    assert different.any() and not different[8:, :].any() and not different[:, 8:].any()


@pytest.mark.parametrize("quantizer", ["fsq", "ema_vq"])
def test_saved_tokenizer_codes_the_same(tmp_path: Path, quantizer: str) -> None:
    tokenizer, frames = make(quantizer), random_frames(3)
    write_frame_tokenizer(tmp_path, tokenizer)
    loaded = load_frame_tokenizer(tmp_path)
    assert torch.equal(loaded.encode(frames), tokenizer.encode(frames))
    assert loaded.fingerprint == tokenizer.fingerprint
    assert (loaded.codebook_size, loaded.downsample) == (tokenizer.codebook_size, 4)


def test_fingerprint_covers_weights_and_configuration() -> None:
    one, other = make(), make()
    assert one.fingerprint == other.fingerprint
    next(other.parameters()).view(-1)[0] += 1e-3
    assert one.fingerprint != other.fingerprint
    # 8 x 5 and 5 x 8 have weights of equal shapes but mean different codes.
    assert make(levels=(8, 5)).fingerprint != make(levels=(5, 8)).fingerprint


def test_sizes_that_do_not_divide_are_an_error() -> None:
    with pytest.raises(DataError, match="30x32 pixels do not divide into codes of 4x4"):
        make().encode(random_frames(1, 30, 32))


def test_wrong_frames_and_codes_are_errors() -> None:
    tokenizer = make()
    with pytest.raises(DataError, match="uint8"):
        tokenizer.encode(random_frames(1).float())
    with pytest.raises(DataError, match=r"\[32, 32, 3\]"):
        tokenizer.encode(random_frames(1)[0])
    with pytest.raises(DataError, match="outside the codebook of 200"):
        tokenizer.decode(torch.full((1, 8, 8), 200))
    with pytest.raises(DataError, match="outside the codebook"):
        tokenizer.decode(torch.full((1, 8, 8), -1))
    with pytest.raises(DataError, match="integers"):
        tokenizer.decode(torch.zeros((1, 8, 8)))


@pytest.mark.parametrize(
    "changes", [{"downsample": 3}, {"downsample": 1}, {"levels": (1, 5)}, {"levels": ()}, {"blocks": -1}]
)
def test_bad_configurations_are_errors(changes: dict[str, object]) -> None:
    with pytest.raises(ConfigError):
        ConvTokenizerConfig(**changes)


def test_missing_and_damaged_files_are_named(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="tokenizer.json.*train_tokenizer.py frames"):
        load_frame_tokenizer(tmp_path / "nowhere")
    write_frame_tokenizer(tmp_path, make())
    weights, described = tmp_path / "model.safetensors", tmp_path / "tokenizer.json"
    good, text = weights.read_bytes(), described.read_text()
    weights.write_bytes(good[:-100])
    with pytest.raises(DataError, match="model.safetensors"):
        load_frame_tokenizer(tmp_path)
    weights.write_bytes(good[:-4] + bytes([good[-4] ^ 1]) + good[-3:])
    with pytest.raises(DataError, match="fingerprint"):
        load_frame_tokenizer(tmp_path)
    weights.unlink()
    with pytest.raises(DataError, match="model.safetensors"):
        load_frame_tokenizer(tmp_path)
    weights.write_bytes(good)
    described.write_text(text[:-20])
    with pytest.raises(DataError, match="not valid JSON"):
        load_frame_tokenizer(tmp_path)
    fields = json.loads(text)
    described.write_text(json.dumps({**fields, "config": {**fields["config"], "depth": 3}}))
    with pytest.raises(DataError, match="bad configuration"):
        load_frame_tokenizer(tmp_path)
    described.write_text(json.dumps({**fields, "config": {**fields["config"], "width": 16}}))
    with pytest.raises(DataError, match="another configuration"):
        load_frame_tokenizer(tmp_path)
