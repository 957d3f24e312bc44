"""flash-linear-attention's own models on its own kernels, enlarged in place.

Exactness and bookkeeping are tested on a CPU, with references in the place of the kernels
(tests/expansion/test_fla_families.py); here the kernels take the enlarged layers.
"""

import copy
import math

import pytest
import torch
from transformers import AutoModelForCausalLM

pytest.importorskip("triton")

import fla_models
import statex
from common import VOCABULARY, distance, logits, mixer, tokens
from fla_models import make_fla
from statex.families import ALL_FAMILIES, FAMILIES

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif("gla" not in FAMILIES, reason="needs flash-linear-attention"),
]

DEVICE = "cuda"
SHORT = 40
"""Tokens that FLA's layers run one by one when no gradient is asked for, in fp32 throughout."""
LONG = 130
SIZES = {
    "gla": {"hidden_size": 64, "num_heads": 2, "expand_k": 1.0, "use_short_conv": True},
    "gsa": {"hidden_size": 64, "num_heads": 2, "num_slots": 16},
    "hgrn2": {"hidden_size": 64, "num_heads": None, "expand_ratio": 32},
    "retnet": {"hidden_size": 64, "num_heads": 2, "expand_v": 1.0},
    "delta_net": {"hidden_size": 64, "num_heads": 2},
    "gated_deltanet": {"hidden_size": 64, "num_heads": 2, "head_dim": 32, "expand_v": 1.0},
}
LARGE = {
    "retnet": {"hidden_size": 256, "num_heads": 1, "expand_v": 1.0},
    "delta_net": {"hidden_size": 256, "num_heads": 1},
    "gated_deltanet": {"hidden_size": 256, "num_heads": 1, "head_dim": 256, "expand_v": 1.0},
}
"""Heads of 256 keys, the most that FLA's own layers of these kinds take, and the size of RetNet's and Gated DeltaNet's
checkpoints."""
CASES = [(name, init, method) for name in SIZES for init, ways in ALL_FAMILIES[name].methods.items() for method in ways]
each_type = pytest.mark.parametrize("name", SIZES)


@pytest.fixture(autouse=True, scope="module")
def untuned():
    """Each kernel in the first of its forms that runs: timing all would take minutes, and none is slow on so little."""
    from triton.runtime.autotuner import Autotuner

    choices, timed, found = Autotuner.prune_configs, Autotuner._bench, set()

    def prune(self, *args, **kwargs):
        found.discard(id(self))
        return choices(self, *args, **kwargs)

    def bench(self, *args, **kwargs):
        times = [math.inf] * 3 if id(self) in found else timed(self, *args, **kwargs)
        if math.isfinite(times[0]):
            found.add(id(self))
        return times

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Autotuner, "prune_configs", prune)
        patch.setattr(Autotuner, "_bench", bench)
        yield


def plain(name, **changes):
    return make_fla(name, **SIZES[name] | changes).to(DEVICE)


def expanded(name, init="reinit", method=None, **changes):
    model = plain(name, **changes)
    statex.expand(model, layers=[0], factor=2, init=init, method=method)
    return model


def ids_of(**shape):
    return tokens(**shape).to(DEVICE)


@pytest.mark.parametrize(("name", "init", "method"), CASES)
def test_the_kernels_compute_what_the_references_do(name, init, method):
    """One by one in fp32, and in chunks in bf16."""
    model = expanded(name, init, method)
    ids = tokens(length=LONG)
    with fla_models.on_the_cpu():
        wanted = logits(copy.deepcopy(model).cpu(), ids)
    ids = ids.to(DEVICE)
    assert distance(logits(model, ids[:, :SHORT]).cpu(), wanted[:, :SHORT]) < 1e-3
    assert distance(logits(model.bfloat16(), ids).float().cpu(), wanted) < 0.1


@pytest.mark.parametrize("name", [name for name in SIZES if "preserve" in ALL_FAMILIES[name].methods])
def test_preserve_keeps_the_function(name):
    model = plain(name)
    ids = ids_of(length=SHORT)
    before = logits(model, ids)
    statex.expand(model, layers=[0], factor=2, init="preserve")
    assert next(mixer(model).parameters()).is_cuda == (DEVICE == "cuda")
    assert distance(logits(model, ids), before) < 1e-3


@pytest.mark.parametrize("name", LARGE)
def test_heads_larger_than_fla_takes(name):
    model = make_fla(name, **LARGE[name]).to(DEVICE)
    ids = ids_of(length=SHORT)
    before = logits(model, ids)
    (layer,) = statex.expand(model, layers=[0], factor=2, init="preserve").layers
    assert layer.after.key_dim == 512
    assert distance(logits(model, ids), before) < 1e-3
    model = model.bfloat16().train()
    ids = ids_of(length=LONG)
    model(ids, labels=ids).loss.backward()
    assert all(parameter.grad.isfinite().all() for parameter in mixer(model).parameters())


@each_type
def test_training_reduces_the_loss(name):
    """Each token is the one before plus three."""
    model = expanded(name).train()
    ids = ((torch.arange(4)[:, None] + 3 * torch.arange(LONG)) % VOCABULARY).to(DEVICE)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    losses = []
    for _ in range(12):
        with torch.autocast(DEVICE, torch.bfloat16):
            loss = model(ids, labels=ids).loss
        loss.backward()
        assert all(parameter.grad.isfinite().all() for parameter in mixer(model).parameters())
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < 0.8 * losses[0], losses


@each_type
def test_a_saved_model_is_the_same(name, tmp_path):
    model = expanded(name)
    model.save_pretrained(tmp_path)
    ids = ids_of(length=SHORT)
    wanted = logits(model, ids)
    for load in (statex.load, AutoModelForCausalLM.from_pretrained):
        found = load(tmp_path).to(DEVICE).eval()
        assert type(found) is type(model)
        assert distance(logits(found, ids), wanted) < 1e-6


@each_type
def test_generation_with_a_cache_equals_generation_without(name):
    model = expanded(name)
    ids, options = ids_of(length=9), {"max_new_tokens": 8, "do_sample": False}
    with_cache, without = (model.generate(ids, use_cache=use, **options) for use in (True, False))
    assert torch.equal(with_cache, without)


@each_type
def test_left_padding(name):
    model = expanded(name)
    ids = ids_of(batch=1, length=20)
    padded, mask = ids_of(length=26), torch.ones(2, 26, dtype=torch.long, device=DEVICE)
    padded[0, 6:], mask[0, :6] = ids[0], 0
    assert distance(logits(model, padded, attention_mask=mask)[:1, 6:], logits(model, ids)) < 1e-3
