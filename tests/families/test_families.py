"""What the families tell of a configuration, against hand-counted figures."""

import pytest
import torch
from transformers import LlamaConfig, Mamba2Config

import delta_models
import statex
from common import MAKERS, make_mamba2
from statex.families import FAMILIES, StateGeometry, family_of
from statex.families.gla import merged_query_order
from statex.models.caches import cache_of
from statex.models.gla.configuration import GLAConfig

GLA = GLAConfig(hidden_size=64, num_heads=8, num_kv_heads=4, num_hidden_layers=3)
MAMBA2 = Mamba2Config(hidden_size=64, num_heads=8, head_dim=16, state_size=32, n_groups=2, num_hidden_layers=3)


def geometry(config):
    return family_of(config).geometry(config)


def test_geometry():
    assert FAMILIES["statex_gla"].geometry(GLA) == StateGeometry(num_heads=8, key_dim=4, value_dim=8)
    assert FAMILIES["mamba2"].geometry(MAMBA2) == StateGeometry(num_heads=8, key_dim=32, value_dim=16)
    assert StateGeometry(8, 32, 16).elements == 4096


@pytest.mark.parametrize("init", ["reinit", "inherit"])
@pytest.mark.parametrize(("factor", "after"), [(2, (4, 8, 16)), (4, (2, 16, 32))])
def test_gla_merges_heads(init, factor, after):
    assert FAMILIES["statex_gla"].expanded_geometry(GLA, geometry(GLA), factor, init) == StateGeometry(*after)


@pytest.mark.parametrize("factor", [2, 3, 4, 7])
def test_gla_preserving_and_mamba2_grow_the_key_dimension(factor):
    assert FAMILIES["statex_gla"].expanded_geometry(GLA, geometry(GLA), factor, "preserve") == StateGeometry(
        8, 4 * factor, 8
    )
    for init in ("reinit", "inherit", "preserve"):
        after = FAMILIES["mamba2"].expanded_geometry(MAMBA2, geometry(MAMBA2), factor, init)
        assert after == StateGeometry(8, 32 * factor, 16)


def test_default_factors():
    for config, factor in ((GLA, 4), (GLAConfig(num_heads=4), 4), (MAMBA2, 4)):
        assert family_of(config).default_factor(config, geometry(config)) == factor
    merged = FAMILIES["statex_gla"].expanded_geometry(GLA, geometry(GLA), 2, "reinit")
    assert FAMILIES["statex_gla"].default_factor(GLA, merged) == 2


def test_merging_keeps_each_query_with_its_key():
    """Query head h reads key head h // g: a merged query head holds one query of each of its key heads, in order."""
    assert merged_query_order(4, 4, 2) == (0, 1, 2, 3)
    assert merged_query_order(4, 2, 2) == (0, 2, 1, 3)
    assert merged_query_order(8, 4, 2) == (0, 2, 1, 3, 4, 6, 5, 7)
    assert merged_query_order(12, 4, 4) == (0, 3, 6, 9, 1, 4, 7, 10, 2, 5, 8, 11)
    for num_heads, num_kv_heads, factor in [(16, 8, 4), (12, 6, 3), (24, 8, 2)]:
        groups = num_heads // num_kv_heads
        order = merged_query_order(num_heads, num_kv_heads, factor)
        assert sorted(order) == list(range(num_heads))
        for new, old in enumerate(order):
            merged_head, block = divmod(new, factor)
            assert old // groups == merged_head // groups * factor + block


@pytest.mark.parametrize("family", [name for name, family in FAMILIES.items() if family.library == "transformers"])
def test_the_cache_holds_a_state_as_its_family_says(family):
    """Of a model whose keys and values differ in size; the diagnosis reads new entries by it."""
    if family in delta_models.ALL_MODELS:
        model = delta_models.make_delta(family)
    else:
        maker, configurations = MAKERS[family.removeprefix("statex_")]
        model = maker(**next(iter(configurations.values())))
    geometry = FAMILIES[family].geometry(model.config)
    H, K, V = geometry.num_heads, geometry.key_dim, geometry.value_dim
    with statex.statex_ops():
        output = model(torch.tensor([[5, 6, 7]]), use_cache=True)
    cached = cache_of(output).layers[0].recurrent_states[0]
    view = FAMILIES[family].state_matrices(cached)
    assert tuple(view.shape) == (1, H, K, V)
    assert view.data_ptr() == cached.data_ptr()
    if family in ("kimi_linear", "bailing_hybrid", "minimax"):
        assert K == V  # which their mixers cannot have otherwise, before an expansion
    else:
        assert K != V
        assert FAMILIES[family].keys_last == (cached.shape[-1] == K)


@pytest.mark.parametrize(("name", "configuration"), [(name, each) for name in MAKERS for each in MAKERS[name][1]])
def test_names_lead_to_the_mixers(name, configuration):
    maker, configurations = MAKERS[name]
    model = maker(**configurations[configuration])
    family = family_of(model.config)
    for index in family.recurrent_layers(model.config):
        assert model.get_submodule(family.mixer_name(model.config, index)).layer_idx == index
        norm = family.norm_name(model.config, index)
        assert norm is None or "weight" in dict(model.get_submodule(norm).named_parameters())


def test_an_expanded_configuration_has_the_family_of_its_base():
    model = make_mamba2()
    statex.expand(model, layers=[0])
    assert model.config.model_type == "statex_mamba2"
    assert family_of(model.config) is FAMILIES["mamba2"]


def test_an_unknown_family_lists_the_known_ones():
    with pytest.raises(statex.UserError, match=r"model_type = 'llama'.*known families: statex_gla, mamba2"):
        family_of(LlamaConfig())
