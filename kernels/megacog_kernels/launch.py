"""One launch of one Triton kernel: to run it, or to compile it ahead of time."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Protocol

import torch


class Launch(Protocol):
    """How a kernel is compiled."""

    @property
    def num_warps(self) -> int: ...

    @property
    def resident(self) -> int:
        """Programs that fit on one multiprocessor at once: a limit on registers."""
        ...

    @property
    def options(self) -> dict[str, int]:
        """What Triton is told."""
        ...


@dataclass(frozen=True)
class Call:
    """One launch of one kernel."""

    kernel: Any
    arguments: dict[str, Any]
    constants: dict[str, Any]
    programs: int
    configuration: Launch

    def run(self) -> None:
        """Launch it; nothing to do without programs."""
        if self.programs < 1:
            return
        tensor = next(value for value in self.arguments.values() if isinstance(value, torch.Tensor))
        with torch.cuda.device_of(tensor):  # Triton launches on the current device
            self.kernel[(self.programs,)](**self.arguments, **self.constants, **self.configuration.options)


@dataclass(frozen=True)
class Warps:
    """How a kernel without matrix products is compiled: plain loads, no pipeline."""

    num_warps: int
    resident: int
    """Programs that fit on one multiprocessor at once: a limit on registers."""

    @property
    def options(self) -> dict[str, int]:
        """What Triton is told."""
        limit = max_registers(self.num_warps, self.resident)
        return {"num_warps": self.num_warps, "num_stages": 1, "maxnreg": limit}


def max_registers(num_warps: int, resident: int) -> int:
    """Registers of one thread, in steps of 8, of which a multiprocessor has 65536."""
    return min(255, 65536 // (resident * num_warps * 32) // 8 * 8)
