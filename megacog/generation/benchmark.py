"""Measures generation with random weights: speed of decoding, steps that windows save, seconds of whole clips.

    python launch/benchmark.py generate [--config FILE] [--json FILE] [key=value ...]

On a GPU the model is that of configs/cogvideo-9b.yaml in bf16, and the goals stand at the end; on a CPU it is the
demo's in fp32, with frames of 12 x 12 codes. There, and with generation.base_precision=fp8 anywhere, the base is
measured in e4m3, too. A token is a row of the model in a step: guided clips take two. Bytes are those that a step must
read at least, weights once and every key and value that a row sees; "of copy" is their rate over that of a copy in the
same run. Text and frame tokenizers are small and random, so their time is not that of real ones.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from itertools import chain
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from megacog.checkpoint.export import load_tensors
from megacog.config.load import load_config
from megacog.config.schema import BasePrecision, Config, GenerationConfig, ModelConfig, Stage
from megacog.generation.cache import stage_masks
from megacog.generation.clusters import Clusters
from megacog.generation.decode import generate_frames
from megacog.generation.hierarchy import ClipGenerator, ClipRequest, whole_clips
from megacog.generation.sampling import Choose, chooser, row_generator
from megacog.generation.schedule import Schedule, schedule
from megacog.model.layout import stage_layout
from megacog.model.transformer import CogVideo
from megacog.parallel.fp8 import check_device, hold_in_fp8
from megacog.parallel.tensor import materialize
from megacog.prepare.digits import captions
from megacog.runtime.cli import run
from megacog.runtime.files import write_json
from megacog.runtime.hardware import describe_device, usable_device
from megacog.tokenizers.frames import ConvTokenizer, ConvTokenizerConfig
from megacog.tokenizers.text import TextTokenizer, train_text_tokenizer
from megacog_kernels.grid import MaskSpec, Space, dense_mask

_CONFIGS = Path(__file__).resolve().parents[2] / "configs"
_ON_GPU: tuple[str, list[str]] = ("cogvideo-9b.yaml", [])
_ON_CPU: tuple[str, list[str]] = (
    "digits.yaml",
    [
        "model.grid=[12, 12]", "model.attention.sequential={kind: full}",
        "model.attention.interpolation={kind: shifted_window, window: [6, 6]}",
    ],
)  # fmt: skip
_GUIDANCE = 3.0
"""Where the configuration guides nothing."""
_ONE, _MANY = "one clip", "8 guided clips"
_FP8 = ", fp8 base"
_SETTLING, _PYTHON_STEPS = 8, 50
"""Steps before those that are timed without CUDA graphs, which take ten times as long, and those."""
_WORDS = 64
"""Pieces of the random text tokenizer."""


@dataclass(frozen=True)
class Decoding:
    """Steps of one code, in the sequential stage after its first sampled frame."""

    clips: int
    rows: int
    ms_per_step: float
    tokens_per_s: float
    gigabytes: float
    """Of one step, 1e9 bytes."""
    of_copy: float


@dataclass(frozen=True)
class Windows:
    """One interpolation block, in as few steps as can be and one code at a time."""

    steps: int
    steps_alone: int
    seconds: float
    seconds_alone: float
    equal_codes: float
    """Share of codes that are equal; 1 but for ties that rounding decides."""


@dataclass(frozen=True)
class Clip:
    """One guided clip, from its caption to pixels."""

    frames: int
    seconds: float
    fp8: bool = False
    """With the base in e4m3."""


class Bench:
    """A model with random weights, and what it takes to generate with it."""

    def __init__(self, config: Config, device: torch.device, folder: Path) -> None:
        """`folder` gets a text tokenizer."""
        torch.manual_seed(0)
        train_text_tokenizer(captions(), folder / "text", vocab_size=_WORDS, template="{span}s")
        self.text = TextTokenizer.load(folder / "text")
        self.config = config.model.model_copy(
            update={"boi_id": self.text.boi_id if config.model.boi_id is None else config.model.boi_id}
        )
        self.device = device
        self.model = random_model(self.config, self.device, config.generation.base_precision)
        words = {"base_suffix": "", "guided_suffix": ""}  # which the random tokenizer need not know
        guided = {} if config.generation.guidance != 1.0 else {"guidance": _GUIDANCE}
        self.settings = config.generation.model_copy(update=words | guided)
        labels = torch.arange(self.config.image_vocab_size) // 40
        self.clusters = Clusters.of_labels(labels).to(device) if self.settings.sampler == "clusters" else None

    def choose(self, stage: Stage) -> Choose:
        """The settings' sampler."""
        return chooser(self.settings, stage, self.clusters)

    def inputs(self, clips: int, known: Sequence[int]) -> tuple[tuple[Tensor, Tensor], dict[int, Tensor]]:
        """Texts, and codes of known frames."""
        text_BL = torch.randint(_WORDS, (clips, self.config.text_length))
        codes_BTP = torch.randint(self.config.image_vocab_size, (clips, self.config.num_frames, self.config.cells))
        return (text_BL, torch.ones_like(text_BL, dtype=torch.bool)), {f: codes_BTP[:, f] for f in known}

    def decoding(self, clips: int, guided: bool, copy_rate: float) -> Decoding:
        """Times the steps of the sequential stage, attention over all earlier frames."""
        text, known = self.inputs(clips, [0])
        at: list[float] = []
        generate_frames(
            self.model, "sequential", *text, (text[0][:1], text[1][:1]), known, choose=self.choose("sequential"),
            guidance=_GUIDANCE if guided else 1.0, generators=[row_generator("row", row) for row in range(clips)],
            on_frame=lambda _: at.append(now(self.device)),
        )  # fmt: skip
        steps = (len(at) - 1) * self.config.cells
        seconds = (at[-1] - at[0]) / steps
        rows = clips * (1 + guided)
        cells = self.config.cells
        size = step_bytes(self.model, "sequential", range(2 * cells, self.config.num_frames * cells), rows)
        return Decoding(clips, rows, seconds * 1e3, rows / seconds, size / 1e9, size / seconds / copy_rate)

    def launching(self, copy_rate: float, count: int = _PYTHON_STEPS) -> Decoding:
        """Times steps of one clip that the host launches kernel by kernel, from the start of frame 2 on.

        As the difference of two short runs, which leaves out what is done before the first step.
        """
        text, known = self.inputs(1, [0, 1])
        whole = schedule(stage_masks(self.model, "sequential"), stage_layout(self.config, "sequential").grid,
                         frozenset(known))  # fmt: skip

        def seconds(steps: int) -> float:
            start = now(self.device)
            generate_frames(
                self.model, "sequential", *text, None, known, choose=self.choose("sequential"), guidance=1.0,
                generators=[row_generator("row", 0)], steps=replace(whole, steps=whole.steps[:steps]),
                cuda_graphs=False,
            )  # fmt: skip
            return now(self.device) - start

        step = (seconds(_SETTLING + count) - seconds(_SETTLING)) / count
        first = 2 * self.config.cells + _SETTLING
        size = step_bytes(self.model, "sequential", range(first, first + count), 1)
        return Decoding(1, 1, step * 1e3, 1 / step, size / 1e9, size / step / copy_rate)

    def windows(self) -> Windows:
        """Times an interpolation block of one clip, twice: kernels are compiled in the first rounds."""
        layout = stage_layout(self.config, "interpolation")
        text, known = self.inputs(1, layout.given_frames)
        few = schedule(stage_masks(self.model, "interpolation"), layout.grid, frozenset(known))
        alone = schedule((MaskSpec(layout.order, Space()),), layout.grid, frozenset(known))  # hides nothing

        def timed(steps: Schedule) -> tuple[float, Tensor]:
            start = now(self.device)
            codes_BTP = generate_frames(
                self.model, "interpolation", *text, None, known, choose=self.choose("interpolation"), guidance=1.0,
                generators=[row_generator("block")], steps=steps,
            )  # fmt: skip
            return now(self.device) - start, codes_BTP

        rounds = [(timed(few), timed(alone)) for _ in range(2)]
        (seconds, codes), (seconds_alone, codes_alone) = rounds[-1]
        sampled = list(layout.loss_frames)
        equal = float((codes == codes_alone)[:, sampled].float().mean())
        return Windows(len(few.steps), len(alone.steps), seconds, seconds_alone, equal)

    def clip(self, levels: int) -> Clip:
        """Times one clip."""
        settings = GenerationConfig.model_validate(
            self.settings.model_dump() | {"preset": None, "levels": levels, "clusters": None}
        )
        shape = ConvTokenizerConfig(8, "ema_vq", codebook_size=self.config.image_vocab_size, width=8, blocks=0)
        frames = ConvTokenizer(shape).to(self.device).eval()
        generator = ClipGenerator(self.model, self.text, frames, settings, clusters=self.clusters)
        start = now(self.device)
        ((_, pixels, _),) = whole_clips(generator.generate([ClipRequest(captions()[0], settings.seconds, seed=1)]))
        return Clip(len(pixels), now(self.device) - start, self.settings.base_precision == "fp8")


def random_model(config: ModelConfig, device: torch.device, base_precision: BasePrecision | None = None) -> CogVideo:
    """Both attention-plus sets; drawn where it lives, bf16 on GPUs or around a base in e4m3, and fp32 elsewhere."""
    with torch.device("meta"):
        model = CogVideo(config, ("sequential", "interpolation"))
    model.requires_grad_(False)
    if base_precision == "fp8":
        check_device(device)
        hold_in_fp8(model.layers)
    dtype = torch.bfloat16 if device.type == "cuda" or base_precision == "fp8" else torch.float32
    materialize(model, device, dtype)
    shapes = {name: parameter.shape for name, parameter in model.named_parameters()}

    def drawn(name: str) -> Tensor:
        weight = torch.empty(shapes[name], dtype=dtype, device=device)
        return weight.fill_(1.0) if name.endswith("layernorm.weight") else weight.normal_(std=0.02)

    load_tensors(model, drawn, shapes)
    model.eval().choose_kernels()
    return model


def step_bytes(model: CogVideo, stage: Stage, tokens: Sequence[int], rows: int) -> float:
    """Bytes that a step of one of `tokens` reads at least, on average: weights, and what all rows see.

    Args:
        model: Whose weights, with the scales of those in e4m3.
        stage: Layout and attention-plus.
        tokens: Frame * cells + cell of each code.
        rows: Of the model in a step.
    """
    plus, layout = model.plus_of(stage), stage_layout(model.config, stage)
    parts = [model.layers, model.final_layernorm, model.code_embedding, *([plus.layers] if plus is not None else [])]
    read = chain.from_iterable(chain(part.parameters(), part.buffers()) for part in parts)  # type: ignore[attr-defined]
    weights = sum(tensor.numel() * tensor.element_size() for tensor in read)
    queries = np.array(tokens)
    masks = [layout.base_mask] * len(model.layers)
    if plus is not None:
        masks += [layout.plus_mask(model.space(stage), index) for index in range(len(model.layers))]
    seen = {mask: float(dense_mask(mask, layout.grid)[queries].sum(axis=1).mean()) for mask in set(masks)}
    keys = sum(model.config.text_length + seen[mask] for mask in masks)
    size = model.final_layernorm.weight.element_size()
    return weights + rows * keys * 2 * model.config.hidden_size * size


def copy_rate(device: torch.device) -> float:
    """Bytes per second of a copy, those read plus those written."""
    source = torch.ones((1 << 30 if device.type == "cuda" else 1 << 27), dtype=torch.uint8, device=device)
    target, count = torch.empty_like(source), 10
    target.copy_(source)
    start = now(device)
    for _ in range(count):
        target.copy_(source)
    return count * 2 * source.nbytes / (now(device) - start)


def now(device: torch.device) -> float:
    """Seconds on a clock, after all work on the device."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


@dataclass
class Report:
    """Everything that was measured so far."""

    device: str
    parameters: int
    copy_gb_s: float
    decoding: dict[str, Decoding] = field(default_factory=dict)
    windows: Windows | None = None
    clips: list[Clip] = field(default_factory=list)


def measure(bench: Bench, report: Report, save: Callable[[Report], None]) -> None:
    """Measure into `report`; print and save every figure as it comes."""
    rate = report.copy_gb_s * 1e9
    base = _FP8 if bench.settings.base_precision == "fp8" else ""
    cases = {_ONE + base: partial(bench.decoding, 1, False, rate), _MANY + base: partial(bench.decoding, 8, True, rate)}
    if bench.device.type == "cuda":
        cases[f"{_ONE}{base}, without CUDA graphs"] = partial(bench.launching, rate)
    for case, decode in cases.items():
        report.decoding[case] = found = decode()
        print(
            f"{case:38s} {found.rows:3d} rows {found.ms_per_step:8.2f} ms/step {found.tokens_per_s:7.0f} tokens/s "
            f"{found.gigabytes:7.3f} GB/step {found.of_copy:5.2f} of copy", flush=True,
        )  # fmt: skip
        save(report)
    if report.windows is None:
        report.windows = windows = bench.windows()
        print(
            f"{'interpolation block' + base:38s} {windows.steps} steps {windows.seconds:.2f} s, one code at a time "
            f"{windows.steps_alone} steps {windows.seconds_alone:.2f} s, {windows.equal_codes:.1%} of codes equal",
            flush=True,
        )
        save(report)
    for levels in dict.fromkeys((0, bench.settings.levels)):
        report.clips.append(bench.clip(levels))
        clip = report.clips[-1]
        print(f"{'one guided clip' + base:38s} {clip.frames} frames {clip.seconds:.2f} s", flush=True)
        save(report)


@dataclass(frozen=True)
class Goal:
    """What the 9B model is to reach on one H200, and what after that."""

    name: str
    at_least: bool
    limits: tuple[float, ...]
    value: float | None
    """None = not run."""

    def __str__(self) -> str:
        sign = ">=" if self.at_least else "<="
        value = float("nan") if self.value is None else self.value
        verdicts = []
        for limit in self.limits:
            met = value >= limit if self.at_least else value <= limit
            verdict = "not run" if self.value is None else "reached" if met else "MISSED"
            verdicts.append(f"{sign} {limit:g} {verdict}")
        return f"{self.name:42s} {value:8.2f}  goal {', then '.join(verdicts)}"


def goals(report: Report) -> list[Goal]:
    """The goals of the 9B model on one H200."""
    seconds = {(clip.frames, clip.fp8): clip.seconds for clip in report.clips}
    one, many = report.decoding.get(_ONE), report.decoding.get(_MANY)
    steps = None if report.windows is None else float(report.windows.steps)
    return [
        Goal("one clip: bytes/s over those of a copy", True, (0.65, 0.80), one.of_copy if one else None),
        Goal(f"{_MANY}: tokens/s", True, (1600.0,), many.tokens_per_s if many else None),
        Goal("an interpolation block, steps", False, (590.0,), steps),
        Goal("one guided clip of 5 frames, s", False, (12.0,), seconds.get((5, False))),
        Goal("one guided clip of 33 frames, s", False, (60.0, 20.0), seconds.get((33, False))),
        Goal(f"one guided clip of 33 frames{_FP8}, s", False, (12.0,), seconds.get((33, True))),
    ]


def main(argv: Sequence[str] | None = None) -> None:
    """Run the command."""
    parser = argparse.ArgumentParser(
        prog="benchmark.py generate", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--config", type=Path, help="whose model and generation settings to use")
    parser.add_argument("--device", help="cpu, cuda, ... (default: cuda if there is one)")
    parser.add_argument("--json", type=Path, help="also write the figures here, each as it comes")
    parser.add_argument("overrides", nargs="*", default=[], metavar="key=value", help="overrides of the configuration")
    options = parser.parse_intermixed_args(argv)
    device = torch.device(usable_device(options.device or ("cuda" if torch.cuda.is_available() else "cpu")))
    on_gpu = device.type == "cuda"
    name, changes = _ON_GPU if on_gpu else _ON_CPU
    path, changes = (options.config, []) if options.config else (_CONFIGS / name, changes)
    configs = [load_config(path, [*changes, *options.overrides])]
    if on_gpu and configs[0].generation.base_precision is None:
        configs.append(load_config(path, [*changes, *options.overrides, "generation.base_precision=fp8"]))

    def save(report: Report) -> None:
        if options.json:
            write_json(options.json, asdict(report))

    report = None
    for config in configs:
        with tempfile.TemporaryDirectory() as folder:
            bench = Bench(config, device, Path(folder))
        if report is None:
            report = begin(bench)
        measure(bench, report, save)
        del bench  # the next one's weights take its place
    assert report is not None
    if on_gpu:
        print("\n" + "\n".join(map(str, goals(report))))


def begin(bench: Bench) -> Report:
    """A report that says what will be measured, and how fast this device copies."""
    parameters = sum(parameter.numel() for parameter in bench.model.parameters())
    rate = copy_rate(bench.device)
    print(f"{describe_device()}\n{parameters / 1e9:.3f} billion parameters, copy {rate / 1e9:.0f} GB/s", flush=True)
    return Report(describe_device(), parameters, rate / 1e9)


if __name__ == "__main__":
    run(main)
