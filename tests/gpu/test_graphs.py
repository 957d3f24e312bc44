"""Decoding by compiled code and by a captured graph equals decoding kernel by kernel."""

import pytest
import torch
from transformers import AutoModelForCausalLM, Mamba2Config

pytest.importorskip("triton")

import statex
from statex.evaluation import Request, evaluate
from statex.models.caches import cache_argument, cache_of
from statex.models.captured_step import CapturedStep
from statex.models.gla.configuration import GLAConfig
from statex.recipe import Evaluation

pytestmark = pytest.mark.gpu

NUM_STEPS = 16


def gla():
    return GLAConfig(hidden_size=256, num_hidden_layers=2, num_heads=2, vocab_size=128)


def gla_with_convolution():
    return GLAConfig(hidden_size=256, num_hidden_layers=2, num_heads=2, vocab_size=128, use_short_conv=True)


def mamba2():
    sizes = {"hidden_size": 128, "num_hidden_layers": 2, "num_heads": 4, "head_dim": 64, "state_size": 128}
    return Mamba2Config(**sizes, n_groups=1, vocab_size=128)


@pytest.fixture(params=[gla, gla_with_convolution, mamba2])
def model(request):
    """Its layer 0 expanded, in fp32: so near are two ways of computing that greedy tokens agree."""
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(request.param()).cuda().eval()
    statex.expand(model, layers=[0])
    return model.eval()


@pytest.fixture
def ids():
    return torch.randint(128, (3, 20), generator=torch.Generator().manual_seed(0)).cuda()


@pytest.mark.slow
def test_static_generation_equals_plain(model, ids):
    torch._dynamo.reset()
    options = {"max_new_tokens": NUM_STEPS, "min_new_tokens": NUM_STEPS, "do_sample": False, "pad_token_id": 0}
    wanted = model.generate(ids, attention_mask=torch.ones_like(ids), **options)
    for _ in range(2):
        found = model.generate(ids, attention_mask=torch.ones_like(ids), **options, cache_implementation="static")
        assert torch.equal(found, wanted)


@torch.inference_mode()
def test_a_captured_step_equals_the_model(model, ids):
    name = cache_argument(model)
    plain, prompt = model(ids, use_cache=True), model(ids, use_cache=True)
    step = CapturedStep(model, cache_of(prompt), len(ids))
    for _ in range(NUM_STEPS):
        chosen = plain.logits[:, -1].argmax(dim=-1)
        plain = model(input_ids=chosen[:, None], use_cache=True, **{name: cache_of(plain)})
        torch.testing.assert_close(step(chosen), plain.logits[:, -1], rtol=1e-4, atol=1e-4)


def test_the_cost_suite_decodes_by_a_graph_too(model):
    settings = Evaluation.model_validate(
        {"suites": ["cost"], "cost": {"lengths": [64], "batch_sizes": [2], "decode_tokens": 4, "repetitions": 3}}
    )
    values = {row.metric: row for row in evaluate(model, None, Request(settings))}
    assert values["decode_graph_ms_per_token"].n == values["decode_ms_per_token"].n == 3
    assert values["decode_graph_ms_per_token"].value > 0
