"""A run that cannot fit is refused before anything is built."""

from __future__ import annotations

from megacog.config.schema import Config
from megacog.errors import ConfigError
from megacog.planning.cluster import Cluster
from megacog.planning.plan import plan
from megacog.planning.report import refusal
from megacog.runtime.log import get_logger

log = get_logger(__name__)


def require_memory(config: Config, cluster: Cluster) -> None:
    """Compare the plan with the memory of the devices; with `train.memory_check` false it only warns.

    Raises:
        ConfigError: The run cannot fit; the message has the planner's numbers and what would fit.
    """
    if plan(config, cluster, (), suggest=False).fits:
        return
    message = refusal(plan(config, cluster, suggest=config.train.memory_check), config, cluster.device.gpu)
    if config.train.memory_check:
        raise ConfigError(f"{message}\nTo try all the same: train.memory_check=false")
    log.warning("%s", message)
