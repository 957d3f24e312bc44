"""One torch thread, no hub; without a GPU no GPU test, and Triton's kernels interpreted."""

import gc
import os

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("OMP_NUM_THREADS", "1")

from copy import deepcopy

import pytest
import torch

import tiny_recipe

SHARED = (tiny_recipe.CONFIGS, tiny_recipe.DATA, tiny_recipe.TRAINING, tiny_recipe.EVALUATION, tiny_recipe.ARMS)
AS_WRITTEN = deepcopy(SHARED)

gc.disable()  # until all is imported: walking what is only just made finds no garbage
torch.set_num_threads(1)
if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")  # read when a kernel's module is imported


def pytest_collection_finish():
    """What was imported and collected stays: Trainer collects garbage in each training, 0.4 s with all of it. And tests
    make few cycles: with Python's own thresholds looking for them takes a twentieth of the time."""
    gc.collect()
    gc.freeze()
    gc.set_threshold(20_000, 20, 20)
    gc.enable()


def pytest_collection_modifyitems(items):
    if not torch.cuda.is_available():
        for item in items:
            if item.get_closest_marker("gpu"):
                item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))


@pytest.fixture(autouse=True)
def shared_values_stay_as_written():
    """A test that changes the values of tiny_recipe fails itself, not a later one in the same process."""
    yield
    try:
        assert SHARED == AS_WRITTEN
    finally:
        for values, written in zip(SHARED, deepcopy(AS_WRITTEN), strict=True):
            values.clear()
            values.update(written)
