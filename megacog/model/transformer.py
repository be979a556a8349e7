"""CogVideo: a text-to-image transformer with a trainable attention-plus channel in every layer.

Text rows see text only, so they depend on no trained weight in the video stages: they run as a
stream of their own, without gradients there, and their keys and values can be kept per caption.
Frame rows run as a second stream.

Legend: B batch, L text length, T frames, P cells of a frame, F = T * P, R rows of a stream,
N heads of this rank, D head dim, C width, V vocabulary, Q predicted frames.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from megacog.config.schema import Checkpointing, ModelConfig, PlusStage, SpaceConfig, Stage
from megacog.errors import EnvError
from megacog.model.attention import AttentionPlus
from megacog.model.layer import Layer
from megacog.model.layout import StageLayout, stage_layout, text_position_ids
from megacog.model.norm import LayerNorm
from megacog.parallel.layers import VocabParallelEmbedding
from megacog.parallel.sequence import ALONE, SequenceParallel
from megacog.parallel.tensor import TensorParallel
from megacog_kernels.attention import Implementation
from megacog_kernels.attention.dispatch import choose as choose_attention
from megacog_kernels.norm.ops import choose_norm


@dataclass(frozen=True)
class LossOutput:
    """What a training step needs."""

    loss: Tensor
    """fp32 scalar: weighted mean cross entropy over the predicted frames."""
    frame_loss_Q: Tensor
    """fp32 [Q], detached: mean cross entropy of each predicted frame."""


class CogVideo(nn.Module):
    """The base and the attention-plus sets named in `plus`, on one tensor-parallel rank.

    Args:
        config: Shape; `boi_id` must be set.
        plus: Stages whose attention-plus is built.
        parallel: This rank's tensor-parallel place; None = the whole model.
        activation_checkpointing: What the backward pass of a layer computes again.
        kernels: What runs attention, norms, gates and the loss: `auto` takes Triton where it can, `triton` insists.
        sequence: This rank's place among those that share every sample in `forward`; None = it has them alone.
        deterministic: Triton's gradients of attention are bitwise the same in every run.

    Weights are uninitialized: call `initialize` or load them.
    """

    def __init__(
        self,
        config: ModelConfig,
        plus: Sequence[PlusStage] = (),
        parallel: TensorParallel | None = None,
        activation_checkpointing: Checkpointing = "none",
        kernels: Implementation = "auto",
        sequence: SequenceParallel | None = None,
        deterministic: bool = True,
    ) -> None:
        super().__init__()
        if config.boi_id is None:
            raise ValueError("model.boi_id is not set; take it from the text tokenizer")
        self.config = config
        self.boi_id = config.boi_id
        self.parallel = parallel or TensorParallel()
        self.sequence = sequence or ALONE
        self.activation_checkpointing: Checkpointing = activation_checkpointing
        self.kernels: Implementation = kernels
        width = config.hidden_size
        self.code_embedding = VocabParallelEmbedding(config.image_vocab_size, width, self.parallel, kernels)
        self.text_embedding = VocabParallelEmbedding(config.text_vocab_size, width, self.parallel)
        self.position_embedding = nn.Embedding(config.base_position_rows, config.hidden_size)
        self.embedding_dropout = nn.Dropout(config.embedding_dropout)
        layers = [Layer(config, self.parallel, kernels, self.sequence, deterministic) for _ in range(config.num_layers)]
        self.layers: Sequence[Layer] = nn.ModuleList(layers)  # type: ignore[assignment]
        self.final_layernorm = LayerNorm(width, config.layernorm_eps, kernels)
        self.plus = nn.ModuleDict({stage: AttentionPlus(config, self.parallel, kernels) for stage in plus})

    @property
    def device(self) -> torch.device:
        return self.final_layernorm.weight.device

    def choose_kernels(self) -> None:
        """Say what runs attention and norms where the weights are.

        Raises:
            EnvError: `kernels` is triton, which cannot run there.
        """
        try:
            place = (self.kernels, self.device, self.final_layernorm.weight.dtype)
            choose_attention(*place, self.config.head_dim)
            choose_norm(*place, self.config.hidden_size)
        except ValueError as error:
            raise EnvError(f"kernels: {error}; set kernels to auto, or change what is in the way") from None

    def trainable(self, stage: Stage) -> None:
        """Let the stage's weights take gradients and freeze all others: the base, or one plus set."""
        for name, parameter in self.named_parameters():
            part = name.split(".")[1] if name.startswith("plus.") else "base"
            parameter.requires_grad_(part == stage)

    def plus_of(self, stage: Stage) -> AttentionPlus | None:
        """The attention-plus of a stage; None for base."""
        if stage == "base":
            return None
        if stage not in self.plus:
            raise ValueError(f"this model holds no attention-plus of stage {stage!r}, only {list(self.plus)}")
        plus = self.plus[stage]
        assert isinstance(plus, AttentionPlus)
        return plus

    def embed_text(self, text_BL: Tensor, valid_BL: Tensor) -> Tensor:
        """Word plus position embedding of the text rows: [B, L, C]."""
        positions_BLC = self.position_embedding(text_position_ids(valid_BL))
        return self.embedding_dropout(self.text_embedding(text_BL) + positions_BLC)

    def embed_frame(self, inputs_BRC: Tensor, frame: int, cells: slice, plus: AttentionPlus | None) -> Tensor:
        """Adds the positions of `cells` of one frame; later frames than 0 stand in the plus table."""
        start, stop, _ = cells.indices(self.config.cells)
        if frame == 0:
            table, offset = self.position_embedding, self.config.text_positions
        else:
            assert plus is not None, "frames after the first need an attention-plus"
            table, offset = plus.position_embedding, (frame - 1) * self.config.cells
        positions_R = torch.arange(offset + start, offset + stop, device=inputs_BRC.device)
        return self.embedding_dropout(inputs_BRC + table(positions_R))

    def embed_boi(self, batch: int) -> Tensor:
        """Embedding of the start-of-image token: [B, 1, C]."""
        return self.text_embedding(torch.full((batch, 1), self.boi_id, device=self.device))

    def _embed_frames(self, codes_BTP: Tensor, plus: AttentionPlus | None) -> Tensor:
        B, T, P = codes_BTP.shape
        boi_BTC = self.embed_boi(B).expand(B, T, -1)
        inputs_BTPC = torch.cat([boi_BTC[:, :, None], self.code_embedding(codes_BTP[..., :-1])], dim=2)
        frames = [self.embed_frame(inputs_BTPC[:, frame], frame, slice(0, P), plus) for frame in range(T)]
        return torch.cat(frames, dim=1)

    def _hidden(
        self,
        text_BL: Tensor,
        valid_BL: Tensor,
        codes_BTP: Tensor,
        layout: StageLayout,
        plus_on: bool = True,
        predicted_only: bool = False,
    ) -> tuple[Tensor, Tensor]:
        """Text rows [B, L, C] and this rank's frame rows [B, R, C] after the last layer, before the final layernorm.

        With `predicted_only` the last layer makes only rows of predicted frames, and text rows are those before it.
        """
        plus = self.plus_of(layout.stage)
        text_BLC = self.embed_text(text_BL, valid_BL)
        frames_BRC = self.sequence.own_rows(self._embed_frames(codes_BTP, plus), self.config.cells)
        policy: Checkpointing = self.activation_checkpointing if self.training else "none"
        for index, layer in enumerate(self.layers):
            plus_layer = plus.layers[index] if plus is not None and plus_on else None
            mask = layout.plus_mask(self.space(layout.stage), index) if plus_layer is not None else None
            last = predicted_only and index == len(self.layers) - 1
            rows = (text_BLC, frames_BRC, valid_BL)
            text_BLC, frames_BRC = layer(*rows, layout, plus_layer, mask, policy=policy, predicted_only=last)
        return text_BLC, frames_BRC

    def space(self, stage: Stage) -> SpaceConfig:
        """The attention-plus space of a stage."""
        space: SpaceConfig = getattr(self.config.attention, stage)
        return space

    def forward(
        self,
        text_BL: Tensor,
        text_valid_BL: Tensor,
        frames_BTP: Tensor,
        stage: Stage,
        context_BTP: Tensor | None = None,
        frame_weights: Sequence[float] | None = None,
    ) -> LossOutput:
        """The stage's loss: of this rank's rows, which are equally many on all ranks of a sequence.

        Args:
            text_BL: int64 text pieces, padded on the left.
            text_valid_BL: bool, False on padding.
            frames_BTP: int64 codes in raster order: the targets.
            stage: Layout, masks and attention-plus to use.
            context_BTP: Codes to feed instead of the targets (imperfect context); None = the targets.
            frame_weights: Weight of every frame [T]; None = equal.
        """
        layout = stage_layout(self.config, stage)
        self._check(text_BL, frames_BTP, layout)
        inputs_BTP = frames_BTP if context_BTP is None else context_BTP
        _, rows_BRC = self._hidden(text_BL, text_valid_BL, inputs_BTP, layout, predicted_only=True)
        predicted = list(layout.loss_frames)
        hidden_BQPC = rows_BRC.unflatten(1, (len(predicted), -1))
        loss_BQP = self._code_loss(hidden_BQPC, self.sequence.own_cells(frames_BTP)[:, predicted])
        frame_loss_Q = loss_BQP.mean(dim=(0, 2))
        weights_Q = torch.ones_like(frame_loss_Q)
        if frame_weights is not None:
            weights_Q = torch.tensor([frame_weights[frame] for frame in predicted], device=frame_loss_Q.device)
        return LossOutput((frame_loss_Q * weights_Q).sum() / weights_Q.sum(), frame_loss_Q.detach())

    def _code_loss(self, hidden_BQPC: Tensor, targets_BQP: Tensor) -> Tensor:
        return self.code_embedding(self.final_layernorm(hidden_BQPC), targets=targets_BQP)

    @torch.no_grad()
    def code_logits(self, hidden_BRC: Tensor) -> Tensor:
        """fp32 logits over the image codes of frame rows before the final layernorm: [B, R, image_vocab_size]."""
        return self._whole_logits(self.code_embedding, self.final_layernorm(hidden_BRC)).float()

    def logits(
        self,
        text_BL: Tensor,
        text_valid_BL: Tensor,
        frames_BTP: Tensor,
        stage: Stage,
        plus: bool = True,
        positions: slice | None = None,
    ) -> Tensor:
        """fp32 logits of rows over codes, then text pieces: [B, L + F, image + text vocabulary].

        For parity and proofs: training and generation never build them. With plus=False the
        attention-plus channel is off (its positions stay); with `positions` only those of the L + F rows
        are computed. Differentiable on one tensor-parallel rank; not for ranks that share a sequence.
        """
        if self.sequence.size > 1:
            raise ValueError("logits are for models that hold whole sequences")
        layout = stage_layout(self.config, stage)
        self._check(text_BL, frames_BTP, layout)
        rows = torch.cat(self._hidden(text_BL, text_valid_BL, frames_BTP, layout, plus), dim=1)
        hidden = self.final_layernorm(rows if positions is None else rows[:, positions])
        tables = (self.code_embedding, self.text_embedding)
        return torch.cat([self._whole_logits(table, hidden) for table in tables], dim=-1).float()

    def _whole_logits(self, table: VocabParallelEmbedding, hidden_BRC: Tensor) -> Tensor:
        local = table(hidden_BRC, as_head=True)
        if self.parallel.size == 1:
            return local
        padded = F.pad(local, (0, table.weight.shape[0] - local.shape[-1])).contiguous()
        parts = [torch.empty_like(padded) for _ in range(self.parallel.size)]
        torch.distributed.all_gather(parts, padded, group=self.parallel.group)
        return torch.cat(parts, dim=-1)[..., : table.vocabulary]

    def _check(self, text_BL: Tensor, frames_BTP: Tensor, layout: StageLayout) -> None:
        expected = (text_BL.shape[0], layout.grid.frames, layout.grid.cells)
        if tuple(frames_BTP.shape) != expected:
            raise ValueError(f"stage {layout.stage} takes frames of shape {expected}, got {tuple(frames_BTP.shape)}")
