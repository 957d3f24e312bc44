"""Models of hybrid classes none of whose layers has attention: their cache counts no tokens, and is asked for them."""

import pytest
import torch

import statex
from common import distance, logits, make_hybrid, tokens
from delta_models import make_delta
from statex.evaluation.reader import Reader
from statex.models.documents import has_attention
from statex.models.limits import context_limit

LINEAR = "linear_attention"
MODELS = {
    "bamba": lambda: make_hybrid("bamba", attn_layer_indices=[], num_hidden_layers=2),
    "zamba2": lambda: make_hybrid("zamba2", layers_block_type=[LINEAR] * 2, num_hidden_layers=2),
    "nemotron_h": lambda: make_hybrid("nemotron_h", layers_block_type=["mlp", LINEAR]),
    "jamba": lambda: make_hybrid("jamba", attn_layer_period=9, attn_layer_offset=8, num_experts=1),
    "qwen3_next": lambda: make_delta("qwen3_next", layer_types=[LINEAR], num_hidden_layers=1),
    "minimax": lambda: make_delta("minimax", layer_types=[LINEAR] * 2, num_hidden_layers=2),
}


def greedy(model, ids, mask=None, **kwargs):
    mask = torch.ones_like(ids) if mask is None else mask
    options = {"max_new_tokens": 6, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    return model.generate(ids, attention_mask=mask, **options, **kwargs)[:, ids.shape[1] :]


@pytest.mark.parametrize("family", MODELS)
def test_it_reads_and_generates(family):
    model = MODELS[family]()
    assert not has_attention(model.base_model)
    assert context_limit(model) is None
    ids = tokens(length=21)
    with statex.statex_ops():
        nll = Reader(model, piece=8).next_token_nll(ids)
        wanted = -logits(model, ids).log_softmax(-1)[:, :-1].gather(-1, ids[:, 1:, None])[..., 0]
    assert distance(nll, wanted) < 1e-5

    statex.expand(model, every=1, factor=2)
    for options in ({}, {"num_beams": 2}):
        assert torch.equal(greedy(model, ids, **options), greedy(model, ids, use_cache=False, **options))
    padded, mask = torch.nn.functional.pad(ids, (3, 0)), torch.nn.functional.pad(torch.ones_like(ids), (3, 0))
    assert torch.equal(greedy(model, padded, mask), greedy(model, ids))
    seq_idx = torch.tensor([[0] * 9 + [1] * 12] * len(ids))
    with torch.no_grad():
        apart = model(ids, seq_idx=seq_idx).logits
    wanted = torch.cat([logits(model, document) for document in ids.split([9, 12], dim=1)], dim=1)
    torch.testing.assert_close(apart, wanted, rtol=1e-4, atol=1e-4)
