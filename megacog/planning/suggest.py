"""What to change in a run that does not fit: candidates, each planned itself, of which the fastest are named."""

from __future__ import annotations

import copy
import json
from collections.abc import Iterable, Iterator
from typing import Any

from pydantic import ValidationError

from megacog.config.schema import Checkpointing, Config
from megacog.errors import ConfigError
from megacog.planning.cluster import GIB, Cluster
from megacog.planning.memory import REDUCE_BUCKET
from megacog.planning.plan import POLICIES, Plan, data_parallel, divisors, least_bytes, on_device, plan, plan_peak

Overrides = dict[str, Any]
"""Dotted key -> value."""

_NAMED = 5
_MICRO_BATCH = "train.micro_batch_size"
_BUCKET = "deepspeed.zero_optimization.reduce_bucket_size"
_SMALL_BUCKET = 100_000_000
"""Elements: 0.2 GB in bf16, still long enough for full speed on any link."""


def suggestions(config: Config, cluster: Cluster) -> Iterator[str]:
    """Overrides with which the run fits, each verified, the fastest first.

    Tried are policies and micro batches, alone and with ways to cut the state, sums and a base of fewer bits, and an
    optimizer on the host; only if none fits, sharing of models and samples.
    """
    for layouts in ([*_light_layouts(config), *_saving_layouts(config)], _shared_layouts(config)):
        found = [each for each in _planned(config, cluster, layouts) if each is not None]
        worthwhile = [each for each in found if not _changes_too_much(each, found)]
        if worthwhile:
            break
    for overrides, planned in sorted(worthwhile, key=lambda each: each[1].seconds or 0)[:_NAMED]:
        text = " ".join(f"{key}={json.dumps(value).strip(chr(34))}" for key, value in overrides.items())
        speed = f", {planned.tokens_per_second:,.0f} tokens/s predicted" if planned.seconds else ""
        host = f", {planned.host / GIB:.1f} GiB of host memory per node" if planned.host else ""
        yield f"{text}  ({planned.peak / GIB:.1f} GiB{speed}{host})"


def _changes_too_much(each: tuple[Overrides, Plan], found: Iterable[tuple[Overrides, Plan]]) -> bool:
    """Whether another candidate changes only part of the same keys and is as fast; micro batches do not count."""
    keys, seconds = each[0].items() - {(_MICRO_BATCH, each[0].get(_MICRO_BATCH))}, each[1].seconds or 0
    for overrides, planned in found:
        fewer = overrides.items() - {(_MICRO_BATCH, overrides.get(_MICRO_BATCH))}
        if fewer < keys and (planned.seconds or 0) <= 1.001 * seconds:
            return True
    return False


def _light_layouts(config: Config) -> list[Overrides]:
    """Ways to cut the state that change no number and send no more per layer."""
    train = config.train
    layouts: list[Overrides] = [{}]
    if train.engine == "torch":
        layouts.append({"train.engine": "deepspeed"})
    elif train.zero_stage < 2 and not train.offload_optimizer:
        layouts.append({"train.zero_stage": 2})
    bucket = config.deepspeed.get("zero_optimization", {}).get("reduce_bucket_size", REDUCE_BUCKET)
    buckets: list[Overrides] = [{}, {_BUCKET: _SMALL_BUCKET}] if bucket > _SMALL_BUCKET else [{}]
    return [layout | size for layout in layouts for size in buckets]


def _saving_layouts(config: Config) -> list[Overrides]:
    """The same with sums and a base of fewer bits, or with an optimizer on the host."""
    train = config.train
    bits: list[Overrides] = [{}]
    if train.base_precision is None and train.stage != "base":
        bits.append({"train.base_precision": "fp8"})
    places: list[Overrides] = [{}]
    if train.gradient_dtype == "fp32":
        places.append({"train.gradient_dtype": "bf16"})
    if not train.offload_optimizer:
        places.append({"train.offload_optimizer": True, "train.zero_stage": 1})
    cuts = [one | other for one in bits for other in places][1:]
    found: list[Overrides] = []
    for layout in _light_layouts(config):
        found += [each for cut in cuts if (each := layout | cut) not in found]
    return found


def _shared_layouts(config: Config) -> list[Overrides]:
    """Ways to cut the weights or the sequences, too."""
    own = {"parallel.sequence": config.parallel.sequence, "parallel.tensor": config.parallel.tensor}
    layouts: list[Overrides] = [{key: size} for key, now in own.items() for size in (2, 4, 8) if size > now]
    train = config.train
    if train.engine == "deepspeed" and train.zero_stage < 3 and config.parallel.tensor == 1:
        layouts.append({"train.zero_stage": 3})
    return layouts


def _planned(
    config: Config, cluster: Cluster, layouts: Iterable[Overrides]
) -> Iterator[tuple[Overrides, Plan] | None]:
    for layout in layouts:
        for policy in POLICIES:
            try:
                yield _largest_that_fits(config, cluster, layout, policy)
            except (ConfigError, ValidationError):
                continue  # no such layout of these ranks


def _largest_that_fits(
    config: Config, cluster: Cluster, layout: Overrides, policy: Checkpointing
) -> tuple[Overrides, Plan] | None:
    """The layout with the largest micro batch that divides and fits: the fewest passes per step are the fastest."""
    overrides = dict(layout)
    if policy != config.train.activation_checkpointing:
        overrides["train.activation_checkpointing"] = policy
    changed = on_device(_override(config, overrides), cluster.device)
    data_size = data_parallel(changed, cluster.world)
    per_rank, uneven = divmod(config.train.global_batch_size, data_size)
    if uneven or least_bytes(changed, data_size, cluster.device.gpu) > cluster.usable_bytes:
        return None
    for size in reversed(divisors(per_rank)):
        if plan_peak(changed, data_size, policy, size, cluster.device.gpu) <= cluster.usable_bytes:
            if size != config.train.micro_batch_size:
                overrides[_MICRO_BATCH] = size
            return overrides, plan(_override(config, overrides), cluster, (), suggest=False)
    return None


def _override(config: Config, overrides: Overrides) -> Config:
    """The run with its keys changed, validated."""
    values = copy.deepcopy(config.model_dump(mode="json"))
    for key, value in overrides.items():
        *sections, name = key.split(".")
        place = values
        for section in sections:
            place = place.setdefault(section, {})
        place[name] = value
    return Config.model_validate(values)
