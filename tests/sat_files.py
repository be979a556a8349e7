"""Small checkpoint folders in exactly the format of SwissArmyTransformer's files, and a model for them."""

from __future__ import annotations

import json
import random
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from megacog.config.schema import ModelConfig, PlusStage, Stage
from megacog.interop import main as convert

STAGES: dict[PlusStage, int] = {"sequential": 1, "interpolation": 2}


def sat_model(**changes: Any) -> ModelConfig:
    """Two layers, width 24, 4 heads, 4 x 4 cells, 24 codes and 16 text pieces (40 rows: 1, 2 or 4 ranks)."""
    settings: dict[str, Any] = dict(
        num_layers=2, hidden_size=24, num_heads=4, grid=(4, 4), text_length=6, text_positions=9, base_positions=30,
        plus_positions=83, image_vocab_size=24, text_vocab_size=16, boi_id=14,
        attention={"interpolation": {"kind": "shifted_window", "window": (2, 2)}},
    )  # fmt: skip
    return ModelConfig.model_validate(settings | changes)


def original_shapes(model: ModelConfig, stage: Stage) -> dict[str, tuple[int, ...]]:
    """Keys and shapes of the original's state dict, written down from its layout."""
    C, inner = model.hidden_size, model.ffn
    linear = {"attention.query_key_value": (3 * C, C), "attention.dense": (C, C), "mlp.dense_h_to_4h": (inner, C),
              "mlp.dense_4h_to_h": (C, inner)}  # fmt: skip
    norms = ("input_layernorm", "third_layernorm", "post_attention_layernorm", "fourth_layernorm")
    shapes: dict[str, tuple[int, ...]] = {
        "transformer.word_embeddings.weight": (model.image_vocab_size + model.text_vocab_size, C),
        "transformer.position_embeddings.weight": (model.base_position_rows, C),
        "transformer.final_layernorm.weight": (C,),
        "transformer.final_layernorm.bias": (C,),
    }
    for layer in range(model.num_layers):
        name = f"transformer.layers.{layer}"
        for norm in norms:
            shapes |= {f"{name}.{norm}.weight": (C,), f"{name}.{norm}.bias": (C,)}
        for part, shape in linear.items():
            shapes |= {f"{name}.{part}.weight": shape, f"{name}.{part}.bias": shape[:1]}
        if stage != "base":
            plus = "mixins.attention_plus"
            shapes |= {f"{plus}.query_key_value.{layer}.weight": (3 * C, C), f"{plus}.dense.{layer}.weight": (C, C),
                       f"{plus}.query_key_value.{layer}.bias": (3 * C,), f"{plus}.dense.{layer}.bias": (C,),
                       f"{plus}.attn_distribution.{layer}": (C,)}  # fmt: skip
    if stage != "base":
        shapes["mixins.extra_position_embedding.position_embeddings.weight"] = (model.plus_position_rows, C)
    return shapes


def original_weights(
    model: ModelConfig, stage: Stage, seed: int = 0, dtype: torch.dtype = torch.float16, std: float = 0.3
) -> dict[str, Tensor]:
    """Random weights by the original's keys; `transformer.*` depends on the seed of the base alone."""
    weights = {}
    for key, shape in original_shapes(model, stage).items():
        own = f"{stage}/{seed}/{key}" if key.startswith("mixins.") else f"{seed}/{key}"
        generator = torch.Generator().manual_seed(random.Random(own).getrandbits(62))
        values = std * torch.randn(shape, generator=generator)
        weights[key] = (values + ("layernorm.weight" in key)).to(dtype)
    return weights


def cut(key: str, whole: Tensor, rank: int, ranks: int) -> Tensor:
    """A model-parallel rank's part, as the original's layers hold it."""
    if "query_key_value" in key:  # q, k and v: of each third its rank-th part
        return torch.cat([third.chunk(ranks)[rank] for third in whole.chunk(3)])
    if "dense_h_to_4h" in key or "word_embeddings" in key:
        return whole.chunk(ranks)[rank]
    if key.endswith("weight") and ("dense" in key):  # attention.dense, dense_4h_to_h and the plus dense
        return whole.chunk(ranks, dim=1)[rank]
    return whole


def settings_json(model: ModelConfig, stage: Stage, ranks: int = 1) -> dict[str, Any]:
    """model_config.json as SwissArmyTransformer writes it."""
    settings: dict[str, Any] = {
        "model_class": "CogVideoModel", "tokenizer_type": "fake", "num_layers": model.num_layers,
        "hidden_size": model.hidden_size, "num_attention_heads": model.num_heads,
        "vocab_size": model.image_vocab_size + model.text_vocab_size, "hidden_dropout": 0.1, "attention_dropout": 0.1,
        "layernorm_order": "sandwich", "inner_hidden_size": None, "hidden_size_per_attention_head": None,
        "model_parallel_size": ranks, "max_sequence_length": model.base_position_rows,
    }  # fmt: skip
    if stage == "base":
        return settings
    text, cells = model.text_length, model.cells
    space = getattr(model.attention, stage)
    return settings | {
        "layout": f"{text}, {text + cells}, {text + model.num_frames * cells}", "cogvideo_stage": STAGES[stage],
        "window_size": space.window[0] if space.window else -1, "additional_seqlen": model.plus_position_rows,
    }


def extra_entries(iteration: int) -> dict[str, Any]:
    """What stands beside `module` in a file of SwissArmyTransformer and DeepSpeed."""
    return {
        "iteration": iteration,
        "client_lr_scheduler": {"start_lr": 2e-4, "warmup_iter": 500, "num_iters": iteration, "end_iter": 500_000,
                                "decay_style": "cosine", "decay_ratio": 10},
        "random_rng_state": random.getstate(),
        "np_rng_state": np.random.get_state(),
        "torch_rng_state": torch.get_rng_state(),
        "cuda_rng_state": torch.ByteTensor(range(16)),
        "buffer_names": [], "optimizer": None, "lr_scheduler": None, "csr_tensor_module_names": set(),
        "sparse_tensor_module_names": set(), "skipped_steps": 3, "global_steps": iteration, "global_samples": 416,
        "dp_world_size": 104, "mp_world_size": 1, "ds_version": "0.6.5",
        "ds_config": {"train_micro_batch_size_per_gpu": 4, "fp16": {"enabled": True}, "optimizer": {"params": {}}},
        "param_shapes": [{"transformer.word_embeddings.weight": torch.Size([40, 24])}],
    }  # fmt: skip


def write_sat(
    folder: Path,
    model: ModelConfig,
    stage: Stage,
    weights: Mapping[str, Tensor] | None = None,
    *,
    ranks: int = 1,
    iteration: int | str = 27000,
    settings: bool = True,
    rename: Callable[[str], str] = str,
) -> Path:
    """Write a checkpoint folder; `rename` changes every key. Returns the folder."""
    weights = original_weights(model, stage) if weights is None else weights
    inner = folder / str(iteration)
    inner.mkdir(parents=True)
    for rank in range(ranks):
        module = {rename(key): cut(key, whole, rank, ranks).clone() for key, whole in weights.items()}
        number = iteration if isinstance(iteration, int) else 0
        torch.save(extra_entries(number) | {"module": module}, inner / f"mp_rank_{rank:02d}_model_states.pt")
    (folder / "latest").write_text(str(iteration))
    if settings:
        (folder / "model_config.json").write_text(json.dumps(settings_json(model, stage, ranks)))
    return folder


def old_name(key: str) -> str:
    """A key as files from before SwissArmyTransformer 0.1 have it."""
    key = key.replace("mixins.extra_position_embedding.", "mixins.0.").replace("mixins.attention_plus.", "mixins.1.")
    return key.removeprefix("transformer.") if "word_embeddings" in key else key


def convert_command(command: str, *arguments: object) -> int:
    """The exit code of convert.py."""
    return convert.main([command, *map(str, arguments)])


def write_config(folder: Path, model: ModelConfig) -> Path:
    train = {"stage": "base", "run_dir": "run", "steps": 7, "global_batch_size": 1, "micro_batch_size": 1}
    sections = {"model": model.model_dump(mode="json"), "tokenizer": {"text": "t", "frames": "f"}, "train": train}
    folder.mkdir(exist_ok=True)
    (folder / "config.yaml").write_text(json.dumps(sections))
    return folder / "config.yaml"
