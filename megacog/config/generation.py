"""How clips are sampled: the settings, and presets of many of them at once."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

from pydantic import Field, model_validator

from megacog.config.section import BasePrecision, Kernels, Section, Stage

PRESETS: Mapping[str, Mapping[str, Any]] = {
    # The defaults of the released inference script; docs/inheritance.md says what each of them does there.
    "cogvideo": {
        "seconds": 4.0,
        "levels": 3,
        "sampler": "clusters",
        "temperature": 1.05,
        "top_k": None,
        "top_p": None,
        "top_clusters": 12,
        "cluster_temperature": 0.89,
        "guidance": 3.0,
        "interpolation_guidance": 1.0,
        "text_bias": 1.4,
        "guided_suffix": "\u89c6\u9891",  # "video", as in the null text
        "base_temperature": 1.0,
        "base_top_clusters": 16,
        "base_guidance": 1.0,
        "base_suffix": "\u9ad8\u6e05\u6444\u5f71",  # "high-definition photography"
        "batch_size": 8,
        "seed": 1234,
        "samples": 4,
    }
}
"""Values that a preset gives to keys which are not given themselves."""

_OF_SAMPLER: Mapping[str, Mapping[str, Any]] = {
    "codes": {"top_k": None, "top_p": None},
    "clusters": {
        "clusters": None, "num_clusters": None, "top_clusters": None, "base_top_clusters": None,
        "cluster_temperature": 1.0,
    },
}  # fmt: skip
"""Keys that mean something with one sampler only, and the values that leave them off."""


class GenerationConfig(Section):
    """How clips are sampled."""

    preset: Literal["cogvideo"] | None = None
    """Values for many of the keys below at once; keys that are given themselves win. cogvideo: as the CogVideo release
    generates (docs/inheritance.md)."""
    levels: int = Field(default=3, ge=0, le=10)
    """Recursive interpolations after the key frames: 5 -> 9 -> 17 -> 33 frames."""
    seconds: float = Field(default=4.0, gt=0)
    """Time between the first and the last key frame of one pass."""
    sampler: Literal["codes", "clusters"] = "codes"
    """codes: draw among the likeliest codes; clusters: draw a cluster of similar codes, then one of its codes."""
    temperature: float = Field(default=1.0, gt=0)
    """Divides the logits before sampling; near 0 = always the likeliest code."""
    base_temperature: float | None = Field(default=None, gt=0)
    """The same for frame 0; null = as temperature."""
    top_k: int | None = Field(default=None, ge=1)
    """codes: sample among this many likeliest codes; null = all."""
    top_p: float | None = Field(default=None, gt=0, le=1)
    """codes: sample among the likeliest codes that hold this probability; null = all."""
    clusters: str | None = None
    """clusters: .npy file with the cluster of every code; null = k-means over the frame tokenizer's codebook."""
    num_clusters: int | None = Field(default=None, ge=1)
    """clusters: how many k-means makes; null = one for every 40 codes."""
    top_clusters: int | None = Field(default=None, ge=1)
    """clusters: draw among this many likeliest clusters; null = all."""
    base_top_clusters: int | None = Field(default=None, ge=1)
    """The same for frame 0; null = as top_clusters."""
    cluster_temperature: float = Field(default=1.0, gt=0)
    """clusters: divides the logits once more when a code is drawn within its cluster."""
    guidance: float = Field(default=1.0, ge=0)
    """Classifier-free guidance scale of the key frames; 1 = off."""
    base_guidance: float | None = Field(default=None, ge=0)
    """Guidance scale of frame 0; null = as guidance."""
    interpolation_guidance: float = Field(default=1.0, ge=0)
    """Guidance scale of interpolated frames; 1 = off."""
    text_bias: float = 0.0
    """Added to the attention scores of text keys in stages without guidance, so that they weigh exp(text_bias) times
    as much."""
    base_suffix: str = ""
    """Words after the caption of frame 0."""
    guided_suffix: str = ""
    """Words after the caption of other frames, where they are guided: what the null text says too."""
    batch_size: int = Field(default=8, ge=1)
    """Clips (or interpolation blocks) generated at once."""
    kernels: Kernels = "auto"
    """Attention, norms and gates: auto takes Triton on GPUs and plain PyTorch elsewhere; triton insists on it."""
    cuda_graphs: bool = True
    """On GPUs, replay sampling steps from CUDA graphs; false launches every kernel from Python."""
    base_precision: BasePrecision | None = None
    """fp8: the base's matrices in e4m3, half the bytes of bf16, made from the export when it is read; everything else
    in bf16. Needs a GPU of compute capability 8.9, or a CPU."""
    overlap: int = Field(default=1, ge=1, le=4)
    """Key frames that the next pass of a long clip is given."""
    seed: int = 1234
    """With prompt and sample number it decides every random draw of a clip."""
    samples: int = Field(default=1, ge=1)
    """Clips per prompt."""

    @model_validator(mode="before")
    @classmethod
    def _apply_preset(cls, values: Any) -> Any:
        if not isinstance(values, dict):
            return values
        preset = _preset(values.get("preset"))
        off = _keys_of_others(values.get("sampler", preset.get("sampler")))
        return {key: value for key, value in preset.items() if key not in off} | values

    @model_validator(mode="after")
    def _keys_fit_sampler(self) -> GenerationConfig:
        off = _keys_of_others(self.sampler)
        given = [key for key, value in off.items() if getattr(self, key) != value]
        if given:
            mend = "top_clusters counts clusters" if self.sampler == "clusters" else "set sampler: clusters"
            raise ValueError(f"{', '.join(given)} cannot be used with sampler: {self.sampler} ({mend})")
        return self

    def replaced_by(self, given: Mapping[str, Any]) -> set[str]:
        """Keys whose values here give way when the keys `given` are set anew: what a preset or a sampler decides."""
        preset = _preset(given.get("preset"))
        stale = {*preset, *_preset(self.preset)} if "preset" in given else set()
        kept = type(self).model_fields["sampler"].default if "sampler" in stale else self.sampler
        stale.update(_keys_of_others(given.get("sampler", preset.get("sampler", kept))))
        return stale - given.keys()

    def text_spans(self, seconds: float) -> tuple[float, ...]:
        """Seconds that the texts of a pass name: those of its key frames, then half as many per interpolation."""
        return tuple(seconds / 2**level for level in range(self.levels + 1))

    def caption(self, text: str, stage: Stage) -> str:
        """What the text of a stage says of a clip: its caption and the suffix that belongs there."""
        if stage == "base":
            suffix = self.base_suffix
        else:
            suffix = self.guided_suffix if self.guidance_of(stage) != 1.0 else ""
        return f"{text} {suffix}" if suffix else text

    def guidance_of(self, stage: Stage) -> float:
        """Guidance scale of a stage; 1 = off."""
        if stage == "base" and self.base_guidance is not None:
            return self.base_guidance
        return self.interpolation_guidance if stage == "interpolation" else self.guidance

    def text_bias_of(self, stage: Stage) -> float:
        """What a stage adds to the attention scores of text keys."""
        return self.text_bias if self.guidance_of(stage) == 1.0 else 0.0

    def temperature_of(self, stage: Stage) -> float:
        """What divides the logits of a stage."""
        return self.temperature if stage != "base" or self.base_temperature is None else self.base_temperature

    def top_clusters_of(self, stage: Stage) -> int | None:
        """Clusters that a stage draws among; None = all."""
        return self.top_clusters if stage != "base" or self.base_top_clusters is None else self.base_top_clusters


def _preset(name: Any) -> Mapping[str, Any]:
    return PRESETS.get(name, {}) if isinstance(name, str) else {}


def _keys_of_others(sampler: Any) -> Mapping[str, Any]:
    """Keys that mean nothing with this sampler; none if there is no such sampler."""
    if sampler not in ("codes", "clusters"):
        return {}
    return _OF_SAMPLER["clusters" if sampler == "codes" else "codes"]
