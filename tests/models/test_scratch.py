"""Models made from scratch by a recipe's fields: what they can learn with depends on their first weights."""

import pytest
import torch
import torch.nn.functional as F

import delta_models
import statex
from common import HYBRIDS, VOCABULARY
from statex.families import FAMILIES
from statex.models.scratch import make_model
from tiny_recipe import CONFIGS

SIZES = {"hidden_size": 32}
ATTENTION = {"num_attention_heads": 2, "intermediate_size": 32}
FIELDS = {"mamba2": CONFIGS["mamba2"]}
FIELDS |= {
    name: SIZES | ({} if "mamba" in name else ATTENTION) | fields | next(iter(each.values()))
    for name, (fields, each) in HYBRIDS.items()
}
GIVEN = ("vocab_size", "pad_token_id", "eos_token_id")
FIELDS |= {
    name: {field: value for field, value in (delta_models.SIZES | own).items() if field not in GIVEN}
    for name, (_, _, own) in delta_models.MODELS.items()
}


class StandIn:
    """A tokenizer as far as a configuration goes."""

    bos_token_id = eos_token_id = pad_token_id = 0

    def __len__(self):
        return VOCABULARY


def time_steps(mixer):
    """The steps of a mixer whose input says nothing of them."""
    (bias,) = (each for name, each in mixer.named_parameters() if name in ("dt_bias", "dt_proj.bias"))
    return F.softplus(bias.detach())


@pytest.mark.parametrize("name", FIELDS)
def test_the_state_of_a_fresh_model_lasts(name):
    """Its heads, or channels, have time steps from 0.001 to 0.1, as their papers': with 1.3 nearly nothing is kept."""
    torch.manual_seed(0)
    model, family = make_model(name, FIELDS[name], StandIn()), FAMILIES[name]
    for index in family.recurrent_layers(model.config):
        steps = time_steps(model.get_submodule(family.mixer_name(model.config, index)))
        assert 0.99e-3 < steps.min() <= steps.max() < 1.01e-1
        assert steps.unique().numel() == steps.numel()


@pytest.mark.parametrize("name", [name for name in FIELDS if name == "mamba2" or name in HYBRIDS])
def test_the_filters_of_a_fresh_mamba_pass_their_input(name):
    """As PyTorch makes them, whatever `initializer_range`: what is read is a product of three things they pass."""
    torch.manual_seed(0)
    model, family = make_model(name, FIELDS[name], StandIn()), FAMILIES[name]
    assert model.config.initializer_range < 0.2
    for index in family.recurrent_layers(model.config):
        convolution = model.get_submodule(family.mixer_name(model.config, index)).conv1d
        assert convolution.weight.detach().std() == pytest.approx(0.5 / 3**0.5, rel=0.2)  # uniform from -0.5 to 0.5
        assert convolution.bias is None or not convolution.bias.detach().any()


@pytest.mark.parametrize("name", ["qwen3_next", "qwen3_5_text", "olmo_hybrid"])
def test_the_state_of_merged_heads_lasts(name):
    """Merged heads have none of the old ones' time steps to keep."""
    model = delta_models.make_delta(name)
    statex.expand(model, layers=[0], init="reinit", method="merge", factor=2)
    steps = time_steps(model.model.layers[0].linear_attn)
    assert steps.shape == (2,)
    assert 0.99e-3 < steps.min() <= steps.max() < 1.01e-1
