"""The plan before any tensor is touched: which layers, which sizes, which mistakes are refused."""

import json

import pytest
import torch
from transformers import Mamba2Config

import statex
from common import EXPANDED, logits, make_gla, make_mamba2, tokens
from statex.expansion.config import PRESETS
from statex.expansion.edits import ExpansionPlan
from statex.expansion.plan import plan_reinitialization, select_layers
from statex.models.gla.configuration import GLAConfig

PAPER_GLA = GLAConfig(hidden_size=2048, num_hidden_layers=24, num_heads=4)
PAPER_MAMBA2 = Mamba2Config(
    hidden_size=2048, num_hidden_layers=48, num_heads=64, head_dim=64, state_size=128, n_groups=1
)


def planned(config, **fields):
    plan = statex.plan_expansion(config, statex.ExpansionConfig(**fields))
    return [layer.index for layer in plan.layers]


def test_selections():
    assert planned(PAPER_GLA) == [0, 6, 12, 18]
    assert planned(PAPER_GLA, every=5) == [0, 5, 10, 15, 20]
    assert planned(PAPER_GLA, num_layers=4) == [0, 6, 12, 18]
    assert planned(PAPER_GLA, num_layers=7) == [0, 3, 6, 10, 13, 17, 20]
    assert planned(PAPER_GLA, num_layers=24) == list(range(24))
    assert planned(PAPER_GLA, layers=[7, 3]) == [3, 7]
    assert select_layers([2, 5, 8, 11], statex.ExpansionConfig(every=2)) == [2, 8]
    assert select_layers([2, 5, 8, 11], statex.ExpansionConfig(num_layers=3)) == [2, 5, 8]


def test_the_paper_s_sizes():
    """arXiv 2509.22630: 12.6M to 18.9M state elements for GLA; Mamba2 in 8 of 48 layers, times 4."""
    plan = statex.plan_expansion(PAPER_GLA, PRESETS["paper-gla"])
    assert [layer.index for layer in plan.layers] == [0, 6, 12, 18]
    assert plan.factor == 4
    assert plan.layers[0].before.elements == 4 * 256 * 512
    assert plan.layers[0].after.elements == 1024 * 2048
    report = statex.state_report(PAPER_GLA)
    after = report.total_elements + sum(layer.after.elements - layer.before.elements for layer in plan.layers)
    assert (report.total_elements, after) == (12_582_912, 18_874_368)
    unchanged = [edit for layer in plan.layers for edit in layer.tensors if edit.before != edit.after]
    assert {edit.name.split(".", 4)[-1] for edit in unchanged} == {"g_norm_swish_gate.weight"}

    plan = statex.plan_expansion(PAPER_MAMBA2, PRESETS["paper-mamba2"])
    assert [layer.index for layer in plan.layers] == list(range(0, 48, 6))
    added = sum(layer.after.elements - layer.before.elements for layer in plan.layers)
    assert added * 2 == statex.state_report(PAPER_MAMBA2).total_elements
    plan = statex.plan_expansion(PAPER_MAMBA2, PRESETS["paper-mamba2-code"])
    assert len(plan.layers) == 48
    assert {layer.after.key_dim for layer in plan.layers} == {512}


def test_planning_touches_nothing():
    model = make_gla()
    before, fields = logits(model, tokens()), model.config.to_dict()
    statex.plan_expansion(model, statex.ExpansionConfig(layers=[EXPANDED]))
    plan_reinitialization(model, [EXPANDED])
    assert torch.equal(logits(model, tokens()), before)
    assert model.config.to_dict() == fields


@pytest.mark.parametrize("init", ["reinit", "inherit", "preserve"])
@pytest.mark.parametrize("config", [PAPER_GLA, PAPER_MAMBA2], ids=["gla", "mamba2"])
def test_a_plan_survives_json(config, init):
    plan = statex.plan_expansion(config, statex.ExpansionConfig(init=init, factor=4))
    assert ExpansionPlan.from_dict(json.loads(json.dumps(plan.to_dict()))) == plan


def test_a_plan_says_every_edit():
    plan = statex.plan_expansion(
        make_mamba2(n_groups=2).config, statex.ExpansionConfig(layers=[1], factor=3, init="preserve")
    )
    text = str(plan)
    assert text.splitlines()[0] == "expand mamba2: init preserve, factor 3, seed 0"
    assert "layer 1: 4 x (8 x 16) -> 4 x (24 x 16), 512 -> 1,536 state elements" in text
    (line,) = [line for line in text.splitlines() if "in_proj.weight" in line]
    assert line.endswith("[164, 32] -> [228, 32]  B: 32 new rows, fresh; C: 32 new rows, zero")
    (line,) = [line for line in text.splitlines() if "A_log" in line]
    assert line.endswith("[4]  kept")
    text = str(statex.plan_expansion(make_mamba2().config, statex.ExpansionConfig(layers=[1], init="inherit")))
    (line,) = [line for line in text.splitlines() if "in_proj.weight" in line]
    assert "B: 24 new rows, copy with 30% noise" in line
    (line,) = [line for line in text.splitlines() if "conv1d.weight" in line]
    assert line.endswith("B: 24 new rows, copy, all times 0.5; C: 24 new rows, copy, all times 0.5")
    config = make_gla(num_heads=4, num_kv_heads=2).config
    text = str(statex.plan_expansion(config, statex.ExpansionConfig(layers=[1], init="inherit")))
    assert "q: heads in the order [0, 2, 1, 3]" in text
    text = str(statex.plan_expansion(config, statex.ExpansionConfig(layers=[1], init="preserve", rank=2)))
    assert "new -> [2, 32]  q: 2 new rows, fresh" in text


def refused(match, call, *args, **kwargs):
    with pytest.raises(statex.UserError, match=match) as caught:
        call(*args, **kwargs)
    assert caught.value.remedy


@pytest.mark.parametrize(
    ("fields", "match"),
    [
        ({"factor": 1}, "factor = 1"),
        ({"factor": 0}, "factor = 0"),
        ({"factor": 2.5}, r"factor = 2\.5"),
        ({"every": 0}, "every = 0"),
        ({"num_layers": 0}, "num_layers = 0"),
        ({"layers": []}, "at least one layer"),
        ({"layers": [1, 1]}, "none twice"),
        ({"layers": [0], "every": 2}, "layers and every exclude one another"),
        ({"every": 2, "num_layers": 2}, "every and num_layers exclude one another"),
        ({"init": "zero"}, "init = 'zero'.*reinit.*inherit.*preserve"),
        ({"rank": 4}, "rank goes only with init"),
        ({"rank": 0, "init": "preserve"}, "rank = 0"),
        ({"seed": -1}, "seed = -1"),
        ({"seed": 2**32}, "seed = 4294967296"),
        ({"how": "merge"}, "how = 'merge': is not a known key"),
    ],
)
def test_bad_configurations(fields, match):
    refused(match, statex.ExpansionConfig, **fields)


@pytest.mark.parametrize(
    ("make", "options", "fields", "match"),
    [
        (make_gla, {}, {"layers": [2]}, "layers = 2.*the recurrent layers are 0-1"),
        (make_gla, {}, {"layers": [-1]}, "layers = -1"),
        (make_mamba2, {}, {"layers": [0, 9]}, "layers = 9"),
        (make_gla, {}, {"num_layers": 3}, "num_layers = 3.*more than the model has"),
        (make_gla, {"num_heads": 4}, {"factor": 3}, r"factor = 3: does not divide num_heads = 4; use one of \[2, 4\]"),
        (make_gla, {"num_heads": 4}, {"factor": 8, "init": "inherit"}, "does not divide num_heads = 4"),
        (make_gla, {"num_heads": 8, "num_kv_heads": 2}, {"factor": 4}, r"num_kv_heads = 2; use one of \[2\]"),
        (make_gla, {"num_heads": 1}, {}, "num_heads = 1: leaves no heads to merge"),
        (make_gla, {"num_heads": 4, "num_kv_heads": 1}, {"factor": 2}, "num_kv_heads = 1: leaves no heads to merge"),
        (make_gla, {"num_heads": 1}, {"init": "preserve"}, "factor = 1: does not enlarge the state"),
        (make_gla, {"feature_map": "relu"}, {"init": "preserve"}, "the feature map 'relu' is not 0 at 0"),
        (make_gla, {"feature_map": "sigmoid"}, {"init": "preserve", "rank": 2}, "feature map 'sigmoid'"),
        (make_mamba2, {}, {"init": "preserve", "rank": 4}, "rank = 4: low-rank growth exists only for GLA"),
    ],
)
def test_expansions_that_do_not_fit(make, options, fields, match):
    model = make(**options)
    before = {name: parameter.clone() for name, parameter in model.named_parameters()}
    fields = {"layers": [EXPANDED]} | fields if not {"num_layers", "layers"} & fields.keys() else fields
    refused(match, statex.expand, model, **fields)
    refused(match, statex.plan_expansion, model.config, statex.ExpansionConfig(**fields))
    assert type(model).__name__ in ("GLAForCausalLM", "Mamba2ForCausalLM")
    assert getattr(model.config, "expansion", None) is None
    after = dict(model.named_parameters())
    assert all(torch.equal(after[name], parameter) for name, parameter in before.items())


@pytest.mark.parametrize("make", [make_gla, make_mamba2])
def test_reinitializing_a_layer_that_is_not_there(make):
    refused("layers = 5", statex.reinitialize, make(), [5])
    refused("at least one layer", statex.reinitialize, make(), [])


def test_a_configuration_or_its_fields():
    refused("excludes further fields", statex.expand, make_gla(), statex.ExpansionConfig(), factor=2)
    refused("is not a known key", statex.expand, make_gla(), heads=2)


def test_a_plan_of_a_newer_version():
    plan = statex.plan_expansion(PAPER_GLA, statex.ExpansionConfig())
    refused("expansion.version = 3", ExpansionPlan.from_dict, plan.to_dict() | {"version": 3})
    damaged = plan.to_dict()
    del damaged["layers"][0]["after"]
    with pytest.raises(statex.UserError, match=r"expansion.layers.0.after = None: is missing") as caught:
        ExpansionPlan.from_dict(damaged)
    assert len(str(caught.value)) < 300


def test_the_report_is_a_table():
    model = make_gla(num_heads=4)
    statex.expand(model, layers=[EXPANDED])
    assert str(statex.state_report(model)).splitlines() == [
        "layer  heads  d_k  d_v  elements  bytes  before",
        "    0      1   16   32       512  2,048     128",
        "    1      4    4    8       128    512        ",
        "total                        640  2,560     256",
        "state +150%, expanded layers: 1",
    ]
    assert str(statex.state_report(make_gla())).splitlines()[-1].split() == ["total", "512", "2,048"]


@pytest.mark.parametrize("fields", [
    {"every": True}, {"every": "1"}, {"every": 1.0}, {"layers": [True]}, {"layers": {0}}, {"layers": "0"},
    {"layers": [0.0]}, {"num_layers": True}, {"every": 1, "factor": True}, {"every": 1, "factor": "2"},
    {"every": 1, "seed": "0"}, {"every": 1, "seed": False}, {"every": 1, "init": "preserve", "rank": 2.0},
])  # fmt: skip
def test_fields_of_another_type_are_refused(fields):
    *_, field = fields
    with pytest.raises(statex.UserError) as caught:
        statex.ExpansionConfig(**fields)
    assert caught.value.field.startswith(field)
    assert caught.value.remedy


@pytest.mark.parametrize("layers", [(0, 1), range(2)])
def test_layers_may_be_any_sequence_of_numbers(layers):
    assert statex.ExpansionConfig(layers=layers).layers == [0, 1]
