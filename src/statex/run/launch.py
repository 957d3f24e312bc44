"""The processes of a run: those that torchrun started, the workers that share its chains, and signals that stop it."""

import gc
import heapq
import multiprocessing
import os
import queue
import signal
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

ProgressCallback = Callable[[str, str, int, int], None]
"""Called with chain, stage, done, total."""

KEEP_FREED_MEMORY = {  # glibc would give each step's tensors back and zero them again: up to a quarter of a step
    "MALLOC_MMAP_THRESHOLD_": "1073741824",
    "MALLOC_TRIM_THRESHOLD_": "4294967296",
    "MALLOC_TOP_PAD_": "67108864",
}


def world_size() -> int:
    """How many processes torchrun has started; 1 without it."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def is_main_process() -> bool:
    """Whether this is the process that writes and reports."""
    return int(os.environ.get("RANK", "0")) == 0


def main_process_first() -> AbstractContextManager:
    """Inside this context, the others wait for the main process."""
    if world_size() == 1:
        return nullcontext()
    import torch
    from accelerate import PartialState

    # Told nothing, accelerate takes processes without a GPU for strangers, and none waits
    return PartialState(cpu=not torch.cuda.is_available()).main_process_first()


@contextmanager
def stop_signals() -> Iterator[None]:
    """Inside this context, SIGTERM and SIGHUP stop the work as Ctrl-C does, by KeyboardInterrupt: all is cleaned up.

    A signal that is ignored stays so: `nohup` has SIGHUP ignored.
    """
    received: list[int] = []

    def stop(number: int, frame: Any) -> None:
        received.append(number)
        raise KeyboardInterrupt

    before = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGHUP)}
    for number, handler in before.items():
        if handler is signal.SIG_DFL:
            signal.signal(number, stop)
    try:
        yield
    except Exception as error:
        if received:  # what breaks as the other processes stop too
            raise KeyboardInterrupt from error
        raise
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def visible_gpus() -> list[str]:
    """The GPUs that this process sees, as CUDA_VISIBLE_DEVICES names them; counted without beginning to use any."""
    import torch

    count = torch.cuda.device_count()
    named = os.environ.get("CUDA_VISIBLE_DEVICES")
    return [name.strip() for name in named.split(",")][:count] if named else [str(number) for number in range(count)]


Call = tuple[Any, ...]
"""Arguments of one call."""
OURS = signal.SIGINT, signal.SIGHUP
"""Signals that are blocked while processes are started, which inherit that: what stops us is for us to tell them."""


def run_in_processes(
    work: Callable[..., None],
    calls: Sequence[tuple[Call, Sequence[Call]]],
    workers: int,
    threads: int,
    report: ProgressCallback,
    gpus: Sequence[str] = (),
) -> None:
    """Do `work(*call, report)` for each call, in `workers` processes of `threads` threads each.

    With each call stand those that can begin once it is done; they go before the calls behind it.

    Each process sees one of `gpus`, in turn, so that they share them evenly; where there are none, what it would see.
    At the first failure, calls not yet started are dropped; it is raised once the running ones have ended. Where this
    process is interrupted or killed, the workers end at once.
    """
    context = multiprocessing.get_context("spawn")
    others = set(multiprocessing.active_children())
    with _environment(KEEP_FREED_MEMORY | {"OMP_NUM_THREADS": str(threads)}):
        with _blocked(*OURS):
            events, places = context.Queue(), context.Queue()
            pool = ProcessPoolExecutor(workers, context, _begin_worker, (events, places))
        for number in range(workers):
            places.put(gpus[number % len(gpus)] if gpus else None)

        def submit(call: Call) -> Future:
            with _blocked(*OURS):
                return pool.submit(_work, work, call)

        with _shown(events, report), pool:
            try:
                do_in_order(calls, workers, submit)
            except KeyboardInterrupt:
                for process in set(multiprocessing.active_children()) - others:
                    process.terminate()
                raise


def do_in_order(calls: Sequence[tuple[Call, Sequence[Call]]], most: int, submit: Callable[[Call], Future]) -> None:
    """Submit the calls and those that follow them, `most` at a time, and wait until all are done; after the first
    failure submit none, and raise it."""
    waiting = [((number, 0), call, later) for number, (call, later) in enumerate(calls)]  # in order: it is a heap
    running: dict[Future, tuple[int, Sequence[Call]]] = {}
    try:
        while waiting or running:
            while waiting and len(running) < most:
                (number, _), call, later = heapq.heappop(waiting)
                running[submit(call)] = number, later
            for future in wait(running, return_when=FIRST_COMPLETED).done:
                number, later = running.pop(future)
                future.result()
                for position, call in enumerate(later, start=1):
                    heapq.heappush(waiting, ((number, position), call, ()))
    except BrokenProcessPool:
        problem = "a worker was killed, perhaps because memory ran out; the same command resumes"
        raise ChildProcessError(problem) from None


_events: Any = None
"""In a worker: where it puts what it reports."""


def _begin_worker(events: Any, places: Any) -> None:
    """Report to the parent, see the GPU that is this worker's, and end when the parent has ended."""
    global _events
    _events = events
    if (gpu := places.get()) is not None:
        os.environ["CUDA_VISIBLE_DEVICES"] = gpu  # torch reads it when it first uses a GPU
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    os._exit(1)


def _work(work: Callable[..., None], call: Call) -> None:
    work(*call, lambda *event: _events.put(event))
    if "torch" in sys.modules and sys.modules["torch"].cuda.is_initialized():
        gc.collect()
        sys.modules["torch"].cuda.empty_cache()  # for the others, which may have the same GPU


@contextmanager
def _shown(events: Any, report: ProgressCallback) -> Iterator[None]:
    """Inside this context, what workers report is shown."""
    stop = threading.Event()

    def show() -> None:
        while not (stop.is_set() and events.empty()):
            try:
                report(*events.get(timeout=0.2))
            except queue.Empty:
                continue

    reader = threading.Thread(target=show, daemon=True)
    reader.start()
    try:
        yield
    finally:
        stop.set()
        reader.join()


@contextmanager
def _blocked(*signals: signal.Signals) -> Iterator[None]:
    """Inside this context, these signals wait."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, signals)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


@contextmanager
def _environment(variables: dict[str, str]) -> Iterator[None]:
    """Inside this context, new processes get these environment variables, unless the user has set them."""
    added = {name: value for name, value in variables.items() if name not in os.environ}
    os.environ.update(added)
    try:
        yield
    finally:
        for name in added:
            del os.environ[name]
