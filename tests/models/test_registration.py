"""Our configurations and models in transformers' Auto classes (tests/test_imports.py: nothing else of them changes)."""

import os
import subprocess
import sys
from runpy import run_path
from types import SimpleNamespace

import huggingface_hub
import pytest
import torch
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, modeling_utils
from transformers.utils import hub

import statex
from commands import run
from common import EXPANDED, make_gla, make_mamba2, tokens
from statex.models.configuration_mamba2 import StatexMamba2Config
from statex.models.gla.configuration import GLAConfig
from statex.models.gla.modeling import GLAForCausalLM
from statex.models.mamba2 import StatexMamba2ForCausalLM

STATEX_FIRST = """
import sys
from statex.models.configuration_mamba2 import StatexMamba2Config
from transformers import CONFIG_MAPPING, AutoConfig, AutoModelForCausalLM
for name in ("statex_gla", "statex_mamba2"):
    config = AutoConfig.for_model(name, num_hidden_layers=1)
    assert type(config).__module__.startswith("statex."), name
    assert type(config) in AutoModelForCausalLM._model_mapping, name
model_code = {"statex.models.gla.modeling", "transformers.models.mamba2.modeling_mamba2", "transformers.modeling_utils"}
assert not model_code & set(sys.modules), "model code before a model was asked for"
assert AutoModelForCausalLM._model_mapping[type(config)].__name__ == "StatexMamba2ForCausalLM"
print("registered")
"""


def test_statex_may_be_imported_before_transformers():
    done = subprocess.run([sys.executable, "-c", STATEX_FIRST], capture_output=True, text=True, timeout=300)
    assert done.stdout.strip() == "registered", done.stderr[-2000:]


A_PROGRAM_CALLED_STATEX = """
import statex
from transformers import CONFIG_MAPPING, AutoModelForCausalLM, Mamba2Config, Mamba2ForCausalLM
assert {"statex_gla", "statex_mamba2"} <= set(CONFIG_MAPPING)
size = {"hidden_size": 16, "num_heads": 2, "head_dim": 16, "num_hidden_layers": 1, "vocab_size": 8, "n_groups": 1}
model = Mamba2ForCausalLM(Mamba2Config(**size))
statex.expand(model, every=1)
assert type(AutoModelForCausalLM.from_config(model.config)) is type(model)
print("registered")
"""


def test_ours_are_registered_whatever_the_program_is_called(tmp_path):
    program = tmp_path / "statex"  # a script of the user's; one called statex.py would hide the package
    program.write_text(A_PROGRAM_CALLED_STATEX)
    done = run(run_path, str(program), None, "__main__")
    assert done.stdout.strip() == "registered", done.stderr[-2000:]


def test_the_base_model_of_an_expanded_model(tmp_path):
    for make in (make_gla, make_mamba2):
        model = make()
        statex.expand(model, layers=[EXPANDED], factor=2, init="inherit")
        folder, alone = tmp_path / model.config.model_type, tmp_path / f"{model.config.model_type}-alone"
        model.save_pretrained(folder)
        with torch.no_grad():
            wanted = model.base_model(tokens()).last_hidden_state
            for options in ({}, {"trust_remote_code": True}):
                base = AutoModel.from_pretrained(folder, **options).eval()
                assert type(base) is type(model.base_model)
                assert torch.equal(base(tokens()).last_hidden_state, wanted)
            base.save_pretrained(alone)
            again = AutoModel.from_pretrained(alone).eval()
            assert torch.equal(again(tokens()).last_hidden_state, wanted)


@pytest.mark.parametrize("make", [make_gla, make_mamba2])
def test_the_shim_of_a_model_that_was_loaded_and_expanded_names_ours(make, tmp_path):
    make().save_pretrained(tmp_path / "plain")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "plain")
    statex.expand(model, layers=[EXPANDED], factor=2)
    assert model.config.model_type == type(model.config).model_type
    model.save_pretrained(tmp_path / "expanded")
    ours = {type(one).__name__ for one in (model, model.base_model, model.config)}
    assert {name.removeprefix("modeling_statex.") for name in model.config.auto_map.values()} == ours
    shim = run_path(str(tmp_path / "expanded" / "modeling_statex.py"))
    assert set(shim["__all__"]) == ours


@pytest.mark.parametrize("make", [make_gla, make_mamba2])
def test_the_shim_is_uploaded_with_the_rest(make, tmp_path, monkeypatch):
    model = make()
    statex.expand(model, layers=[EXPANDED], factor=2)
    uploaded = []

    def upload(self, working_dir, repo_id, files_timestamps, **kwargs):
        uploaded.append(set(os.listdir(working_dir)) - set(files_timestamps))

    def repository(*args, **kwargs):
        return SimpleNamespace(repo_id=next(arg for arg in args if isinstance(arg, str)))

    monkeypatch.setattr(huggingface_hub.HfApi, "create_repo", repository)
    for module in (modeling_utils, hub):  # of older versions
        monkeypatch.setattr(module, "create_repo", repository, raising=False)
    for owner in (type(model), type(model.config)):
        monkeypatch.setattr(owner, "_upload_modified_files", upload)
    model.save_pretrained(tmp_path / "model", push_to_hub=True)
    model.config.save_pretrained(tmp_path / "config", push_to_hub=True)
    (with_model, with_config) = uploaded
    assert {"config.json", "model.safetensors", "modeling_statex.py"} <= with_model
    assert {"config.json", "modeling_statex.py"} <= with_config


def test_the_auto_classes_give_ours():
    for name, config_class, model_class in (
        ("statex_gla", GLAConfig, GLAForCausalLM),
        ("statex_mamba2", StatexMamba2Config, StatexMamba2ForCausalLM),
    ):
        config = AutoConfig.for_model(name, num_hidden_layers=1)
        assert type(config) is config_class
        assert AutoModelForCausalLM._model_mapping[type(config)] is model_class


FLA = """
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel

def registered(model_type, name):
    config = type(f"{name}Config", (PreTrainedConfig,), {"model_type": model_type, "__module__": __name__})
    model = type(f"{name}ForCausalLM", (PreTrainedModel,), {"config_class": config, "__module__": __name__})
    AutoConfig.register(model_type, config, exist_ok=True)
    AutoModelForCausalLM.register(config, model, exist_ok=True)
    return config

MambaConfig, Mamba2Config, ABCConfig = (registered(name.lower(), name) for name in ("Mamba", "Mamba2", "ABC"))
"""
USES_OF_MAMBA = """
import sys
import statex
from statex.models.scratch import make_model
from transformers import AutoConfig, AutoModelForCausalLM, Mamba2ForCausalLM, MambaForCausalLM
import fla.models

class Tokenizer:
    bos_token_id, eos_token_id, pad_token_id = 0, 1, 2
    def __len__(self):
        return 8

sizes = {"hidden_size": 16, "num_hidden_layers": 1, "state_size": 4}
for expected, fields in ((MambaForCausalLM, {}), (Mamba2ForCausalLM, {"num_heads": 4, "head_dim": 8, "n_groups": 1})):
    name = expected.config_class.model_type
    assert "fla.models" in sys.modules
    model = make_model(name, sizes | fields, Tokenizer())
    model.save_pretrained(name)
    auto = AutoModelForCausalLM
    loaded = statex.load(name), auto.from_pretrained(name), auto.from_config(model.config)
    assert {type(each) for each in (model, *loaded)} == {expected}, name
    assert statex.inspect(name).model_type == name
    assert AutoConfig.for_model(f"statex_{name}").base_model_type == name
for config in (fla.models.Mamba2Config, fla.models.ABCConfig):
    assert AutoModelForCausalLM._model_mapping[config].__module__ == "fla.models"
assert AutoConfig.for_model("abc").__module__ == "fla.models"
print("unchanged")
"""


@pytest.mark.parametrize(
    "imports",
    ["import fla, statex", "import statex, fla", "import statex, transformers.models.qwen3_next.modeling_qwen3_next"],
    ids=["fla first", "statex first", "by transformers"],
)
def test_transformers_keeps_its_own_model_types_when_fla_is_imported(imports, tmp_path):
    (tmp_path / "fla" / "models").mkdir(parents=True)
    (tmp_path / "fla" / "__init__.py").write_text("import fla.models")
    (tmp_path / "fla" / "models" / "__init__.py").write_text(FLA)
    program = tmp_path / "program.py"
    program.write_text(imports + USES_OF_MAMBA)
    done = run(run_path, str(program), None, "__main__", path=[tmp_path], cwd=tmp_path)
    assert done.stdout.strip() == "unchanged", done.stderr[-2000:]
