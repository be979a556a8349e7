"""icetk's VQVAE against its list of tensors and against a plain re-statement of its formulas."""

from __future__ import annotations

import json
import math
from functools import lru_cache
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from small_icetk import image_weights, small_vqvae
from torch import Tensor

from megacog.errors import ConfigError, DataError
from megacog.tokenizers.frames import load_frame_tokenizer, write_frame_tokenizer
from megacog.tokenizers.icetk_vqvae import IcetkVqvae, IcetkVqvaeConfig

KEYS = Path(__file__).parent.parent / "interop" / "ice_image_keys.tsv"
RATES = (4, 8, 16)


@lru_cache
def on_meta(rate: int) -> IcetkVqvae:
    """The release's full size, without memory."""
    with torch.device("meta"):
        return IcetkVqvae(IcetkVqvaeConfig(rate))


def random_frames(count: int, height: int, width: int) -> Tensor:
    """Coarse patterns, so that codes vary within a frame."""
    generator = torch.Generator().manual_seed(count)
    coarse = torch.rand((count, 3, height // 4, width // 4), generator=generator)
    return (F.interpolate(coarse, scale_factor=4) * 255).to(torch.uint8).movedim(1, -1).contiguous()


# ---- A plain re-statement: functions of the dict of weights, no module.


def conv(weights: dict[str, Tensor], name: str, x: Tensor, stride: int = 1, padding: int | None = None) -> Tensor:
    weight = weights[f"{name}.weight"]
    padding = weight.shape[-1] // 2 if padding is None else padding
    return F.conv2d(x, weight, weights[f"{name}.bias"], stride, padding)


def norm(weights: dict[str, Tensor], name: str, x: Tensor) -> Tensor:
    B, C = x.shape[:2]
    groups = x.reshape(B, 32, -1)
    mean, variance = groups.mean(-1, keepdim=True), groups.var(-1, unbiased=False, keepdim=True)
    normal = ((groups - mean) / torch.sqrt(variance + 1e-6)).reshape(x.shape)
    return normal * weights[f"{name}.weight"].view(C, 1, 1) + weights[f"{name}.bias"].view(C, 1, 1)


def swish(x: Tensor) -> Tensor:
    return x * torch.sigmoid(x)


def residual(weights: dict[str, Tensor], name: str, x: Tensor) -> Tensor:
    y = conv(weights, f"{name}.conv1", swish(norm(weights, f"{name}.norm1", x)))
    y = conv(weights, f"{name}.conv2", swish(norm(weights, f"{name}.norm2", y)))
    shortcut = f"{name}.nin_shortcut"
    return y + (conv(weights, shortcut, x) if f"{shortcut}.weight" in weights else x)


def attention(weights: dict[str, Tensor], name: str, x: Tensor) -> Tensor:
    B, C, H, W = x.shape
    y = norm(weights, f"{name}.norm", x)
    q, k, v = (conv(weights, f"{name}.{part}", y).reshape(B, C, H * W) for part in "qkv")
    shares = torch.softmax(torch.einsum("bci,bcj->bij", q, k) / math.sqrt(C), dim=-1)
    mixed = torch.einsum("bij,bcj->bci", shares, v).reshape(B, C, H, W)
    return x + conv(weights, f"{name}.proj_out", mixed)


def halve(weights: dict[str, Tensor], name: str, x: Tensor) -> Tensor:
    B, C, H, W = x.shape
    padded = torch.zeros(B, C, H + 1, W + 1)
    padded[:, :, :H, :W] = x
    return conv(weights, name, padded, stride=2, padding=0)


def plain_encode(weights: dict[str, Tensor], frames: Tensor, rate: int) -> Tensor:
    mean, std = torch.tensor([0.79093, 0.76271, 0.75340]), torch.tensor([0.30379, 0.32279, 0.32800])
    x = ((frames / 255.0 - mean) / std).permute(0, 3, 1, 2)
    x = conv(weights, "enc.conv_in", x)
    for level in range(3):
        for block in range(2):
            x = residual(weights, f"enc.down.{level}.block.{block}", x)
        if level < 2:
            x = halve(weights, f"enc.down.{level}.downsample.conv", x)
    x = residual(weights, "enc.mid.block_1", x)
    x = residual(weights, "enc.mid.block_2", attention(weights, "enc.mid.attn_1", x))
    x = conv(weights, "enc.conv_out", swish(norm(weights, "enc.norm_out", x)))
    for level in range(int(math.log2(rate)) - 2):
        B, C, H, W = x.shape
        pooled = x.reshape(B, C, H // 2, 2, W // 2, 2).mean(dim=(3, 5))
        x = pooled + halve(weights, f"down_samplers.{level}.conv_down_sampler.conv", x)
    z = conv(weights, "quantize.proj", x).permute(0, 2, 3, 1)
    rows = weights["quantize.embed.weight"]
    return (z[..., None, :] - rows).square().sum(-1).argmin(-1)


def plain_decode(weights: dict[str, Tensor], codes: Tensor, rate: int) -> Tensor:
    """Returns RGB in 0..1, not clamped, [B, H, W, 3]."""
    decoder = f"decs.{4 - int(math.log2(rate))}"
    x = weights["quantize.embed.weight"][codes].permute(0, 3, 1, 2)
    x = conv(weights, f"{decoder}.conv_in", x)
    x = residual(weights, f"{decoder}.mid.block_1", x)
    x = residual(weights, f"{decoder}.mid.block_2", attention(weights, f"{decoder}.mid.attn_1", x))
    for level in reversed(range(int(math.log2(rate)) + 1)):
        x = residual(weights, f"{decoder}.up.{level}.block.0", x)
        if level == 4:
            x = attention(weights, f"{decoder}.up.4.attn.0", x)
        if level:
            x = x.repeat_interleave(2, dim=2).repeat_interleave(2, dim=3)
            x = conv(weights, f"{decoder}.up.{level}.upsample.conv", x)
    x = conv(weights, f"{decoder}.conv_out", swish(norm(weights, f"{decoder}.norm_out", x)))
    mean, std = torch.tensor([0.79093, 0.76271, 0.75340]), torch.tensor([0.30379, 0.32279, 0.32800])
    return x.permute(0, 2, 3, 1) * std + mean


# ---- Tests.


def test_the_three_rates_use_every_tensor_of_the_release_and_no_other() -> None:
    released = dict(line.split("\t") for line in KEYS.read_text().splitlines())
    assert len(released) == 329
    used = {}
    for rate in RATES:
        for name, tensor in on_meta(rate).state_dict().items():
            assert "x".join(map(str, tensor.shape)) == released[name], name
            used[name] = tensor
    # The moving averages serve the training of the codebook only.
    assert released.keys() - used.keys() == {"quantize.cluster_size", "quantize.embed_avg"}
    codebook = used["quantize.embed.weight"]
    averages = len(codebook) + codebook.numel()
    assert sum(tensor.numel() for tensor in used.values()) + averages == 102_579_497


@pytest.mark.parametrize(("rate", "count"), [(4, 50_418_819), (8, 51_452_163), (16, 53_537_155)])
def test_a_rate_keeps_only_its_own_part(rate: int, count: int) -> None:
    tokenizer = on_meta(rate)
    assert sum(parameter.numel() for parameter in tokenizer.parameters()) == count
    assert set(tokenizer.decs) == {{4: "2", 8: "1", 16: "0"}[rate]}


@pytest.mark.parametrize(("side", "grid"), [(160, 20), (480, 60)])
def test_the_release_codes_160_pixels_as_20_x_20_and_480_as_60_x_60(side: int, grid: int) -> None:
    tokenizer = on_meta(8)
    assert tokenizer.grid(side, side) == (grid, grid)
    codes = tokenizer.codes_of_frames(torch.empty((2, side, side, 3), dtype=torch.uint8, device="meta"))
    assert codes.shape == (2, grid, grid) and codes.dtype == torch.int64
    assert tokenizer.frames_of_codes(codes).shape == (2, side, side, 3)


@pytest.mark.parametrize("rate", RATES)
def test_codes_are_those_of_the_plain_formulas_row_by_row(rate: int) -> None:
    frames = random_frames(2, 3 * rate, 6 * rate)
    codes = small_vqvae(rate).encode(frames)
    assert codes.shape == (2, 3, 6)
    assert len(codes.unique()) > 4
    assert torch.equal(codes, plain_encode(image_weights(), frames, rate))


@pytest.mark.parametrize("rate", RATES)
def test_frames_are_those_of_the_plain_formulas(rate: int) -> None:
    tokenizer = small_vqvae(rate)
    codes = torch.randint(0, tokenizer.codebook_size, (2, 2, 4), generator=torch.Generator().manual_seed(rate))
    frames = tokenizer.decode(codes)
    plain = plain_decode(image_weights(), codes, rate).mul(255).clamp(0, 255)
    assert frames.shape == (2, 2 * rate, 4 * rate, 3) and frames.dtype == torch.uint8
    assert frames.float().std() > 5  # not all clamped
    assert (frames.float() - plain).abs().max() <= 0.51  # rounding to 8 bits


def test_batches_of_any_size_give_the_same_codes_and_frames() -> None:
    tokenizer = small_vqvae()
    frames = random_frames(5, 32, 48)
    codes = tokenizer.encode(frames)
    assert torch.equal(torch.cat([tokenizer.encode(frame[None]) for frame in frames]), codes)
    decoded = tokenizer.decode(codes)
    assert torch.equal(torch.cat([tokenizer.decode(part) for part in codes.split(2)]), decoded)
    assert not torch.equal(decoded[0], decoded[1])


def test_a_folder_gives_the_same_tokenizer_back(tmp_path: Path) -> None:
    tokenizer, frames = small_vqvae(), random_frames(1, 32, 32)
    write_frame_tokenizer(tmp_path, tokenizer)
    loaded = load_frame_tokenizer(tmp_path)
    assert (loaded.fingerprint, loaded.codebook_size, loaded.downsample) == (tokenizer.fingerprint, 200, 8)
    codes = tokenizer.encode(frames)
    assert torch.equal(loaded.encode(frames), codes)
    assert torch.equal(loaded.decode(codes), tokenizer.decode(codes))


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"config": {"rate": 5}}, "rate 5 must be one of"),
        ({"config": {"width": 40}}, "multiple of 32"),
        ({"config": {"depth": 1}}, "bad configuration"),
        ({"config": [8]}, "bad configuration"),
        ({"architecture": "dvae"}, "expected .* conv or icetk-vqvae"),
        ({"fingerprint": "0" * 64}, "do not match the recorded fingerprint"),
    ],
)
def test_a_changed_description_is_refused(tmp_path: Path, changes: dict[str, object], said: str) -> None:
    write_frame_tokenizer(tmp_path, small_vqvae())
    path = tmp_path / "tokenizer.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))
    with pytest.raises(DataError, match=said):
        load_frame_tokenizer(tmp_path)


def test_weights_of_another_rate_are_refused(tmp_path: Path) -> None:
    write_frame_tokenizer(tmp_path, small_vqvae(8))
    path = tmp_path / "tokenizer.json"
    stored = json.loads(path.read_text())
    path.write_text(json.dumps({**stored, "config": {**stored["config"], "rate": 16}}))
    with pytest.raises(DataError, match="another configuration"):
        load_frame_tokenizer(tmp_path)


def test_frames_that_do_not_divide_are_refused() -> None:
    with pytest.raises(DataError, match="multiples of 8"):
        small_vqvae().encode(torch.zeros((1, 36, 32, 3), dtype=torch.uint8))
    with pytest.raises(ConfigError, match="code_dim positive"):
        IcetkVqvaeConfig(code_dim=0)
