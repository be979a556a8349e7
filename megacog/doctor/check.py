"""What a check says, and how checks are shown."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import asdict, dataclass
from typing import Any, Literal

Verdict = Literal["ok", "warning", "sick"]
_COLORS: dict[Verdict, str] = {"ok": "32", "warning": "33", "sick": "31"}


@dataclass(frozen=True)
class Check:
    """One fact about a machine and what it means for a run."""

    name: str
    verdict: Verdict
    """ok; warning: a run works, but slower or not everywhere; sick: a run fails or holds all others up."""
    value: str
    fix: str = ""
    """What to do, in one line; empty when ok."""

    @property
    def sick(self) -> bool:
        return self.verdict == "sick"


Nodes = dict[str, list[Check]]
"""The checks of every node, by its name."""


def table(checks: Iterable[Check], color: bool) -> str:
    """A line per check, with its fix below it where it has one."""
    checks = list(checks)
    width = max((len(check.name) for check in checks), default=0)
    lines = []
    for check in checks:
        word = f"{check.verdict:7}"
        mark = f"\033[{_COLORS[check.verdict]}m{word}\033[0m" if color else word
        lines.append(f"{mark}  {check.name:{width}}  {check.value}")
        if check.fix:
            lines.append(f"{'':7}  {'':{width}}  -> {check.fix}")
    return "\n".join(lines)


def report(nodes: Nodes) -> dict[str, Any]:
    """All checks by node, and the nodes with a sick one, as JSON values."""
    return {
        "sick": sorted(node for node, checks in nodes.items() if any(check.sick for check in checks)),
        "nodes": {node: [asdict(check) for check in checks] for node, checks in nodes.items()},
    }
