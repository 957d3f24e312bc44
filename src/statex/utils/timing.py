"""How much time and memory work takes, for training, evaluation and benchmarks."""

import resource
import statistics
import sys
import time
from collections.abc import Callable, Sequence

import torch


def synchronize(device: torch.device | str) -> None:
    """Wait until the device has finished its work."""
    if torch.device(device).type == "cuda":
        torch.cuda.synchronize(device)


class Stopwatch:
    """Seconds since it was made, with the device's work finished: `Stopwatch(device).seconds()`."""

    def __init__(self, device: torch.device | str = "cpu"):
        self.device = device
        synchronize(device)
        self.start = time.perf_counter()

    def seconds(self) -> float:
        synchronize(self.device)
        return time.perf_counter() - self.start


def time_functions(
    functions: Sequence[Callable[[], object]],
    device: torch.device | str,
    repetitions: int = 20,
    warmup: int = 3,
) -> list[float]:
    """Median seconds of each function, run alternately so that all see the same machine.

    On a CPU by the wall clock. On CUDA between two events around each call; calls are queued without waiting, as in
    training, so that launching kernels counts only where the host falls behind, that is, where it takes longer than
    running everything queued before.
    """
    device = torch.device(device)
    for _ in range(warmup):
        for function in functions:
            function()
    timed = _timed_by_events if device.type == "cuda" else _timed_by_clock
    calls = [[timed(function) for function in functions] for _ in range(repetitions)]
    synchronize(device)
    return [statistics.median(seconds() for seconds in of_function) for of_function in zip(*calls, strict=True)]


def time_replays(
    functions: Sequence[Sequence[Callable[[], object]]], repetitions: int = 12, warmup: int = 3
) -> list[float]:
    """Median seconds of one run of each function on CUDA; a function is given as the list of its runs.

    The runs of each function are replayed as one graph, and the graphs alternately. Launching is not measured, nor
    hits in the L2 cache if each run has its own data and all together exceed it.

    Raises:
        RuntimeError: one of them does something that cannot be captured.
    """
    graphs = [_captured(runs) for runs in functions]
    seconds = time_functions([graph.replay for graph in graphs], "cuda", repetitions, warmup)
    return [each / len(runs) for each, runs in zip(seconds, functions, strict=True)]


def _captured(runs: Sequence[Callable[[], object]]) -> torch.cuda.CUDAGraph:
    runs[0]()  # compiles and sets up what a capture must not
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for run in runs:
            run()
    return graph


def _timed_by_clock(function: Callable[[], object]) -> Callable[[], float]:
    """Call the function; returns a function that gives the seconds it took."""
    start = time.perf_counter()
    function()
    seconds = time.perf_counter() - start
    return lambda: seconds


def _timed_by_events(function: Callable[[], object]) -> Callable[[], float]:
    """The same on CUDA; the result may be called once the device is synchronized."""
    begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    begin.record()
    function()
    end.record()
    return lambda: begin.elapsed_time(end) / 1e3


def reset_peak_memory(device: torch.device | str) -> None:
    """Begin a new measurement of peak memory. On a CPU the peak is the process's and cannot be reset."""
    if torch.device(device).type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)


def peak_memory(device: torch.device | str) -> int:
    """Bytes at the peak: of the device's allocator on CUDA, of the whole process (resident) on a CPU."""
    if torch.device(device).type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def allocated_memory(device: torch.device | str) -> int:
    """Bytes that tensors occupy on a CUDA device now."""
    return torch.cuda.memory_allocated(device)
