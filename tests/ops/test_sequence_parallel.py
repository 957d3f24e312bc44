"""Operations and models on slices of one sequence in several ranks compute what one rank does."""

from functools import partial

import models_on_slices
import pytest
import sliced

from commands import run


@pytest.mark.parametrize(
    "check", [sliced.check_all, partial(models_on_slices.check, "torch")], ids=["operations", "models"]
)
def test_slices_compute_what_the_whole_does(check, tmp_path):
    """Four ranks; two train in tests/training/test_training_on_slices.py."""
    done = run(sliced.main, 4, tmp_path, check)
    assert done.returncode == 0, done.stderr
