"""Clips from key frames and interpolation: order, spans, seeds, sliding."""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from small_export import make_export
from torch import Tensor

from megacog.checkpoint.export import open_export
from megacog.config.schema import GenerationConfig
from megacog.errors import ConfigError, DataError
from megacog.generation import hierarchy
from megacog.generation.hierarchy import (
    ClipChunk,
    ClipGenerator,
    ClipRequest,
    merge_blocks,
    plan_clip,
    sampled_frames,
    whole_clips,
)
from megacog.generation.infer import load_generator


@pytest.fixture(scope="module")
def export_path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_export(tmp_path_factory.mktemp("hierarchy"))


def generator(path: Path, **settings: Any) -> ClipGenerator:
    return load_generator(open_export(path), GenerationConfig(**settings), "cpu")


def request(digit: int = 3, seconds: float = 4.0, **fields: Any) -> ClipRequest:
    return ClipRequest(f"the digit {digit} moves left", seconds, fields.pop("seed", 7), **fields)


def clips(made: Iterator[ClipChunk]) -> dict[int, np.ndarray]:
    return {index: frames for index, frames, _ in whole_clips(made)}


def test_merged_blocks_share_their_border_frames() -> None:
    blocks = torch.tensor([[0, 10, 1, 11, 2], [2, 12, 3, 13, 4]])[..., None]
    assert merge_blocks(blocks)[:, 0].tolist() == [0, 10, 1, 11, 2, 12, 3, 13, 4]


@pytest.mark.parametrize(
    ("levels", "frames", "fps"), [(0, 5, 1.0), (1, 9, 2.0), (2, 17, 4.0), (3, 33, 8.0)], ids=["5", "9", "17", "33"]
)
def test_each_level_doubles_the_frame_rate(levels: int, frames: int, fps: float) -> None:
    plan = plan_clip(4.0, 5, GenerationConfig(levels=levels))
    assert (plan.frames, plan.fps, plan.passes, plan.span) == (frames, fps, 1, 4.0)


def test_a_short_clip_takes_one_pass_at_a_higher_rate_and_a_long_one_slides() -> None:
    short = plan_clip(1.0, 5, GenerationConfig())
    assert (short.span, short.fps, short.frames, short.passes) == (1.0, 32.0, 33, 1)
    long = plan_clip(10.0, 5, GenerationConfig(overlap=2))
    # 10 key intervals: 4 from the first pass, then 3 each.
    assert (long.span, long.fps, long.frames, long.passes, long.key_intervals) == (4.0, 8.0, 81, 3, 10)
    assert plan_clip(4.6, 5, GenerationConfig()).frames == 37


def test_settings_that_a_model_cannot_follow_are_named() -> None:
    with pytest.raises(ConfigError, match="generation.overlap 3 leaves no new frame"):
        plan_clip(4.0, 3, GenerationConfig(overlap=3))
    with pytest.raises(ConfigError, match="odd model.num_frames"):
        plan_clip(4.0, 4, GenerationConfig())


class Recorder:
    """Stands for the sampler: frame f of a sequence is coded by known neighbors, and every call is kept."""

    def __init__(self, made: ClipGenerator) -> None:
        self.calls: list[tuple[str, int, list[int], list[str]]] = []
        self.text = made.text

    def __call__(
        self, model: Any, stage: str, text_BL: Tensor, valid_BL: Tensor, null: Any, known: dict[int, Tensor], **_: Any
    ) -> Tensor:
        texts = [self.text.decode(row[valid].tolist()) for row, valid in zip(text_BL, valid_BL, strict=True)]
        self.calls.append((stage, len(text_BL), sorted(known), texts))
        frames = 1 if stage == "base" else 5
        codes_BTP = torch.zeros(len(text_BL), frames, 16, dtype=torch.int64)
        for frame, codes_BP in known.items():
            codes_BTP[:, frame] = codes_BP
        for frame in range(frames):
            if frame in known:
                continue
            if stage == "sequential":
                codes_BTP[:, frame] = codes_BTP[:, frame - 1] + 8
            elif stage == "interpolation":
                codes_BTP[:, frame] = (codes_BTP[:, frame - 1] + codes_BTP[:, frame + 1]) // 2
        return codes_BTP


class Times:
    """Stands for the frame tokenizer: shows every code as a gray level."""

    downsample = 4

    def decode(self, codes_Bhw: Tensor, on_frames: Callable[[int], None] | None = None) -> Tensor:
        return codes_Bhw[..., None].expand(*codes_Bhw.shape, 3).to(torch.uint8)


@pytest.mark.parametrize("overlap", [1, 2, 3, 4])
def test_a_long_clip_is_one_even_line_of_frames_whatever_the_overlap(
    export_path: Path, monkeypatch: pytest.MonkeyPatch, overlap: int
) -> None:
    made = generator(export_path, overlap=overlap, batch_size=3)
    recorder = Recorder(made)
    monkeypatch.setattr(hierarchy, "generate_frames", recorder)
    made.frames = Times()  # type: ignore[assignment]
    seconds = [9.5, 2.0, 4.0]
    requests = [request(digit, length) for digit, length in enumerate(seconds)]
    # With key frames 8 codes apart, every frame of the finished clip is one code after the last.
    for index, frames_THWC in clips(made.generate(requests)).items():
        count = plan_clip(seconds[index], 5, made.settings).frames
        assert frames_THWC[:, 0, 0, 0].tolist() == list(range(count))
    stages = [call[0] for call in recorder.calls]
    assert stages[0] == "base" and recorder.calls[0][1] == 3
    assert recorder.calls[1][2] == [0]
    assert all(known == list(range(overlap)) for stage, _, known, _ in recorder.calls[2:] if stage == "sequential")
    assert all(known == [0, 2, 4] for stage, _, known, _ in recorder.calls if stage == "interpolation")
    assert max(size for _, size, _, _ in recorder.calls) == 3


def test_texts_carry_the_span_of_their_sequence(export_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made = generator(export_path, batch_size=64)
    recorder = Recorder(made)
    monkeypatch.setattr(hierarchy, "generate_frames", recorder)
    made.frames = Times()  # type: ignore[assignment]
    list(made.generate([request(3, 4.0), request(5, 2.0)]))
    by_call = [(stage, size, texts[0].split("<n>")[0].strip(), texts[-1].split("<n>")[0].strip())
               for stage, size, _, texts in recorder.calls]  # fmt: skip
    assert by_call == [
        ("base", 2, "the digit 3 moves left", "the digit 5 moves left"),
        ("sequential", 2, "4.0s", "2.0s"),
        ("interpolation", 4, "2.0s", "1.0s"),
        ("interpolation", 8, "1.0s", "0.5s"),
        ("interpolation", 16, "0.5s", "0.2s"),
    ]


def test_a_clip_does_not_depend_on_batch_size_prompt_order_or_company(export_path: Path) -> None:
    requests = [request(3), request(4), request(3, sample=1), request(5, seconds=6.0), request(3)]
    wide = clips(generator(export_path, levels=1, batch_size=8).generate(requests))
    narrow = clips(generator(export_path, levels=1, batch_size=2).generate(requests[::-1]))
    for index in range(5):
        np.testing.assert_array_equal(wide[index], narrow[4 - index])
    np.testing.assert_array_equal(wide[0], wide[4])
    for other in (1, 2):
        assert not np.array_equal(wide[0], wide[other])
    other_seed = clips(generator(export_path, levels=1).generate([request(3, seed=8)]))
    assert not np.array_equal(wide[0], other_seed[0])


def test_every_caption_is_read_once_per_rate(export_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Not once per block, batch or pass: 13 key frames and two levels, guided, four rows at a time."""
    made = generator(export_path, levels=2, guidance=2, interpolation_guidance=2, batch_size=4)
    read: list[tuple[int, ...]] = []
    embed = made.model.embed_text

    def counting(text_BL: Tensor, valid_BL: Tensor) -> Tensor:
        read.extend(tuple(row) for row in text_BL.tolist())
        return embed(text_BL, valid_BL)

    monkeypatch.setattr(made.model, "embed_text", counting)
    list(made.generate([request(3, seconds=9.0), request(3, seconds=9.0, sample=1)]))
    # Without a rate, and with three spans; each with and without the caption.
    assert len(read) == len(set(read)) == 8


def test_guidance_reaches_key_frames_and_interpolation_separately(export_path: Path) -> None:
    plain = clips(generator(export_path, levels=1).generate([request()]))[0]
    keys_guided = clips(generator(export_path, levels=1, guidance=3).generate([request()]))[0]
    between_guided = clips(generator(export_path, levels=1, interpolation_guidance=3).generate([request()]))[0]
    assert not np.array_equal(plain[::2], keys_guided[::2])
    np.testing.assert_array_equal(plain[::2], between_guided[::2])
    assert not np.array_equal(plain[1::2], between_guided[1::2])


def test_given_key_frames_come_back_as_given_and_steer_the_rest(export_path: Path) -> None:
    made = generator(export_path, levels=1)
    given_KP = torch.arange(32).view(2, 16) % 16
    with_prompt = [chunk.codes_TP for chunk in made.generate([request(given_KP=given_KP)])][0]
    without = [chunk.codes_TP for chunk in made.generate([request()])][0]
    assert torch.equal(with_prompt[[0, 2]], given_KP)
    assert not torch.equal(with_prompt[3:], without[3:])
    with pytest.raises(ValueError, match="leave none of 5"):
        list(made.generate([request(given_KP=torch.zeros(5, 16, dtype=torch.int64))]))


def test_the_planned_number_of_sampled_frames_is_the_real_one(export_path: Path) -> None:
    made = generator(export_path, levels=2, overlap=2, batch_size=4)
    requests = [request(1), request(2, 9.0), request(4, given_KP=torch.zeros(2, 16, dtype=torch.int64))]
    counted: list[int] = []
    pixels: list[int] = []
    made.on_frame, made.on_pixels = counted.append, pixels.append
    list(made.generate(requests))
    assert sum(pixels) == sum(plan_clip(each.seconds, 5, made.settings).frames for each in requests)
    planned = [
        sampled_frames(plan_clip(each.seconds, 5, made.settings), 5, given, made.settings)
        for each, given in zip(requests, (0, 0, 2), strict=True)
    ]
    assert sum(counted) == sum(planned)


def test_a_long_clip_slides_in_constant_memory_and_hands_frames_out_early(
    export_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = generator(export_path)
    recorder = Recorder(made)
    monkeypatch.setattr(hierarchy, "generate_frames", recorder)
    made.frames = Times()  # type: ignore[assignment]
    live_numbers = {}
    for index, chunk in enumerate(made.generate([request(seconds=4.0 * 12)])):
        assert len(chunk.frames_THWC) == (33 if chunk.first_frame == 0 else 32)
        recorder.calls.clear()
        if index in (2, 11):
            live_numbers[index] = sum(each.numel() for each in gc.get_objects() if type(each) is Tensor)
    assert live_numbers[2] == live_numbers[11]


def test_prompts_that_the_model_cannot_read_are_refused_before_sampling(export_path: Path) -> None:
    made = generator(export_path)
    with pytest.raises(DataError, match=r"more than the 20 that the model reads"):
        made.check(ClipRequest("the digit 3 moves right " * 9, 4.0, 1))


def test_texts_longer_than_inherited_weights_were_trained_on_go_up_to_the_table(export_path: Path) -> None:
    made = generator(export_path, levels=0)
    long = ClipRequest("the digit 3 moves right " * 2, 4.0, 1)
    made.model.config = made.model.config.model_copy(update={"text_length": 10})
    with pytest.raises(DataError, match="more than the 10 that the model reads"):
        made.check(long)
    made.text.settings = replace(made.text.settings, trained_length=10)
    made.check(long)
    assert sum(len(chunk.frames_THWC) for chunk in made.generate([long])) == 5
    with pytest.raises(DataError, match="more than the 20 that the model reads"):
        made.check(ClipRequest("the digit 3 moves right " * 9, 4.0, 1))


def test_a_null_text_that_does_not_fit_is_found_before_sampling(export_path: Path) -> None:
    guided, plain = generator(export_path, interpolation_guidance=2.0), generator(export_path)
    for made in (guided, plain):
        made.text.settings = replace(made.text.settings, null_caption="the digit 3 moves " * 9)
    plain.check(request(3, 4.0))
    with pytest.raises(DataError, match="the null text .* model.text_length is 20"):
        guided.check(request(3, 4.0))
