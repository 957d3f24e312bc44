"""Our configurations and models in transformers' Auto classes (tests/test_imports.py: nothing else of them changes)."""

import subprocess
import sys

from transformers import AutoConfig, AutoModelForCausalLM

import statex  # noqa: F401 (registers)
from statex.models.configuration_mamba2 import StatexMamba2Config
from statex.models.gla.configuration import GLAConfig
from statex.models.gla.modeling import GLAForCausalLM
from statex.models.mamba2 import StatexMamba2ForCausalLM

STATEX_FIRST = """
import sys
from statex.models.configuration_mamba2 import StatexMamba2Config
from transformers import CONFIG_MAPPING, AutoConfig, AutoModelForCausalLM
assert "statex.models.gla.modeling" not in sys.modules, "a model class before its configuration was built"
for name in ("statex_gla", "statex_mamba2"):
    config = AutoConfig.for_model(name, num_hidden_layers=1)
    assert type(config).__module__.startswith("statex."), name
    assert type(config) in AutoModelForCausalLM._model_mapping, name
print("registered")
"""


def test_statex_may_be_imported_before_transformers():
    done = subprocess.run([sys.executable, "-c", STATEX_FIRST], capture_output=True, text=True, timeout=300)
    assert done.stdout.strip() == "registered", done.stderr[-2000:]


def test_the_auto_classes_give_ours():
    for name, config_class, model_class in (
        ("statex_gla", GLAConfig, GLAForCausalLM),
        ("statex_mamba2", StatexMamba2Config, StatexMamba2ForCausalLM),
    ):
        config = AutoConfig.for_model(name, num_hidden_layers=1)
        assert type(config) is config_class
        assert AutoModelForCausalLM._model_mapping[type(config)] is model_class
