"""The original model, step by step, on its own weights: what our fast path is compared with.

One sequence of text and frames, dense attention, masks as numbers (masked scores become -10000), PB-relax in the
attention-plus channel. Shares no code with `megacog.model` and its masks. Plain and slow, for CPU and fp32.

Legend: B batch, L text length, T frames, P cells of a frame, F = T * P, S = L + F, N heads, D head dim, C width,
V vocabulary of codes and text together, K keys.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from megacog.config.schema import ModelConfig, Stage
from megacog.interop.keys import WORDS

Weight = Callable[[str], Tensor]
"""The tensor of a key of the original, in fp32."""
MASKED = -10000.0
PB_RELAX = 16.0
_SEED = 20220529


@dataclass(frozen=True)
class Inputs:
    """What the original is fed with. Ids are those of its one vocabulary: codes, then text pieces."""

    text_BL: Tensor
    """int64, padded on the left."""
    valid_BL: Tensor
    """bool, False on padding."""
    frames_BTP: Tensor
    """int64 codes."""

    @classmethod
    def random(cls, model: ModelConfig, frames: int, padding: Sequence[int]) -> Inputs:
        """Random codes and text: a sample for each number of padding tokens on the left, ids of the last piece."""
        generator = torch.Generator().manual_seed(_SEED)
        codes, vocabulary = model.image_vocab_size, model.image_vocab_size + model.text_vocab_size
        text_BL = torch.randint(codes, vocabulary, (len(padding), model.text_length), generator=generator)
        valid_BL = torch.arange(model.text_length) >= torch.tensor(padding)[:, None]
        text_BL[~valid_BL] = vocabulary - 1
        frames_BTP = torch.randint(0, codes, (len(padding), frames, model.cells), generator=generator)
        return cls(text_BL, valid_BL, frames_BTP)

    def row(self, boi: int) -> Tensor:
        """Text, the start-of-image id, all codes: int64 [B, S + 1]."""
        batch = len(self.text_BL)
        boi_B1 = torch.full((batch, 1), boi, dtype=torch.int64)
        return torch.cat([self.text_BL, boi_B1, self.frames_BTP.flatten(1)], dim=1)

    def tokens(self, boi: int) -> Tensor:
        """The input of every position: the row but for its end, every frame opened by `boi`: int64 [B, S]."""
        tokens_BS = self.row(boi)[:, :-1].clone()
        tokens_BS[:, self.text_BL.shape[1] :: self.frames_BTP.shape[2]] = boi
        return tokens_BS

    def labels(self, boi: int) -> Tensor:
        """What every position predicts: int64 [B, S]."""
        return self.row(boi)[:, 1:]

    def positions(self, first_frame: int) -> Tensor:
        """Position ids: 0 on padding, 0, 1, ... on text, `first_frame` and on for frames: int64 [B, S]."""
        text_BL = torch.where(self.valid_BL, self.valid_BL.long().cumsum(1) - 1, 0)
        frames_F = first_frame + torch.arange(self.frames_BTP[0].numel())
        return torch.cat([text_BL, frames_F.expand(len(text_BL), -1)], dim=1)


def plain_logits(weight: Weight, model: ModelConfig, stage: Stage, inputs: Inputs) -> Tensor:
    """fp32 logits of every position over the whole vocabulary: [B, S, V]. Differentiable in the weights.

    Args:
        weight: The original's tensors by key; asked for when needed, so that they need not be held at once.
        model: Shape and masks: attention-plus full or in shifted windows.
        stage: Which model of the original; `base` is CogView2's.
        inputs: One frame for base, all frames else.
    """
    assert model.boi_id is not None
    boi = model.image_vocab_size + model.boi_id
    x_BSC = F.embedding(inputs.tokens(boi), weight(WORDS)) + _positions(weight, model, inputs)
    frame_mask_FF = base_mask(model, stage, inputs.frames_BTP.shape[1])
    for layer in range(model.num_layers):
        # For gradients at full width: the attention scores of one layer alone take gigabytes.
        x_BSC = checkpoint(
            _layer, weight, model, stage, layer, x_BSC, inputs.valid_BL, frame_mask_FF, use_reentrant=False
        )
    return _norm(weight, model, "transformer.final_layernorm", x_BSC) @ weight(WORDS).T


def loss_frames(stage: Stage, frames: int) -> list[int]:
    """Frames that the stage's loss is taken on."""
    return {"base": [0], "sequential": list(range(1, frames)), "interpolation": list(range(1, frames, 2))}[stage]


def plain_loss(logits_BSV: Tensor, model: ModelConfig, stage: Stage, inputs: Inputs) -> Tensor:
    """Mean cross entropy over the image codes alone, on the stage's frames: a scalar."""
    T, P = inputs.frames_BTP.shape[1:]
    codes_BTPV = logits_BSV[:, -T * P :, : model.image_vocab_size].unflatten(1, (T, P))
    chosen = loss_frames(stage, T)
    return F.cross_entropy(codes_BTPV[:, chosen].flatten(0, 2), inputs.frames_BTP[:, chosen].flatten())


def base_mask(model: ModelConfig, stage: Stage, frames: int) -> Tensor:
    """Which frame positions a frame position sees in the base channel, 1 or 0: fp32 [F, F]. Its own frame only."""
    frame_F, cell_F = _frames_and_cells(model, frames)
    same_FF = frame_F[:, None] == frame_F
    earlier_FF = cell_F[None, :] <= cell_F[:, None]
    if stage == "interpolation":
        earlier_FF = earlier_FF | (frame_F % 2 == 0)[:, None]
    return (same_FF & earlier_FF).float()


def plus_mask(model: ModelConfig, stage: Stage, layer: int, frames: int) -> Tensor:
    """Which frame positions a frame position sees in the attention-plus channel of a layer: fp32 [F, F]."""
    frame_F, cell_F = _frames_and_cells(model, frames)
    tq, tk, pq, pk = frame_F[:, None], frame_F[None, :], cell_F[:, None], cell_F[None, :]
    if stage == "sequential":
        seen_FF = (tk < tq) | ((tk == tq) & (pk <= pq))
    else:
        odd_query, odd_key = tq % 2 == 1, tk % 2 == 1
        seen_FF = ~odd_key | (odd_query & odd_key & ((tk < tq) | ((tk == tq) & (pk <= pq))))
    space = getattr(model.attention, stage)
    if space.kind == "shifted_window":
        width = model.grid[1]
        for window, place_F in zip(space.window, (cell_F // width, cell_F % width), strict=True):
            # The frame is rolled back by half a window; what that wraps around is a block of its own.
            block_F = (place_F - (window // 2 if layer % 2 else 0)) // window
            seen_FF = seen_FF & (block_F[:, None] == block_F[None, :])
    elif space.kind != "full":
        raise ValueError(f"the original has no {space.kind} attention")
    return seen_FF.float()


def _frames_and_cells(model: ModelConfig, frames: int) -> tuple[Tensor, Tensor]:
    position_F = torch.arange(frames * model.cells)
    return position_F // model.cells, position_F % model.cells


def _positions(weight: Weight, model: ModelConfig, inputs: Inputs) -> Tensor:
    """Position embeddings: the base's table for text and frame 0, the additional one after them."""
    ids_BS = inputs.positions(model.text_positions)
    split, last = model.text_length + model.cells, model.text_positions + model.cells
    rows_BSC = F.embedding(ids_BS[:, :split], weight("transformer.position_embeddings.weight"))
    if ids_BS.shape[1] == split:
        return rows_BSC
    table = weight("mixins.extra_position_embedding.position_embeddings.weight")
    return torch.cat([rows_BSC, F.embedding(ids_BS[:, split:] - last, table)], dim=1)


def _layer(
    weight: Weight, model: ModelConfig, stage: Stage, layer: int, x_BSC: Tensor, valid_BL: Tensor, mask_FF: Tensor
) -> Tensor:
    name = f"transformer.layers.{layer}"
    L, frames = model.text_length, mask_FF.shape[0] // model.cells
    y_BSC = _norm(weight, model, f"{name}.input_layernorm", x_BSC)
    out_BSC = _base_attention(weight, model, name, y_BSC, valid_BL, mask_FF)
    if stage != "base":
        mask = plus_mask(model, stage, layer, frames)
        plus_BFC = _plus_attention(weight, model, layer, y_BSC, valid_BL, mask)
        share_C = torch.sigmoid(weight(f"mixins.attention_plus.attn_distribution.{layer}"))
        mixed_BFC = share_C * out_BSC[:, L:] + (1 - share_C) * plus_BFC
        out_BSC = torch.cat([out_BSC[:, :L], mixed_BFC], dim=1)
    x_BSC = x_BSC + _norm(weight, model, f"{name}.third_layernorm", out_BSC)
    z_BSC = _norm(weight, model, f"{name}.post_attention_layernorm", x_BSC)
    z_BSC = _linear(weight, f"{name}.mlp.dense_h_to_4h", z_BSC)
    z_BSC = 0.5 * z_BSC * (1 + torch.tanh(math.sqrt(2 / math.pi) * z_BSC * (1 + 0.044715 * z_BSC * z_BSC)))
    out_BSC = _linear(weight, f"{name}.mlp.dense_4h_to_h", z_BSC)
    return x_BSC + _norm(weight, model, f"{name}.fourth_layernorm", out_BSC)


def _base_attention(
    weight: Weight, model: ModelConfig, name: str, y_BSC: Tensor, valid_BL: Tensor, mask_FF: Tensor
) -> Tensor:
    q, k, v = _heads(_linear(weight, f"{name}.attention.query_key_value", y_BSC), model)
    mask_B1SS = _with_text(valid_BL, mask_FF)
    scores_BNSS = q @ k.transpose(-1, -2) / math.sqrt(model.head_dim)
    scores_BNSS = scores_BNSS * mask_B1SS + MASKED * (1 - mask_B1SS)
    return _linear(weight, f"{name}.attention.dense", _join(scores_BNSS.softmax(-1) @ v))


def _plus_attention(
    weight: Weight, model: ModelConfig, layer: int, y_BSC: Tensor, valid_BL: Tensor, mask_FF: Tensor
) -> Tensor:
    """Attention of frame rows over frames and text, with scores divided by 16, shifted by their maximum and scaled
    back (PB-relax), which leaves the softmax as it is."""
    L, name = model.text_length, "mixins.attention_plus"
    q, k, v = _heads(_linear(weight, f"{name}.query_key_value.{layer}", y_BSC), model)
    q_BNFD = q[:, :, L:] / (math.sqrt(model.head_dim) * PB_RELAX)
    scores_BNFF = q_BNFD @ k[:, :, L:].transpose(-1, -2)
    scores_BNFF = scores_BNFF * mask_FF + MASKED * (1 - mask_FF)
    shift_BN11 = scores_BNFF.detach().amax((-1, -2), keepdim=True)
    text_BNFL = (q_BNFD @ k[:, :, :L].transpose(-1, -2) - shift_BN11) * PB_RELAX
    valid_B11L = valid_BL[:, None, None].float()
    text_BNFL = text_BNFL * valid_B11L + MASKED * (1 - valid_B11L)
    share_BNFK = torch.cat([(scores_BNFF - shift_BN11) * PB_RELAX, text_BNFL], dim=-1).softmax(-1)
    out_BNFD = share_BNFK @ torch.cat([v[:, :, L:], v[:, :, :L]], dim=2)
    return _linear(weight, f"{name}.dense.{layer}", _join(out_BNFD))


def _with_text(valid_BL: Tensor, mask_FF: Tensor) -> Tensor:
    """The base channel's mask over text and frames, fp32 [B, 1, S, S]: text sees valid text, frames see it too."""
    (B, L), frames = valid_BL.shape, mask_FF.shape[0]
    mask_B1SS = torch.zeros(B, 1, L + frames, L + frames)
    mask_B1SS[..., :L] = valid_BL[:, None, None]
    mask_B1SS[..., L:, L:] = mask_FF
    return mask_B1SS


def _heads(qkv_BSX: Tensor, model: ModelConfig) -> list[Tensor]:
    """q, k and v, which are thirds of the projection: each [B, N, S, D]."""
    return [part.unflatten(-1, (model.num_heads, -1)).transpose(1, 2) for part in qkv_BSX.chunk(3, dim=-1)]


def _join(x_BNSD: Tensor) -> Tensor:
    return x_BNSD.transpose(1, 2).flatten(-2)


def _linear(weight: Weight, name: str, x: Tensor) -> Tensor:
    return F.linear(x, weight(f"{name}.weight"), weight(f"{name}.bias"))


def _norm(weight: Weight, model: ModelConfig, name: str, x_BSC: Tensor) -> Tensor:
    centered = x_BSC - x_BSC.mean(-1, keepdim=True)
    scaled = centered / torch.sqrt(centered.square().mean(-1, keepdim=True) + model.layernorm_eps)
    return scaled * weight(f"{name}.weight") + weight(f"{name}.bias")
