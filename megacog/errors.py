"""The errors that a user can mend, and the exit codes that go with them.

Every message says what is wrong, where, why it matters and how to mend it. Launchers print the
message without a traceback (see `megacog.runtime.cli`).
"""

from __future__ import annotations

EXIT_DONE = 0
EXIT_FAULT = 1
EXIT_CONFIG = 75
EXIT_PREEMPTED = 85


class MegacogError(Exception):
    """Base of all errors caused by input, configuration or environment rather than by a bug."""

    exit_code = EXIT_FAULT
    told = False
    """Whether another rank says it: then this one leaves without a word."""


class ConfigError(MegacogError):
    """A configuration value is unknown, ill-typed or contradicts another one."""

    exit_code = EXIT_CONFIG


class DataError(MegacogError):
    """A shard, video, caption or prompt is missing, damaged or does not fit the model."""


class CheckpointError(MegacogError):
    """A checkpoint or export is missing, incomplete, damaged or belongs to another run."""


class EnvError(MegacogError):
    """The machine lacks something: a package, a device, disk space, another rank."""
