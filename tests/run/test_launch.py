"""Worker processes: what they report, how failures reach their parent, and that none outlives it."""

import os
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor

import pytest

from statex.run import launch
from trials import signals
from trials.common import end_all, processes, start, wait_until

WORK = """
import importlib.util, sys, time

spec = importlib.util.spec_from_file_location("launch", sys.argv[1])  # alone: importing statex takes seconds
launch = importlib.util.module_from_spec(spec)
sys.modules["launch"] = launch
spec.loader.exec_module(launch)

def work(name, report):
    report(name, "begun", 0, 1)
    time.sleep(60)

if __name__ == "__main__":
    try:
        with launch.stop_signals():
            show = lambda *event: print(*event, file=sys.stderr, flush=True)
            calls = [((name,), []) for name in "abc"]
            launch.run_in_processes(work, calls, 2, 1, show)
    except KeyboardInterrupt:
        sys.exit(1)
"""


@pytest.mark.parametrize(
    ("number", "to_all"),
    [(signal.SIGTERM, False), (signal.SIGTERM, True), (signal.SIGHUP, True), (signal.SIGINT, True),
     (signal.SIGKILL, False)],
)  # fmt: skip
def test_no_worker_outlives_its_parent(tmp_path, number, to_all):
    (tmp_path / "work.py").write_text(WORK)
    process, mark = start([sys.executable], tmp_path / "work.py", launch.__file__)
    try:
        assert [process.stderr.readline() for _ in range(2)] != ["", ""]  # both workers are at work
        assert len(processes(mark)) >= 3
        os.killpg(process.pid, number) if to_all else os.kill(process.pid, number)
        errors = process.communicate(timeout=30)[1]
        assert wait_until(lambda: not processes(mark), 10)
        assert process.returncode == (-number if number == signal.SIGKILL else 1)
        assert "c begun" not in errors
        assert "Traceback" not in errors
    finally:
        end_all(mark)


@pytest.mark.slow
def test_training_under_torchrun_that_a_signal_stops(tmp_path):
    assert signals.stopped("SIGTERM, torchrun", tmp_path) == []


PLACES = """
import importlib.util, os, sys, time

spec = importlib.util.spec_from_file_location("launch", sys.argv[1])
launch = importlib.util.module_from_spec(spec)
sys.modules["launch"] = launch
spec.loader.exec_module(launch)

def work(name, report):
    time.sleep(1)  # so that each worker gets one
    report(os.environ.get("CUDA_VISIBLE_DEVICES", "unset"), name, 0, 1)

if __name__ == "__main__":
    calls = [(("a",), []), (("b",), [("c",), ("d",)])]
    launch.run_in_processes(work, calls, 3, 1, lambda *event: print(*event), sys.argv[2:])
"""


@pytest.mark.parametrize(("gpus", "seen"), [(["3", "GPU-5"], {"3", "GPU-5"}), ([], {"unset"})])
def test_each_worker_sees_a_gpu_of_its_own(tmp_path, monkeypatch, gpus, seen):
    (tmp_path / "work.py").write_text(PLACES)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    command = [sys.executable, str(tmp_path / "work.py"), launch.__file__, *gpus]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    lines = [line.split() for line in done.stdout.splitlines()]
    assert {gpu for gpu, *_ in lines} == seen, done.stderr
    assert sorted(name for _, name, *_ in lines) == ["a", "b", "c", "d"]


def test_what_follows_a_call_begins_once_it_is_done_and_before_later_calls():
    begun = []

    def work(name, seconds):
        begun.append(name)
        time.sleep(seconds)

    calls = [(("slow", 0.3), [("after slow", 0)]), (("quick", 0), [("after quick", 0.6)]), (("last", 0), [])]
    with ThreadPoolExecutor(2) as pool:
        launch.do_in_order(calls, 2, lambda call: pool.submit(work, *call))
    assert begun == ["slow", "quick", "after quick", "after slow", "last"]


def test_after_a_failure_nothing_more_begins():
    begun = []

    def work(name):
        begun.append(name)
        raise FloatingPointError(name)

    with ThreadPoolExecutor(1) as pool, pytest.raises(FloatingPointError, match="first"):
        launch.do_in_order([(("first",), [("second",)]), (("third",), [])], 1, lambda call: pool.submit(work, *call))
    assert begun == ["first"]


@pytest.mark.parametrize(
    ("named", "count", "found"), [(None, 2, ["0", "1"]), ("4, 6", 2, ["4", "6"]), ("", 0, []), ("3,9", 1, ["3"])]
)
def test_gpus_are_named_as_the_environment_does(monkeypatch, named, count, found):
    monkeypatch.setattr("torch.cuda.device_count", lambda: count)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    if named is not None:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", named)
    assert launch.visible_gpus() == found
