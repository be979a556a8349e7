"""Clusters of codes that look alike, for the sampler that draws a cluster first.

A cluster file is one numpy array of integers, the number of the cluster of every code, in .npy format without
pickled objects: the format of the file that CogView2 and CogVideo were released with (cluster_label2.npy). Without
a file, k-means (Lloyd 1982) over the vectors of the frame tokenizer's codebook makes the clusters, started as
k-means++ does (Arthur and Vassilvitskii 2007) with a fixed seed.

Tensor suffixes: V codes, D channels of a code vector, K clusters, M codes of the largest cluster, B batch.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from megacog.config.generation import GenerationConfig
from megacog.errors import ConfigError, DataError
from megacog.tokenizers.frames import FrameTokenizer

CODES_PER_CLUSTER = 40
"""The release has 500 clusters of its 20000 codes."""
_SEED = 20220529
_MAX_ROUNDS = 100
# Codes x clusters of one block of distances; bounds memory for large codebooks.
_DISTANCE_BLOCK = 1 << 24


@dataclass(frozen=True)
class Clusters:
    """A partition of the codes, laid out so that every sum over a cluster runs in one fixed order."""

    members_KM: Tensor
    """int64: the codes of every cluster, ascending, then V (no code) up to the size of the largest."""
    places_V: Tensor
    """int64: where `members_KM.flatten()` holds each code."""

    @classmethod
    def of_labels(cls, labels_V: Tensor) -> Clusters:
        """The partition that gives every code a cluster, 0 .. K - 1, none of them empty."""
        sizes_K = torch.bincount(labels_V)
        order_V = labels_V.argsort(stable=True)
        starts_K = sizes_K.cumsum(0) - sizes_K
        cluster_V = labels_V[order_V]
        place_V = cluster_V * sizes_K.max() + torch.arange(len(labels_V)) - starts_K[cluster_V]
        members_KM = torch.full((len(sizes_K), int(sizes_K.max())), len(labels_V))
        members_KM.view(-1)[place_V] = order_V
        return cls(members_KM, torch.empty_like(place_V).scatter_(0, order_V, place_V))

    def to(self, device: torch.device | str) -> Clusters:
        """The same partition on a device."""
        return Clusters(self.members_KM.to(device), self.places_V.to(device))

    def by_cluster(self, logits_BV: Tensor) -> Tensor:
        """Logits [B, K, M] in the order of `members_KM`, -inf where there is no code."""
        return F.pad(logits_BV, (0, 1), value=float("-inf"))[:, self.members_KM]

    def by_code(self, logits_BKM: Tensor) -> Tensor:
        """Logits [B, V]; the inverse of `by_cluster`."""
        return logits_BKM.flatten(1)[:, self.places_V]


def clusters_for(settings: GenerationConfig, frames: FrameTokenizer) -> Clusters | None:
    """What the settings say to sample from; None if they name another sampler.

    Raises:
        ConfigError: more clusters are asked for than the tokenizer has codes.
        DataError: the cluster file cannot be used with this tokenizer.
    """
    if settings.sampler != "clusters":
        return None
    if settings.clusters is not None:
        return Clusters.of_labels(read_labels(Path(settings.clusters), frames.codebook_size))
    wanted = settings.num_clusters or -(-frames.codebook_size // CODES_PER_CLUSTER)
    if wanted > frames.codebook_size:
        raise ConfigError(
            f"generation.num_clusters {wanted} is more than the {frames.codebook_size} codes of the frame tokenizer; "
            "set fewer, or null for one cluster per 40 codes"
        )
    return Clusters.of_labels(k_means(frames.codebook(), wanted))


def read_labels(path: Path, codebook_size: int) -> Tensor:
    """The cluster of every code in a cluster file: int64 [V].

    Raises:
        DataError: the file is missing, no such array, or does not fit the codebook.
    """
    labels = _read_array(path)
    if labels.ndim != 1 or labels.dtype.kind not in "iu":
        raise DataError(f"cluster file {path} holds {labels.dtype} {list(labels.shape)}, not one integer per code")
    if len(labels) != codebook_size:
        raise DataError(
            f"cluster file {path} is for {len(labels)} codes, the frame tokenizer of this model has {codebook_size}; "
            "it belongs to another tokenizer. Set generation.clusters to the right one, or to null for k-means"
        )
    outside = np.flatnonzero((labels < 0) | (labels >= codebook_size))
    if len(outside):
        code = outside[0]
        raise DataError(
            f"cluster file {path}: code {code} is in cluster {labels[code]}; clusters are numbered from 0, at most "
            f"one for each of the {codebook_size} codes"
        )
    sizes = np.bincount(labels.astype(np.int64))
    empty = np.flatnonzero(sizes == 0)
    if len(empty):
        raise DataError(
            f"cluster file {path}: cluster {empty[0]} has no code, yet there is a cluster {len(sizes) - 1}; "
            "number the clusters from 0 without gaps"
        )
    return torch.from_numpy(labels.astype(np.int64))


def _read_array(path: Path) -> np.ndarray:
    try:
        with open(path, "rb") as file:
            return np.lib.format.read_array(file, allow_pickle=False)
    except FileNotFoundError:
        raise DataError(
            f"cluster file {path} (generation.clusters) does not exist; null makes clusters by k-means"
        ) from None
    except OSError as error:
        raise DataError(f"cluster file {path} cannot be read: {error.strerror}") from error
    except (ValueError, EOFError, MemoryError) as error:
        raise DataError(
            f"cluster file {path} is no whole .npy array without pickled objects ({error}); write it with "
            "numpy.save, one integer per code"
        ) from error


def k_means(vectors_VD: Tensor, num_clusters: int) -> Tensor:
    """The cluster, 0 .. num_clusters - 1, of every vector: int64 [V], the same in every call; none is empty.

    Args:
        vectors_VD: any float dtype; distances are Euclidean, in fp64 on the CPU.
        num_clusters: at most V.
    """
    vectors_VD = vectors_VD.detach().to("cpu", torch.float64)
    centers_KD = _spread_centers(vectors_VD, num_clusters)
    labels_V = _fill_empty(*_nearest(vectors_VD, centers_KD), num_clusters)
    for _ in range(_MAX_ROUNDS):
        sizes_K = torch.bincount(labels_V, minlength=num_clusters)
        centers_KD = torch.zeros_like(centers_KD).index_add_(0, labels_V, vectors_VD) / sizes_K[:, None]
        before_V, labels_V = labels_V, _fill_empty(*_nearest(vectors_VD, centers_KD), num_clusters)
        if torch.equal(before_V, labels_V):
            break
    return labels_V


def _spread_centers(vectors_VD: Tensor, count: int) -> Tensor:
    """Vectors to start from: each drawn with the squared distance to the nearest one before as its weight."""
    generator = torch.Generator().manual_seed(_SEED)
    chosen = [int(torch.randint(len(vectors_VD), (1,), generator=generator))]
    distance_V = torch.full((len(vectors_VD),), float("inf"), dtype=torch.float64)
    norms_V = vectors_VD.square().sum(1)
    while len(chosen) < count:
        last = chosen[-1]
        from_last_V = (norms_V - vectors_VD @ (2 * vectors_VD[last]) + norms_V[last]).clamp_min(0)
        distance_V = torch.minimum(distance_V, from_last_V)
        # All vectors chosen or equal to a chosen one: any will do.
        weights_V = distance_V if distance_V.any() else torch.ones_like(distance_V)
        chosen.append(int(torch.multinomial(weights_V, 1, generator=generator)))
    return vectors_VD[chosen]


def _nearest(vectors_VD: Tensor, centers_KD: Tensor) -> tuple[Tensor, Tensor]:
    """The nearest center of every vector, the first of equals, and the squared distance to it."""
    norms_K = centers_KD.square().sum(1)
    blocks = vectors_VD.split(max(1, _DISTANCE_BLOCK // len(centers_KD)))
    found = [torch.addmm(norms_K, block_VD, centers_KD.T, alpha=-2).min(dim=1) for block_VD in blocks]
    distance_V = torch.cat([block.values for block in found]) + vectors_VD.square().sum(1)
    return torch.cat([block.indices for block in found]), distance_V


def _fill_empty(labels_V: Tensor, distance_V: Tensor, num_clusters: int) -> Tensor:
    """Every empty cluster gets the vector that is farthest from its center and not alone in its cluster."""
    sizes_K = torch.bincount(labels_V, minlength=num_clusters)
    farthest = iter(distance_V.argsort(descending=True, stable=True).tolist())
    for cluster in torch.nonzero(sizes_K == 0).flatten().tolist():
        code = next(code for code in farthest if sizes_K[labels_V[code]] > 1)
        sizes_K[labels_V[code]] -= 1
        sizes_K[cluster] += 1
        labels_V[code] = cluster
    return labels_V
