"""Sampling by clusters of codes: the distribution, the cluster file, k-means.

Tensor suffixes: B batch, V codes, K clusters, D channels.
"""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from megacog.config.generation import GenerationConfig
from megacog.errors import ConfigError, DataError
from megacog.generation.clusters import Clusters, clusters_for, k_means, read_labels
from megacog.generation.sampling import draw_uniforms, row_generator, sample_clusters
from megacog.tokenizers.frames import ConvTokenizer, ConvTokenizerConfig
from megacog.tokenizers.icetk_vqvae import IcetkVqvae, IcetkVqvaeConfig

LABELS = [1, 0, 2, 1, 0, 1, 2]
DRAWS = 40_000


def two_steps(
    logits_V: np.ndarray, labels: list[int], temperature: float, top_clusters: int, cluster_temperature: float
) -> np.ndarray:
    """Probability of every code when a cluster is drawn first and a code of it then, in plain numpy."""
    z = logits_V / temperature
    p = np.exp(z) / np.exp(z).sum()
    mass = {cluster: sum(p[code] for code, own in enumerate(labels) if own == cluster) for cluster in set(labels)}
    kept = sorted(mass, key=lambda cluster: -mass[cluster])[:top_clusters]
    total = sum(mass[cluster] for cluster in kept)
    result = np.zeros(len(labels))
    for cluster in kept:
        outside = np.where(np.array(labels) == cluster, z, -65504.0)
        within = np.exp(outside / cluster_temperature - (outside / cluster_temperature).max())
        result += mass[cluster] / total * within / within.sum()
    return result


def code_at(probability_V: np.ndarray, uniform: float) -> int:
    """The first code at which the running sum of probabilities passes the uniform number."""
    running = 0.0
    for code, probability in enumerate(probability_V):
        running += probability
        if uniform < running:
            return code
    return int(np.flatnonzero(probability_V)[-1])


@settings(max_examples=40, deadline=None)
@given(
    st.lists(st.integers(0, 4), min_size=2, max_size=12),
    st.integers(1, 5),
    st.sampled_from([(1.0, 1.0), (1.05, 0.89), (0.3, 2.0)]),
    st.integers(0, 2**31),
)
def test_codes_are_those_of_two_draws_at_every_uniform_number(
    raw: list[int], top_clusters: int, temperatures: tuple[float, float], seed: int
) -> None:
    labels = np.unique(raw, return_inverse=True)[1].tolist()
    logits_BV = torch.randn(3, len(labels), generator=torch.Generator().manual_seed(seed)) * 3
    uniform_B = draw_uniforms([row_generator(seed, row) for row in range(3)], 1)[:, 0]
    got = sample_clusters(
        logits_BV, uniform_B, clusters=Clusters.of_labels(torch.tensor(labels)), temperature=temperatures[0],
        top_clusters=top_clusters, cluster_temperature=temperatures[1],
    )  # fmt: skip
    rows = zip(logits_BV.double().numpy(), uniform_B.tolist(), strict=True)
    wanted = [code_at(two_steps(row, labels, temperatures[0], top_clusters, temperatures[1]), u) for row, u in rows]
    assert got.tolist() == wanted


def test_many_draws_have_the_shares_of_a_cluster_draw_and_a_code_draw() -> None:
    logits_V = torch.tensor([1.0, 0.2, 2.0, 0.5, -0.3, 0.9, 0.1])
    generator = torch.Generator().manual_seed(5)
    # The two draws literally: a cluster from the renormalized masses of the likeliest, then a code of it.
    z_V, labels_V = logits_V / 1.05, torch.tensor(LABELS)
    mass_K = torch.zeros(3).index_add_(0, labels_V, z_V.softmax(0))
    mass_K[mass_K.argmin()] = 0
    cluster_B = torch.multinomial(mass_K, DRAWS, replacement=True, generator=generator)
    within_BV = z_V.expand(DRAWS, -1).masked_fill(labels_V != cluster_B[:, None], -65504.0) / 0.89
    wanted = torch.multinomial(within_BV.softmax(1), 1, generator=generator)[:, 0].bincount(minlength=7) / DRAWS
    got = sample_clusters(
        logits_V.expand(DRAWS, -1), draw_uniforms([row_generator("shares")], DRAWS)[0],
        clusters=Clusters.of_labels(labels_V), temperature=1.05, top_clusters=2, cluster_temperature=0.89,
    ).bincount(minlength=7) / DRAWS  # fmt: skip
    # Both shares have a standard error of at most 0.0025.
    torch.testing.assert_close(got, wanted, atol=0.015, rtol=0)
    assert (wanted[labels_V == mass_K.argmin()] == 0).all() and (wanted > 0).sum() >= 4


@pytest.mark.parametrize("uniform", [0.0, 1 - 2**-53])
def test_a_code_of_a_dropped_cluster_is_never_drawn_at_either_end(uniform: float) -> None:
    logits_1V = torch.tensor([[0.0, 0.1, 3.0, 4.0, 0.2]])
    clusters = Clusters.of_labels(torch.tensor([0, 0, 1, 1, 0]))
    code = sample_clusters(logits_1V, torch.tensor([uniform], dtype=torch.float64), clusters=clusters, top_clusters=1)
    assert code.item() == (2 if uniform == 0.0 else 3)


def test_logits_go_to_clusters_and_back() -> None:
    clusters = Clusters.of_labels(torch.tensor(LABELS))
    assert clusters.members_KM.tolist() == [[1, 4, 7], [0, 3, 5], [2, 6, 7]]
    logits_BV = torch.arange(14.0).view(2, 7)
    grouped = clusters.by_cluster(logits_BV)
    assert grouped[1].tolist() == [[8, 11, float("-inf")], [7, 10, 12], [9, 13, float("-inf")]]
    assert torch.equal(clusters.by_code(grouped), logits_BV)


def write(path: Path, array: Any, **options: Any) -> Path:
    np.save(path, array, **options)
    return path


@pytest.mark.parametrize("dtype", [np.int64, np.int16, np.uint32])
def test_a_cluster_file_of_any_integers_is_read(tmp_path: Path, dtype: type) -> None:
    labels_V = read_labels(write(tmp_path / "clusters.npy", np.array(LABELS, dtype)), 7)
    assert (labels_V.tolist(), labels_V.dtype) == (LABELS, torch.int64)


@pytest.mark.parametrize(
    ("array", "message"),
    [
        (np.array(LABELS[:-1]), "is for 6 codes, the frame tokenizer of this model has 7"),
        (np.array([*LABELS, 0]), "is for 8 codes"),
        (np.array([1, 0, -1, 1, 0, 1, 2]), "code 2 is in cluster -1"),
        (np.array([1, 0, 900, 1, 0, 1, 2]), "code 2 is in cluster 900"),
        (np.array([1, 0, 3, 1, 0, 1, 3]), "cluster 2 has no code, yet there is a cluster 3"),
        (np.array(LABELS, np.float32), "holds float32 [7], not one integer per code"),
        (np.array([LABELS]), "holds int64 [1, 7]"),
        (np.array(LABELS, object), "no whole .npy array without pickled objects"),
    ],
)
def test_a_cluster_file_that_does_not_fit_is_named_with_its_fault(
    tmp_path: Path, array: np.ndarray, message: str
) -> None:
    path = write(tmp_path / "clusters.npy", array)
    with pytest.raises(DataError) as info:
        read_labels(path, 7)
    assert message in str(info.value) and str(path) in str(info.value)


def test_what_is_no_cluster_file_is_refused(tmp_path: Path) -> None:
    whole = io.BytesIO()
    np.save(whole, np.arange(7))
    archive = io.BytesIO()
    np.savez(archive, np.arange(7))
    bodies = [b"", b"<html>", whole.getvalue()[:-8], whole.getvalue()[:20], archive.getvalue(), b"\x80\x04N."]
    for body in bodies:
        (tmp_path / "bad.npy").write_bytes(body)
        with pytest.raises(DataError, match=r"bad.npy is no whole .npy array"):
            read_labels(tmp_path / "bad.npy", 7)
    with pytest.raises(DataError, match="none.npy .* does not exist"):
        read_labels(tmp_path / "none.npy", 7)
    with pytest.raises(DataError, match="cannot be read"):
        read_labels(tmp_path, 7)


def test_a_file_is_never_unpickled(tmp_path: Path) -> None:
    class Bomb:
        def __reduce__(self) -> tuple[Any, ...]:
            return (Path.touch, (tmp_path / "exploded",))

    path = write(tmp_path / "bomb.npy", np.array([Bomb()], object), allow_pickle=True)
    with pytest.raises(DataError):
        read_labels(path, 1)
    assert not (tmp_path / "exploded").exists()


def blobs(count: int, each: int) -> tuple[Tensor, Tensor]:
    """Vectors around `count` far points, shuffled, and which point each belongs to."""
    generator = torch.Generator().manual_seed(1)
    label_V = torch.arange(count).repeat_interleave(each)[torch.randperm(count * each, generator=generator)]
    centers_KD = torch.randn(count, 5, generator=generator) * 30
    return centers_KD[label_V] + torch.randn(len(label_V), 5, generator=generator), label_V


def test_k_means_finds_clusters_that_are_there() -> None:
    vectors_VD, truth_V = blobs(6, 20)
    found_V = k_means(vectors_VD, 6)
    pairs = set(zip(found_V.tolist(), truth_V.tolist(), strict=True))
    assert len(pairs) == 6 == len(found_V.unique())


def test_k_means_is_the_same_every_time_and_leaves_the_global_random_state_alone() -> None:
    vectors_VD = torch.randn(300, 4, generator=torch.Generator().manual_seed(2))
    before = torch.get_rng_state()
    first = k_means(vectors_VD, 12)
    torch.manual_seed(99)
    assert torch.equal(first, k_means(vectors_VD.clone(), 12))
    torch.set_rng_state(before)
    assert (first.bincount() > 0).all() and first.max() == 11
    # Lloyd's fixed point: every vector is nearest to the mean of its own cluster.
    means_KD = torch.stack([vectors_VD[first == cluster].double().mean(0) for cluster in range(12)])
    assert torch.equal(torch.cdist(vectors_VD.double(), means_KD).argmin(1), first)


@pytest.mark.parametrize("num_clusters", [1, 3, 9, 10])
def test_k_means_leaves_no_cluster_empty_even_among_equal_vectors(num_clusters: int) -> None:
    vectors_VD = torch.tensor([[0.0, 1.0]] * 9 + [[5.0, 5.0]])
    labels_V = k_means(vectors_VD, num_clusters)
    assert labels_V.bincount(minlength=num_clusters).min() >= 1 and len(labels_V) == 10


@pytest.mark.parametrize(
    "config",
    [ConvTokenizerConfig(levels=(4, 4), width=8, blocks=0),
     ConvTokenizerConfig(quantizer="ema_vq", codebook_size=90, code_dim=3, width=8, blocks=0)],
    ids=["fsq", "ema_vq"],
)  # fmt: skip
def test_the_codebook_of_a_tokenizer_gives_one_cluster_per_forty_codes(config: ConvTokenizerConfig) -> None:
    torch.manual_seed(0)
    tokenizer = ConvTokenizer(config)
    for name, buffer in tokenizer.named_buffers():
        if name.endswith("embedding_KD"):
            buffer.normal_()
    codebook_VD = tokenizer.codebook()
    assert codebook_VD.shape == (tokenizer.codebook_size, tokenizer.quantizer.dim)
    codes = torch.tensor([[[3, 7], [0, 9]]])
    assert torch.equal(tokenizer.quantizer.vectors(codes)[0, :, 1, 1], codebook_VD[9])
    made = clusters_for(GenerationConfig(sampler="clusters"), tokenizer)
    assert made is not None and len(made.members_KM) == -(-tokenizer.codebook_size // 40)
    assert sorted(made.members_KM[made.members_KM < tokenizer.codebook_size].tolist()) == list(range(len(codebook_VD)))


def test_the_codebook_of_icetk_gives_clusters() -> None:
    torch.manual_seed(0)
    tokenizer = IcetkVqvae(IcetkVqvaeConfig(rate=8, width=32, codebook_size=80, code_dim=32))
    assert torch.equal(tokenizer.codebook()[7], tokenizer.quantize.embed(torch.tensor(7)))
    made = clusters_for(GenerationConfig(sampler="clusters"), tokenizer)
    assert made is not None and len(made.members_KM) == 2


def test_the_settings_decide_where_clusters_come_from(tmp_path: Path) -> None:
    tokenizer = ConvTokenizer(ConvTokenizerConfig(levels=(4, 4), width=8, blocks=0))
    assert clusters_for(GenerationConfig(), tokenizer) is None
    path = write(tmp_path / "c.npy", np.arange(16) % 3)
    from_file = clusters_for(GenerationConfig(sampler="clusters", clusters=str(path)), tokenizer)
    assert from_file is not None and from_file.members_KM[1, :5].tolist() == [1, 4, 7, 10, 13]
    counted = clusters_for(GenerationConfig(sampler="clusters", num_clusters=5), tokenizer)
    assert counted is not None and len(counted.members_KM) == 5
    with pytest.raises(ConfigError, match="num_clusters 17 is more than the 16 codes"):
        clusters_for(GenerationConfig(sampler="clusters", num_clusters=17), tokenizer)
