"""Property tests: a damaged model folder is accepted and runs, or is a UserError at once, and nothing is written.

`long_run.py` beside this tries thousands, with limits on memory.
"""

import time

import model_folders
import pytest
from hypothesis import HealthCheck, example, given, settings

SECONDS = 5.0
FOLDERS: dict = {}
QUIET = list(HealthCheck)


@pytest.fixture(scope="module", autouse=True)
def folders(tmp_path_factory):
    FOLDERS.update(model_folders.make_folders(tmp_path_factory.mktemp("whole")))
    return FOLDERS


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    return tmp_path_factory.mktemp("damaged")


def check(damage, place):
    begin = time.process_time()
    model_folders.try_damage(FOLDERS, damage, place)
    assert time.process_time() - begin < SECONDS


@settings(max_examples=40, deadline=None, derandomize=True, database=None, suppress_health_check=QUIET)
@example(damage=("mamba2", [("config.json", ("num_hidden_layers",), "set", 10**9)]))
@example(damage=("expanded-gla", [("config.json", ("expansion", 0, "layers", 0, "index"), "set", 99)]))
@example(damage=("shards", [("model.safetensors.index.json", ("weight_map", "lm_head.weight"), "set", "../b")]))
@example(damage=("gla", [("model.safetensors", ("lm_head.weight", "dtype"), "set", "I32")]))
@example(damage=("gla", [("tokenizer_config.json", None, "text", ("[]", 0.0, 0))]))
@given(damage=model_folders.damages(FOLDERS))
def test_the_same_damages_every_time(damage, place):
    check(damage, place)


@settings(max_examples=20, deadline=None, database=None, print_blob=True, suppress_health_check=QUIET)
@given(damage=model_folders.damages(FOLDERS))
def test_other_damages_every_time(damage, place):
    check(damage, place)


def test_whole_folders_are_accepted(folders, place):
    for name in folders:
        assert model_folders.try_damage(folders, (name, []), place) == "accepted", name
