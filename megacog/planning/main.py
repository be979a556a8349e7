"""`launch/plan.py`: what a run needs on a cluster, before it is queued."""

from __future__ import annotations

import argparse
import re
from collections.abc import Sequence
from pathlib import Path

from megacog.config.cluster import ClusterConfig
from megacog.config.load import load_config
from megacog.config.schema import Config
from megacog.errors import EXIT_CONFIG, EXIT_DONE, ConfigError
from megacog.planning.cluster import Assumptions, Cluster, find_device
from megacog.planning.plan import Plan, plan
from megacog.planning.report import describe, weak_scaling


def main(argv: Sequence[str] | None = None) -> int:
    """Print a plan; 0 if the run fits, 75 if it does not fit or divide."""
    arguments = parse_arguments(argv)
    config = load_config(arguments.config, arguments.overrides)
    per_node, memory = _gpus(arguments.gpus, config.cluster)
    device = find_device(arguments.device, memory, config.train.precision)
    nodes = arguments.nodes or config.cluster.nodes or 1
    cluster = Cluster(device, per_node, nodes, Assumptions().changed(arguments.assume))
    if arguments.weak_scaling is not None:
        return _print_scaling(config, cluster, arguments.weak_scaling)
    found = plan(config, cluster)
    print(found.model_dump_json(indent=2) if arguments.json else describe(found, config, cluster))
    return EXIT_DONE if found.fits else EXIT_CONFIG


def parse_arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="plan.py", description="What a run needs on a cluster: memory, communication, time. Starts nothing.",
        epilog="`plan.py check` compares planned with measured memory. Any key of the configuration can be overridden.",
    )  # fmt: skip
    parser.add_argument("--config", required=True, type=Path, help="YAML file of the run")
    parser.add_argument(
        "--gpus", metavar="NxGIB", help="GPUs per node and memory of each: 8x80; default: those of the cluster section"
    )
    parser.add_argument("--nodes", type=positive, help="default: cluster.nodes, or 1")
    parser.add_argument("--device", help="H100, H200, A100, ..., or cpu; default: by memory (80 GiB: H100)")
    parser.add_argument("--assume", action="append", default=[], metavar="NAME=VALUE", help="change an assumption")
    parser.add_argument("--json", action="store_true", help="print the plan as JSON")
    parser.add_argument(
        "--weak-scaling", type=_sizes, metavar="GPUS,...", help="a table of as much work per GPU on other worlds"
    )
    parser.add_argument("overrides", nargs="*", default=[], metavar="key=value")
    return parser.parse_args(argv)


def positive(text: str) -> int:
    """A number of things of a command line."""
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError(f"{number} is not positive")
    return number


def _sizes(text: str) -> list[int]:
    return [positive(size) for size in text.split(",")]


def _gpus(text: str | None, cluster: ClusterConfig) -> tuple[int, float]:
    if text is None:
        if not cluster.gpus_per_node or cluster.gpu_memory_gib is None:
            raise ConfigError("say --gpus 8x80, or set cluster.gpus_per_node and cluster.gpu_memory_gib")
        return cluster.gpus_per_node, cluster.gpu_memory_gib
    found = re.fullmatch(r"([1-9]\d*)x(\d+(?:\.\d+)?)", text)
    if found is None or float(found[2]) <= 0:
        raise ConfigError(f"--gpus {text}: expected GPUs per node x GiB of each, such as 8x80")
    return int(found[1]), float(found[2])


def _print_scaling(config: Config, cluster: Cluster, worlds: Sequence[int]) -> int:
    own = plan(config, cluster, (), suggest=False)
    if own.seconds is None:
        raise ConfigError("--weak-scaling needs a device whose peak is known")
    plans = [_scaled(config, cluster, own, world) for world in worlds]
    for line in weak_scaling(plans, plans[0], config.train.micro_batch_size):
        print(line)
    return EXIT_DONE if all(each.fits for each in plans) else EXIT_CONFIG


def _scaled(config: Config, cluster: Cluster, own: Plan, world: int) -> Plan:
    """The plan of as many micro batches per rank on `world` ranks."""
    resized = cluster.resized(world)
    per_step = config.train.micro_batch_size * own.accumulation
    train = config.train.model_copy(update={"global_batch_size": per_step * world * own.data_size // own.world})
    return plan(config.model_copy(update={"train": train}), resized, (), suggest=False)
