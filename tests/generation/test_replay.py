"""A sampling step is a function of device memory alone, so a recording of it samples what the step itself does."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from small_model import batch, build_model, model_config
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten, tree_leaves, tree_unflatten

from megacog.config.schema import ModelConfig
from megacog.generation import cache, decode
from megacog.generation.clusters import Clusters
from megacog.generation.decode import Sampler, generate_frames
from megacog.generation.replay import Replayed, can_capture
from megacog.generation.sampling import row_generator, sample_clusters, sample_codes
from megacog.model.transformer import CogVideo
from megacog_kernels import dispatch
from megacog_kernels.grid import MaskSpec, VideoGrid, dense_mask

SAMPLERS: dict[str, Any] = {
    "codes": partial(sample_codes, temperature=0.9, top_k=12, top_p=0.95),
    "clusters": partial(sample_clusters, clusters=Clusters.of_labels(torch.arange(17) % 5), top_clusters=4),
}


def small_config(**changes: Any) -> ModelConfig:
    """Two heads of width 16, as the kernels want them."""
    windows = {"kind": "shifted_window", "window": (2, 2)}
    return model_config(grid=(2, 4), num_heads=2, attention={"interpolation": windows}, **changes)


class Tape(TorchDispatchMode):
    """What a CUDA graph is on a GPU: the operators that ran and the tensors they ran on, without the Python between."""

    def __init__(self) -> None:
        super().__init__()
        self.operators: list[tuple[Any, Any, Any, Any]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        self.operators.append((func, args, kwargs or {}, out))
        return out

    def replay(self) -> None:
        """Run them again: on their own results where one made the arguments, else on the tensors of the recording."""
        made: dict[int, Any] = {}
        for func, args, kwargs, recorded in self.operators:
            leaves, shape = tree_flatten((args, kwargs))
            args, kwargs = tree_unflatten([made.get(id(leaf), leaf) for leaf in leaves], shape)
            out = func(*args, **kwargs)
            made |= zip(map(id, tree_leaves(recorded)), tree_leaves(out), strict=True)


def record_on_tape(sampler: Sampler, work: Callable[[], None]) -> Callable[[], None]:
    """As a capture does, leaves the step to be done: what it has written is written again."""
    tape = Tape()
    with tape:
        work()
    sampler.next_1 -= 1
    return tape.replay


def attention_on_device(
    q_BRND: Tensor, k_BSND: Tensor, v_BSND: Tensor, valid_BL: Tensor, tokens_BR: Tensor, mask: MaskSpec,
    grid: VideoGrid, text_bias: float, implementation: str,
) -> Tensor:  # fmt: skip
    """What the kernels of `decode_attention` compute, which are slow to interpret; plain torch looks at tokens."""
    assert text_bias == 0.0
    frames_BRF = torch.from_numpy(dense_mask(mask, grid).copy())[tokens_BR.long()]
    text_BRL = valid_BL[:, None].expand(-1, q_BRND.shape[1], -1)
    allowed_B1RS = torch.cat([text_BRL, frames_BRF], dim=2)[:, None]
    q, k, v = (rows.transpose(1, 2) for rows in (q_BRND, k_BSND, v_BSND))
    return scaled_dot_product_attention(q, k, v, attn_mask=allowed_B1RS).transpose(1, 2)


def test_recorded_steps_sample_the_same_codes(monkeypatch: pytest.MonkeyPatch) -> None:
    model = build_model(small_config()).eval()
    text, valid, codes = batch(model.config, 5, size=1)
    known = {frame: codes[:, frame] for frame in (0, 2, 4)}
    widths: list[int] = []

    def generated() -> Tensor:
        return generate_frames(
            model, "interpolation", text, valid, (text.roll(1), valid), known, guidance=3.0,
            choose=SAMPLERS["codes"], generators=[row_generator("row")],
        )  # fmt: skip

    def replayed(step: Any) -> Replayed:
        def counted(width: int) -> None:
            widths.append(width)
            step(width)

        return Replayed(counted, partial(record_on_tape, step.__self__))

    eager = generated()
    monkeypatch.setattr(cache, "decode_attention", attention_on_device)
    monkeypatch.setattr(decode, "can_capture", lambda _: True)
    monkeypatch.setattr(decode, "Replayed", replayed)
    assert torch.equal(generated(), eager)
    assert widths == [1, 1, 2, 2]  # each width once as it is and once to be recorded, of 13 steps
    assert len(eager[:, [1, 3]].unique()) > 3


class StaysOnDevice(TorchDispatchMode):
    """Refuses what moves values between devices, which a capture cannot."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        devices = {leaf.device.type for leaf in tree_leaves((args, kwargs, out)) if isinstance(leaf, Tensor)}
        assert devices <= {"meta"}, f"{func} has tensors on {devices}"
        return out


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_a_step_reads_nothing_on_the_host_and_gets_nothing_from_it(
    sampler: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On the meta device, whose tensors have no values: reading one is an error, as is computing on two devices."""
    monkeypatch.setattr(dispatch, "_choose", lambda *_: ("triton", "as on a GPU"))
    with torch.device("meta"):
        model = CogVideo(small_config(num_layers=1), ("interpolation",)).bfloat16()
    text, valid, codes = batch(model.config, 5)
    choose, step = SAMPLERS[sampler], Sampler.step
    if sampler == "clusters":
        choose = partial(choose, clusters=choose.keywords["clusters"].to("meta"))
    widths: list[int] = []

    def watched(self: Sampler, width: int) -> None:
        widths.append(width)
        with StaysOnDevice():
            step(self, width)

    def made() -> Tensor:
        return generate_frames(
            model, "interpolation", text, valid, (text[:1], valid[:1]), {f: codes[:, f] for f in (0, 2, 4)},
            guidance=3.0, choose=choose, generators=[row_generator("row", row) for row in range(2)],
        )  # fmt: skip

    monkeypatch.setattr(Sampler, "step", watched)
    assert made().is_meta and {1, 2} == set(widths)
    plain = choose
    for wrong in (lambda logits, at: plain(logits, at) + at.sum().item(), lambda logits, at: plain(logits, at.cpu())):
        choose = wrong
        with pytest.raises((RuntimeError, NotImplementedError, AssertionError), match="meta"):
            made()


@pytest.mark.skipif(not torch.cuda.is_available(), reason="CUDA graphs need a GPU")
@pytest.mark.parametrize("sampler", SAMPLERS)
def test_cuda_graphs_sample_the_same_codes(sampler: str) -> None:
    model = build_model(small_config()).eval().to("cuda")
    text, valid, codes = batch(model.config, 5)
    choose = SAMPLERS[sampler]
    if sampler == "clusters":
        choose = partial(choose, clusters=choose.keywords["clusters"].to("cuda"))
    assert can_capture(model)
    graphs, python = (
        generate_frames(
            model, "interpolation", text, valid, (text[:1], valid[:1]), {f: codes[:, f] for f in (0, 2, 4)},
            guidance=3.0, choose=choose, generators=[row_generator("row", row) for row in range(2)],
            cuda_graphs=cuda_graphs,
        )
        for cuda_graphs in (True, False)
    )  # fmt: skip
    assert torch.equal(graphs, python) and len(graphs[:, [1, 3]].unique()) > 3


def test_only_kernels_that_read_positions_on_a_gpu_are_captured() -> None:
    assert not can_capture(build_model(small_config(), kernels="triton"))
