"""The `cluster` section: on which machines a run runs, and how SLURM is asked for them."""

from __future__ import annotations

import re
from typing import Annotated, Literal

from pydantic import AfterValidator, Field, model_validator

from megacog.config.section import Section

# What stands in a `#SBATCH --key=value` line: SLURM splits it at spaces, and a line break would end the comment.
_WORD = re.compile(r"[A-Za-z0-9_.,:;/@%=+~^&|*()\[\]-]+")
_TIME = re.compile(r"\d+(:[0-5]?\d){0,2}|\d+-\d+(:[0-5]?\d){0,2}")
_OPTION = re.compile(r"[a-z][a-z0-9-]*")


def _word(text: str) -> str:
    if not _WORD.fullmatch(text):
        raise ValueError(f"{text!r} is no single word that can stand in a job script (letters, digits, _.,:;/@%=+~...)")
    return text


def _path(text: str) -> str:
    if not text or re.search(r"[\x00-\x1f\x7f,]", text):
        raise ValueError(f"{text!r} must not be empty nor hold commas or control characters")
    return text


def _time(text: str) -> str:
    if not _TIME.fullmatch(text):
        raise ValueError(f"{text!r} is no time limit of SLURM: write minutes, HH:MM:SS or D-HH:MM:SS")
    return text


Word = Annotated[str, AfterValidator(_word)]
PathText = Annotated[str, AfterValidator(_path)]


class ContainerConfig(Section):
    """Image that the ranks of a SLURM job run in. Without this section they run on the host."""

    runtime: Literal["pyxis", "apptainer"]
    """pyxis: srun's own `--container-image`; apptainer: every task starts `apptainer exec`."""
    image: PathText
    """Path or name of the image, as the runtime takes it."""
    mounts: tuple[PathText, ...] = ()
    """`HOST:CONTAINER` folders; the repository and the folder of submission are always mounted."""


class ClusterConfig(Section):
    """Machines of the run: checked against the ranks that appear, and what `launch/submit.py` asks SLURM for."""

    nodes: int | None = Field(default=None, ge=1)
    """Machines. A run that finds more or fewer ranks than nodes x ranks per node stops; null = take what comes."""
    gpus_per_node: int = Field(default=0, ge=0)
    """GPUs of one machine, one rank each; 0 = machines without GPUs."""
    gpu_memory_gib: float | None = Field(default=None, gt=0)
    """Memory of one GPU as it is sold, 80 for example: `launch/submit.py` then refuses a run that cannot fit. null =
    the ranks find out when they start."""
    ranks_per_node: int | None = Field(default=None, ge=1)
    """Ranks of one machine; null = one per GPU, or one without GPUs."""
    spare_nodes: int = Field(default=0, ge=0)
    """Machines that a job asks for beyond `nodes`: launch/doctor.py then runs first, and sick ones are left out."""
    partition: Word | None = None
    """SLURM's --partition."""
    account: Word | None = None
    """SLURM's --account."""
    time: Annotated[str, AfterValidator(_time)] = "24:00:00"
    """SLURM's --time: how long one job may run. A run goes on in the next job."""
    save_seconds: int = Field(default=300, ge=1)
    """Seconds before the end of `time` at which the ranks are told to save and leave."""
    options: dict[str, Word | Literal[""] | None] = Field(default_factory=dict)
    """More options of sbatch, without dashes: `{qos: high, mem: "0", contiguous: null}`; null = one without a value."""
    container: ContainerConfig | None = None

    @property
    def local_ranks(self) -> int:
        """Ranks of one machine."""
        return self.ranks_per_node or self.gpus_per_node or 1

    @property
    def time_seconds(self) -> int:
        """`time` in seconds."""
        days, dash, clock = self.time.rpartition("-")
        parts = [int(part) for part in clock.split(":")]
        if dash:  # D-HH, D-HH:MM or D-HH:MM:SS
            hours, minutes, seconds = (*parts, 0, 0)[:3]
        else:  # MM, MM:SS or HH:MM:SS
            hours, minutes, seconds = parts if len(parts) == 3 else (0, *parts, 0)[:3]
        return ((int(days or 0) * 24 + hours) * 60 + minutes) * 60 + seconds

    @model_validator(mode="after")
    def _values_fit(self) -> ClusterConfig:
        if self.gpus_per_node and self.local_ranks != self.gpus_per_node:
            raise ValueError(
                f"ranks_per_node {self.ranks_per_node} with gpus_per_node {self.gpus_per_node}: with GPUs there is "
                "one rank per GPU; leave ranks_per_node out"
            )
        if self.save_seconds >= self.time_seconds:
            raise ValueError(
                f"save_seconds {self.save_seconds} is not less than the {self.time_seconds} seconds of time {self.time}"
            )
        for name in self.options:
            if not _OPTION.fullmatch(name):
                raise ValueError(f"options: {name!r} is no long option of sbatch without dashes, as `qos` is")
        return self
