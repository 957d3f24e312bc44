"""Whole models on the kernels of layers and steps, interpreted on a CPU, compute what they compute on PyTorch."""

import pytest
import torch

import statex
from common import distance, make_gla, make_mamba2, tokens
from statex.models.caches import cache_argument, cache_of
from statex.ops import backends, layer_operations, recurrences

MODELS = {
    "gla": lambda: make_gla(use_short_conv=True, num_heads=4, num_kv_heads=2),
    "mamba2": lambda: make_mamba2(n_groups=2),
}
INTERPRETED = ("short_convolution", "short_convolution_step", "gated_rms_norm", "ssd_step", "gla_step")


@pytest.fixture(params=MODELS)
def model(request):
    if torch.cuda.is_available():
        pytest.skip("the kernels are compiled where there is a GPU")
    pytest.importorskip("triton")
    model = MODELS[request.param]()
    statex.expand(model, layers=[0])
    return model


@pytest.fixture
def interpret(monkeypatch):
    """Call it, and from then on these ops run on their kernels; it returns the names of those that ran."""
    choose, taken = backends.choose, set()

    def kernel(op, backend, like):
        if op not in INTERPRETED:
            return choose(op, backend, like)
        taken.add(op)
        assert backends._import_triton(op) is None
        return backends._triton_functions[op]

    def start():
        for module in (layer_operations, recurrences):
            monkeypatch.setattr(module, "choose", kernel)
        return taken

    return start


def everything(model, ids):
    """Logits and gradients of packed documents; logits of a prompt, of single tokens behind it, and of several."""
    documents = (torch.arange(ids.shape[1]) // 7).expand(ids.shape)
    model.zero_grad()
    output = model(ids, labels=ids, use_cache=False, seq_idx=documents)
    output.loss.backward()
    found = {"packed": output.logits.detach()} | {name: p.grad.clone() for name, p in model.named_parameters()}
    with torch.no_grad():
        cache = None
        for start, end in ((0, 11), (11, 12), (12, 13), (13, 20)):
            output = model(ids[:, start:end], use_cache=True, **{cache_argument(model): cache})
            cache, found[f"{start} to {end}"] = cache_of(output), output.logits
    return found


def test_a_model_is_the_same_on_the_kernels(model, interpret):
    wanted = everything(model, tokens())
    taken = interpret()
    found = everything(model, tokens())
    assert {"short_convolution", "gated_rms_norm"} < taken
    assert max(distance(found[name], wanted[name]) for name in wanted) < 1e-5
