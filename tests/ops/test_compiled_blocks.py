"""Whole blocks of our models, each compiled as one graph: the same losses and gradients as without compilation."""

import pytest
import torch

import statex
from common import distance, make_gla, make_hybrid, make_mamba2, tokens
from statex.models.caches import cache_argument, cache_of

MODELS = {
    "gla": lambda: make_gla(use_short_conv=True, num_heads=4, num_kv_heads=2),
    "mamba2": lambda: make_mamba2(n_groups=2),
    "mamba": lambda: make_hybrid("mamba"),
}
DOCUMENTS = (torch.arange(20) // 7).expand(2, 20)


@pytest.fixture(autouse=True)
def fresh_compiler():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


@pytest.fixture(params=MODELS)
def model(request):
    """One layer expanded, one not."""
    model = MODELS[request.param]()
    statex.expand(model, layers=[0])
    return model


def compile_blocks(model, backend):
    for block in model.base_model.layers:
        block.compile(fullgraph=True, backend=backend)


def trained(model, **options):
    """Logits and gradients of a step."""
    model.train().zero_grad()
    output = model(tokens(), labels=tokens(), use_cache=False, **options)
    output.loss.backward()
    return {"logits": output.logits.detach()} | {name: p.grad.clone() for name, p in model.named_parameters()}


def assert_same(found, wanted, bound):
    wrong = {name: distance(found[name], wanted[name]) for name in wanted}
    assert max(wrong.values()) <= bound, wrong


def test_training(model):
    wanted = trained(model)
    compile_blocks(model, "aot_eager")
    assert_same(trained(model), wanted, 1e-6)


def test_training_on_documents_with_gradient_checkpointing(model):
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    wanted = trained(model, seq_idx=DOCUMENTS)
    compile_blocks(model, "aot_eager")
    assert_same(trained(model, seq_idx=DOCUMENTS), wanted, 1e-6)


@pytest.mark.slow
def test_training_as_inductor_fuses_it(model):
    wanted = trained(model)
    compile_blocks(model, "inductor")
    assert_same(trained(model), wanted, 1e-5)


@torch.no_grad()
def read(model):
    """Logits of a padded prompt, and of what follows it token by token and several at once."""
    mask, cache, logits = torch.ones(2, 20, dtype=torch.long), None, []
    mask[0, :3] = 0
    for start, end in ((0, 11), (11, 12), (12, 13), (13, 20)):
        output = model(
            tokens()[:, start:end], attention_mask=mask[:, :end], use_cache=True, **{cache_argument(model): cache}
        )
        cache = cache_of(output)
        logits.append(output.logits)
    return torch.cat(logits, dim=1)


def test_inference_with_states(model):
    wanted = read(model)
    with torch._dynamo.config.patch(recompile_limit=32):  # prompt, first cache, token, tokens: of two layers each
        compile_blocks(model, "eager")  # there are no gradients to trace
        assert distance(read(model), wanted) < 1e-6
