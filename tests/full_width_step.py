"""Training steps of two layers of the release's width in bf16: `python tests/full_width_step.py POLICY ...`.

Prints a JSON line per policy: loss, gradient norm, seconds and CPU seconds of a step (AdamW with learning rate 0, so
that every policy finds the same weights), and the peak memory of the process so far in GiB.
"""

from __future__ import annotations

import json
import resource
import sys
import time

import torch
from small_model import batch, model_config
from torch import Tensor

from megacog.model.transformer import CogVideo
from megacog.parallel.groups import ProcessGroups
from megacog.parallel.tensor import materialize
from megacog.training.comparison import small_config
from megacog.training.plain_engine import PlainEngine

THREADS = 2
SHAPE = dict(
    num_layers=2, hidden_size=3072, num_heads=48, grid=(20, 20), text_length=64, text_positions=512,
    image_vocab_size=20000, text_vocab_size=130010, boi_id=130000,
)  # fmt: skip


@torch.no_grad()
def fill(name: str, weight: Tensor) -> None:
    """Numbers of an initial weight's size, without drawing 10^9 of them."""
    if weight.dim() == 1:
        weight.fill_(1.0 if "layernorm.weight" in name else 0.0)
        return
    drawn = 0.02 * torch.randn(1 << 20, generator=torch.Generator().manual_seed(len(name)))
    flat = weight.view(-1)
    for first in range(0, len(flat), len(drawn)):
        part = flat[first : first + len(drawn)]
        part.copy_(drawn[: len(part)])


def main() -> None:
    torch.set_num_threads(THREADS)
    config = small_config("torch", 0, 1, 1, "bf16").model_copy(update={"model": model_config(**SHAPE)})
    with torch.device("meta"):
        model = CogVideo(config.model, ("sequential",))
    materialize(model, "cpu", torch.bfloat16)
    for name, weight in model.named_parameters():
        fill(name, weight)
    model.trainable("sequential")
    engine = PlainEngine(config, model, ProcessGroups(), 1)
    text, valid, codes = batch(config.model, 5, size=1)
    for policy in sys.argv[1:]:
        model.activation_checkpointing = policy  # type: ignore[assignment]
        wall, cpu = time.perf_counter(), time.process_time()
        loss = engine.forward(text_BL=text, text_valid_BL=valid, frames_BTP=codes, stage="sequential").loss
        engine.backward(loss)
        engine.step(0.0)
        found = {"loss": loss.item(), "grad_norm": engine.grad_norm}
        found |= {"seconds": time.perf_counter() - wall, "cpu_seconds": time.process_time() - cpu}
        found["peak_gib"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
        print(json.dumps(found), flush=True)


if __name__ == "__main__":
    main()
