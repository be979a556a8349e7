"""Proof that a model's step is what its layers add up to: two shallow models predict the deep one.

    python launch/prove.py predict [--config configs/cogvideo-9b.yaml] [--layers 6 12 48]

Step time and peak memory are measured at all three depths; a straight line through the first two must meet the
third within 3 %. What shares of a step do not grow with depth, and what a planner may interpolate, follow from it.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import torch

from megacog.errors import EXIT_DONE, EXIT_FAULT
from megacog.planning.cluster import GIB
from megacog.runtime.cli import run
from megacog.runtime.files import write_json
from megacog.runtime.hardware import describe_device
from megacog.runtime.peak_memory import what
from megacog.training.benchmark import CPU_CONFIG, GPU_CONFIG
from megacog.training.measure import Case, Measured, case_config, measure

TOLERANCE = 0.03


@dataclass(frozen=True)
class Prediction:
    """One quantity at the largest depth."""

    name: str
    predicted: float
    measured: float

    @property
    def error(self) -> float:
        """Relative to what was measured."""
        return self.predicted / self.measured - 1

    @property
    def accepted(self) -> bool:
        return abs(self.error) <= TOLERANCE

    def __str__(self) -> str:
        verdict = "reached" if self.accepted else "MISSED"
        numbers = f"predicted {self.predicted:.4g}, measured {self.measured:.4g}, {self.error:+.2%}"
        return f"{self.name}: {numbers}, goal 3 %: {verdict}"


def main(argv: Sequence[str] | None = None) -> int:
    """Print what was measured and predicted; 1 when a prediction is off by more than 3 %."""
    arguments = parse_arguments(argv)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    path = arguments.config or (GPU_CONFIG if device.type == "cuda" else CPU_CONFIG)
    case = Case("sequential", arguments.micro_batch)
    print(f"{describe_device()}, {path}, {case.name}; memory: most {what(device)}", flush=True)
    found: list[Measured] = []
    for layers in arguments.layers:
        config = case_config(path, case, (*arguments.overrides, f"model.num_layers={layers}"))
        found.append(measure(config, case, device, arguments.seconds))
        print(f"{layers:4} layers: {found[-1].seconds:.4f} s, {found[-1].peak_bytes / GIB:.3f} GiB", flush=True)
    predictions = predict(arguments.layers, found)
    if arguments.json is not None:
        rows = [asdict(prediction) | {"error": prediction.error} for prediction in predictions]
        write_json(arguments.json, {"device": describe_device(), "layers": arguments.layers, "predictions": rows})
    print("\n".join(map(str, predictions)))
    return EXIT_DONE if all(prediction.accepted for prediction in predictions) else EXIT_FAULT


def parse_arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="prove.py predict", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--config", type=Path, help="run to take model and optimizer from")
    parser.add_argument("--layers", type=int, nargs=3, default=[6, 12, 48], help="two depths to predict the third from")
    parser.add_argument("--micro-batch", type=int, default=8, help="samples per step (default 8)")
    parser.add_argument("--seconds", type=float, default=10.0, help="to time each depth for (default 10)")
    parser.add_argument("--json", type=Path, help="also write the predictions here")
    parser.add_argument("overrides", nargs="*", default=[], metavar="key=value", help="override a key of the config")
    return parser.parse_args(argv)


def predict(layers: Sequence[int], found: Sequence[Measured]) -> list[Prediction]:
    """Step time and peak memory at the last depth from the line through the first two."""
    low, high, wanted = layers

    def extended(first: float, second: float) -> float:
        return second + (second - first) / (high - low) * (wanted - high)

    seconds = [each.seconds for each in found]
    gib = [each.peak_bytes / GIB for each in found]
    return [
        Prediction("seconds per step", extended(seconds[0], seconds[1]), seconds[2]),
        Prediction("peak memory in GiB", extended(gib[0], gib[1]), gib[2]),
    ]


if __name__ == "__main__":
    run(main)
