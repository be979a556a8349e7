"""What one micro batch needs, found by running the model itself on fake tensors.

Fake tensors have shapes and dtypes but no data, so a forward and backward pass of any size takes seconds and no
memory. Every tensor that comes to life is entered in a ledger and struck out when it dies, and every operator's work
is added up. The result depends on shapes alone, and it cannot drift away from the model's code.

Layers in the middle of a model are alike, and so are samples: two small depths and two batch sizes are run, and
everything is linear in between and beyond.
"""

from __future__ import annotations

import dataclasses
import weakref
from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import dataclass
from functools import lru_cache
from typing import Any
from unittest import mock

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from megacog.config.schema import Checkpointing, Config, Kernels, ModelConfig
from megacog.errors import ConfigError, EnvError
from megacog.model.flops import visible_pairs
from megacog.model.layout import stage_layout
from megacog.model.transformer import CogVideo
from megacog.parallel.sequence import SequenceParallel
from megacog.parallel.tensor import TensorParallel
from megacog_kernels import products
from megacog_kernels.attention import reference
from megacog_kernels.attention.ops import decode_mask
from megacog_kernels.cross_entropy.chunks import row_stride
from megacog_kernels.dispatch import planned_for_gpu

_DEPTHS = (2, 4)
"""Layers of the runs: the first and the last layer are special, and odd layers may have another mask than even ones."""
_BATCHES = (2, 3)
"""Samples of the runs; a single sample is run by itself, because some of its slices need no copies."""
_ATTENTION_BACKWARD = {False: 2.5, True: 3.5}
"""Work of attention's backward over its forward, by whether it is deterministic: five or seven matrix products for
two, since a kernel of its own for q's gradient computes scores and weights once more."""


@dataclass(frozen=True)
class Pass:
    """Memory and work of one forward and backward pass on one rank, without weights. Bytes and operations."""

    saved: float = 0
    """Alive when the forward pass ends: what is kept for the backward pass."""
    peak_before: float = 0
    """Most alive at once before the first gradient of a weight exists."""
    peak_after: float = 0
    """Most alive at once afterwards, with every gradient consumed as soon as it exists."""
    peak_kept: float = 0
    """The same with all gradients kept."""
    gemm_flops: float = 0
    """Of matrix products, recomputed ones too."""
    attention_flops: float = 0
    """Of attention forward, recomputed ones too: a multiply-add of a visible pair is two operations."""
    attention_backward_flops: float = 0
    pointwise_bytes: float = 0
    """Read and written by all other operators."""
    sums: float = 0
    """Sums over the ranks that share a model, recomputed ones too; also of the next two pairs."""
    sum_bytes: float = 0
    gathers: float = 0
    """Gatherings from these ranks."""
    gather_bytes: float = 0
    """Of what is gathered, all parts together."""
    exchanges: float = 0
    """All-to-alls of the ranks that share a sample."""
    exchange_bytes: float = 0
    """Of one rank's side."""

    def _map(self, other: Pass, share: float) -> Pass:
        pairs = zip(dataclasses.astuple(self), dataclasses.astuple(other), strict=True)
        return Pass(*(a + share * (b - a) for a, b in pairs))


def trace_pass(config: Config, policy: Checkpointing, batch: int, gpu: bool) -> Pass:
    """One forward and backward pass of `batch` samples on one rank of the run.

    Args:
        config: The run; its model may be of any size.
        policy: What `train.activation_checkpointing` would be.
        batch: Samples.
        gpu: As on a GPU that Triton serves, with the implementations that `train.kernels` takes there; else as on a
            CPU.

    Raises:
        ConfigError: `train.kernels` is triton and the kernels cannot take the model's sizes.
    """
    model = config.model.model_copy(update={"boi_id": config.model.boi_id or 0, "inherit": None})
    train, parallel = config.train, config.parallel
    place = (train.stage, train.precision, parallel.tensor, parallel.sequence, train.deterministic, gpu)
    kernels: Kernels = train.kernels if gpu else "reference"
    return _at_batch(model, place, policy, kernels, batch)


@lru_cache(maxsize=256)
def _at_batch(model: ModelConfig, place: tuple[Any, ...], policy: Checkpointing, kernels: Kernels, batch: int) -> Pass:
    if batch == 1 or batch in _BATCHES:
        return _at_depth(model, place, policy, kernels, batch)
    low, high = (_at_batch(model, place, policy, kernels, size) for size in _BATCHES)
    return low._map(high, (batch - _BATCHES[0]) / (_BATCHES[1] - _BATCHES[0]))


def _at_depth(model: ModelConfig, place: tuple[Any, ...], policy: Checkpointing, kernels: Kernels, batch: int) -> Pass:
    if model.num_layers <= _DEPTHS[1]:
        return _run(model, place, policy, kernels, batch)
    low, high = (
        _run(model.model_copy(update={"num_layers": depth}), place, policy, kernels, batch) for depth in _DEPTHS
    )
    return low._map(high, (model.num_layers - _DEPTHS[0]) / (_DEPTHS[1] - _DEPTHS[0]))


def _run(config: ModelConfig, place: tuple[Any, ...], policy: Checkpointing, kernels: Kernels, batch: int) -> Pass:
    stage, precision, tensor, sequence, deterministic, gpu = place
    dtype = torch.bfloat16 if precision == "bf16" else torch.float32
    grid = stage_layout(config, stage).grid
    with _groups(tensor, sequence) as (parallel, shared), FakeTensorMode():
        with default_dtype(dtype):
            plus = () if stage == "base" else (stage,)
            model = CogVideo(config, plus, parallel, policy, kernels, shared, deterministic)
        model.trainable(stage)
        inputs = {
            "text_BL": torch.zeros(batch, config.text_length, dtype=torch.int64),
            "text_valid_BL": torch.ones(batch, config.text_length, dtype=torch.bool),
            "frames_BTP": torch.zeros(batch, grid.frames, grid.cells, dtype=torch.int64),
        }
        ledger = Ledger([*model.parameters(), *inputs.values()])
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.register_post_accumulate_grad_hook(ledger.consume)
        with as_on_a_gpu() if gpu else nullcontext(), ledger:
            _check_kernels(model)
            loss = model(**inputs, stage=stage).loss
            saved = ledger.live
            loss.backward()
            del loss
    return Pass(
        saved, ledger.peak_before, ledger.peak_after, ledger.peak_kept, ledger.gemm, ledger.attention,
        ledger.attention_backward, ledger.pointwise, **ledger.collectives,
    )  # fmt: skip


def _check_kernels(model: CogVideo) -> None:
    try:
        model.choose_kernels()
    except EnvError as error:
        raise ConfigError(f"train.{error}") from None


class Ledger(TorchDispatchMode):
    """Keeps account of living tensors and of the operators' work."""

    def __init__(self, given: Iterable[Tensor]) -> None:
        super().__init__()
        self.live = 0
        self.peak_before = self.peak_after = self.peak_kept = 0
        self.gemm = self.attention = self.attention_backward = self.pointwise = 0.0
        self.collectives: dict[str, float] = {}
        """Numbers and bytes of collectives, by their names in `Pass`."""
        self._gradients = 0
        self._known = {tensor.untyped_storage()._cdata for tensor in given}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        out = func(*args, **kwargs)
        created = [tensor for tensor in tree_leaves(out) if isinstance(tensor, Tensor)]
        fresh = [self.enter(tensor) for tensor in created]
        self._note_peak(_hidden_bytes(func, args))
        self._count_work(func, args, created, any(fresh) or "out" in kwargs)
        return out

    def consume(self, parameter: Tensor) -> None:
        """Take a weight's gradient away, as an engine does that accumulates elsewhere."""
        assert parameter.grad is not None
        self._gradients += parameter.grad.nbytes
        parameter.grad = None

    @property
    def peak(self) -> int:
        """Most bytes alive at once."""
        return max(self.peak_before, self.peak_after)

    def forget_peaks(self) -> None:
        """Begin anew with what is alive now."""
        self.peak_before = self.peak_after = self.peak_kept = self.live
        self._gradients = 0

    def enter(self, tensor: Tensor) -> bool:
        """Note a tensor that is alive; whether its memory is new."""
        if tensor.device.type == "meta":
            return False
        storage = tensor.untyped_storage()
        key, size = storage._cdata, storage.nbytes()
        if key in self._known:
            return False
        self._known.add(key)
        self.live += size
        weakref.finalize(storage, self._strike_out, key, size)
        return True

    def _strike_out(self, key: int, size: int) -> None:
        self._known.discard(key)
        self.live -= size

    def _note_peak(self, hidden: int) -> None:
        now = self.live + hidden
        if self._gradients == 0:
            self.peak_before = max(self.peak_before, now)
        else:
            self.peak_after = max(self.peak_after, now)
        self.peak_kept = max(self.peak_kept, now + self._gradients)

    def _count_work(self, func: Any, args: Any, created: list[Tensor], fresh: bool) -> None:
        name = func._schema.name
        if name in _COLLECTIVES:
            self._count_collective(_COLLECTIVES[name], args[0])
            return
        if not fresh and not name.endswith("_"):
            return  # a view, or a result that was kept from a first run
        if name in _PRODUCTS:
            left, right = args[-2:] if name != "aten::bmm" else args[:2]
            self.gemm += 2 * left.numel() * right.shape[-1]
        elif name == "megacog::attend":
            self.attention += _attention_flops(args[0], args[3], args[6])
        elif name == "megacog::attend_backward":
            self.attention_backward += _ATTENTION_BACKWARD[args[11]] * _attention_flops(args[3], args[6], args[9])
        elif name == _REFERENCE_ATTENTION:
            self.attention += _reference_flops(args[0], args[1])
        elif name == f"{_REFERENCE_ATTENTION}_backward":
            self.attention_backward += _ATTENTION_BACKWARD[False] * _reference_flops(args[1], args[2])
        elif name.startswith("megacog::linear_logsumexp"):
            hidden, weight = (args[0], args[1]) if name == "megacog::linear_logsumexp" else (args[3], args[4])
            products = 1 if name == "megacog::linear_logsumexp" else 1 + sum(args[8])
            self.gemm += products * 2 * hidden.numel() * weight.shape[0]
        else:
            tensors = [leaf for leaf in tree_leaves(args) if isinstance(leaf, Tensor)]
            self.pointwise += sum(tensor.nbytes for tensor in [*tensors, *created])

    def _count_collective(self, kind: str, result: Any) -> None:
        size = sum(tensor.nbytes for tensor in tree_leaves(result))
        for name, amount in ((f"{kind}s", 1), (f"{kind}_bytes", size)):
            self.collectives[name] = self.collectives.get(name, 0) + amount


_PRODUCTS = ("aten::mm", "aten::addmm", "aten::addmm_", "aten::bmm")
_COLLECTIVES = {"c10d::allreduce_": "sum", "c10d::allgather_": "gather", "c10d::alltoall_base_": "exchange"}
"""Operator -> name in `Pass`. Its first argument is what it fills."""
_REFERENCE_ATTENTION = "aten::_scaled_dot_product_flash_attention_for_cpu"
"""What the reference calls on fake tensors, for the fused attention that torch has on a GPU, too."""


def _hidden_bytes(func: Any, args: Any) -> int:
    """Memory that an operator of ours takes for itself while it runs."""
    name = func._schema.name
    if name == "megacog::linear_logsumexp":
        hidden, weight, _, rows, triton = args
        copies = 0 if triton else 1 if hidden.dtype == torch.float32 else 2  # shifted logits; in fp32, if they are not
        return _logits_bytes(hidden, weight, rows, copies)
    if name == "megacog::linear_logsumexp_backward":
        _, _, _, hidden, weight, _, rows, triton, needed = args
        sums = 4 * weight.numel() if needed[1] else 0  # the weight's gradient is summed in fp32
        return _logits_bytes(hidden, weight, rows, 0 if triton else 2) + sums  # the exponentials and what they are of
    if name == "megacog::attend_backward" and not args[11]:
        return 4 * args[3].numel()  # the gradient of q is summed in fp32
    return 0


def _logits_bytes(hidden_XC: Tensor, weight_VC: Tensor, rows: int, copies: int) -> int:
    """A chunk of logits, and fp32 copies of it."""
    rows, V = min(rows, hidden_XC.shape[0]), weight_VC.shape[0]
    return rows * (row_stride(V) * hidden_XC.element_size() + copies * 4 * V)


def _attention_flops(q_BRND: Tensor, text_k_BLND: Tensor, code: Sequence[int]) -> float:
    B, R, N, D = q_BRND.shape
    frame_pairs = _visible_pairs(tuple(code)) if code else 0
    return 4.0 * B * N * D * (frame_pairs + R * text_k_BLND.shape[1])


def _reference_flops(q_BNRD: Tensor, k_BNKD: Tensor) -> float:
    """Masked pairs are computed, too."""
    return 4.0 * q_BNRD.numel() * k_BNKD.shape[2]


@lru_cache(maxsize=64)
def _visible_pairs(code: tuple[int, ...]) -> int:
    mask, grid, asking = decode_mask(code)
    pairs_T = np.array(visible_pairs(mask, grid))
    return int(pairs_T[list(asking)].sum() if asking else pairs_T.sum())


@contextmanager
def as_on_a_gpu() -> Iterator[None]:
    """Implementations are those of a GPU that Triton serves, products take bf16 as it is, and each dropout is one
    kernel that keeps a mask of a byte per element."""
    with ExitStack() as stack:
        stack.enter_context(planned_for_gpu())
        stack.enter_context(mock.patch.object(nn.Dropout, "forward", _fused_dropout))
        for module in (products, reference):
            stack.enter_context(mock.patch.object(module, "through_fp32", lambda x: False))
        yield


def _fused_dropout(module: nn.Dropout, x: Tensor) -> Tensor:
    return torch.native_dropout(x, module.p, True)[0] if module.p and module.training else x


@contextmanager
def default_dtype(dtype: torch.dtype) -> Iterator[None]:
    """Modules are built in this dtype: fake tensors cannot be cast afterwards."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


@contextmanager
def _groups(tensor: int, sequence: int) -> Iterator[tuple[TensorParallel, SequenceParallel]]:
    """The first of the ranks that share a model or a sample; their collectives do nothing to fake tensors."""
    size = tensor * sequence
    own = size > 1 and not dist.is_initialized()
    if own:
        from torch.testing._internal.distributed.fake_pg import FakeStore

        dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=size)
    try:
        group = dist.group.WORLD if size > 1 else None
        yield TensorParallel(0, tensor, group), SequenceParallel(0, sequence, group)
    finally:
        if own:
            dist.destroy_process_group()
