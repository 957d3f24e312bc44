"""The benchmarks as a user starts them: a process of their own, in which nothing else has made our models known."""

import json
import subprocess
import sys

import pytest


@pytest.mark.parametrize(("what", "case"), [("model", "gla-1.3b-read"), ("training", "gla-45m-2k")])
def test_a_case_of_our_own_model(what, case, monkeypatch):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    monkeypatch.setenv("TORCHDYNAMO_DISABLE", "1")  # generating code takes a minute; tests/training compiles
    command = [sys.executable, "-m", "statex", "bench", what, "--case", case, "--json"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    records = json.loads(done.stdout)
    assert {record["case"] for record in records} == {case}
    assert all(record["losses_differ"] < 1e-5 for record in records if what == "training")
