"""Decoding as torch.compile and generate's static cache take it: one graph for every token, the same result."""

from contextlib import nullcontext

import pytest
import torch
from torch._dynamo.utils import counters
from transformers import CompileConfig

import statex
from common import make_gla, make_mamba2, make_rwkv7, tokens
from statex.models.caches import cache_argument, cache_of
from statex.models.captured_step import CapturedStep
from statex.models.recurrent import CACHE_NAME

MODELS = {
    "gla": lambda: make_gla(),
    "gla-expanded": lambda: expanded(make_gla()),
    "gla-conv": lambda: make_gla(use_short_conv=True, num_heads=4, num_kv_heads=2),
    "gla-grown": lambda: expanded(make_gla(), init="preserve", factor=2, rank=3),
    "rwkv7-grown": lambda: expanded(make_rwkv7(), init="preserve", factor=2),
    "mamba2": lambda: make_mamba2(),
    "mamba2-expanded": lambda: expanded(make_mamba2(n_groups=2)),
}
NUM_STEPS = 12


def expanded(model, **changes):
    statex.expand(model, layers=[0], **changes)
    return model


def ops_of(model):
    """transformers' own Mamba2 needs the context; our classes do not."""
    return statex.statex_ops() if model.config.model_type == "mamba2" else nullcontext()


@pytest.fixture(autouse=True)
def fresh_compiler():
    torch._dynamo.reset()
    counters.clear()
    with torch._dynamo.config.patch(error_on_recompile=True):
        yield
    torch._dynamo.reset()


@torch.no_grad()
def decode(model, step, ids):
    """Logits of NUM_STEPS tokens behind `ids`, greedily; `step` decodes."""
    name, logits = cache_argument(model), []
    output = model(ids, use_cache=True)
    for _ in range(NUM_STEPS):
        output = step(input_ids=output.logits[:, -1:].argmax(dim=-1), use_cache=True, **{name: cache_of(output)})
        logits.append(output.logits)
    return torch.cat(logits, dim=1)


@pytest.mark.parametrize("name", MODELS)
def test_a_step_is_one_graph_for_every_token_and_cache(name):
    model, ids = MODELS[name](), tokens()
    with ops_of(model):
        wanted = decode(model, model, ids)
        compiled = torch.compile(model.__call__, fullgraph=True, backend="eager")
        assert torch.equal(decode(model, compiled, ids), wanted)
        assert torch.equal(decode(model, compiled, ids), wanted)
    assert counters["stats"]["unique_graphs"] == 1


@pytest.mark.parametrize("name", MODELS)
def test_static_generation_is_compiled_once_and_equals_plain(name):
    model, ids = MODELS[name](), tokens()
    compiler = CompileConfig(fullgraph=True, backend="eager", mode=None)
    compiler._compile_all_devices = True  # transformers' own switch for tests
    mask = torch.ones_like(ids)
    mask[0, :3] = 0
    options = {"max_new_tokens": NUM_STEPS, "min_new_tokens": NUM_STEPS, "do_sample": False, "pad_token_id": 0}
    with ops_of(model):
        wanted = model.generate(ids, attention_mask=mask, **options)
        assert counters["stats"]["unique_graphs"] == 0
        for _ in range(2):
            found = model.generate(
                ids, attention_mask=mask, **options, cache_implementation="static", compile_config=compiler
            )
            assert torch.equal(found, wanted)
    assert counters["stats"]["unique_graphs"] == 1


def test_a_static_cache_that_was_used_is_not_read_over_silently():
    model, ids = make_gla(), tokens()
    options = {"max_new_tokens": 3, "do_sample": False, "pad_token_id": 0, "attention_mask": torch.ones_like(ids)}
    first = model.generate(ids, **options, cache_implementation="static", return_dict_in_generate=True)
    with pytest.raises(ValueError, match=r"get_seq_length|has read tokens"):
        model.generate(ids, **options, **{CACHE_NAME: cache_of(first)})


def test_a_graph_needs_a_cuda_device():
    model = make_gla()
    cache = cache_of(model(tokens(), use_cache=True))
    with pytest.raises(ValueError, match="model is on cpu"):
        CapturedStep(model, cache, 2)
