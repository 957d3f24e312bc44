"""The expanded classes of a family, made of transformers' own."""

import pickle
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, Mamba2Config, Mamba2ForCausalLM

import statex
from common import make_gla, make_mamba2
from statex.families import FAMILIES
from statex.models import factory
from statex.models.gla.configuration import GLAConfig
from statex.models.gla.modeling import GLAForCausalLM, GLAModel

SHIMS = Path(__file__).parent.parent / "fixtures" / "plans"


def test_they_are_made_once_and_found_by_name():
    config_class = factory.expanded_config_class(FAMILIES["mamba2"])
    classes = factory.expanded_model_classes(FAMILIES["mamba2"])
    assert issubclass(config_class, Mamba2Config)
    assert issubclass(classes.causal_lm, Mamba2ForCausalLM)
    assert classes.causal_lm.config_class is classes.model.config_class is config_class
    for one in (config_class, *classes, *classes.model.exchanged.values()):
        assert getattr(factory, one.__name__) is one
        assert pickle.loads(pickle.dumps(one)) is one
    with pytest.raises(AttributeError, match="StatexMamba3Config"):
        _ = factory.StatexMamba3Config
    assert not hasattr(factory, "StatexXLSTMForCausalLM")


def test_a_family_of_our_own_classes_has_nothing_made():
    assert factory.expanded_config_class(FAMILIES["statex_gla"]) is GLAConfig
    assert factory.expanded_model_classes(FAMILIES["statex_gla"]) == (GLAModel, GLAForCausalLM)


@pytest.mark.parametrize("make", [make_gla, make_mamba2])
def test_an_expanded_model_can_be_pickled(make):
    model = make()
    statex.expand(model, every=1, factor=2)
    copied = pickle.loads(pickle.dumps(model))
    assert type(copied) is type(model)
    assert all(torch.equal(a, b) for a, b in zip(copied.parameters(), model.parameters(), strict=True))


@pytest.mark.parametrize(("name", "make"), [("gla", make_gla), ("mamba2", make_mamba2)])
def test_the_shims_of_folders_of_the_first_version_lead_to_the_same_classes(name, make, tmp_path):
    model, found = make(), {}
    statex.expand(model, every=1, factor=2)
    shim = (SHIMS / f"shim-{name}.txt").read_text()
    exec(shim, found)
    ours = {type(one).__name__: type(one) for one in (model, model.base_model, model.config)}
    assert {each: found[each] for each in found["__all__"]} == ours
    model.save_pretrained(tmp_path)
    (tmp_path / "modeling_statex.py").write_text(shim)
    assert type(AutoModelForCausalLM.from_pretrained(tmp_path, trust_remote_code=True)) is type(model)
