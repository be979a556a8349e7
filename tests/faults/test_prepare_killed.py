"""A preparation that is killed at any moment comes to the same bytes. 50 and more kills: tests/prepare_kills.py."""

from __future__ import annotations

from pathlib import Path

import pytest
from prepare_kills import kill_at_random

pytestmark = [pytest.mark.distributed, pytest.mark.timeout(600)]


def test_ten_kills_at_random_lose_no_finished_shard_and_change_no_byte(tmp_path: Path) -> None:
    record = kill_at_random(tmp_path, 10)
    assert record.kills == 10 and record.preparations >= 4
    assert len(record.victims) >= 3, "alone and under mpirun, a rank and all"
