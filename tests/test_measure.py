"""Time, memory and origin of a figure."""

import subprocess
import time

import pytest
import torch

from statex import measure


def test_a_stopwatch_counts_seconds():
    watch = measure.Stopwatch()
    time.sleep(0.02)
    first = watch.seconds()
    assert 0.02 <= first <= watch.seconds()


def test_functions_are_timed_in_turn():
    calls = []

    def slow():
        calls.append("slow")
        time.sleep(0.004)

    times = measure.time_functions([slow, lambda: calls.append("quick")], "cpu", repetitions=5, warmup=2)
    assert calls == ["slow", "quick"] * 7
    assert times[0] >= 0.004
    assert times[1] < times[0]


def test_peak_memory_is_in_bytes_and_grows():
    before = measure.peak_memory("cpu")
    block = torch.ones(8 * 2**20)  # 32 MiB
    assert block.sum() > 0
    assert 2**26 < before <= measure.peak_memory("cpu") < 2**40
    measure.reset_peak_memory("cpu")  # does nothing there, and does not fail


def test_the_device_has_a_name_and_its_threads():
    name = measure.device_name("cpu")
    threads = torch.get_num_threads()
    assert name.endswith(f", {threads} thread" + ("s" if threads > 1 else ""))
    assert len(name) > len(", 1 thread")


def git(folder, *arguments):
    identity = ("-c", "user.name=x", "-c", "user.email=x@example.com", "-c", "commit.gpgsign=false")
    subprocess.run(["git", "-C", str(folder), *identity, *arguments], check=True, capture_output=True)


@pytest.mark.parametrize("tracked", [True, False])
def test_the_commit_is_that_of_our_own_sources(tmp_path, monkeypatch, tracked):
    """Not that of a repository of the user's in which the package happens to be installed."""
    source = tmp_path / "site" / "statex" / "measure.py"
    source.parent.mkdir(parents=True)
    source.write_text("x = 1\n")
    (tmp_path / "other.txt").write_text("x")
    git(tmp_path, "init")
    git(tmp_path, "add", "." if tracked else "other.txt")
    git(tmp_path, "commit", "-m", "x")
    monkeypatch.setattr(measure, "__file__", str(source))
    found = measure.source_commit()
    if tracked:
        assert len(found) == 12
        source.write_text("x = 2\n")
        assert measure.source_commit() == found + "+changes"
    else:
        assert found == f"statex {measure.package_version('statex')}"


def test_without_git_the_version_is_told(tmp_path, monkeypatch):
    monkeypatch.setattr(measure, "__file__", str(tmp_path / "measure.py"))
    assert measure.source_commit() == f"statex {measure.package_version('statex')}"
    monkeypatch.setenv("PATH", str(tmp_path))
    assert measure.source_commit() == f"statex {measure.package_version('statex')}"


def test_versions():
    versions = measure.versions()
    assert versions["torch"].startswith(torch.__version__.split("+")[0])
    assert measure.package_version("no-such-package") == "not installed"
    assert {"python", "statex", "torch", "transformers"} <= versions.keys()
