"""The operations on slices of one sequence in several ranks compute what one rank does."""

import sliced

from commands import run


def test_slices_compute_what_the_whole_does(tmp_path):
    """Four ranks; two train in tests/training/test_training_on_slices.py."""
    done = run(sliced.main, 4, tmp_path)
    assert done.returncode == 0, done.stderr
