"""Choosing codes from logits: guidance, temperature, top-k, top-p or clusters, one random stream per row.

Every row of a batch owns a random stream that is keyed by what the row generates (prompt text, seed,
sample, stage, place in the clip). A clip therefore does not depend on the batch size, on the other
prompts or on their order. Codes are drawn by inverting the cumulative distribution at one uniform
number per code, so the whole stream of a row is drawn at once.

Tensor suffixes: B batch, S codes drawn, V codes of the frame tokenizer, K clusters, M codes of a cluster.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Sequence
from functools import partial

import torch
from torch import Tensor

from megacog.config.generation import GenerationConfig
from megacog.config.section import Stage
from megacog.generation.clusters import Clusters

Choose = Callable[[Tensor, Tensor], Tensor]
"""From logits [B, V] and a uniform number for each row to one code per row, int64 [B]."""


def chooser(settings: GenerationConfig, stage: Stage, clusters: Clusters | None) -> Choose:
    """How the settings draw the codes of a stage; `clusters` as `clusters_for` gives them."""
    temperature = settings.temperature_of(stage)
    if clusters is None:
        return partial(sample_codes, temperature=temperature, top_k=settings.top_k, top_p=settings.top_p)
    return partial(
        sample_clusters,
        clusters=clusters,
        temperature=temperature,
        top_clusters=settings.top_clusters_of(stage),
        cluster_temperature=settings.cluster_temperature,
    )


def row_seed(*key: str | int | float) -> int:
    """A 63-bit seed that is a pure function of `key`, the same on every machine and in every process."""
    digest = hashlib.sha256(json.dumps(key, ensure_ascii=True).encode()).digest()
    return int.from_bytes(digest[:8], "big") >> 1


def row_generator(*key: str | int | float) -> torch.Generator:
    """A CPU generator whose stream belongs to `key` alone."""
    return torch.Generator().manual_seed(row_seed(*key))


def draw_uniforms(generators: Sequence[torch.Generator], count: int) -> Tensor:
    """The next `count` uniform numbers in [0, 1) of each row's stream: fp64 [B, count], on the CPU."""
    rows = [torch.rand(count, generator=generator, dtype=torch.float64) for generator in generators]
    return torch.stack(rows)


def guide(conditional_BV: Tensor, null_BV: Tensor, scale: float) -> Tensor:
    """Logits of classifier-free guidance, null + scale * (conditional - null): 1 = conditional, 0 = null."""
    return null_BV + scale * (conditional_BV - null_BV)


def keep_top_k(logits_BV: Tensor, top_k: int) -> Tensor:
    """Logits with everything below the k-th largest of its row set to -inf (ties with it stay)."""
    if top_k >= logits_BV.shape[-1]:
        return logits_BV
    smallest_kept_B1 = logits_BV.topk(top_k, dim=-1).values[..., -1:]
    return logits_BV.masked_fill(logits_BV < smallest_kept_B1, float("-inf"))


def keep_top_p(logits_BV: Tensor, top_p: float) -> Tensor:
    """Logits of the smallest set of codes whose probabilities reach `top_p`, the rest set to -inf.

    The most probable code always stays.
    """
    sorted_BV, order_BV = logits_BV.sort(dim=-1, descending=True, stable=True)
    probability_BV = sorted_BV.double().softmax(dim=-1)
    mass_before_BV = probability_BV.cumsum(dim=-1) - probability_BV
    dropped_BV = mass_before_BV >= top_p
    dropped_BV[..., 0].fill_(False)
    return logits_BV.masked_fill(torch.zeros_like(dropped_BV).scatter(-1, order_BV, dropped_BV), float("-inf"))


def sample_codes(
    logits_BV: Tensor,
    uniform_B: Tensor,
    *,
    temperature: float = 1.0,
    top_k: int | None = None,
    top_p: float | None = None,
) -> Tensor:
    """One code per row, int64 [B], drawn from the filtered distribution at `uniform_B` in [0, 1).

    Temperature is applied first, then top-k, then top-p. A code of probability zero is never drawn.
    """
    logits_BV = logits_BV.float() / temperature
    if top_k is not None:
        logits_BV = keep_top_k(logits_BV, top_k)
    if top_p is not None and top_p < 1.0:
        logits_BV = keep_top_p(logits_BV, top_p)
    return _draw(logits_BV, uniform_B)


def sample_clusters(
    logits_BV: Tensor,
    uniform_B: Tensor,
    *,
    clusters: Clusters,
    temperature: float = 1.0,
    top_clusters: int | None = None,
    cluster_temperature: float = 1.0,
) -> Tensor:
    """One code per row, int64 [B]: a cluster by its probability, then one of its codes, as CogView2 samples.

    Only the `top_clusters` likeliest clusters are drawn. Within a cluster the logits are divided by temperature *
    cluster_temperature. Both draws are one from the distribution of codes that they amount to.
    """
    # fp64 as in _draw. Sums over a cluster, not over scattered codes: the same in every run on any device.
    logits_BKM = clusters.by_cluster(logits_BV.double() / temperature)
    cluster_BK = logits_BKM.logsumexp(dim=-1)
    if top_clusters is not None:
        cluster_BK = keep_top_k(cluster_BK, top_clusters)
    within_BKM = (logits_BKM / cluster_temperature).log_softmax(dim=-1)
    return _draw(clusters.by_code(cluster_BK[..., None] + within_BKM), uniform_B)


def _draw(logits_BV: Tensor, uniform_B: Tensor) -> Tensor:
    """The codes at which the cumulative distributions pass `uniform_B`."""
    # fp64: with 20000 codes an fp32 running sum would lose the codes at its end.
    cumulative_BV = logits_BV.double().softmax(dim=-1).cumsum(dim=-1)
    total_B1 = cumulative_BV[:, -1:]
    target_B1 = uniform_B.to(total_B1)[:, None] * total_B1
    below_total_B1 = torch.nextafter(total_B1, torch.zeros_like(total_B1))
    return torch.searchsorted(cumulative_BV, torch.minimum(target_B1, below_total_B1), right=True)[:, 0]
