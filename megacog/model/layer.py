"""One layer of the transformer: both attention channels, the MLP and the norms between them.

Sandwich-LN; text and frame rows share all weights:

    a = LN1(x);  x = x + LN3(gate * base(a) + (1 - gate) * plus(a));  x = x + LN4(MLP(LN2(x)))

LN1..LN4 are input, post_attention, third and fourth layernorm. Text rows have no plus channel.

Legend: B batch, L text length, F frame tokens, R rows of a stream, N heads of this rank, D head dim, C width.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor, nn
from torch.nn import functional as F

from megacog.config.schema import Checkpointing, ModelConfig
from megacog.model.attention import Attend, AttentionChannel, KeyValue, PlusLayer
from megacog.model.layout import StageLayout
from megacog.model.norm import BranchNorm, LayerNorm
from megacog.model.recompute import run_layer
from megacog.parallel.layers import ColumnParallelLinear, RowParallelLinear
from megacog.parallel.sequence import ALONE, RowDropout, SequenceParallel
from megacog.parallel.tensor import TensorParallel
from megacog_kernels.attention import Implementation, attention, text_attention
from megacog_kernels.grid import MaskSpec, VideoGrid


@dataclass(frozen=True)
class TextStates:
    """What one layer's text rows offer to its frame rows."""

    normed_BLC: Tensor
    """The rows as both channels take them."""
    base: KeyValue


def attend_all(
    mask: MaskSpec, grid: VideoGrid, text: KeyValue, valid_BL: Tensor, kernels: Implementation,
    text_bias: float = 0.0, queries: tuple[int, ...] | None = None, sequence: SequenceParallel = ALONE,
    deterministic: bool = True,
) -> Attend:  # fmt: skip
    """Attention of all rows of a grid, or of the frames `queries`, over the valid text and all rows.

    Of all these, ranks that share a sequence hand in and get their own.
    """
    text_k, text_v = (sequence.own_heads(part) for part in text)

    def attend(q_BRND: Tensor, k_BFND: Tensor, v_BFND: Tensor) -> Tensor:
        return attention(
            q_BRND, k_BFND, v_BFND, mask, grid, text_k=text_k, text_v=text_v, text_valid=valid_BL,
            text_bias=text_bias, query_frames=queries, deterministic=deterministic, implementation=kernels,
        ).frames  # fmt: skip

    return sequence.over_all_rows(attend, grid.cells)


class MLP(nn.Module):
    def __init__(self, config: ModelConfig, parallel: TensorParallel, sequence: SequenceParallel) -> None:
        super().__init__()
        self.up = ColumnParallelLinear(config.hidden_size, config.ffn, parallel)
        self.down = RowParallelLinear(config.ffn, config.hidden_size, parallel)
        self.dropout = RowDropout(config.mlp_dropout, sequence, config.cells)

    def forward(self, x_BRC: Tensor, frames: bool) -> Tensor:
        return self.dropout(self.down(F.gelu(self.up(x_BRC), approximate="tanh")), frames)


class Layer(nn.Module):
    """One base layer; the attention-plus of the running stage is handed in."""

    def __init__(
        self, config: ModelConfig, parallel: TensorParallel, kernels: Implementation, sequence: SequenceParallel,
        deterministic: bool,
    ) -> None:  # fmt: skip
        super().__init__()
        self.kernels: Implementation = kernels
        self.sequence = sequence
        self.deterministic = deterministic
        norm = (config.hidden_size, config.layernorm_eps, kernels)
        self.input_layernorm = LayerNorm(*norm)
        self.third_layernorm = BranchNorm(*norm)
        self.post_attention_layernorm = LayerNorm(*norm)
        self.fourth_layernorm = BranchNorm(*norm)
        self.attention = AttentionChannel(config, parallel)
        self.mlp = MLP(config, parallel, sequence)

    def _residual(self, x_BRC: Tensor, mixed_BRC: Tensor, frames: bool) -> Tensor:
        x_BRC, normed_BRC = self.third_layernorm(x_BRC, mixed_BRC, then=self.post_attention_layernorm)
        return self.fourth_layernorm(x_BRC, self.mlp(normed_BRC, frames))

    def text_rows(self, x_BLC: Tensor, valid_BL: Tensor) -> tuple[Tensor, TextStates]:
        """The text stream through this layer: next rows, and what frame rows see of the text."""
        normed_BLC = self.input_layernorm(x_BLC)
        kept: list[KeyValue] = []

        def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            kept.append((k, v))
            return text_attention(q, k, v, valid_BL, implementation=self.kernels)

        mixed_BLC = self.attention(normed_BLC, attend)
        return self._residual(x_BLC, mixed_BLC, frames=False), TextStates(normed_BLC, kept[0])

    def _text_states(self, x_BLC: Tensor) -> TextStates:
        """What frame rows see of the text, where nothing asks for the text's next rows."""
        normed_BLC = self.input_layernorm(x_BLC)
        return TextStates(normed_BLC, self.attention.project_text(normed_BLC))

    def frame_rows(self, x_BRC: Tensor, base: Attend, plus: PlusLayer | None, plus_attend: Attend | None) -> Tensor:
        """Rows of the frame stream through this layer."""
        normed_BRC = self.input_layernorm(x_BRC)
        mixed_BRC = self.attention(normed_BRC, base)
        if plus is not None:
            assert plus_attend is not None
            mixed_BRC = plus.gate(mixed_BRC, plus(normed_BRC, plus_attend))
        return self._residual(x_BRC, mixed_BRC, frames=True)

    def forward(
        self,
        text_BLC: Tensor,
        frames_BRC: Tensor,
        valid_BL: Tensor,
        layout: StageLayout,
        plus: PlusLayer | None,
        plus_mask: MaskSpec | None,
        *,
        policy: Checkpointing = "none",
        predicted_only: bool = False,
    ) -> tuple[Tensor, Tensor]:
        """Both streams through this layer, all frames of the stage at once; of the frames this rank's rows.

        With `predicted_only` other rows than those of predicted frames offer keys and values and end here; text rows
        are returned as they came.
        """
        text_policy = policy if text_BLC.requires_grad else "none"  # without gradients nothing is kept anyway
        if predicted_only:
            text = run_layer(text_policy, self._text_states, text_BLC)
        else:
            text_BLC, text = run_layer(text_policy, self.text_rows, text_BLC, valid_BL)
        rest = (valid_BL, layout, plus, plus_mask, predicted_only)
        return text_BLC, run_layer(policy, self._all_frames, frames_BRC, text, *rest)

    def _all_frames(
        self,
        x_BRC: Tensor,
        text: TextStates,
        valid_BL: Tensor,
        layout: StageLayout,
        plus: PlusLayer | None,
        plus_mask: MaskSpec | None,
        predicted_only: bool,
    ) -> Tensor:
        queries = layout.loss_frames if predicted_only else None

        def attend(channel: AttentionChannel, mask: MaskSpec, qkv: Sequence[Tensor], text: Sequence[Tensor]) -> Tensor:
            text_k, text_v = text
            see = attend_all(
                mask, layout.grid, (text_k, text_v), valid_BL, self.kernels, queries=queries, sequence=self.sequence,
                deterministic=self.deterministic,
            )  # fmt: skip
            return channel.back(see(*qkv))

        normed_BRC = self.input_layernorm(x_BRC)
        queries_BQC = layout.predicted_rows(normed_BRC) if predicted_only else None
        qkv = self.attention.project_frames(normed_BRC, queries_BQC, None)
        mixed_BRC = attend(self.attention, layout.base_mask, qkv, text.base)
        if plus is not None:
            assert plus_mask is not None
            *qkv, text_k, text_v = plus.project_frames(normed_BRC, queries_BQC, text.normed_BLC)
            mixed_BRC = plus.gate(mixed_BRC, attend(plus, plus_mask, qkv, (text_k, text_v)))
        return self._residual(layout.predicted_rows(x_BRC) if predicted_only else x_BRC, mixed_BRC, frames=True)
