"""A run that cannot fit is refused before anything is built."""

from __future__ import annotations

from megacog.config.schema import Config
from megacog.errors import ConfigError
from megacog.planning.cluster import Cluster
from megacog.planning.plan import plan
from megacog.planning.report import refusal
from megacog.runtime.log import SHARED, get_logger

log = get_logger(__name__)


def require_memory(config: Config, cluster: Cluster, suggest: bool = True) -> None:
    """Compare the plan with the memory of the devices; with `train.memory_check` false it only warns.

    Args:
        config: The run.
        cluster: Where it runs.
        suggest: Look for what would fit, which takes a while: one of many ranks is enough.

    Raises:
        ConfigError: The run cannot fit; the message has the planner's numbers and what would fit.
    """
    found = plan(config, cluster, (), suggest and config.train.memory_check)
    if found.fits:
        return
    message = refusal(found, config, cluster.device.gpu)
    if config.train.memory_check:
        raise ConfigError(f"{message}\nTo try all the same: train.memory_check=false")
    log.warning("%s", message, extra=SHARED)
