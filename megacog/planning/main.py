"""`launch/plan.py`: what a run needs on a cluster, before it is queued."""

from __future__ import annotations

import argparse
import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from megacog.config.cluster import ClusterConfig
from megacog.config.load import load_config
from megacog.config.schema import Config
from megacog.errors import EXIT_CONFIG, EXIT_DONE, ConfigError
from megacog.planning.cluster import Assumptions, Cluster, find_device

if TYPE_CHECKING:
    from megacog.planning.plan import Plan


def main(argv: Sequence[str] | None = None) -> int:
    """Print a plan; 0 if the run fits, 75 if it does not fit or divide."""
    arguments = parse_arguments(argv)
    gpus = _gpus(arguments.gpus) if arguments.gpus is not None else None
    assumptions = Assumptions().changed(arguments.assume)
    config = load_config(arguments.config, arguments.overrides)
    per_node, memory = gpus or _own_gpus(config.cluster)
    device = find_device(arguments.device, memory, config.train.precision)
    nodes = arguments.nodes or config.cluster.nodes or 1
    cluster = Cluster(device, per_node, nodes, assumptions)

    from megacog.planning.plan import plan  # with torch, which takes seconds: what was asked is checked by now
    from megacog.planning.report import describe

    if arguments.weak_scaling is not None:
        return _print_scaling(config, cluster, arguments.weak_scaling, arguments.json)
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
        "--gpus", metavar="NxGIB", help="GPUs per node and memory of each as it is sold: 8x80; default: the cluster's"
    )
    parser.add_argument("--nodes", type=positive, help="default: cluster.nodes, or 1")
    parser.add_argument("--device", help="H100, H200, A100, ..., or cpu; default: by memory (80 GiB: H100)")
    parser.add_argument("--assume", action="append", default=[], metavar="NAME=VALUE", help="change an assumption")
    parser.add_argument("--json", action="store_true", help="print the plan, or those of the table, as JSON")
    parser.add_argument(
        "--weak-scaling", type=_sizes, metavar="GPUS,...", help="a table of as much work per GPU on other worlds"
    )
    parser.add_argument("overrides", nargs="*", default=[], metavar="key=value")
    return parser.parse_args(argv)


def positive(text: str) -> int:
    """A number of things of a command line."""
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is no whole number above 0")
    return int(text)


def _sizes(text: str) -> list[int]:
    return [positive(size) for size in text.split(",")]


def _gpus(text: str) -> tuple[int, float]:
    found = re.fullmatch(r"([1-9]\d*)x(\d+(?:\.\d+)?)", text)
    if found is None or float(found[2]) <= 0:
        raise ConfigError(f"--gpus {text}: expected GPUs per node x GiB of each, such as 8x80")
    return int(found[1]), float(found[2])


def _own_gpus(cluster: ClusterConfig) -> tuple[int, float]:
    if not cluster.gpus_per_node or cluster.gpu_memory_gib is None:
        raise ConfigError("say --gpus 8x80, or set cluster.gpus_per_node and cluster.gpu_memory_gib")
    return cluster.gpus_per_node, cluster.gpu_memory_gib


def _print_scaling(config: Config, cluster: Cluster, worlds: Sequence[int], as_json: bool) -> int:
    from megacog.planning.plan import plan
    from megacog.planning.report import weak_scaling

    own = plan(config, cluster, (), suggest=False)
    if own.seconds is None:
        raise ConfigError("--weak-scaling needs a device whose peak is known")
    plans = [_scaled(config, cluster, own, world) for world in worlds]
    if as_json:
        print(json.dumps([each.model_dump(mode="json") for each in plans], indent=2))
    else:
        print("\n".join(weak_scaling(plans, plans[0], config.train.micro_batch_size)))
    return EXIT_DONE if all(each.fits for each in plans) else EXIT_CONFIG


def _scaled(config: Config, cluster: Cluster, own: Plan, world: int) -> Plan:
    """The plan of as many micro batches per rank on `world` ranks."""
    from megacog.planning.plan import plan

    resized = cluster.resized(world)
    per_step = config.train.micro_batch_size * own.accumulation
    train = config.train.model_copy(update={"global_batch_size": per_step * world * own.data_size // own.world})
    return plan(config.model_copy(update={"train": train}), resized, (), suggest=False)
