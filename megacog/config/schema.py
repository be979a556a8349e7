"""The typed configuration of a run: every knob, its default and its meaning.

The only home of defaults. A key here is spelled the same in YAML, in `key=value` overrides, in the
docs and in the logs. Cross-field rules live in the validators below; rules that need files (does
the vocabulary fit the tokenizer?) are checked where the files are opened.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field, model_validator

from megacog.config.cluster import ClusterConfig as ClusterConfig
from megacog.config.generation import GenerationConfig as GenerationConfig
from megacog.config.layouts import layout_problems
from megacog.config.section import BasePrecision as BasePrecision
from megacog.config.section import Checkpointing as Checkpointing
from megacog.config.section import Kernels as Kernels
from megacog.config.section import PlusStage as PlusStage
from megacog.config.section import Section as Section
from megacog.config.section import Stage as Stage
from megacog.config.watch import WatchConfig as WatchConfig


class SpaceConfig(Section):
    """Which cells of a visible frame an attention-plus query sees (the base channel always sees
    its own frame only)."""

    kind: Literal["full", "frame", "local3d", "shifted_window"] = "full"
    """full: all cells; frame: own frame only; local3d: near cells; shifted_window: same block."""
    window: tuple[int, int] | None = None
    """Height and width in cells; required by local3d (odd) and shifted_window."""
    frames: int | None = Field(default=None, ge=1)
    """local3d: see keys less than this many frames away; null = all frames."""

    @model_validator(mode="after")
    def _window_fits_kind(self) -> SpaceConfig:
        windowed = self.kind in ("local3d", "shifted_window")
        if windowed != (self.window is not None):
            need = "needs `window: [h, w]`" if windowed else "takes no `window`"
            raise ValueError(f"kind {self.kind!r} {need}")
        if self.window is not None and min(self.window) < 1:
            raise ValueError(f"window {list(self.window)} must be positive")
        if self.kind == "local3d" and self.window and any(side % 2 == 0 for side in self.window):
            raise ValueError(f"local3d window {list(self.window)} must be odd (radius on each side)")
        if self.frames is not None and self.kind != "local3d":
            raise ValueError("`frames` applies to local3d only")
        return self


class AttentionConfig(Section):
    """The attention-plus mask of each stage. Defaults follow the CogVideo release."""

    sequential: SpaceConfig = SpaceConfig()
    interpolation: SpaceConfig = SpaceConfig(kind="shifted_window", window=(10, 10))


class InitConfig(Section):
    """Random start of a base that inherits nothing. The defaults are the release's, made for width 3072."""

    weight_std: float = Field(default=0.02, gt=0)
    """Standard deviation of linear weights; output projections get this / sqrt(2 num_layers)."""
    embedding_std: float = Field(default=0.02, gt=0)
    """Standard deviation of code, text and position embeddings."""
    residual_norm: float = Field(default=1.0, gt=0)
    """Initial weight of the third and fourth layernorm: how much a layer adds to the residual stream. At 1, what
    the embeddings say soon drowns; small models trained for minutes want less."""


class ModelConfig(Section):
    """Shape of the transformer and where its weights start from."""

    num_layers: int = Field(ge=1)
    """Transformer layers; each has a base and an attention-plus channel."""
    hidden_size: int = Field(ge=1)
    """Width of the residual stream; a multiple of num_heads."""
    num_heads: int = Field(ge=1)
    """Attention heads of each channel; parallel.tensor and parallel.sequence divide them."""
    ffn_size: int | None = Field(default=None, ge=1)
    """Inner width of the MLP; null = 4 x hidden_size."""
    grid: tuple[int, int]
    """Height and width of one frame in codes."""
    num_frames: int = Field(default=5, ge=2)
    """Frames per sequence of the sequential and interpolation stages."""
    text_length: int = Field(default=64, ge=1)
    """Text tokens in front of the frames; shorter texts are padded on the left."""
    image_vocab_size: int = Field(ge=2)
    """Codes of the frame tokenizer."""
    text_vocab_size: int = Field(ge=4)
    """Rows of the text embedding; at least the pieces of the text tokenizer."""
    boi_id: int | None = Field(default=None, ge=0)
    """Text piece that starts every frame; null = as the text tokenizer says."""
    text_positions: int = Field(default=512, ge=1)
    """Rows of the base position table in front of frame 0."""
    base_positions: int | None = Field(default=None, ge=1)
    """Rows of the base position table; null = text_positions + cells of one frame."""
    plus_positions: int | None = Field(default=None, ge=1)
    """Rows of each additional position table; null = num_frames x cells."""
    layernorm_eps: float = Field(default=1e-5, gt=0)
    """Added to the variance in every layernorm."""
    embedding_dropout: float = Field(default=0.0, ge=0, lt=1)
    """Dropout after the embeddings."""
    mlp_dropout: float = Field(default=0.0, ge=0, lt=1)
    """Dropout after every MLP."""
    attention: AttentionConfig = AttentionConfig()
    init: InitConfig = InitConfig()
    inherit: str | None = None
    """Export whose weights this run starts from; null = random base."""
    plus_from: PlusStage | Literal["base"] = "base"
    """What a new attention-plus set copies: the base channel, or another set of the export."""
    plus_dense: Literal["copy", "random"] = "copy"
    """With plus_from base: copy `dense` too (paper) or draw it at random (released code)."""

    @property
    def cells(self) -> int:
        """Codes of one frame."""
        return self.grid[0] * self.grid[1]

    @property
    def head_dim(self) -> int:
        return self.hidden_size // self.num_heads

    @property
    def ffn(self) -> int:
        return self.ffn_size or 4 * self.hidden_size

    @property
    def base_position_rows(self) -> int:
        return self.base_positions or self.text_positions + self.cells

    @property
    def plus_position_rows(self) -> int:
        return self.plus_positions or self.num_frames * self.cells

    @model_validator(mode="after")
    def _shapes_fit(self) -> ModelConfig:
        if self.hidden_size % self.num_heads:
            raise ValueError(f"hidden_size {self.hidden_size} is not divisible by num_heads {self.num_heads}")
        if min(self.grid) < 1:
            raise ValueError(f"grid {list(self.grid)} must be positive")
        if self.text_length > self.text_positions:
            raise ValueError(f"text_length {self.text_length} exceeds text_positions {self.text_positions}")
        if self.base_position_rows < self.text_positions + self.cells:
            raise ValueError(
                f"base_positions {self.base_position_rows} < text_positions {self.text_positions} "
                f"+ {self.cells} cells of frame 0"
            )
        if self.plus_position_rows < (self.num_frames - 1) * self.cells:
            raise ValueError(
                f"plus_positions {self.plus_position_rows} < "
                f"{self.num_frames - 1} frames x {self.cells} cells"
            )
        if self.boi_id is not None and self.boi_id >= self.text_vocab_size:
            raise ValueError(f"boi_id {self.boi_id} is outside text_vocab_size {self.text_vocab_size}")
        return self


class TokenizerConfig(Section):
    """Folders written by launch/train_tokenizer.py."""

    text: str
    """Folder of the text tokenizer."""
    frames: str
    """Folder of the frame tokenizer that made the shards."""


class SourceConfig(Section):
    """One shard set of a weighted mixture."""

    path: str
    """Shard file or glob pattern, e.g. data/clips-*.h5."""
    weight: float = Field(default=1.0, gt=0)
    """Share in the mixture, relative to the other sources."""


class RatePhase(Section):
    """From optimizer step `from_step` on, rates below `min_fps` are not used."""

    from_step: int = Field(ge=0)
    """First optimizer step of the phase."""
    min_fps: float = Field(gt=0)
    """Lowest rate used from then on."""


class RatesConfig(Section):
    """Which frame rate a clip is trained at."""

    series: tuple[float, ...] = (0.25, 0.5, 1.0, 2.0, 4.0, 8.0)
    """Frame rates of the sequential stage, ascending."""
    interpolation: tuple[float, ...] = (2.0, 4.0, 8.0)
    """Rates of the interpolation stage."""
    policy: Literal["lowest", "mixture"] = "lowest"
    """lowest: the lowest feasible rate (paper); mixture: sometimes any feasible one."""
    lowest_probability: float = Field(default=0.5, ge=0, le=1)
    """mixture: probability of the lowest feasible rate; else uniform over the feasible ones."""
    phases: tuple[RatePhase, ...] = ()

    @model_validator(mode="after")
    def _rates_ascend(self) -> RatesConfig:
        for name, rates in (("series", self.series), ("interpolation", self.interpolation)):
            if not rates or rates[0] <= 0 or list(rates) != sorted(set(rates)):
                raise ValueError(f"{name} {list(rates)} must be positive and strictly ascending")
        steps = [phase.from_step for phase in self.phases]
        if steps != sorted(set(steps)):
            raise ValueError(f"phases must have strictly ascending from_step, not {steps}")
        return self


class DataConfig(Section):
    train: tuple[SourceConfig, ...] = ()
    eval: tuple[SourceConfig, ...] = ()
    rates: RatesConfig = RatesConfig()
    base_frame: Literal["any", "first"] = "any"
    """base stage: a random frame of the clip, or its first one."""
    base_video_share: float = Field(default=0.0, ge=0, le=1)
    """base stage: share of samples that are a random frame of a window as the sequential stage takes it, under
    its rate text. A base trained from scratch needs some: once frozen, it must know texts with a rate and frames
    from anywhere in a clip. 0 for an inherited base, which is not trained."""
    caption_dropout: float = Field(default=0.1, ge=0, le=1)
    """Share of samples whose caption (never the rate) becomes the null text."""
    workers: int = Field(default=2, ge=0)
    """Loader processes per rank; 0 = load in the training process."""
    worker_timeout: float = Field(default=120.0, ge=1, le=86400)
    """Seconds that a loader process may take for a micro batch. One that hangs or dies is replaced and reads the same
    samples; when that one fails too, the run stops and names the clip."""


class LossConfig(Section):
    frame_weights: tuple[float, ...] | None = None
    """Weight of each frame of the sequence in the mean; null = 1 on every predicted frame."""


Momentum = Annotated[float, Field(ge=0, lt=1)]


class TrainConfig(Section):
    stage: Stage
    """What is trained: the base, or one attention-plus on a frozen base."""
    run_dir: str
    """Folder of the run: config, metrics, samples, checkpoints, export."""
    engine: Literal["deepspeed", "torch"] = "deepspeed"
    """torch: the plain engine that DeepSpeed is checked against (one data-parallel rank or more, no ZeRO)."""
    steps: int = Field(ge=1)
    """Optimizer steps of the whole run; the schedule ends there."""
    global_batch_size: int = Field(ge=1)
    """Samples per optimizer step over all ranks."""
    micro_batch_size: int = Field(ge=1)
    """Samples per rank and forward pass; accumulation = global / (micro x data-parallel size)."""
    precision: Literal["bf16", "fp32"] = "bf16"
    """Compute dtype. bf16 keeps fp32 masters of what is trained."""
    gradient_dtype: Literal["fp32", "bf16"] = "fp32"
    """What gradients are summed in over the micro batches of a step. bf16 saves memory and rounds every sum."""
    base_precision: BasePrecision | None = None
    """Stages sequential and interpolation: fp8 holds the frozen base's matrices in e4m3 and multiplies there, with
    activations quantized row by row; null = in precision. Needs a GPU of compute capability 8.9, or a CPU. Checkpoints
    and exports keep the base as it was."""
    kernels: Kernels = "auto"
    """Attention, norms, gates and loss: auto takes Triton on GPUs and plain PyTorch elsewhere; triton insists on it."""
    deterministic: bool = True
    """Triton's gradients of attention are bitwise the same in every run; false lets them be summed in any order, with
    two of seven matrix products less. Then a resumed run continues to rounding, not bitwise."""
    zero_stage: Literal[0, 1, 2, 3] = 1
    """DeepSpeed: what is cut over data-parallel ranks (1 optimizer, 2 gradients, 3 weights)."""
    offload_optimizer: bool = False
    """Keep AdamW's moments and the fp32 masters in the host's memory and update there (12 bytes per trained parameter
    less on the device; ZeRO 1): for few cards with little memory and many micro batches per step."""
    learning_rate: float = Field(default=2e-4, gt=0)
    """Peak learning rate."""
    min_learning_rate_ratio: float = Field(default=0.1, ge=0, le=1)
    """The cosine ends at this share of learning_rate."""
    warmup_steps: int = Field(default=500, ge=0)
    """Steps of linear warm-up."""
    betas: tuple[Momentum, Momentum] = (0.9, 0.95)
    """AdamW momentum of the gradient and of its square."""
    eps: float = Field(default=1e-8, gt=0)
    """AdamW epsilon."""
    weight_decay: float = Field(default=1e-4, ge=0)
    """AdamW decay; biases and layernorms have none."""
    gradient_clip: float = Field(default=0.1, ge=0)
    """Global gradient norm; 0 = off."""
    activation_checkpointing: Checkpointing = "none"
    """What the backward pass computes again: nothing; norms and the products that need no sum over ranks (selective);
    whole layers (full)."""
    context_corruption: float = Field(default=0.0, ge=0, lt=1)
    """Share of the given frames' codes that are resampled at random."""
    seed: int = 1234
    """Initial weights, sample order, rates, windows and dropped captions follow from it."""
    eval_every: int = Field(default=500, ge=0)
    """Steps between evaluations; 0 = never."""
    eval_batches: int = Field(default=8, ge=1)
    """Micro batches of one evaluation, over all ranks."""
    log_every: int = Field(default=1, ge=1)
    """Steps between lines of the log and records of metrics.jsonl."""
    max_minutes: float | None = Field(default=None, gt=0)
    """Save and leave with exit code 85 so many minutes after the start; the same command continues."""
    resume: Literal["auto", "must", "never"] = "auto"
    """auto: continue from the newest checkpoint of run_dir if there is one; must: fail without one;
    never: fail if there is one."""
    threads: int | None = Field(default=None, ge=1)
    """CPU threads per rank; null = cores / local ranks."""
    memory_check: bool = True
    """On GPUs: refuse to start when the planned peak of memory exceeds the device's; false = warn and go on."""

    @model_validator(mode="after")
    def _offload_fits(self) -> TrainConfig:
        if not self.offload_optimizer:
            return self
        if self.engine != "deepspeed":
            raise ValueError("offload_optimizer is done by engine deepspeed; set it, or leave offload_optimizer out")
        if self.zero_stage != 1:
            why = {
                0: "with 0 there is no offload",
                2: "with 2 DeepSpeed would add up the gradients of micro batches in bf16 on the host",
                3: "with 3 it is not supported",
            }
            raise ValueError(f"offload_optimizer needs zero_stage 1: {why[self.zero_stage]}")
        return self

    @model_validator(mode="after")
    def _base_precision_fits(self) -> TrainConfig:
        if self.base_precision is None:
            return self
        if self.stage == "base":
            raise ValueError("base_precision fp8 is for a frozen base, and stage base trains it; leave it out")
        if self.precision != "bf16":
            raise ValueError(f"base_precision fp8 gives products in bf16, and precision is {self.precision}; set bf16")
        if self.engine == "deepspeed" and self.zero_stage == 3:
            raise ValueError("base_precision fp8 holds the base whole on every rank, and zero_stage 3 cuts it; use 2")
        return self


class ParallelConfig(Section):
    tensor: int = Field(default=1, ge=1)
    """Ranks that share one copy of the model (heads, MLP, vocabularies): 1, 2, 4 or 8."""
    sequence: int = Field(default=1, ge=1)
    """Ranks that share every sample, for sequences too long for one: rows of the frames, heads in attention. The
    rest is data parallel: world / (tensor x sequence)."""


class CheckpointConfig(Section):
    every: int = Field(default=2000, ge=0)
    """Steps between checkpoints; 0 = only at the end."""
    keep_last: int = Field(default=3, ge=1)
    """Newest checkpoints that are kept."""
    keep_every: int = Field(default=0, ge=0)
    """Checkpoints of steps that are multiples of it are kept for good; 0 = none."""
    keep_best: int = Field(default=0, ge=0)
    """Checkpoints with the lowest evaluation loss that are kept besides; 0 = none."""
    asynchronous: bool = True
    """Train on while a checkpoint is written; costs every rank host memory for its share of one."""
    on_error: Literal["stop", "continue"] = "stop"
    """What a checkpoint that cannot be written does to the run; the last one of a run must be written."""


class SamplesConfig(Section):
    """Clips generated while training, with the same prompts and seeds every time."""

    every: int = Field(default=0, ge=0)
    """Steps between samples; 0 = none."""
    prompts: tuple[str, ...] = ()
    """Captions of the sample clips."""
    seed: int = 0
    """As generation.seed, for the sample clips."""


class MetricsConfig(Section):
    tensorboard: bool = True
    """Also write TensorBoard events (metrics.jsonl is always written)."""
    peak_tflops: float | None = Field(default=None, gt=0)
    """Dense peak of one device at the run's precision; null = by device name, MFU n/a if unknown."""


class Config(Section):
    """One model and one run."""

    model: ModelConfig
    tokenizer: TokenizerConfig
    data: DataConfig = DataConfig()
    train: TrainConfig
    parallel: ParallelConfig = ParallelConfig()
    cluster: ClusterConfig = ClusterConfig()
    watch: WatchConfig = WatchConfig()
    loss: LossConfig = LossConfig()
    checkpoint: CheckpointConfig = CheckpointConfig()
    generation: GenerationConfig = GenerationConfig()
    samples: SamplesConfig = SamplesConfig()
    metrics: MetricsConfig = MetricsConfig()
    deepspeed: dict[str, Any] = Field(default_factory=dict)
    """Extra DeepSpeed settings, merged into the generated ones; keys are checked."""

    @model_validator(mode="after")
    def _the_best_is_known(self) -> Config:
        every, eval_every = self.checkpoint.every, self.train.eval_every
        if self.checkpoint.keep_best and (not self.data.eval or not every or not eval_every or every % eval_every):
            raise ValueError(
                f"checkpoint.keep_best needs data.eval and an evaluation at every checkpoint: checkpoint.every {every} "
                f"must be a multiple of train.eval_every {eval_every}"
            )
        return self

    @model_validator(mode="after")
    def _sections_fit(self) -> Config:
        model, train = self.model, self.train
        problems = list(layout_problems(model, train, self.parallel))
        if problems:
            raise ValueError("; ".join(problems))
        if train.global_batch_size % train.micro_batch_size:
            raise ValueError(
                f"train.global_batch_size {train.global_batch_size} is not a multiple of "
                f"train.micro_batch_size {train.micro_batch_size}"
            )
        if train.precision == "fp32" and train.gradient_dtype == "bf16":
            raise ValueError("train.gradient_dtype bf16 needs train.precision bf16: gradients of fp32 weights are fp32")
        if train.stage != "base" and model.inherit is None:
            raise ValueError(
                f"train.stage {train.stage} needs model.inherit: the export whose base it builds on"
            )
        weights = self.loss.frame_weights
        frames = 1 if train.stage == "base" else model.num_frames
        if weights is not None and len(weights) != frames:
            raise ValueError(
                f"loss.frame_weights has {len(weights)} entries, the sequence has {frames} frames"
            )
        if weights is not None:
            predicted = weights if train.stage == "base" else weights[1 :: 2 if train.stage == "interpolation" else 1]
            if min(weights) < 0 or not sum(predicted) > 0:
                raise ValueError(f"loss.frame_weights {list(weights)}: none may be negative, some predicted one not 0")
        if train.stage == "interpolation" and model.num_frames % 2 == 0:
            raise ValueError(f"interpolation needs an odd model.num_frames, not {model.num_frames}")
        return self
