"""The small world that commands are called in."""

from __future__ import annotations

from command_world import command, training, world

__all__ = ["command", "training", "world"]
