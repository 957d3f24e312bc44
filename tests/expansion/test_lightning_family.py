"""What is MiniMax's alone; the behaviour matrix runs on it in test_delta_families.py."""

import pytest
import torch
from test_expanded_function import dead_rows, gradients_after
from test_expanded_running import greedy

import statex
from common import EXPANDED, distance, logits, mixer, tokens
from delta_models import DeltaCase, delta_logits, make_delta
from statex.models.caches import cache_argument, cache_of


def parts(rows, heads, key_dim):
    """The rows of queries, keys and values [H, ..., D] of the projection's [H * (2 K + V), D]."""
    return rows.unflatten(0, (heads, -1)).tensor_split([key_dim, 2 * key_dim], dim=1)


def test_new_queries_and_keys_learn_within_two_steps():
    case = DeltaCase("minimax", "grouped", "preserve", factor=3)
    for num_steps in range(2):
        q, k, _ = parts(gradients_after(case.expanded(), num_steps)["qkv_proj.weight"], 4, 24)
        new_q, new_k = q[:, 8:].flatten(0, 1), k[:, 8:].flatten(0, 1)
        assert dead_rows(new_q) == 0
        assert dead_rows(new_k) == (0 if num_steps else len(new_k))


def test_exact_copies_would_change_nothing():
    """Without the noise, an inherited layer's mixer is the old one: the norm of all heads sees what grew alike."""
    model, x = make_delta("minimax").double(), torch.randn(2, 20, 32, dtype=torch.float64)
    with torch.no_grad(), statex.statex_ops():
        wanted = mixer(model)(x)[0]
        old = mixer(model).qkv_proj.weight.clone()
        statex.expand(model, layers=[EXPANDED], init="inherit", factor=2)
        assert distance(mixer(model)(x)[0], wanted) > 0.01
        q, k, v = parts(old, 4, 8)
        mixer(model).qkv_proj.weight.copy_(torch.cat([q, q, k, k, v], dim=1).flatten(0, 1))
        assert distance(mixer(model)(x)[0], wanted) < 1e-3  # the norm's epsilon


def test_layers_can_be_expanded_twice_and_merged():
    model, ids = make_delta("minimax").double(), tokens()
    with statex.statex_ops():
        before = logits(model, ids)
    for _ in range(2):
        statex.expand(model, layers=[EXPANDED], factor=2, init="preserve")
    assert distance(logits(model, ids), before) < 1e-10
    statex.expand(model, layers=[EXPANDED], method="merge", factor=2)
    layer = statex.state_report(model).layers[EXPANDED]
    assert (layer.num_heads, layer.key_dim, layer.value_dim) == (2, 64, 16)
    states = [(2, 64, 16), (4, 8, 8)]
    assert distance(logits(model, ids)[0], delta_logits(model, ids[0], states)) < 1e-6  # fp32 decays


def test_what_cannot_be_is_refused():
    with pytest.raises(statex.UserError, match=r"one decay rate .*use init = \"reinit\", or method = \"grow\""):
        statex.expand(make_delta("minimax"), layers=[EXPANDED], init="inherit", method="merge")
    with pytest.raises(statex.UserError, match=r"activation 'sigmoid' is not 0 at 0"):
        statex.expand(make_delta("minimax", hidden_act="sigmoid"), layers=[EXPANDED], init="preserve")
    with pytest.raises(statex.UserError, match="low-rank growth exists only for GLA"):
        statex.expand(make_delta("minimax"), layers=[EXPANDED], init="preserve", rank=2)


def test_an_unexpanded_model_is_on_our_op_within_statex_ops():
    model, ids = make_delta("minimax"), tokens()
    wanted = logits(model, ids)
    with statex.statex_ops():
        assert 0 < distance(logits(model, ids), wanted) < 1e-5
    assert torch.equal(logits(model, tokens()), wanted)


def test_beams_and_positions_need_our_cache():
    """transformers' own cache of MiniMax reorders no state, and counts no tokens behind a first layer that has one."""
    model, ids = make_delta("minimax"), tokens(length=6)
    with statex.statex_ops():
        assert torch.equal(greedy(model, ids, num_beams=3), greedy(model, ids, num_beams=3, use_cache=False))
        with torch.no_grad():
            cache = cache_of(model(ids, use_cache=True))
            assert cache.get_seq_length() == 6
            with pytest.raises(ValueError, match="packed documents cannot be continued from a cache"):
                model.model(ids, use_cache=True, cu_seqlens=torch.tensor([0, 12]), **{cache_argument(model): cache})


@pytest.mark.parametrize("fields", [{"method": "merge"}, {"init": "preserve"}])
def test_decays_have_the_model_s_dtype(fields, tmp_path):
    """They are buffers of the checkpoint: a loaded model would have other decays than the saved one."""
    model = make_delta("minimax").bfloat16()
    slopes = mixer(model).slope_rate.clone()
    statex.expand(model, layers=[EXPANDED], **fields)
    assert mixer(model).slope_rate.dtype == torch.bfloat16
    assert torch.equal(mixer(model).slope_rate, slopes) == ("init" in fields)
    model.save_pretrained(tmp_path)
    loaded = mixer(statex.load(tmp_path)).slope_rate
    assert loaded.dtype == torch.bfloat16
    assert torch.equal(loaded, mixer(model).slope_rate)
