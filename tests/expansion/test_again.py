"""A model expanded more than once: each step from what the model is by then, all of them stored and replayed."""

import json

import pytest
import torch
from transformers import AutoModelForCausalLM

import statex
from common import (
    HYBRIDS,
    distance,
    logits,
    make_gla,
    make_hybrid,
    make_mamba2,
    make_rwkv7,
    mixer,
    recurrent_layers,
    state_after,
    tokens,
)
from statex.checkpoint import inspect
from statex.expansion.state_use import new_entries
from statex.expansion.stored import layer_geometry, stored_plan
from statex.families import StateGeometry

MAKERS = {
    "gla": lambda: make_gla(num_heads=8, num_kv_heads=4, use_short_conv=True),
    "mamba2": lambda: make_mamba2(n_groups=2, use_bias=True),
    "rwkv7": make_rwkv7,
}
INITS = ["reinit", "inherit", "preserve"]
every = pytest.mark.parametrize("family", MAKERS)


def expand(model, layers, init, **fields):
    return statex.expand(model, layers=layers, init=init, **({"factor": 2} | fields))


def assert_loads(model, folder):
    model.save_pretrained(folder)
    for loaded in (AutoModelForCausalLM.from_pretrained(folder).eval(), statex.load(folder).eval()):
        assert torch.equal(logits(loaded, tokens()), logits(model, tokens()))
        assert stored_plan(loaded.config) == stored_plan(model.config)
    assert inspect(folder).state == statex.state_report(model)


@every
@pytest.mark.parametrize("second", INITS)
@pytest.mark.parametrize("first", INITS)
def test_the_same_layer_twice(family, first, second, tmp_path):
    model = MAKERS[family]()
    plans = [expand(model, [0], first, seed=1), expand(model, [0], second, seed=1)]
    assert stored_plan(model.config).steps == plans
    assert plans[1].layers[0].before == plans[0].layers[0].after
    geometry = layer_geometry(model.config)
    assert state_after(model, tokens()) == [geometry[index].elements for index in (0, 1)]
    assert geometry[0] == plans[1].layers[0].after
    assert_loads(model, tmp_path)
    assert {edit.name for plan in plans for edit in plan.layers[0].tensors if edit.is_fresh} == stored_plan(
        model.config
    ).fresh_tensors


@pytest.mark.parametrize("family", HYBRIDS)
def test_other_families_twice(family, tmp_path):
    model = make_hybrid(family, **next(iter(HYBRIDS[family][1].values())))
    expand(model, [0], "inherit", seed=1)
    before = logits(model, tokens())
    if family == "falcon_mamba":
        expand(model, [0], "reinit")
    else:
        expand(model, [0], "preserve", factor=3)
        assert distance(logits(model, tokens()), before) < 1e-5
    assert state_after(model, tokens())[0] == layer_geometry(model.config)[0].elements
    statex.reinitialize(model, recurrent_layers(model)[-1:])
    assert_loads(model, tmp_path)


@every
@pytest.mark.parametrize("first", INITS)
def test_preserving_keeps_the_function_of_an_expanded_model(family, first):
    model = MAKERS[family]().double()
    expand(model, [0], first)
    before = logits(model, tokens())
    expand(model, [0], "preserve", factor=3)
    assert distance(logits(model, tokens()), before) < 1e-6  # transformers' Mamba2 computes in fp32


@pytest.mark.parametrize(
    ("family", "tensor", "new"), [("gla", "k_proj.weight", 4 * 4 * 32), ("mamba2", "in_proj.weight", 2 * 16 * 32)]
)
def test_a_second_step_draws_other_numbers(family, tensor, new):
    """The rows of the second step are drawn from another stream than those of the first, also with one seed."""
    model = MAKERS[family]()
    expand(model, [0], "preserve")
    first = set(mixer(model).get_parameter(tensor).detach().flatten().tolist())
    expand(model, [0], "preserve")
    second = set(mixer(model).get_parameter(tensor).detach().flatten().tolist())
    assert first < second
    assert len(second) - len(first) == new


@every
def test_other_layers_and_a_control_among_them(family, tmp_path):
    model = MAKERS[family]()
    expand(model, [0], "inherit")
    statex.reinitialize(model, [0, 1], seed=2)
    expand(model, [1], "preserve", factor=3)
    report = statex.state_report(model)
    assert [layer.elements // layer.elements_before for layer in report.layers] == [2, 3]
    assert [step.kind for step in report.steps] == ["expand", "reinitialize", "expand"]
    assert sum(step.elements - step.elements_before for step in report.steps) == (
        report.total_elements - report.total_elements_before
    )
    lines = str(report).splitlines()[-3:]
    assert lines[0].startswith("step 1: expand, init inherit, factor 2, layers 0: ")
    assert lines[1].startswith("step 2: reinitialize, init reinit, factor 1, layers 0, 1: ")
    assert_loads(model, tmp_path)
    assert inspect(tmp_path).expansion == (
        "expand, init inherit, factor 2, then reinitialize, init reinit, factor 1, then expand, init preserve, factor 3"
    )
    stored = json.loads((tmp_path / "config.json").read_text())["expansion"]
    assert [plan["kind"] for plan in stored] == ["expand", "reinitialize", "expand"]


def test_a_layer_with_low_rank_rows(tmp_path):
    model = MAKERS["gla"]()
    expand(model, [0], "preserve", rank=3)
    statex.reinitialize(model, [0])  # keeps its rank
    expand(model, [1], "preserve")
    assert_loads(model, tmp_path)
    for init in INITS:
        with pytest.raises(statex.UserError, match=r"layers = 0: was expanded before .*low-rank projections") as caught:
            expand(model, [0], init)
        assert "the checkpoint before that" in caught.value.remedy
    with pytest.raises(statex.UserError, match=r"layers = 1: was expanded before .*rank = 2 .*grown before"):
        expand(model, [1], "preserve", rank=2)


def test_no_heads_are_left_to_merge():
    model = make_gla(num_heads=4)
    statex.expand(model, layers=[0])
    with pytest.raises(statex.UserError, match=r"layers = 0: was expanded before .*leaves no heads to merge"):
        statex.expand(model, layers=[0])
    statex.expand(model, layers=[0], init="preserve", factor=2)
    assert layer_geometry(model.config)[0] == StateGeometry(1, 32, 32)


def test_a_default_factor_that_differs_by_layer():
    model = make_gla(num_heads=4)
    statex.expand(model, layers=[0], factor=2)
    with pytest.raises(statex.UserError, match=r"factor = None: has no default.*\[2, 4\]"):
        statex.expand(model, every=1)
    statex.expand(model, every=1, factor=2)
    assert [state.num_heads for state in layer_geometry(model.config).values()] == [1, 2]


def test_new_entries_of_several_steps():
    """Merged and then grown: the blocks off the diagonal, and the rows behind all; grown and then merged: in blocks."""
    for inits, rows in (
        (["inherit", "preserve"], ["1100", "0011", "0000", "0000"]),
        (["preserve", "inherit"], ["1100", "0000", "0011", "0000"]),
    ):
        model = make_gla(hidden_size=4, num_heads=2)
        for init in inits:
            expand(model, [0], init)
        (layer,) = stored_plan(model.config).layers
        old = torch.tensor([[value == "1" for value in row] for row in rows])
        assert torch.equal(new_entries(layer), ~old[None])
