"""The operations on slices of one sequence in several ranks compute what one rank does."""

import os
import subprocess
import sys
from pathlib import Path


def test_slices_compute_what_the_whole_does(tmp_path):
    """Four ranks; two train in tests/training/test_training_on_slices.py."""
    path = os.pathsep.join(filter(None, sys.path))
    done = subprocess.run(
        [sys.executable, str(Path(__file__).with_name("sliced.py")), "4", str(tmp_path)],
        capture_output=True,
        text=True,
        timeout=240,
        env=os.environ | {"PYTHONPATH": path, "OMP_NUM_THREADS": "1"},
    )
    assert done.returncode == 0, done.stderr
