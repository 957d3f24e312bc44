"""Whole models, unchanged, on slices of one sequence in two ranks compute what they do on one."""

import os
import subprocess
import sys
from pathlib import Path


def test_models_on_slices_compute_what_they_do_on_the_whole(tmp_path):
    done = subprocess.run(
        [sys.executable, str(Path(__file__).with_name("sliced_models.py")), str(tmp_path)],
        capture_output=True,
        text=True,
        timeout=240,
        env=os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, sys.path)), "OMP_NUM_THREADS": "1"},
    )
    assert done.returncode == 0, done.stderr
