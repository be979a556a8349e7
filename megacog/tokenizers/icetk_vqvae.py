"""icetk's image tokenizer, the frame tokenizer of CogView2 and CogVideo: a convolutional VQ autoencoder.

Parameters have the names and shapes of the released `ice_image.pt`, which holds one encoder, one codebook
and a decoder for each of three rates. A tokenizer here is the part of it that one rate needs. Its group
norms and its attention look at the whole frame, so a local change of pixels can change codes anywhere.

Dimensions: B frames, H/W pixels or cells, h/w code grid, C channels, D code channels, S = H*W positions.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from megacog.errors import ConfigError
from megacog.tokenizers.coding import CodingModule
from megacog.tokenizers.quantizers import nearest_rows

# Of RGB in 0..1.
MEAN = (0.79093, 0.76271, 0.75340)
STD = (0.30379, 0.32279, 0.32800)
ENCODER_MULTIPLIERS = (1, 2, 4)
DECODER_MULTIPLIERS = {4: (1, 2, 4), 8: (1, 1, 2, 4), 16: (1, 1, 1, 2, 4)}
"""Rate -> channels of the decoder's levels in units of the width, from full resolution down."""
_GROUPS = 32
_EPS = 1e-6


@dataclass(frozen=True)
class IcetkVqvaeConfig:
    """Shape of the network; saved in tokenizer.json. The defaults are the release's, at CogVideo's rate."""

    rate: int = 8
    """Pixels per code along each axis: 4, 8 or 16."""
    width: int = 128
    """Channels at full resolution, a multiple of 32."""
    codebook_size: int = 20000
    code_dim: int = 256

    def __post_init__(self) -> None:
        if self.rate not in DECODER_MULTIPLIERS:
            raise ConfigError(f"rate {self.rate} must be one of {list(DECODER_MULTIPLIERS)}")
        if self.width < 1 or self.width % _GROUPS:
            raise ConfigError(f"width {self.width} must be a positive multiple of {_GROUPS}")
        if self.codebook_size < 2 or self.code_dim < 1:
            raise ConfigError("codebook_size must be at least 2, code_dim positive")

    @property
    def level(self) -> int:
        """How often the encoder's output, a quarter of the frame's size, is halved."""
        return self.rate.bit_length() - 3


class ResnetBlock(nn.Module):
    """shortcut(x) + conv(silu(norm(conv(silu(norm(x))))))."""

    def __init__(self, channels: int, out_channels: int) -> None:
        super().__init__()
        self.norm1 = nn.GroupNorm(_GROUPS, channels, _EPS)
        self.conv1 = nn.Conv2d(channels, out_channels, 3, padding=1)
        self.norm2 = nn.GroupNorm(_GROUPS, out_channels, _EPS)
        self.conv2 = nn.Conv2d(out_channels, out_channels, 3, padding=1)
        if channels != out_channels:
            self.nin_shortcut = nn.Conv2d(channels, out_channels, 1)

    def forward(self, x_BCHW: Tensor) -> Tensor:
        y_BCHW = self.conv1(F.silu(self.norm1(x_BCHW)))
        y_BCHW = self.conv2(F.silu(self.norm2(y_BCHW)))
        return y_BCHW + (self.nin_shortcut(x_BCHW) if hasattr(self, "nin_shortcut") else x_BCHW)


class AttentionBlock(nn.Module):
    """x + attention of every position to every position, with one head."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.norm = nn.GroupNorm(_GROUPS, channels, _EPS)
        self.q = nn.Conv2d(channels, channels, 1)
        self.k = nn.Conv2d(channels, channels, 1)
        self.v = nn.Conv2d(channels, channels, 1)
        self.proj_out = nn.Conv2d(channels, channels, 1)

    def forward(self, x_BCHW: Tensor) -> Tensor:
        y_BCHW = self.norm(x_BCHW)
        q_BSC, k_BSC, v_BSC = (conv(y_BCHW).flatten(2).mT for conv in (self.q, self.k, self.v))
        mixed_BSC = F.scaled_dot_product_attention(q_BSC[:, None], k_BSC[:, None], v_BSC[:, None])[:, 0]
        return x_BCHW + self.proj_out(mixed_BSC.mT.reshape(x_BCHW.shape))


class Halve(nn.Module):
    """A convolution of stride 2, padded on the right and at the bottom."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, stride=2)

    def forward(self, x_BCHW: Tensor) -> Tensor:
        return self.conv(F.pad(x_BCHW, (0, 1, 0, 1)))


class ResidualHalve(nn.Module):
    """Mean of 2x2 positions plus a convolution of stride 2."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv_down_sampler = Halve(channels)

    def forward(self, x_BCHW: Tensor) -> Tensor:
        return F.avg_pool2d(x_BCHW, 2) + self.conv_down_sampler(x_BCHW)


class Double(nn.Module):
    """Nearest-neighbor upsampling by 2 and a convolution."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, padding=1)

    def forward(self, x_BCHW: Tensor) -> Tensor:
        return self.conv(F.interpolate(x_BCHW, scale_factor=2.0, mode="nearest"))


class Level(nn.Module):
    """Residual blocks of one resolution, each with attention or none, then a change of resolution or none."""

    def __init__(self, channels: int, out_channels: int, blocks: int, attention: bool = False) -> None:
        super().__init__()
        widths = [channels] + [out_channels] * blocks
        self.block = nn.ModuleList(ResnetBlock(*pair) for pair in zip(widths, widths[1:], strict=False))
        self.attn = nn.ModuleList(AttentionBlock(out_channels) for _ in range(blocks if attention else 0))

    def forward(self, x_BCHW: Tensor) -> Tensor:
        for index, block in enumerate(self.block):
            x_BCHW = block(x_BCHW)
            if self.attn:
                x_BCHW = self.attn[index](x_BCHW)
        for name in ("downsample", "upsample"):
            if hasattr(self, name):
                x_BCHW = getattr(self, name)(x_BCHW)
        return x_BCHW


class Middle(nn.Module):
    """Residual block, attention, residual block."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.block_1 = ResnetBlock(channels, channels)
        self.attn_1 = AttentionBlock(channels)
        self.block_2 = ResnetBlock(channels, channels)

    def forward(self, x_BCHW: Tensor) -> Tensor:
        return self.block_2(self.attn_1(self.block_1(x_BCHW)))


class Encoder(nn.Module):
    """Normalized pixels [B, 3, H, W] to features [B, D, H/4, W/4]."""

    def __init__(self, width: int, multipliers: Sequence[int], code_dim: int) -> None:
        super().__init__()
        channels = [width * factor for factor in multipliers]
        self.conv_in = nn.Conv2d(3, width, 3, padding=1)
        self.down = nn.ModuleList()
        for inner, outer in zip([width, *channels], channels, strict=False):
            self.down.append(Level(inner, outer, blocks=2))
        for level, outer in zip(self.down, channels[:-1], strict=False):
            level.downsample = Halve(outer)
        self.mid = Middle(channels[-1])
        self.norm_out = nn.GroupNorm(_GROUPS, channels[-1], _EPS)
        self.conv_out = nn.Conv2d(channels[-1], code_dim, 3, padding=1)

    def forward(self, x_BCHW: Tensor) -> Tensor:
        x_BCHW = self.conv_in(x_BCHW)
        for level in self.down:
            x_BCHW = level(x_BCHW)
        return self.conv_out(F.silu(self.norm_out(self.mid(x_BCHW))))


class Decoder(nn.Module):
    """Code vectors [B, D, h, w] to normalized pixels [B, 3, h * rate, w * rate]."""

    def __init__(self, width: int, multipliers: Sequence[int], code_dim: int) -> None:
        super().__init__()
        channels = [width * factor for factor in multipliers]
        deepest = len(channels) - 1
        self.conv_in = nn.Conv2d(code_dim, channels[-1], 3, padding=1)
        self.mid = Middle(channels[-1])
        # Level i has the resolution of the frame divided by 2**i; the deepest is used first. Five levels mean
        # a code grid of 16 x 16 at the 256 pixels that the release was made for: there it has attention.
        self.up = nn.ModuleList(
            Level(inner, outer, blocks=1, attention=index == 4)
            for index, (inner, outer) in enumerate(zip([*channels[1:], channels[-1]], channels, strict=True))
        )
        for index in range(1, deepest + 1):
            self.up[index].upsample = Double(channels[index])
        self.norm_out = nn.GroupNorm(_GROUPS, channels[0], _EPS)
        self.conv_out = nn.Conv2d(channels[0], 3, 3, padding=1)

    def forward(self, x_BCHW: Tensor) -> Tensor:
        x_BCHW = self.mid(self.conv_in(x_BCHW))
        for level in reversed(self.up):
            x_BCHW = level(x_BCHW)
        return self.conv_out(F.silu(self.norm_out(x_BCHW)))


class Codebook(nn.Module):
    """A 1x1 convolution and the codebook whose nearest row is the code."""

    def __init__(self, codebook_size: int, code_dim: int) -> None:
        super().__init__()
        self.proj = nn.Conv2d(code_dim, code_dim, 1)
        self.embed = nn.Embedding(codebook_size, code_dim)

    def forward(self, z_BDhw: Tensor) -> Tensor:
        """Returns int64 codes [B, h, w] of encoder outputs."""
        z_BhwD = self.proj(z_BDhw).movedim(1, -1)
        return nearest_rows(z_BhwD.flatten(0, 2), self.embed.weight).view(z_BhwD.shape[:-1])


class IcetkVqvae(CodingModule):
    """Encoder, codebook and decoder of one rate. The encoder's weights are the same at all rates."""

    architecture = "icetk-vqvae"
    group_pixels = 160 * 160
    config: IcetkVqvaeConfig

    def __init__(self, config: IcetkVqvaeConfig) -> None:
        super().__init__()
        self.config = config
        self.codebook_size = config.codebook_size
        self.downsample = config.rate
        self.enc = Encoder(config.width, ENCODER_MULTIPLIERS, config.code_dim)
        self.quantize = Codebook(config.codebook_size, config.code_dim)
        self.down_samplers = nn.ModuleList(ResidualHalve(config.code_dim) for _ in range(config.level))
        decoder = Decoder(config.width, DECODER_MULTIPLIERS[config.rate], config.code_dim)
        # The release counts decoders from the highest rate down.
        self.decs = nn.ModuleDict({str(2 - config.level): decoder})

    def codebook(self) -> Tensor:
        """Returns the vector of every code, float32 [codebook_size, code_dim], on the tokenizer's device."""
        return self.quantize.embed.weight.detach()

    def codes_of_frames(self, frames_BHWC: Tensor) -> Tensor:
        """Returns codes int64 [B, h, w] of uint8 frames [B, H, W, 3]."""
        pixels_BCHW = frames_BHWC.movedim(-1, 1).to(torch.float32).contiguous() / 255.0
        mean, std = (pixels_BCHW.new_tensor(values).view(3, 1, 1) for values in (MEAN, STD))
        z_BDhw = self.enc((pixels_BCHW - mean) / std)
        for halve in self.down_samplers:
            z_BDhw = halve(z_BDhw)
        return self.quantize(z_BDhw)

    def frames_of_codes(self, codes_Bhw: Tensor) -> Tensor:
        """Returns uint8 frames [B, H, W, 3] of int64 codes [B, h, w]; values outside the range are clamped."""
        vectors_BDhw = self.quantize.embed(codes_Bhw).movedim(-1, 1).contiguous()
        (decoder,) = self.decs.values()
        pixels_BCHW = decoder(vectors_BDhw)
        mean, std = (pixels_BCHW.new_tensor(values).view(3, 1, 1) for values in (MEAN, STD))
        levels_BCHW = ((pixels_BCHW * std + mean) * 255.0).round().clamp(0, 255)
        return levels_BCHW.to(torch.uint8).movedim(1, -1).contiguous()
