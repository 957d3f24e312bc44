"""transformers' own Mamba2 on statex's ops: the same function, reversibly."""

import sys
from importlib import import_module
from pathlib import Path

import pytest
import torch
import transformers
from transformers.models.bamba import modeling_bamba
from transformers.models.mamba2 import modeling_mamba2

import statex
from common import HYBRIDS, MAMBA2, distance, logits, make_hybrid, make_mamba2, tokens
from statex.errors import UserError
from statex.models.caches import cache_argument, cache_of
from statex.models.dispatch import RECURRENCES, REPLACEMENTS, norm_forward, replaced_modules
from statex.models.factory import StatexMamba2Mixer

OURS = REPLACEMENTS | {"MambaRMSNormGated": norm_forward, "Mamba2RMSNorm": norm_forward}


def current():
    own = {name: getattr(modeling_mamba2, name) for name in OURS}
    return {name: found.forward if isinstance(found, type) else found for name, found in own.items()}


def test_it_is_reversible():
    own = current()
    with statex.statex_ops():
        assert current() == OURS
        with statex.statex_ops():
            assert current() == OURS
        assert current() == OURS
    assert current() == own


def test_it_is_undone_after_an_error():
    own = current()
    with pytest.raises(ZeroDivisionError), statex.statex_ops():
        _ = 1 / 0
    assert current() == own


def test_expanding_replaces_nothing_in_transformers():
    own, forward = current(), modeling_mamba2.Mamba2Mixer.forward
    model = make_mamba2()
    statex.expand(model, layers=[0])
    assert {type(block.mixer) for block in model.backbone.layers} == {StatexMamba2Mixer}
    assert current() == own
    assert modeling_mamba2.Mamba2Mixer.forward is forward


def test_other_models_of_the_process_keep_transformers_own_ops():
    model, expanded = make_mamba2(), make_mamba2(seed=1)
    before = logits(model, tokens())
    statex.expand(expanded, layers=[0])
    assert torch.equal(logits(model, tokens()), before)


def gradients(model, ids):
    model.zero_grad()
    model(ids, labels=ids, use_cache=False).loss.backward()
    return {name: parameter.grad.clone() for name, parameter in model.named_parameters() if parameter.grad is not None}


@pytest.mark.parametrize("length", [1, 5, 37])
@pytest.mark.parametrize("configuration", MAMBA2)
def test_logits_and_gradients_are_transformers_own(configuration, length):
    model, ids = make_mamba2(**MAMBA2[configuration]), tokens(length=max(2, length))
    wanted, wanted_gradients = logits(model, ids), gradients(model, ids)
    with statex.statex_ops():
        assert distance(logits(model, ids), wanted) < 1e-5
        for name, gradient in gradients(model, ids).items():
            assert distance(gradient, wanted_gradients[name]) < 1e-4, name


def test_time_step_limits_are_kept():
    model, ids = make_mamba2(time_step_limit=(0.3, 0.5)), tokens()
    wanted = logits(model, ids)
    assert distance(logits(make_mamba2(), ids), wanted) > 1e-3
    with statex.statex_ops():
        assert distance(logits(model, ids), wanted) < 1e-5


def test_time_step_limits_hold_in_single_steps_too():
    """transformers applies them to whole passes only."""
    model, ids = make_mamba2(time_step_limit=(0.3, 0.5), n_groups=2, use_bias=True), tokens()
    with statex.statex_ops(), torch.no_grad():
        cache, outputs = None, []
        for t in range(ids.shape[1]):
            output = model(ids[:, t : t + 1], use_cache=True, **{cache_argument(model): cache})
            cache = cache_of(output)
            outputs.append(output.logits)
        assert distance(torch.cat(outputs, dim=1), logits(model, ids)) < 1e-5


@pytest.mark.parametrize(("family", "configuration"), [(name, each) for name in HYBRIDS for each in HYBRIDS[name][1]])
def test_logits_and_gradients_of_hybrids_are_transformers_own(family, configuration):
    model, ids = make_hybrid(family, **HYBRIDS[family][1][configuration]), tokens(length=37)
    wanted, wanted_gradients = logits(model, ids), gradients(model, ids)
    with statex.statex_ops():
        assert distance(logits(model, ids), wanted) < 1e-5
        for name, gradient in gradients(model, ids).items():
            assert distance(gradient, wanted_gradients[name]) < 1e-3, name


@pytest.mark.parametrize("configuration", ["2-groups", "bias"])
def test_cached_steps_are_transformers_own(configuration):
    model, ids = make_mamba2(**MAMBA2[configuration]), tokens()

    @torch.no_grad()
    def step_by_step():
        cache, outputs = None, []
        for t in range(ids.shape[1]):
            output = model(ids[:, t : t + 1], use_cache=True, **{cache_argument(model): cache})
            cache = cache_of(output)
            outputs.append(output.logits)
        return torch.cat(outputs, dim=1), cache.layers[0].recurrent_states[0]

    wanted = step_by_step()
    with statex.statex_ops():
        actual = step_by_step()
    assert distance(actual[0], wanted[0]) < 1e-5
    assert distance(actual[1], wanted[1]) < 1e-5


def test_an_activation_that_our_convolution_lacks_is_refused():
    model = make_mamba2(hidden_act="gelu")
    with statex.statex_ops(), pytest.raises(ValueError, match="hidden_act = 'gelu'"):
        logits(model, tokens())


def test_it_knows_every_model_of_transformers_that_has_these_functions():
    folder = Path(transformers.__file__).parent / "models"
    functions = {"mamba2": b"\ndef mamba2_chunk_scan(", "gated_delta": b"\ndef torch_chunk_gated_delta_rule("}
    functions |= {"kimi_delta": b"\ndef chunk_kimi_delta_attention(", "lightning": b"LightningAttention(nn.Module)"}
    functions["selective_scan"] = b"\ndef mamba_selective_scan("
    found = {
        f"transformers.models.{file.parent.name}.{file.stem}": recurrence
        for file in folder.glob("*/modeling_*.py")
        for recurrence, function in functions.items()
        if function in file.read_bytes()
    }
    del found["transformers.models.zamba.modeling_zamba"]  # one such mixer for each head: no family, and not replaced
    assert found == {path: recurrence for path, (recurrence, _) in replaced_modules().items()}


@pytest.mark.parametrize("path", replaced_modules())
def test_a_module_that_is_loaded_within_it_is_on_our_ops(path, monkeypatch):
    recurrence, norms = replaced_modules()[path]
    ours = RECURRENCES[recurrence].functions
    monkeypatch.delitem(sys.modules, path, raising=False)
    with statex.statex_ops():
        module = import_module(path)
        assert {name: getattr(module, name) for name in ours} == ours
        found = [name for name in vars(module) if name.endswith("RMSNormGated")] or norms
        assert found or recurrence == "lightning"
        assert all(getattr(module, name).forward is RECURRENCES[recurrence].norm_forward for name in found if norms)
    assert not any(getattr(module, name) is function for name, function in ours.items())


@pytest.mark.parametrize("name", ["mamba2_chunk_scan", "causal_conv1d_update", "MambaRMSNormGated", "Mamba2RMSNorm"])
def test_a_name_that_transformers_has_renamed_is_an_error(name, monkeypatch):
    monkeypatch.setattr(modeling_mamba2, f"new_{name}", getattr(modeling_mamba2, name), raising=False)
    monkeypatch.delattr(modeling_mamba2, name)
    scan = modeling_bamba.mamba2_chunk_scan
    with pytest.raises(UserError, match=f"modeling_mamba2 has no {name}"), statex.statex_ops():
        pass
    assert modeling_bamba.mamba2_chunk_scan is scan
