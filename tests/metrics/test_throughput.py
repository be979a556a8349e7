from __future__ import annotations

import pytest

from megacog.metrics.throughput import Throughput


class Clock:
    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


def test_speeds_follow_from_samples_and_seconds() -> None:
    clock = Clock()
    throughput = Throughput(10**12, 15 * 10**11, 1000, world_size=4, peak_tflops=2.0, clock=clock)
    with throughput.waiting():
        clock.now += 1.0
    clock.now += 3.0
    speed = throughput.step(num_samples=8)
    assert speed.seconds == 4.0
    assert speed.tokens_per_second == 2000.0
    assert speed.tflops == pytest.approx(0.5)
    assert speed.hardware_tflops == pytest.approx(0.75)
    assert (speed.mfu, speed.hfu) == pytest.approx((0.25, 0.375))
    assert speed.data_wait == pytest.approx(0.25)


def test_an_unknown_peak_gives_no_mfu() -> None:
    clock = Clock()
    throughput = Throughput(10**12, 15 * 10**11, 1000, world_size=1, peak_tflops=None, clock=clock)
    clock.now += 1.0
    speed = throughput.step(1)
    assert speed.mfu is None and speed.hfu is None and speed.hardware_tflops == 1.5


def test_steps_are_measured_one_by_one_and_restart_forgets_the_time_between() -> None:
    clock = Clock()
    throughput = Throughput(1, 1, 1, world_size=1, peak_tflops=None, clock=clock)
    clock.now += 1.0
    throughput.step(1)
    clock.now += 50.0
    throughput.restart()
    clock.now += 2.0
    speed = throughput.step(1)
    assert (speed.seconds, speed.data_wait) == (2.0, 0.0)


def test_waiting_counts_also_when_the_block_fails() -> None:
    clock = Clock()
    throughput = Throughput(1, 1, 1, world_size=1, peak_tflops=None, clock=clock)
    with pytest.raises(StopIteration), throughput.waiting():
        clock.now += 2.0
        raise StopIteration
    assert throughput.step(1).data_wait == 1.0
