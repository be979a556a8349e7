"""icetk's files at small sizes: the image tokenizer with every entry of the release, the text model."""

from __future__ import annotations

import io
from functools import lru_cache
from pathlib import Path

import sentencepiece
import torch
from torch import Tensor

from megacog.tokenizers.icetk_vqvae import DECODER_MULTIPLIERS, IcetkVqvae, IcetkVqvaeConfig

SIZES = {"width": 32, "codebook_size": 200, "code_dim": 8}


def small_config(rate: int = 8) -> IcetkVqvaeConfig:
    """The small tokenizer of one rate."""
    return IcetkVqvaeConfig(rate, **SIZES)


def image_weights() -> dict[str, Tensor]:
    """What `ice_image.pt` holds under `module`: all rates, and the moving averages of the codebook."""
    return {name: weight.clone() for name, weight in _image_weights().items()}


@lru_cache
def _image_weights() -> dict[str, Tensor]:
    weights: dict[str, Tensor] = {}
    with torch.random.fork_rng():
        torch.manual_seed(0)
        for rate in DECODER_MULTIPLIERS:
            weights = {**IcetkVqvae(small_config(rate)).state_dict(), **weights}
        for name, weight in weights.items():
            # Far from the start of training, where biases and norms do nothing.
            weights[name] = weight + 0.2 * torch.randn_like(weight) * (0.2 if weight.ndim == 4 else 1.0)
    weights["quantize.cluster_size"] = torch.ones(SIZES["codebook_size"])
    weights["quantize.embed_avg"] = weights["quantize.embed.weight"].clone()
    return weights


def small_vqvae(rate: int = 8) -> IcetkVqvae:
    """The tokenizer of `image_weights` at one rate."""
    with torch.device("meta"):
        tokenizer = IcetkVqvae(small_config(rate))
    weights = image_weights()
    tokenizer.load_state_dict({name: weights[name] for name in tokenizer.state_dict()}, assign=True)
    return tokenizer.eval().requires_grad_(False)


CAPTIONS = (
    "一只狗在沙滩上奔跑",
    "一个人在滑雪",
    "视频 高清摄影",
    "a dog runs along a beach",
    "a man is skiing, high quality!",
)


def write_text_model(path: Path) -> int:
    """Writes a model with the first pieces of `ice_text.model` (<unk> <s> </s> <pad> <n>); returns its pieces."""
    spans = [f"{span}秒" for span in ("0.5", *(f"{second}.0" for second in range(1, 17)))]
    buffer = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter([*CAPTIONS, *spans]),
        model_writer=buffer,
        model_type="unigram",
        vocab_size=120,
        hard_vocab_limit=False,
        character_coverage=1.0,
        user_defined_symbols=["<pad>", "<n>"],
        minloglevel=2,
    )
    path.write_bytes(buffer.getvalue())
    return sentencepiece.SentencePieceProcessor(model_proto=buffer.getvalue()).get_piece_size()
