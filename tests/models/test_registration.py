"""Our configurations in transformers' Auto classes, whoever is imported first, and nothing else of them changed."""

import subprocess
import sys

from transformers import AutoConfig, AutoModelForCausalLM

import statex  # noqa: F401 (registers)
from statex.models.configuration_mamba2 import StatexMamba2Config
from statex.models.gla.configuration import GLAConfig
from statex.models.gla.modeling import GLAForCausalLM
from statex.models.mamba2 import StatexMamba2ForCausalLM

ORDERS = [  # each begins in the middle of a circle of imports; tests/test_imports.py begins with transformers
    "import statex; from transformers import Mamba2Config",
    "from statex.models.configuration_mamba2 import StatexMamba2Config",
    "from statex.models.gla.modeling import GLAForCausalLM",
]

CHECK = """
import os, sys
import torch  # what all orders share is imported once, then each order has a process of its own

def check(order):
    exec(order)
    from transformers import CONFIG_MAPPING
    for name in ("statex_gla", "statex_mamba2"):
        assert CONFIG_MAPPING[name].__module__.startswith("statex."), name
    if "statex.models" not in order:
        assert "statex.models.gla.modeling" not in sys.modules, "a model class before its configuration was built"

for order in sys.argv[1:]:
    child = os.fork()
    if child == 0:
        try:
            check(order)
            print(order, "works", flush=True)
        finally:
            os._exit(0)
    os.waitpid(child, 0)
"""


def test_the_order_of_imports_does_not_matter():
    command = [sys.executable, "-c", CHECK, *ORDERS]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.stdout.splitlines() == [f"{order} works" for order in ORDERS], done.stderr[-2000:]


def test_the_auto_classes_give_ours():
    for name, config_class, model_class in (
        ("statex_gla", GLAConfig, GLAForCausalLM),
        ("statex_mamba2", StatexMamba2Config, StatexMamba2ForCausalLM),
    ):
        config = AutoConfig.for_model(name, num_hidden_layers=1)
        assert type(config) is config_class
        assert AutoModelForCausalLM._model_mapping[type(config)] is model_class
