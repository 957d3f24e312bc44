"""Adding a family takes one file (toy_family.py) and one line of a table: the behaviour matrix runs on it."""

import inspect
import json
from dataclasses import dataclass

import pytest
import test_expanded_function
import test_expanded_running
import test_packed_documents
import test_persistence
import torch
from toy_family import ToyFamily, ToyMamba2Config, ToyMamba2ForCausalLM, ToyMamba2Model
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM

import statex
from common import MAMBA2, Case, logits, make_mamba2, settled, tokens
from statex.families import FAMILIES
from statex.models.registration import register_families


@pytest.fixture(scope="module", autouse=True)
def toy():
    """The family in the table, as another line there would have it; and its architecture where transformers' are."""
    AutoConfig.register("toy_mamba2", ToyMamba2Config)
    AutoModel.register(ToyMamba2Config, ToyMamba2Model)
    AutoModelForCausalLM.register(ToyMamba2Config, ToyMamba2ForCausalLM)
    FAMILIES["toy_mamba2"] = ToyFamily()
    register_families()
    yield
    del FAMILIES["toy_mamba2"]


@dataclass(frozen=True)
class ToyCase(Case):
    """A case of Mamba2, with the same weights in the toy's classes."""

    def model(self, **changes):
        mamba2 = make_mamba2(**MAMBA2[self.configuration] | changes)
        fields = {key: value for key, value in mamba2.config.to_dict().items() if key != "model_type"}
        model = ToyMamba2ForCausalLM(ToyMamba2Config(**fields))
        model.load_state_dict(mamba2.state_dict())
        return settled(model) if model.device.type == "meta" else model.eval()


CASES = [
    ToyCase("mamba2", "2-groups", "reinit"),
    ToyCase("mamba2", "bias", "inherit", factor=3),
    ToyCase("mamba2", "no-conv-bias", "preserve"),
]


def matrix():
    """Every test of the behaviour matrix that runs over cases, with the cases that it takes."""
    for module in (test_expanded_function, test_expanded_running, test_packed_documents, test_persistence):
        for name, test in vars(module).items():
            arguments = set(inspect.signature(test).parameters) if name.startswith("test_") else set()
            if "case" in arguments and arguments <= {"case", "tmp_path"}:
                (marked,) = (mark.args[1] for mark in test.pytestmark if mark.name == "parametrize")
                inits = {(case.family, case.init) for case in marked}
                for case in CASES:
                    if ("mamba2", case.init) in inits:
                        yield pytest.param(test, case, id=f"{name}-{case}")


def test_the_matrix_is_there():
    assert len({param.values[0] for param in matrix()}) > 20


@pytest.mark.parametrize(("test", "case"), matrix())
def test_the_behaviour_matrix(test, case, tmp_path):
    given = {"case": case, "tmp_path": tmp_path}
    test(**{name: given[name] for name in inspect.signature(test).parameters})


def test_its_expansion_is_mamba2_s():
    toy, mamba2 = CASES[1], Case("mamba2", "bias", "inherit", factor=3)
    ours, theirs = toy.expanded(), mamba2.expanded()
    assert type(ours).__name__ == "StatexToyMamba2ForCausalLM"
    assert ours.config.model_type == "statex_toy_mamba2"
    assert torch.equal(logits(ours, tokens()), logits(theirs, tokens()))


def test_its_folder_is_described_and_found(tmp_path):
    CASES[0].expanded().save_pretrained(tmp_path)
    assert statex.inspect(tmp_path).model_type == "statex_toy_mamba2"
    assert json.loads((tmp_path / "config.json").read_text())["auto_map"] == {
        "AutoConfig": "modeling_statex.StatexToyMamba2Config",
        "AutoModel": "modeling_statex.StatexToyMamba2Model",
        "AutoModelForCausalLM": "modeling_statex.StatexToyMamba2ForCausalLM",
    }
