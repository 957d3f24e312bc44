"""What of an RWKV-7's expansion is its own; the behaviour matrix runs over RWKV7_CASES of common.py."""

import math

import pytest
import torch
from huggingface_hub.errors import StrictDataclassClassValidationError
from test_expanded_function import dead_rows, gradients_after

import statex
from common import EXPANDED, RWKV7_CASES, Case, distance, logits, make_rwkv7, mixer, tokens
from statex.families import rwkv7

OF_KEYS = {
    "r_proj.weight", "k_proj.weight", "k_k", "k_a", "r_k", "w_lora.lora.2.weight", "w_lora.lora.2.bias",
    "a_lora.lora.2.weight", "a_lora.lora.2.bias",
}  # fmt: skip


def new_rows(model, tensors, before):
    """Rows that an expansion added, by tensor: behind the old ones of each head."""
    H, K = model.config.num_heads, mixer(model).key_dim
    parts = {name: tensors[name].reshape(H, K, *tensors[name].shape[1:]) for name in OF_KEYS - {"r_k"}}
    parts["r_k"] = tensors["r_k"]
    return {name: part[:, before:].flatten(0, 1) for name, part in parts.items()}


def test_all_that_has_a_number_for_each_key_channel_grows():
    model = make_rwkv7()
    plan = statex.expand(model, layers=[EXPANDED])
    grown = {edit.name.split("attn.")[1] for edit in plan.layers[0].tensors if edit.before != edit.after}
    assert grown == OF_KEYS
    geometry = plan.layers[0].after
    assert (geometry.num_heads, geometry.key_dim, geometry.value_dim) == (4, 32, 16)


@pytest.mark.parametrize("case", [case for case in RWKV7_CASES if case.init == "preserve"], ids=str)
def test_which_new_rows_learn_when_it_is_preserved(case):
    """What reads and what removes are 0 and learn at once; all else acts through them, a step later."""
    K, model = case.model().config.head_dim, case.expanded()
    for name, gradient in new_rows(model, gradients_after(model, 0), K).items():
        assert dead_rows(gradient) == (0 if name in ("r_proj.weight", "k_k") else len(gradient)), name
    for num_steps in (1, 2):
        model = case.expanded()
        later = new_rows(model, gradients_after(model, num_steps), K)
        assert {name: dead_rows(gradient) for name, gradient in later.items()} == dict.fromkeys(OF_KEYS, 0)


@pytest.mark.parametrize("layer", [0, 1])
def test_every_row_of_a_fresh_mixer_learns_within_two_steps(layer):
    """Its low-rank projections are 0 times something at first, as RWKV-7's are when it is trained from the start."""
    for num_steps in (0, 1):
        copied = make_rwkv7()
        statex.expand(copied, layers=[layer])
        gradients_after(copied, num_steps)
        found = {name: parameter.grad for name, parameter in mixer(copied, layer).named_parameters()}
        dead = {name for name, gradient in found.items() if dead_rows(gradient)}
        later = {f"{letter}_lora.lora.2.weight" for letter in ("wa" if layer == 0 else "wav")}
        later |= {"x_w", "x_a", "x_g"}  # which act through those alone
        assert dead == (later if num_steps == 0 else set())


@pytest.mark.parametrize("configuration", ["plain", "1-head"])
def test_inherit_without_noise_keeps_the_function(configuration, monkeypatch):
    """Copies of what removes are normalised together; what reads copies of the state carries 1 / f."""
    monkeypatch.setattr(rwkv7, "INHERIT_NOISE", 0.0)
    model = Case("rwkv7", configuration, "inherit").model().double()
    before = logits(model, tokens())
    statex.expand(model, layers=[0, 1], factor=3, init="inherit")
    assert distance(logits(model, tokens()), before) < 1e-10


@pytest.mark.parametrize("layer", [0, 1])
def test_preserve_of_any_layer_and_twice(layer):
    model = make_rwkv7().double()
    before = logits(model, tokens())
    for factor in (2, 3):
        statex.expand(model, layers=[layer], factor=factor, init="preserve")
    assert mixer(model, layer).key_dim == 48
    assert distance(logits(model, tokens()), before) < 1e-10


def test_reinit_is_the_model_s_own_initialisation():
    model = make_rwkv7(num_hidden_layers=4)
    statex.expand(model, layers=[1], factor=4)
    fresh = mixer(model, 1)
    assert torch.equal(fresh.k_a, torch.full((128,), 1.02))
    assert torch.equal(fresh.r_k, torch.full((4, 32), -0.04))
    for name, gain in (("r_proj", 1.0), ("k_proj", 0.1)):
        columns = getattr(fresh, name).weight / gain
        torch.testing.assert_close(columns.T @ columns, 4 * torch.eye(32), rtol=1e-4, atol=1e-4)
    assert not fresh.w_lora.lora[0].weight.any()
    assert fresh.w_lora.lora[2].weight.any()
    bias = fresh.w_lora.lora[2].bias.view(4, 32)
    assert bool((bias[:, 1:] > bias[:, :-1]).all())  # slow channels first in each head, as in the whole layer
    assert torch.equal(fresh.g_norm.weight, torch.full((64,), 0.5**0.7))
    bound = (64 * 2 * 4) ** -0.5
    assert 0.9 * bound < fresh.o_proj.weight.abs().max() <= bound
    assert torch.equal(model.model.layers[1].attn_norm.weight, torch.ones(32))


def test_the_strongest_decay_is_that_of_the_paper():
    from statex.models.rwkv7.mixer import STRONGEST_LOG_DECAY

    assert math.isclose(STRONGEST_LOG_DECAY, -0.606531, abs_tol=1e-6)


def test_what_cannot_be_is_refused():
    model = make_rwkv7()
    with pytest.raises(statex.UserError, match="low-rank growth exists only for GLA"):
        statex.expand(model, layers=[EXPANDED], init="preserve", rank=2)
    with pytest.raises(statex.UserError, match=r"factor = 1: "):
        statex.expand(model, layers=[EXPANDED], factor=1)
    for changes, field in (
        ({"head_dim": 12}, "head_dim"), ({"num_heads": 3}, "head_dim"), ({"value_dim": 30}, "value_dim"),
        ({"value_dim": [32, 64]}, "value_dim"), ({"attn": {"layers": [0]}}, "attn"),
        ({"gate_low_rank_dim": 0}, "gate_low_rank_dim"),
    ):  # fmt: skip
        with pytest.raises(StrictDataclassClassValidationError, match=rf"UserError: {field} = "):
            make_rwkv7(**changes)
