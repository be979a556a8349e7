"""The preset that generates as the CogVideo release does: its values, what wins over it, what it makes of a clip."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from small_export import make_export
from small_model import batch, build_model, model_config
from torch import Tensor
from torch.nn import functional as F

from megacog.checkpoint.export import open_export
from megacog.config.generation import GenerationConfig
from megacog.config.load import apply_overrides, dump_config, load_config
from megacog.errors import ConfigError, DataError
from megacog.generation import hierarchy, infer
from megacog.generation.cache import Decoder
from megacog.generation.hierarchy import ClipRequest, whole_clips
from megacog.generation.infer import load_generator
from megacog_kernels.attention import reference

BASE_WORDS, VIDEO = "\u9ad8\u6e05\u6444\u5f71", "\u89c6\u9891"
RELEASED = {
    "preset": "cogvideo",
    "levels": 3,
    "seconds": 4.0,
    "sampler": "clusters",
    "temperature": 1.05,
    "base_temperature": 1.0,
    "top_k": None,
    "top_p": None,
    "clusters": None,
    "num_clusters": None,
    "top_clusters": 12,
    "base_top_clusters": 16,
    "cluster_temperature": 0.89,
    "guidance": 3.0,
    "base_guidance": 1.0,
    "interpolation_guidance": 1.0,
    "text_bias": 1.4,
    "base_suffix": BASE_WORDS,
    "guided_suffix": VIDEO,
    "batch_size": 8,
    "kernels": "auto",
    "base_precision": None,
    "cuda_graphs": True,
    "overlap": 1,
    "seed": 1234,
    "samples": 4,
}


def overridden(section: GenerationConfig, *overrides: str) -> GenerationConfig:
    return apply_overrides(section, overrides, "generation")


def test_the_preset_has_every_constant_of_the_release() -> None:
    settings = GenerationConfig(preset="cogvideo")
    assert settings.model_dump(mode="json") == RELEASED
    assert settings.text_spans(settings.seconds) == (4.0, 2.0, 1.0, 0.5)
    stages = ("base", "sequential", "interpolation")
    assert [settings.guidance_of(stage) for stage in stages] == [1.0, 3.0, 1.0]
    assert [settings.text_bias_of(stage) for stage in stages] == [1.4, 0.0, 1.4]
    assert [settings.temperature_of(stage) for stage in stages] == [1.0, 1.05, 1.05]
    assert [settings.top_clusters_of(stage) for stage in stages] == [16, 12, 12]
    assert [settings.caption("x", stage) for stage in stages] == [f"x {BASE_WORDS}", f"x {VIDEO}", "x"]


def test_without_guidance_text_is_favored_and_the_suffix_is_gone() -> None:
    settings = GenerationConfig(preset="cogvideo", guidance=1.0)
    assert settings.text_bias_of("sequential") == 1.4
    assert settings.caption("x", "sequential") == "x"


def test_keys_that_are_given_win_over_the_preset_and_the_resolved_config_says_all(tmp_path: Path) -> None:
    path = tmp_path / "c.yaml"
    path.write_text(
        "model: {num_layers: 1, hidden_size: 8, num_heads: 2, grid: [2, 2], image_vocab_size: 16, text_vocab_size: 9}\n"
        "tokenizer: {text: t, frames: f}\n"
        "train: {stage: base, run_dir: r, steps: 1, global_batch_size: 1, micro_batch_size: 1}\n"
        "generation: {preset: cogvideo, temperature: 0.7, top_clusters: null}\n"
    )
    config = load_config(path, ["generation.samples=1"])
    given = {"temperature": 0.7, "top_clusters": None, "samples": 1}
    assert config.generation.model_dump(mode="json") == RELEASED | given
    path.write_text(dump_config(config))
    assert load_config(path) == config


def test_a_preset_on_the_command_line_replaces_what_the_model_was_exported_with() -> None:
    exported = GenerationConfig(top_p=0.9, temperature=0.5, overlap=2, levels=0)
    settings = overridden(exported, "samples=2", "preset=cogvideo", "levels=1")
    assert settings.model_dump(mode="json") == RELEASED | {"samples": 2, "overlap": 2, "levels": 1}
    assert overridden(settings, "guidance=2").model_dump() == settings.model_dump() | {"guidance": 2.0}
    assert overridden(settings, "preset=null") == GenerationConfig(overlap=2)


def test_a_cluster_file_survives_the_preset_and_another_sampler_drops_what_was_only_for_clusters() -> None:
    exported = GenerationConfig(sampler="clusters", clusters="c.npy", top_clusters=3)
    assert overridden(exported, "preset=cogvideo").clusters == "c.npy"
    for section in (exported, overridden(exported, "preset=cogvideo")):
        codes = overridden(section, "sampler=codes", "top_k=5")
        assert (codes.sampler, codes.top_k, codes.clusters, codes.top_clusters) == ("codes", 5, None, None)
    assert overridden(exported, "preset=null").clusters == "c.npy"


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["preset=cogvideo", "top_k=12"], r"top_k cannot be used with sampler: clusters \(top_clusters counts"),
        (["top_clusters=3", "cluster_temperature=2"], "top_clusters, cluster_temperature cannot be used with sampl"),
        (["preset=cogvid"], r"generation.preset: expected one of cogvideo, got .* did you mean cogvideo\?"),
        (["preset=[cogvideo]"], "generation.preset: expected one of cogvideo"),
        (["preset=cogvideo", "sampler=5"], "generation.sampler: expected one of codes, clusters"),
    ],
)
def test_settings_that_contradict_are_refused(overrides: list[str], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        overridden(GenerationConfig(), *overrides)


@pytest.fixture(scope="module")
def export_path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    # Toy captions of digits; the pieces of Chinese words are unknown to this tokenizer, so they need none.
    return make_export(tmp_path_factory.mktemp("preset"))


WORDS = {"base_suffix": "moves", "guided_suffix": "left"}


def test_the_stages_are_asked_for_what_the_release_asks(export_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made = load_generator(open_export(export_path), GenerationConfig(preset="cogvideo", num_clusters=4, **WORDS), "cpu")
    calls = []

    def recorder(_: Any, stage: str, text_BL: Tensor, valid_BL: Tensor, null: Any, known: Any, **how: Any) -> Tensor:
        text = made.text.decode(text_BL[0][valid_BL[0]].tolist())
        null_text = made.text.decode(null[0][0][null[1][0]].tolist()) if null else None
        choose = how["choose"].keywords
        numbers = [how["guidance"], how["text_bias"], choose["temperature"], choose["top_clusters"]]
        calls.append((stage, len(text_BL), sorted(known), text, null_text, numbers, choose["cluster_temperature"]))
        return torch.zeros(len(text_BL), 1 if stage == "base" else 5, 16, dtype=torch.int64)

    monkeypatch.setattr(hierarchy, "generate_frames", recorder)
    (clip,) = whole_clips(made.generate([ClipRequest("the digit 3", 4.0, 7)]))
    assert len(clip[1]) == 33 and clip[2] == 8.0
    video, key = [1.0, 1.4, 1.05, 12], [3.0, 0.0, 1.05, 12]
    assert calls == [
        ("base", 1, [], "the digit 3 moves", None, [1.0, 1.4, 1.0, 16], 0.89),
        ("sequential", 1, [0], "4.0s<n> the digit 3 left", "4.0s<n> video", key, 0.89),
        ("interpolation", 2, [0, 2, 4], "2.0s<n> the digit 3", None, video, 0.89),
        ("interpolation", 4, [0, 2, 4], "1.0s<n> the digit 3", None, video, 0.89),
        ("interpolation", 8, [0, 2, 4], "0.5s<n> the digit 3", None, video, 0.89),
    ]


def test_a_prompt_that_the_suffix_makes_too_long_is_refused_at_once(export_path: Path) -> None:
    suffix = " ".join(["moves"] * 20)
    made = load_generator(open_export(export_path), GenerationConfig(base_suffix=suffix), "cpu")
    with pytest.raises(DataError, match="more than the 20 that the model reads"):
        made.check(ClipRequest("the digit 3", 4.0, 7))


def test_a_prompt_file_becomes_clips_with_the_preset_and_a_cluster_file(
    export_path: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    np.save(tmp_path / "clusters.npy", np.arange(16) // 4)
    (tmp_path / "prompts.txt").write_text("the digit 3 moves left\n")
    words = [f"{key}={value}" for key, value in WORDS.items()]
    common = [str(tmp_path / "prompts.txt"), "--model", str(export_path), "preset=cogvideo", "levels=1", "samples=2"]
    clusters = f"clusters={tmp_path / 'clusters.npy'}"
    assert infer.main([*common, *words, clusters, "--out", str(tmp_path / "out")]) == 0
    results = [json.loads(line) for line in (tmp_path / "out/results.jsonl").read_text().splitlines()]
    assert [result["frames"] for result in results] == [9, 9]
    assert results[0]["settings"]["cluster_temperature"] == 0.89
    np.save(tmp_path / "clusters.npy", np.arange(15) // 4)
    with pytest.raises(DataError, match="is for 15 codes, the frame tokenizer of this model has 16"):
        infer.main([*common, clusters, "--out", str(tmp_path / "bad")])
    assert not (tmp_path / "bad").exists()


@pytest.mark.parametrize("stage", ["base", "sequential", "interpolation"])
def test_the_cache_favors_text_as_a_whole_forward_with_a_bias_does(
    stage: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = build_model(model_config()).eval()
    frames = 1 if stage == "base" else 5
    text, valid, codes = batch(model.config, frames)
    given = [0] if stage == "sequential" else [0, 2, 4] if stage == "interpolation" else []

    def replayed(text_bias: float) -> Tensor:
        decoder = Decoder(model, stage, text, valid, text_bias=text_bias)
        if given:
            decoder.give({frame: codes[:, frame] for frame in given})
        cells = model.config.cells
        tokens = [frame * cells + cell for frame in range(frames) if frame not in given for cell in range(cells)]
        before = [codes.flatten(1)[:, max(token - 1, 0), None] for token in tokens]
        steps = [decoder.step(torch.tensor([token]), code) for token, code in zip(tokens, before, strict=True)]
        return torch.cat(steps, dim=1)

    favored, plain = replayed(1.4), replayed(0.0)
    L, P, V = model.config.text_length, model.config.cells, model.config.image_vocab_size

    def with_bias(q_BRND: Tensor, k_BKND: Tensor, v_BKND: Tensor, allowed_BRK: Tensor, scale: float) -> Tensor:
        """A softmax in the open; rows of frames see the text first, then frames, so R tells them from text rows."""
        scores = torch.einsum("brnd,bknd->bnrk", q_BRND, k_BKND) * scale
        if k_BKND.shape[1] > L:
            scores[..., :L] += 1.4
        weights = scores.masked_fill(~allowed_BRK[:, None], float("-inf")).softmax(-1)
        return torch.einsum("bnrk,bknd->brnd", weights, v_BKND)

    monkeypatch.setattr(reference, "_attend", with_bias)
    with torch.no_grad():
        whole = model.logits(text, valid, codes, stage)[:, L:, :V].unflatten(1, (frames, P))
    wanted = whole[:, [frame for frame in range(frames) if frame not in given]].flatten(1, 2)
    torch.testing.assert_close(favored, wanted, atol=1e-4, rtol=1e-4)
    assert F.l1_loss(favored, plain) > 1e-2
