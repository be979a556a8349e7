"""heartbeat.json and heartbeat.log on disks that are slow."""

from __future__ import annotations

import threading
from pathlib import Path

import pytest

from megacog.runtime.hub import Beat, Hub
from megacog.runtime.hub_status import StatusFile


def test_the_reason_of_the_end_waits_for_a_status_that_is_being_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    hub = Hub(1, 8.0, 0.0)
    hub.join(0, "node", 1, 0.0)
    hub.hear(0, 0.0, Beat(3, 1, "forward", 300.0, 0.0))
    status, free, replace = StatusFile(tmp_path, hub), threading.Event(), StatusFile._replace

    def slow(self: StatusFile, text: str) -> None:
        free.wait(60)
        replace(self, text)

    monkeypatch.setattr(StatusFile, "_replace", slow)
    monkeypatch.setattr("megacog.runtime.hub_status._CLOSE_SECONDS", 60.0)
    status.write(100.0)
    status.write(200.0)  # left out: the disk is busy
    status.report("rank 0 is stuck", {0: "in sit_here"})
    free.set()
    status.close()
    assert "rank 0 is stuck" in (tmp_path / "heartbeat.log").read_text()
    assert (tmp_path / "heartbeat.json").exists()
