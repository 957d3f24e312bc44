"""Sequences in segments: outputs are those of whole sequences, gradients those of states passed on detached."""

from functools import partial
from itertools import pairwise

import pytest
import torch
import torch.nn.functional as F
from recurrence_inputs import assert_close, gla_inputs, kda_inputs, selective_scan_inputs, ssd_inputs
from torch import nn
from torch.utils.checkpoint import checkpoint

import statex
from common import VOCABULARY, make_gla, make_hybrid, make_mamba2
from statex.models.caches import cache_argument, cache_of
from statex.models.dispatch import statex_ops
from statex.ops import carried_state, gated_delta, gla, gla_step, selective_scan, short_convolution, ssd
from statex.ops.segments import cu_seqlens_of

TOKENS, SEGMENTS = 36, 3
PER_TOKEN = {"q", "k", "v", "log_decay", "beta", "x", "dt", "B", "C"}


class Mixer(nn.Module):
    """An operation as a module's; the second of two calls has the inputs in reverse, and so another state."""

    def __init__(self, operation, twice=False, recomputed=False):
        super().__init__()
        self.operation, self.twice, self.recomputed = operation, twice, recomputed

    def forward(self, seq_idx=None, **inputs):
        output = self.operation(seq_idx, **inputs)
        if self.twice:
            output = output - 2 * self.operation(seq_idx, **inputs | {"v": -inputs["v"].cos()})
        return output

    def run(self, seq_idx, inputs):
        if self.recomputed:
            return checkpoint(self, seq_idx, use_reentrant=False, **inputs)
        return self(seq_idx, **inputs)


def recurrence(operation, seq_idx, **inputs):
    if seq_idx is None:
        return operation(**inputs)[0]
    rows = {name: x.reshape(1, -1, *x.shape[2:]) if name in PER_TOKEN else x for name, x in inputs.items()}
    output = operation(**rows, cu_seqlens=cu_seqlens_of(seq_idx))[0]
    return output.view(*seq_idx.shape, *output.shape[2:])


def convolution(seq_idx, **inputs):
    return short_convolution(**inputs, seq_idx=seq_idx)


def documents() -> torch.Tensor:
    """Rows of one and of five documents, borders inside segments and at them."""
    seq_idx = torch.zeros(2, TOKENS, dtype=torch.int32)
    for begin in (5, 12, 14, 30):
        seq_idx[1, begin:] += 1
    return seq_idx


def gla_case():
    inputs = gla_inputs(TOKENS)
    del inputs["initial_state"]
    return partial(recurrence, gla), inputs


def ssd_case():
    inputs = ssd_inputs(TOKENS)
    del inputs["initial_state"]
    return partial(recurrence, ssd), inputs


def selective_scan_case():
    inputs = selective_scan_inputs(TOKENS)
    del inputs["initial_state"]
    return partial(recurrence, selective_scan), inputs


def convolution_case():
    generator = torch.Generator().manual_seed(0)
    shapes = {"x": (2, TOKENS, 6), "weight": (6, 4), "bias": (6,)}
    return convolution, {name: torch.randn(*shape, generator=generator) for name, shape in shapes.items()}


def delta_case():
    inputs = kda_inputs(TOKENS)
    del inputs["initial_state"]
    return partial(recurrence, gated_delta), inputs


CASES = {
    "gla": gla_case,
    "ssd": ssd_case,
    "gated_delta": delta_case,
    "selective_scan": selective_scan_case,
    "convolution": convolution_case,
}


def cut(inputs, begin, end):
    return {name: x[:, begin:end] if name in PER_TOKEN else x for name, x in inputs.items()}


@pytest.mark.parametrize("recomputed", [False, True])
@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("case", CASES)
def test_segments_compute_what_the_whole_does(case, packed, recomputed):
    """Segments of different lengths, one shorter than what a convolution reaches back."""
    operation, inputs = CASES[case]()
    inputs = {name: x.float().requires_grad_() for name, x in inputs.items()}
    seq_idx = documents() if packed else None
    mixer = Mixer(operation, twice=case == "gla", recomputed=recomputed)
    wanted = mixer.run(seq_idx, inputs)
    borders, outputs = [0, 12, 14, 30, TOKENS], []
    with carried_state([mixer]) as carried:
        for begin, end in pairwise(borders):
            here = seq_idx[:, begin:end] if packed else None
            with carried.segment(here):
                outputs.append(mixer.run(here, cut(inputs, begin, end)))
                outputs[-1].sum().backward()
    assert_close({"output": torch.cat(outputs, dim=1)}, {"output": wanted}, 1e-5)
    for name in set(inputs) & {"k", "log_decay", "x", "dt", "B"}:  # nothing goes back over a border
        whole = torch.autograd.grad(wanted.sum(), inputs[name], retain_graph=True)[0]
        assert torch.allclose(inputs[name].grad[:, 30:], whole[:, 30:], rtol=1e-4, atol=1e-5), name
        assert not torch.allclose(inputs[name].grad[:, :30], whole[:, :30], rtol=1e-2), name


def test_what_cannot_be_carried_is_refused():
    q = torch.randn(1, 8, 2, 4)
    mixer = Mixer(lambda seq_idx, q, **options: gla(q, q, q, -q.abs(), **options)[0])
    step = Mixer(lambda seq_idx, q: gla_step(q[:, 0], q[:, 0], q[:, 0], -q[:, 0].abs(), torch.zeros(1, 2, 4, 4)))
    with carried_state([mixer, step]) as carried:
        mixer(q=q)  # outside of a segment nothing is carried
        with carried.segment():
            mixer(q=q, initial_state=torch.zeros(1, 2, 4, 4))
            with pytest.raises(ValueError, match="give it to segment"):
                mixer(q=q, cu_seqlens=torch.tensor([0, 8]))
            with pytest.raises(ValueError, match=r"gla_step cannot run on a part .*: carried_state has gated_delta"):
                step(q=q)
            with pytest.raises(ValueError, match="outside of the modules"):
                gla(q, q, q, -q.abs())
            with pytest.raises(ValueError, match="inside another"), carried.segment():
                pass
        with carried.segment(), pytest.raises(ValueError, match="only the first segment of it"):
            mixer(q=q, initial_state=torch.zeros(1, 2, 4, 4))
    assert not mixer._forward_hooks
    assert not mixer._forward_pre_hooks


@pytest.mark.parametrize("case", CASES)
def test_segments_of_other_sequences_are_refused(case):
    operation, inputs = CASES[case]()
    mixer, seq_idx = Mixer(operation), documents()
    fewer = {name: x[:1] if name in PER_TOKEN else x for name, x in inputs.items()}
    for first, then, given, message in (
        (None, None, fewer, "a segment has 1 rows and the one before it had 2"),
        (seq_idx, seq_idx[:1], fewer, "a segment has 1 rows and the one before it had 2"),
        (None, seq_idx, inputs, "seq_idx is given for some segments of a sequence and not for all"),
        (seq_idx, None, inputs, "seq_idx is given for some segments of a sequence and not for all"),
    ):
        with carried_state([mixer]) as carried:
            with carried.segment(first):
                mixer(first, **inputs)
            with pytest.raises(ValueError, match=message), carried.segment(then):
                mixer(then, **given)
            with carried.segment(first):
                pass  # one that is refused leaves nothing behind


MODELS = {
    "gla": partial(make_gla, use_short_conv=True, num_heads=4),
    "mamba2": partial(make_mamba2, n_groups=2),
    "mamba": partial(make_hybrid, "mamba"),
}


@pytest.fixture(params=MODELS)
def model(request):
    """A model of which one layer is expanded."""
    model = MODELS[request.param]()
    statex.expand(model, layers=[1], init="preserve")
    return model.train()


def mixers(model):
    return [module for name, module in model.named_modules() if name.endswith((".attn", ".mixer"))]


def summed_loss(logits, targets):
    return F.cross_entropy(logits.flatten(0, 1), targets.flatten(), reduction="sum")


def gradients(model):
    found = {name: parameter.grad for name, parameter in model.named_parameters()}
    model.zero_grad()
    return found


@pytest.mark.parametrize("recomputed", [False, True])
def test_models_in_segments(model, recomputed):
    """Against the model's own cache, whose states are detached by hand between segments."""
    ids, targets = torch.randint(VOCABULARY, (2, 2, TOKENS), generator=torch.Generator().manual_seed(0))
    pieces = list(zip(ids.chunk(SEGMENTS, 1), targets.chunk(SEGMENTS, 1)))
    with statex_ops():
        whole = model(input_ids=ids, use_cache=False).logits
        model.eval()  # with a cache, and by no checkpoint
        by_hand, cache = [], None
        for piece, labels in pieces:
            given = {} if cache is None else {cache_argument(model): cache}
            output = model(input_ids=piece, use_cache=True, **given)
            by_hand.append(output.logits)
            summed_loss(output.logits, labels).backward()
            cache = detached(cache_of(output))
        wanted = gradients(model)
        model.train()
        if recomputed:
            model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        with carried_state(mixers(model)) as carried:
            outputs = []
            for piece, labels in pieces:
                with carried.segment():
                    outputs.append(model(input_ids=piece, use_cache=False).logits)
                    summed_loss(outputs[-1], labels).backward()
    got = gradients(model)
    assert_close({"logits": torch.cat(outputs, 1)}, {"logits": whole}, 1e-5)
    assert_close({"logits": torch.cat(by_hand, 1)}, {"logits": whole}, 1e-5)
    assert got.keys() == wanted.keys()
    assert_close(got, wanted, 1e-5)
    with statex_ops():
        summed_loss(model(input_ids=ids, use_cache=False).logits, targets).backward()
    untruncated = gradients(model)
    assert any((got[name] - untruncated[name]).norm() > 1e-3 * got[name].norm() for name in got)


def detached(cache):
    for layer in cache.layers:
        for states in (layer.conv_states, layer.recurrent_states):
            states |= {number: state.detach().clone() for number, state in states.items() if state is not None}
    return cache


def test_packed_documents_of_a_model(model):
    """A segment's first document resumes from its own state; the others begin afresh."""
    ids, seq_idx = torch.randint(VOCABULARY, (2, TOKENS), generator=torch.Generator().manual_seed(0)), documents()

    def logits(ids, seq_idx):
        return model(input_ids=ids, seq_idx=seq_idx, use_cache=False).logits

    with statex_ops(), torch.no_grad(), carried_state(mixers(model)) as carried:
        whole = logits(ids, seq_idx)
        outputs = []
        for piece, index in zip(ids.chunk(SEGMENTS, 1), seq_idx.chunk(SEGMENTS, 1)):
            with carried.segment(index):
                outputs.append(logits(piece, index))
    assert_close({"logits": torch.cat(outputs, 1)}, {"logits": whole}, 1e-5)
