"""Frozen matrices in e4m3: both directions of their products, and models that hold them.

Legend: R rows, K features in, N features out.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from forked_ranks import run_forked
from small_model import batch, build_model, model_config
from torch import Tensor
from torch.nn import functional as F
from tracked_memory import TrackedMemory

from megacog.checkpoint.export import load_tensors
from megacog.config.schema import ModelConfig
from megacog.errors import EnvError
from megacog.model.transformer import CogVideo
from megacog.parallel.fp8 import check_device, held_weight, hold_in_fp8, load_weight, weight_product
from megacog.parallel.layers import ColumnParallelLinear, RowParallelLinear
from megacog.parallel.tensor import TensorParallel, materialize

CONFIG = model_config()
MATRICES = ("attention.qkv.weight", "attention.dense.weight", "mlp.up.weight", "mlp.down.weight")
ROUNDING = 2**-4 / 3**0.5
"""Root mean square of a relative error that is uniform in half a step of e4m3's 3 bits of mantissa, at most."""


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).bfloat16()


def held_linear(weight: Tensor, bias: Tensor) -> ColumnParallelLinear:
    """A layer that holds `weight` in e4m3."""
    with torch.device("meta"):
        layer = ColumnParallelLinear(weight.shape[1], weight.shape[0], TensorParallel())
    layer.requires_grad_(False)
    hold_in_fp8([layer])
    materialize(layer, "cpu", torch.bfloat16)
    load_weight(layer, weight)
    layer.bias.copy_(bias)
    return layer


def relative(mine: Tensor, wanted: Tensor) -> float:
    """Root mean square of the difference over that of what is wanted."""
    return float((mine.double() - wanted.double()).norm() / wanted.double().norm())


def quantized(x: Tensor) -> Tensor:
    """Every row in e4m3 under the least power of two that fits, written out."""
    scale = 2.0 ** torch.ceil(torch.log2(x.double().abs().amax(1, keepdim=True) / 448))
    return (x.double() / scale).to(torch.float8_e4m3fn).double() * scale


def test_the_product_differs_from_bf16_by_the_rounding_of_its_operands_and_no_more() -> None:
    x, weight, bias = random(64, 256, seed=1), random(192, 256, seed=2), random(192, seed=3)
    mine = held_linear(weight, bias)(x)
    wanted = F.linear(x.double(), weight.double(), bias.double())
    assert 0.3 * ROUNDING < relative(mine, wanted) < ROUNDING * 2**0.5
    exact = F.linear(quantized(x), quantized(weight), bias.double())
    assert relative(mine, exact) < 2**-8  # of bf16, in which it comes out


def test_the_gradient_is_that_of_the_held_weight() -> None:
    x, weight, grad = random(64, 256, seed=1), random(192, 256, seed=2), random(64, 192, seed=3)
    weight *= torch.logspace(-6, 6, 192, base=2.0).bfloat16()[:, None]  # rows of every size need scales of their own
    layer = held_linear(weight, random(192))
    x.requires_grad_()
    layer(x).backward(grad)
    assert x.grad is not None
    held = held_weight(layer.weight, layer.weight_scale).double()
    assert torch.equal(held, quantized(weight))
    assert relative(x.grad, grad.double() @ weight.double()) < ROUNDING * 2**0.5
    scale = layer.weight_scale.view(torch.float32).double()
    exact = quantized(grad * scale) @ (held / scale[:, None])
    assert relative(x.grad, exact) < 2**-8


def test_gradients_are_finer_in_e4m3_than_in_e5m2() -> None:
    grad, weight = random(64, 192, seed=3), random(192, 256, seed=2)
    weight_fp8, wanted = quantized(weight), grad.double() @ weight.double()
    coarse = grad.double().to(torch.float8_e5m2).double() @ weight_fp8
    assert relative(quantized(grad) @ weight_fp8, wanted) < 0.75 * relative(coarse, wanted)


def test_leading_dims_rows_of_nothing_and_no_gradient() -> None:
    weight, bias = random(48, 32), random(48, seed=1)
    layer = held_linear(weight, bias)
    x = random(2, 3, 32)
    flat = layer(x.flatten(0, 1))
    assert torch.equal(layer(x), flat.view(2, 3, 48)) and not flat.requires_grad
    assert layer(x[:, :0]).shape == (2, 0, 48)
    x.requires_grad_()
    with TrackedMemory() as memory:
        out = layer(x)
        assert memory.live == out.nbytes, "nothing is kept for the backward pass"
    assert torch.equal(out, flat.view(2, 3, 48))


def test_what_is_not_finite_shows_in_both_directions() -> None:
    layer = held_linear(random(48, 32), random(48, seed=1))
    x = random(3, 32).requires_grad_()
    layer(x).backward(torch.tensor([1.0, float("inf"), 1.0]).bfloat16()[:, None].expand(3, 48))
    assert x.grad is not None and x.grad.isnan().all(1).tolist() == [False, True, False]


def test_only_frozen_bf16_matrices_with_sides_that_divide() -> None:
    layer = ColumnParallelLinear(32, 48, TensorParallel())
    with pytest.raises(ValueError, match="trained weight"):
        hold_in_fp8([layer])
    odd = RowParallelLinear(32, 40, TensorParallel()).requires_grad_(False)
    with pytest.raises(ValueError, match=r"\(40, 32\).*multiples of 16"):
        hold_in_fp8([odd])
    held = held_linear(random(48, 32), random(48))
    with pytest.raises(ValueError, match="bfloat16"):
        weight_product(torch.randn(2, 32), held.weight, held.weight_scale)


@pytest.mark.parametrize("capability, fits", [((8, 0), False), ((8, 6), False), ((8, 9), True), ((9, 0), True)])
def test_gpus_without_fp8_are_refused(monkeypatch: pytest.MonkeyPatch, capability: Any, fits: bool) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "Card")
    check_device(torch.device("cpu"))
    if fits:
        check_device(torch.device("cuda"))
    else:
        with pytest.raises(EnvError, match=f"8.9.*Card has {capability[0]}.{capability[1]}"):
            check_device(torch.device("cuda"))


def held_model(source: CogVideo, parallel: TensorParallel | None = None) -> CogVideo:
    """The sequential stage of `source`, one rank's part, in bf16 with its base in e4m3."""
    with torch.device("meta"):
        model = CogVideo(source.config, ("sequential",), parallel)
    model.trainable("sequential")
    hold_in_fp8(model.layers)
    materialize(model, "cpu", torch.bfloat16)
    load_tensors(model, source.get_parameter, [name for name, _ in model.named_parameters()])
    return model


def test_a_model_keeps_its_parameters_by_name_shape_and_shard() -> None:
    source = build_model(CONFIG, ("sequential",))
    model = held_model(source)
    theirs = dict(source.named_parameters())
    assert [name for name, _ in model.named_parameters()] == list(theirs)
    for name, parameter in model.named_parameters():
        held = name.startswith("layers.") and name.endswith(MATRICES)
        assert parameter.dtype == (torch.uint8 if held else torch.bfloat16), name
        assert parameter.shape == theirs[name].shape
        assert getattr(parameter, "shard", None) == getattr(theirs[name], "shard", None)
        assert parameter.requires_grad == name.startswith("plus.")
        if not held:
            assert torch.equal(parameter, theirs[name].bfloat16())


def test_casts_of_the_whole_module_pass_held_weights_by() -> None:
    model = held_model(build_model(CONFIG, ("sequential",)))
    before = {name: tensor.clone() for name, tensor in [*model.named_parameters(), *model.named_buffers()]}
    model.bfloat16().to(torch.bfloat16)
    after = dict([*model.named_parameters(), *model.named_buffers()])
    assert all(torch.equal(before[name], after[name]) and before[name].dtype == after[name].dtype for name in before)
    assert "layers.0.mlp.up.weight_scale" in before


def test_loading_never_holds_the_base_in_another_precision() -> None:
    config = model_config(num_layers=6, hidden_size=128)
    source = build_model(config, ("sequential",))
    sizes = {name: parameter.numel() for name, parameter in source.named_parameters()}
    matrices = {name: size for name, size in sizes.items() if name.startswith("layers.") and name.endswith(MATRICES)}
    with TrackedMemory() as memory:
        model = held_model(source)
        held = memory.live
        assert held == sum(matrices.values()) + 2 * (sum(sizes.values()) - sum(matrices.values())) + sum(
            4 * source.get_parameter(name).shape[0] for name in matrices
        )
    # In plain torch the quantization of one matrix makes fp32 copies of it; the kernel makes none.
    assert memory.peak <= held + 16 * max(matrices.values()) < held + 2 * sum(matrices.values())
    assert model.layers[0].mlp.up.weight.dtype == torch.uint8


def loss_and_gradients(model: CogVideo, config: ModelConfig = CONFIG) -> tuple[float, dict[str, Tensor]]:
    output = model(*batch(config, 5), "sequential")
    output.loss.backward()
    gradients = {name: p.grad.float() for name, p in model.named_parameters() if p.grad is not None}
    return output.loss.item(), gradients


def test_losses_and_gradients_of_a_model_are_near_those_in_bf16() -> None:
    source = build_model(CONFIG, ("sequential",), noise=0.05)
    loss, gradients = loss_and_gradients(held_model(source))
    source.bfloat16().trainable("sequential")
    wanted, theirs = loss_and_gradients(source)
    assert loss == pytest.approx(wanted, rel=5e-3) and loss != wanted
    assert gradients.keys() == theirs.keys()
    whole, other = (torch.cat([part[name].flatten() for name in theirs]) for part in (gradients, theirs))
    assert 1e-3 < relative(whole, other) < 0.15


def losses_and_local_gradients(parallel: TensorParallel) -> Any:
    source = build_model(CONFIG_16, ("sequential",), noise=0.05)
    loss, gradients = loss_and_gradients(held_model(source, parallel), CONFIG_16)
    return loss, {name: gradient.numpy() for name, gradient in gradients.items()}


CONFIG_16 = model_config(hidden_size=64)


@pytest.mark.distributed
def test_cutting_the_model_over_ranks_quantizes_the_same_values(tmp_path: Path) -> None:
    loss, whole = losses_and_local_gradients(TensorParallel())
    ranks = run_forked(losses_and_local_gradients, 2, tmp_path)
    model = CogVideo(CONFIG_16, ("sequential",))
    for rank, (other, gradients) in enumerate(ranks):
        assert other == pytest.approx(loss, rel=2e-3)
        for name, gradient in gradients.items():
            shard = getattr(model.get_parameter(name), "shard", None)
            wanted = torch.from_numpy(whole[name])
            part = shard.slice(wanted, rank, 2) if shard else wanted
            # What rounds otherwise is bf16, before and after quantization: 2^-9 each, over the depth of the model.
            assert relative(torch.from_numpy(gradient), part) < 0.08, name
