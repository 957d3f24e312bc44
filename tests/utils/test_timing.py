"""Time and memory."""

import time

import torch

from statex.utils import timing


def test_a_stopwatch_counts_seconds():
    watch = timing.Stopwatch()
    time.sleep(0.02)
    first = watch.seconds()
    assert 0.02 <= first <= watch.seconds()


def test_functions_are_timed_in_turn():
    calls = []

    def slow():
        calls.append("slow")
        time.sleep(0.004)

    times = timing.time_functions([slow, lambda: calls.append("quick")], "cpu", repetitions=5, warmup=2)
    assert calls == ["slow", "quick"] * 7
    assert times[0] >= 0.004
    assert times[1] < times[0]


def test_peak_memory_is_in_bytes_and_grows():
    before = timing.peak_memory("cpu")
    block = torch.ones(8 * 2**20)  # 32 MiB
    assert block.sum() > 0
    assert 2**26 < before <= timing.peak_memory("cpu") < 2**40
    timing.reset_peak_memory("cpu")  # does nothing there, and does not fail
