"""What the architecture promises, whatever the weights."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from small_model import BOTH, batch, build_model, model_config
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from megacog.config.schema import Checkpointing, Stage
from megacog.errors import EnvError
from megacog.generation.cache import Decoder
from megacog.model import layer
from megacog.model.init import initialize_base, initialize_plus
from megacog.model.layout import stage_layout
from megacog.model.transformer import CogVideo
from megacog_kernels.attention import attention

CONFIG = model_config()
STAGES: list[Stage] = ["base", "sequential", "interpolation"]


@pytest.fixture(scope="module")
def model() -> CogVideo:
    return build_model().eval()


def frame_logits(model: CogVideo, codes: Tensor, stage: Stage, plus: bool = True) -> Tensor:
    """Logits of frame rows as [B, T, P, V] for the fixed text."""
    text, valid, _ = batch(model.config, 1, codes.shape[0])
    with torch.no_grad():
        logits = model.logits(text, valid, codes, stage, plus)
    return logits[:, model.config.text_length :].unflatten(1, codes.shape[1:])


def changed_frames(model: CogVideo, stage: Stage, frame: int, cell: int) -> set[int]:
    """Frames whose logits move when one code changes."""
    codes = batch(model.config, stage_layout(model.config, stage).grid.frames)[2]
    other = codes.clone()
    other[:, frame, cell] = (other[:, frame, cell] + 1) % model.config.image_vocab_size
    moved = (frame_logits(model, codes, stage) != frame_logits(model, other, stage)).flatten(2).any(dim=2).any(dim=0)
    return set(torch.nonzero(moved).flatten().tolist())


@pytest.mark.parametrize("stage", STAGES)
def test_the_last_code_of_a_frame_is_never_an_input(model: CogVideo, stage: Stage) -> None:
    for frame in range(stage_layout(CONFIG, stage).grid.frames):
        assert changed_frames(model, stage, frame, CONFIG.cells - 1) == set()


def test_sequential_frames_reach_later_frames_only(model: CogVideo) -> None:
    assert changed_frames(model, "sequential", 2, 0) == {2, 3, 4}


def test_interpolated_frames_never_reach_known_or_earlier_ones(model: CogVideo) -> None:
    assert changed_frames(model, "interpolation", 1, 0) == {1, 3}
    assert changed_frames(model, "interpolation", 3, 0) == {3}
    assert changed_frames(model, "interpolation", 4, 0) == {0, 1, 2, 3, 4}


def test_a_row_never_depends_on_its_own_code_or_later_ones(model: CogVideo) -> None:
    codes = batch(CONFIG, 5)[2]
    other = codes.clone()
    other[:, 3, 5:] = (other[:, 3, 5:] + 1) % CONFIG.image_vocab_size
    for stage in ("sequential", "interpolation"):
        before, after = frame_logits(model, codes, stage), frame_logits(model, other, stage)
        torch.testing.assert_close(before[:, 3, :6], after[:, 3, :6], rtol=0, atol=0)
        assert (before[:, 3, 6:] != after[:, 3, 6:]).any()


def test_text_rows_never_depend_on_frames(model: CogVideo) -> None:
    text, valid, codes = batch(CONFIG, 5)
    with torch.no_grad():
        rows = [model.logits(text, valid, c, "sequential")[:, : CONFIG.text_length] for c in (codes, codes.flip(2))]
    torch.testing.assert_close(rows[0], rows[1], rtol=0, atol=0)


def test_padding_pieces_change_nothing(model: CogVideo) -> None:
    text, valid, codes = batch(CONFIG, 5)
    other = text.clone()
    other[~valid] = (other[~valid] + 1) % CONFIG.text_vocab_size
    with torch.no_grad():
        first, second = (model(t, valid, codes, "sequential").loss for t in (text, other))
    assert first == second


def test_frame_0_without_plus_depends_on_base_weights_only() -> None:
    model = build_model().eval()
    codes = batch(CONFIG, 5)[2]
    before = frame_logits(model, codes, "sequential", plus=False)[:, 0]
    with torch.no_grad():
        for parameter in model.plus.parameters():
            parameter.add_(1.0)
    torch.testing.assert_close(before, frame_logits(model, codes, "sequential", plus=False)[:, 0], rtol=0, atol=0)


@pytest.mark.parametrize("own_frame", [True, False], ids=["own frame", "default mask"])
def test_fresh_attention_plus_leaves_the_base_unchanged(own_frame: bool) -> None:
    """qkv and dense copied, positions tiled: each frame (own frame only) or frame 0 has the base's logits."""
    space = {"kind": "frame"} if own_frame else {"kind": "full"}
    config = model_config(attention={"sequential": space})
    model = build_model(config, plus=("sequential",)).eval()
    initialize_plus(model, "sequential", "copy", seed=0)
    codes = batch(config, 5)[2]
    logits = frame_logits(model, codes, "sequential")
    for frame in range(5 if own_frame else 1):
        base = frame_logits(model, codes[:, frame : frame + 1], "base")[:, 0]
        torch.testing.assert_close(logits[:, frame], base, rtol=1e-5, atol=1e-5)


def test_random_dense_is_not_equivalent_to_the_base() -> None:
    model = build_model(plus=("sequential",)).eval()
    initialize_plus(model, "sequential", "random", seed=0)
    codes = batch(CONFIG, 5)[2]
    base = frame_logits(model, codes[:, :1], "base")
    assert (frame_logits(model, codes, "sequential")[:, :1] - base).abs().max() > 1e-2


@pytest.mark.parametrize("stage", STAGES)
def test_only_the_stage_is_trained_and_text_takes_no_gradient_in_video_stages(stage: Stage) -> None:
    model = build_model()
    model.trainable(stage)
    text, valid, codes = batch(CONFIG, stage_layout(CONFIG, stage).grid.frames)
    model(text, valid, codes, stage).loss.backward()
    for name, parameter in model.named_parameters():
        trained = name.startswith(f"plus.{stage}.") or (stage == "base" and not name.startswith("plus."))
        assert (parameter.grad is not None) == trained, name
    embedded = model.embed_text(text, valid)
    assert embedded.requires_grad == (stage == "base")


def test_loss_is_the_mean_cross_entropy_of_the_predicted_frames(model: CogVideo) -> None:
    text, valid, codes = batch(CONFIG, 5)
    with torch.no_grad():
        output = model(text, valid, codes, "interpolation", frame_weights=(1.0, 3.0, 1.0, 1.0, 1.0))
        logits = frame_logits(model, codes, "interpolation")[..., : CONFIG.image_vocab_size]
    each = torch.nn.functional.cross_entropy(logits[:, [1, 3]].movedim(-1, 1), codes[:, [1, 3]], reduction="none")
    torch.testing.assert_close(output.frame_loss_Q, each.mean(dim=(0, 2)))
    torch.testing.assert_close(output.loss, (3 * output.frame_loss_Q[0] + output.frame_loss_Q[1]) / 4)


def test_context_changes_inputs_but_not_targets(model: CogVideo) -> None:
    text, valid, codes = batch(CONFIG, 5)
    context = codes.clone()
    context[:, 0] = 0
    with torch.no_grad():
        plain, corrupted = (model(text, valid, codes, "sequential", c).loss for c in (None, context))
        logits = frame_logits(model, context, "sequential")[:, 1:, :, : CONFIG.image_vocab_size]
    expected = torch.nn.functional.cross_entropy(logits.flatten(0, 2), codes[:, 1:].flatten())
    assert plain != corrupted
    torch.testing.assert_close(corrupted, expected)


def plain_loss(model: CogVideo, stage: Stage) -> Tensor:
    """The loss from logits of all rows: nothing is left out, and nothing recomputed."""
    text, valid, codes = batch(model.config, stage_layout(model.config, stage).grid.frames)
    predicted = list(stage_layout(model.config, stage).loss_frames)
    rows = model.logits(text, valid, codes, stage)[:, model.config.text_length :].unflatten(1, codes.shape[1:])
    logits = rows[:, predicted, :, : model.config.image_vocab_size]
    return torch.nn.functional.cross_entropy(logits.flatten(0, 2), codes[:, predicted].flatten())


@pytest.mark.parametrize("stage", STAGES)
@pytest.mark.parametrize("policy", ["none", "selective", "full"])
def test_loss_and_every_gradient_are_those_of_the_plain_path(stage: Stage, policy: Checkpointing) -> None:
    text, valid, codes = batch(CONFIG, stage_layout(CONFIG, stage).grid.frames)
    plain, fast = build_model(), build_model()
    plain.trainable(stage)
    fast.trainable(stage)
    fast.activation_checkpointing = policy
    losses = [plain_loss(plain, stage), fast(text, valid, codes, stage).loss]
    torch.testing.assert_close(*losses, rtol=1e-6, atol=0)
    for loss in losses:
        loss.backward()
    for (name, one), other in zip(plain.named_parameters(), fast.parameters(), strict=True):
        assert (one.grad is None) == (other.grad is None), name
        if one.grad is not None and other.grad is not None:
            torch.testing.assert_close(one.grad, other.grad, rtol=1e-4, atol=1e-6, msg=name)


@pytest.mark.parametrize("policy", ["selective", "full"])
def test_dropout_is_the_same_when_a_layer_runs_again(policy: Checkpointing) -> None:
    gradients = []
    for checkpointing in ("none", policy):
        model = build_model(model_config(mlp_dropout=0.3, embedding_dropout=0.1))
        model.activation_checkpointing = checkpointing
        model.trainable("sequential")
        torch.manual_seed(3)
        model(*batch(CONFIG, 5), "sequential").loss.backward()
        gradients.append([p.grad for p in model.parameters() if p.grad is not None])
    for plain, recomputed in zip(*gradients, strict=True):
        torch.testing.assert_close(plain, recomputed, rtol=0, atol=0)


class Products(TorchDispatchMode):
    """Counts rows of matrix products by width of input and output."""

    def __init__(self) -> None:
        super().__init__()
        self.rows: dict[tuple[int, int], list[int]] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in (torch.ops.aten.addmm.default, torch.ops.aten.mm.default):
            left, right = args[-2:]
            self.rows.setdefault(tuple(right.shape), []).append(left.shape[0])
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize(("stage", "predicted"), [("sequential", 4), ("interpolation", 2)])
def test_the_last_layer_computes_no_row_that_no_loss_needs(stage: Stage, predicted: int) -> None:
    C, P, L = CONFIG.hidden_size, CONFIG.cells, CONFIG.text_length
    model = build_model()
    model.trainable(stage)
    text, valid, codes = batch(CONFIG, 5, size=1)
    with Products() as forward:
        loss = model(text, valid, codes, stage).loss
    frames, rows = 5 * P, predicted * P
    assert forward.rows[C, 3 * C] == [L, frames, frames], "q|k|v of text, base and plus in the first layer"
    assert forward.rows[C, 2 * C] == [L, L, frames, frames, L], "k|v only: text in plus, then the last layer"
    assert forward.rows[C, C] == [L, frames, frames, rows, rows, rows, rows], "dense, and q of the last layer"
    assert forward.rows[C, 4 * C] == [L, frames, rows] and forward.rows[4 * C, C] == [L, frames, rows], "MLP"
    with Products() as backward:
        loss.backward()
    assert L not in backward.rows[3 * C, C] and backward.rows[4 * C, C] == [rows, frames], "no gradient of text rows"


def test_wrong_frame_shape_and_missing_plus_are_refused(model: CogVideo) -> None:
    text, valid, codes = batch(CONFIG, 4)
    with pytest.raises(ValueError, match="takes frames of shape"):
        model(text, valid, codes, "sequential")
    with pytest.raises(ValueError, match="holds no attention-plus"):
        build_model(plus=())(*batch(CONFIG, 5), "sequential")


def test_initial_weights_follow_the_release() -> None:
    config = model_config(hidden_size=64, num_layers=8, text_vocab_size=500)
    model = CogVideo(config, BOTH)
    initialize_base(model, seed=3)
    initialize_plus(model, "sequential", "random", seed=3)
    layer = model.layers[3]
    assert layer.attention.qkv.weight.std().item() == pytest.approx(0.02, rel=0.05)
    assert layer.mlp.down.weight.std().item() == pytest.approx(0.02 / 4, rel=0.05)
    plus = model.plus["sequential"]
    assert plus.layers[3].dense.weight.std().item() == pytest.approx(0.02, rel=0.05)
    assert torch.equal(plus.layers[3].qkv.weight, layer.attention.qkv.weight)
    first = model.position_embedding.weight[config.text_positions :]
    assert torch.equal(plus.position_embedding.weight, first.repeat(5, 1))


def test_release_shape_has_the_exact_parameter_counts() -> None:
    config = model_config(
        num_layers=48, hidden_size=3072, num_heads=48, grid=(20, 20), text_length=64, text_positions=512,
        base_positions=1024, image_vocab_size=20000, text_vocab_size=130010, boi_id=130000,
    )  # fmt: skip
    with torch.device("meta"):
        model = CogVideo(config, BOTH)
    counts = {"base": 0, "sequential": 0, "interpolation": 0}
    for name, parameter in model.named_parameters():
        counts[name.split(".")[1] if name.startswith("plus.") else "base"] += parameter.numel()
    assert counts == {"base": 5_902_307_328, "sequential": 1_818_820_608, "interpolation": 1_818_820_608}


def test_asking_for_triton_where_it_cannot_run_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    model = CogVideo(model_config(), BOTH, kernels="triton")
    with pytest.raises(EnvError, match="kernels: .*'triton' cannot run: .*set kernels to auto"):
        model.choose_kernels()
    with pytest.raises(ValueError, match="'triton' cannot run"):
        model(*batch(model.config, 5), "sequential")


@pytest.mark.parametrize(("stage", "known", "policy"), [
    ("interpolation", (0, 2, 4), "none"), ("sequential", (0,), "selective"),
])  # fmt: skip
def test_triton_and_reference_give_the_same_loss_gradients_and_decoding(
    stage: Stage, known: tuple[int, ...], policy: Checkpointing
) -> None:
    config = model_config(hidden_size=32, num_heads=2)
    models = [build_model(config, kernels=kernels, checkpointing=policy) for kernels in ("reference", "triton")]
    text, valid, codes = batch(config, 5)
    results = []
    for model in models:
        model.trainable(stage)
        loss = model(text, valid, codes, stage).loss
        loss.backward()
        gradients = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
        decoder = Decoder(model.eval(), stage, text, valid)
        decoder.give({frame: codes[:, frame] for frame in known})
        first = model.config.cells
        logits = [decoder.step(torch.tensor([first + cell]), codes[:, 1, :1]) for cell in (0, 1)]
        results.append((loss.detach(), gradients, logits))
    (loss, gradients, logits), (triton_loss, triton_gradients, triton_logits) = results
    torch.testing.assert_close(triton_loss, loss, rtol=1e-5, atol=1e-5)
    assert gradients.keys() == triton_gradients.keys() and gradients
    for name, gradient in gradients.items():
        torch.testing.assert_close(triton_gradients[name], gradient, rtol=1e-4, atol=1e-5, msg=name)
    torch.testing.assert_close(triton_logits, logits, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("deterministic", [True, False])
def test_how_gradients_are_summed_is_asked_of_every_attention(
    monkeypatch: pytest.MonkeyPatch, deterministic: bool
) -> None:
    asked: list[bool] = []

    def noting(*tensors: Any, **options: Any) -> Any:
        asked.append(options["deterministic"])
        return attention(*tensors, **options)

    monkeypatch.setattr(layer, "attention", noting)
    model = CogVideo(CONFIG, BOTH, deterministic=deterministic)
    model(*batch(CONFIG, 5), "sequential")
    assert asked == 2 * CONFIG.num_layers * [deterministic]
