"""Faults on purpose, to prove that a run survives them: `MEGACOG_FAULT="rank:1,step:7,phase:save,kind:kill"`.

Keys of a fault, in any order; several faults are separated by `;`:
- phase: data, forward, backward, step, evaluate, save or load. Required.
- kind: kill (SIGKILL to itself), stop (SIGSTOP to itself), sleep (for `seconds`), nan (in the loss if the phase is
  forward, in the gradients if it is backward, in a weight if it is step), flip (one bit of a weight, phase step),
  enospc (the write at the fault point fails; phase save). Required.
- rank, step: where; without them on every rank, in every step.
- seconds: of kind sleep.
- once: a file that the fault makes when it comes; while the file is there, it does not come again (after a restart).

A fault comes once in a step, at the first fault point of its phase.
"""

from __future__ import annotations

import errno
import os
import signal
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from megacog.errors import ConfigError
from megacog.runtime.log import get_logger

log = get_logger(__name__)

VARIABLE = "MEGACOG_FAULT"
PHASES = ("data", "forward", "backward", "step", "evaluate", "save", "load")
KINDS = {
    "kill": PHASES, "stop": PHASES, "sleep": PHASES, "nan": ("forward", "backward", "step"),
    "flip": ("step",), "enospc": ("save",),
}  # fmt: skip
"""Kind -> phases in which it makes sense."""
_KEYS = ("phase", "kind", "rank", "step", "seconds", "once")


@dataclass
class Fault:
    """One fault of the plan, as in the docstring of this file."""

    phase: str
    kind: str
    rank: int | None = None
    step: int | None = None
    seconds: float = 0.0
    once: Path | None = None
    _last: int | None = field(default=None, repr=False, compare=False)
    """Step in which it came last."""

    def due(self, phase: str, step: int) -> bool:
        """Whether it comes here and now; if so it does not come again in this step."""
        if phase != self.phase or self.step not in (None, step) or self._last == step:
            return False
        if self.once is not None:
            try:
                self.once.touch(exist_ok=False)
            except FileExistsError:
                return False
        self._last = step
        return True


_plan: tuple[Fault, ...] | None = None
"""Faults of this rank; None almost always."""


def arm(rank: int, environ: Mapping[str, str] = os.environ) -> None:
    """Read the faults of this rank from the environment; `fault_point` does nothing before.

    Raises:
        ConfigError: The variable cannot be understood.
    """
    global _plan
    text = environ.get(VARIABLE, "")
    mine = [fault for fault in parse(text) if fault.rank in (None, rank)]
    _plan = tuple(mine) or None
    for fault in mine:
        log.warning("%s: a fault will be injected on rank %d: %s", VARIABLE, rank, fault)


def parse(text: str) -> list[Fault]:
    """The faults that a value of the variable asks for.

    Raises:
        ConfigError: With the part that is wrong and what is allowed.
    """
    return [_parse_one(part.strip()) for part in text.split(";") if part.strip()]


def _parse_one(text: str) -> Fault:
    given: dict[str, str] = {}
    for pair in text.split(","):
        key, colon, value = (part.strip() for part in pair.partition(":"))
        if not colon or key not in _KEYS or not value or key in given:
            raise _wrong(text, f"{pair.strip()!r}: write key:value, each key once, of {', '.join(_KEYS)}")
        given[key] = value
    if given.get("phase") not in PHASES:
        raise _wrong(text, f"phase must be one of {', '.join(PHASES)}")
    kind = given.get("kind", "")
    if given["phase"] not in KINDS.get(kind, ()):
        kinds = ", ".join(name for name, phases in KINDS.items() if given["phase"] in phases)
        raise _wrong(text, f"kind must be one of {kinds} in phase {given['phase']}")
    if (kind == "sleep") != ("seconds" in given):
        raise _wrong(text, "kind sleep, and no other, needs seconds")
    try:
        rank, step = (int(given[key]) if key in given else None for key in ("rank", "step"))
        seconds = float(given.get("seconds", 0))
    except ValueError as error:
        raise _wrong(text, f"rank and step must be whole numbers, seconds a number: {error}") from None
    return Fault(given["phase"], kind, rank, step, seconds, Path(given["once"]) if "once" in given else None)


def _wrong(text: str, why: str) -> ConfigError:
    return ConfigError(f"{VARIABLE}: {text!r}: {why}. Unset it to train without injected faults")


def fault_point(phase: str, step: int) -> Literal["nan", "flip"] | None:
    """A place where a fault may come; without faults it does nothing.

    Args:
        phase: One of `PHASES`.
        step: Optimizer step, from 1; the step of the checkpoint when saving or loading.

    Returns:
        What the caller must spoil: the loss, gradients or a weight ("nan"), or a bit of a weight ("flip").

    Raises:
        OSError: Kind enospc: what the write that follows would raise.
    """
    if _plan is None:
        return None
    found: Literal["nan", "flip"] | None = None
    for fault in _plan:
        if fault.due(phase, step):
            log.warning("%s: %s in phase %s of step %d", VARIABLE, fault.kind, phase, step)
            if fault.kind == "kill":
                os.kill(os.getpid(), signal.SIGKILL)
            elif fault.kind == "stop":
                os.kill(os.getpid(), signal.SIGSTOP)
            elif fault.kind == "sleep":
                time.sleep(fault.seconds)
            elif fault.kind == "enospc":
                raise OSError(errno.ENOSPC, "No space left on device (injected)")
            else:
                found = "nan" if fault.kind == "nan" else "flip"
    return found
