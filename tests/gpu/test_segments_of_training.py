"""Models in segments that carry their states, on the kernels: outputs of the whole, gradients of PyTorch's path."""

import pytest
import torch
import torch.nn.functional as F

pytest.importorskip("triton")

import statex
from common import VOCABULARY, make_gla, make_mamba2
from statex.models.dispatch import statex_ops
from statex.ops import carried_state, use_backend

pytestmark = pytest.mark.gpu

TOKENS, SEGMENTS = 768, 3
BOUND = 1e-4  # what the kernels' own tests ask for in fp32
MODELS = {
    "gla": lambda: make_gla(use_short_conv=True, hidden_size=128, num_heads=4),
    "mamba2": lambda: make_mamba2(hidden_size=128, num_heads=16, state_size=32, n_groups=2),
}


def in_segments(model, ids, targets, seq_idx, backend):
    """Logits, and gradients of the sum of the cross-entropies."""
    model.zero_grad()
    mixers = [module for name, module in model.named_modules() if name.endswith((".attn", ".mixer"))]
    logits = []
    with statex_ops(), use_backend(backend), carried_state(mixers) as carried:
        for piece, labels, index in zip(*(x.chunk(SEGMENTS, 1) for x in (ids, targets, seq_idx))):
            with carried.segment(index):
                logits.append(model(input_ids=piece, seq_idx=index, use_cache=False).logits)
                F.cross_entropy(logits[-1].flatten(0, 1), labels.flatten(), reduction="sum").backward()
    return torch.cat(logits, 1), {name: parameter.grad.clone() for name, parameter in model.named_parameters()}


def distance(a, b):
    return ((a - b).norm() / b.norm()).item()


@pytest.mark.parametrize("recomputed", [False, True])
@pytest.mark.parametrize("family", MODELS)
def test_segments_compute_what_the_whole_does(family, recomputed):
    model = MODELS[family]()
    statex.expand(model, layers=[1], init="preserve")
    model.cuda().train()
    if recomputed:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    ids, targets = torch.randint(VOCABULARY, (2, 2, TOKENS), device="cuda")
    seq_idx = torch.zeros(2, TOKENS, dtype=torch.int32, device="cuda")
    for begin in (100, 300, 512, 513):
        seq_idx[1, begin:] += 1
    got, gradients = in_segments(model, ids, targets, seq_idx, "triton")
    _, wanted = in_segments(model, ids, targets, seq_idx, "torch")
    with statex_ops(), torch.no_grad():
        whole = model(input_ids=ids, seq_idx=seq_idx, use_cache=False).logits
    assert distance(got, whole) < BOUND
    wrong = {name: distance(gradients[name], wanted[name]) for name in wanted}
    assert max(wrong.values()) < 10 * BOUND, wrong
