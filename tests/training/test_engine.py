"""The engines on one rank, and what DeepSpeed is told."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from megacog.config.schema import Config
from megacog.errors import ConfigError
from megacog.parallel.groups import ProcessGroups
from megacog.training.comparison import run_step, small_config, small_engine
from megacog.training.engine import deepspeed_config
from megacog.training.optimizer import build_optimizer, decays
from megacog.training.plain_engine import PlainEngine

ALONE = ProcessGroups()


def with_deepspeed(config: Config, **settings: Any) -> Config:
    return config.model_copy(update={"deepspeed": settings})


def test_deepspeed_settings_are_generated_and_merged() -> None:
    config = with_deepspeed(
        small_config("deepspeed", 2, 1, 1, "bf16"), zero_optimization={"overlap_comm": False}, wall_clock_breakdown=True
    )
    generated = deepspeed_config(config, accumulation=3)
    assert generated["zero_optimization"] == {"stage": 2, "overlap_comm": False}
    assert generated["gradient_accumulation_steps"] == 3 and generated["train_micro_batch_size_per_gpu"] == 2
    assert generated["gradient_clipping"] == config.train.gradient_clip
    assert generated["data_types"] == {"grad_accum_dtype": "fp32"} and generated["bf16"]["enabled"]
    assert generated["wall_clock_breakdown"] is True


@pytest.mark.parametrize(
    "settings", [{"gradient_clipping": 5.0}, {"zero_optimization": {"stage": 3}}, {"bf16": {"enabled": True}}]
)
def test_deepspeed_settings_cannot_contradict_the_train_section(settings: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match="contradicts"):
        deepspeed_config(with_deepspeed(small_config("deepspeed", 1, 1, 1), **settings), 1)


def test_the_sum_of_gradients_is_what_the_configuration_says() -> None:
    config = small_config("deepspeed", 1, 1, 1, "bf16")
    train = config.train.model_copy(update={"gradient_dtype": "bf16"})
    generated = deepspeed_config(config.model_copy(update={"train": train}), accumulation=4)
    assert generated["data_types"] == {"grad_accum_dtype": "bf16"}
    assert "data_types" not in deepspeed_config(small_config("deepspeed", 1, 1, 1, "fp32"), accumulation=4)


def test_the_plain_engine_can_sum_in_bf16() -> None:
    moments = []
    for dtype in ("fp32", "bf16"):
        config = small_config("torch", 0, 1, 1, "bf16")
        train = config.train.model_copy(update={"gradient_dtype": dtype})
        config = config.model_copy(update={"train": train})
        engine = small_engine(config, ALONE)
        run_step(engine, config, ALONE, 1)
        moments.append(engine.get_state("plus.sequential.layers.0.qkv.weight")["exp_avg"])
    assert not torch.equal(*moments)
    torch.testing.assert_close(*moments, rtol=0.05, atol=float(0.01 * moments[0].abs().max()))


def test_biases_and_norms_do_not_decay() -> None:
    assert decays("plus.sequential.layers.0.qkv.weight") and decays("plus.sequential.position_embedding.weight")
    assert not decays("layers.0.mlp.up.bias")
    assert not decays("layers.0.post_attention_layernorm.weight") and not decays("final_layernorm.weight")


def engine_and_config(precision: str = "fp32", steps: int = 20) -> tuple[Any, Config]:
    config = small_config("torch", 0, 1, steps, precision)
    return small_engine(config, ALONE), config


def test_clipping_changes_the_update_and_reports_the_norm_before_it() -> None:
    engine, config = engine_and_config()
    before = {name: engine.weight(name).clone() for name, _ in engine.model.named_parameters()}
    _, norm = run_step(engine, config, ALONE, 1)
    assert norm > 10 * config.train.gradient_clip
    moment = engine.get_state("plus.sequential.layers.0.qkv.weight")["exp_avg"]
    squares = sum(float(engine.get_state(name)["exp_avg"].pow(2).sum()) for name in before if name.startswith("plus"))
    assert moment.abs().max() > 0
    # After one step exp_avg = (1 - beta1) * clipped gradient, whose norm is the limit.
    assert squares**0.5 == pytest.approx(0.1 * config.train.gradient_clip, rel=1e-4)


def test_frozen_weights_stay_and_have_no_state() -> None:
    engine, config = engine_and_config()
    before = {name: engine.weight(name).clone() for name, p in engine.model.named_parameters() if not p.requires_grad}
    run_step(engine, config, ALONE, 1)
    assert before and all(torch.equal(before[name], engine.weight(name)) for name in before)
    assert all(parameter.grad is None for parameter in engine.model.parameters())
    with pytest.raises(KeyError):
        engine.get_state("layers.0.attention.qkv.weight")


def test_bf16_keeps_fp32_masters_that_learn_below_bf16_resolution() -> None:
    engine, config = engine_and_config("bf16")
    run_step(engine, config, ALONE, 1)
    state = engine.get_state("plus.sequential.layers.0.qkv.weight")
    assert state["weight"].dtype == torch.bfloat16 and state["master"].dtype == torch.float32
    assert torch.equal(state["weight"], state["master"].bfloat16())
    assert not torch.equal(state["master"], state["weight"].float())


def test_a_step_with_non_finite_gradients_changes_nothing() -> None:
    engine, config = engine_and_config()
    run_step(engine, config, ALONE, 1)
    name = "plus.sequential.layers.1.dense.weight"
    before = {field: tensor.clone() for field, tensor in engine.get_state(name).items()}
    with torch.no_grad():
        gate = engine.model.get_parameter("plus.sequential.layers.0.gate.logit")
        kept = gate.clone()
        gate.fill_(float("nan"))
    loss, norm = run_step(engine, config, ALONE, 2)
    assert loss != loss and norm != norm
    with torch.no_grad():
        gate.copy_(kept)
    assert all(torch.equal(before[field], tensor) for field, tensor in engine.get_state(name).items())
    loss, norm = run_step(engine, config, ALONE, 3)
    assert loss == loss and norm == norm, "gradients of the skipped step must be gone"


def test_training_lowers_the_loss() -> None:
    config = small_config("torch", 0, 1, 30)
    config = config.model_copy(update={"train": config.train.model_copy(update={"learning_rate": 2e-3})})
    engine = small_engine(config, ALONE)
    losses = [run_step(engine, config, ALONE, step)[0] for step in (*range(1, 31), 1)]
    assert losses[-1] < losses[0] - 0.004


def test_the_plain_engine_steps_as_adamw_on_the_clipped_mean_gradient_does() -> None:
    config = small_config("torch", 0, 1, 20)
    engine, twin = small_engine(config, ALONE), small_engine(config, ALONE).model
    assert isinstance(engine, PlainEngine)
    optimizer = build_optimizer(twin.named_parameters(), config.train)
    from megacog.training.comparison import GLOBAL_BATCH, small_batch
    from megacog.training.schedule import learning_rate

    for step in range(1, 4):
        run_step(engine, config, ALONE, step)
        text, valid, codes = small_batch(config.model, "sequential", step)
        assert text.shape[0] == GLOBAL_BATCH
        optimizer.zero_grad()
        twin(text, valid, codes, "sequential").loss.backward()  # the whole batch at once
        trained = [parameter for parameter in twin.parameters() if parameter.requires_grad]
        torch.nn.utils.clip_grad_norm_(trained, config.train.gradient_clip)
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step, config.train)
        optimizer.step()
    for name, parameter in twin.named_parameters():
        torch.testing.assert_close(engine.weight(name), parameter, rtol=1e-4, atol=2e-5)
