"""The generalised delta rule: the naive version against closed forms, the chunked one and the step against it."""

from itertools import pairwise
from types import SimpleNamespace

import pytest
import torch
from recurrence_inputs import (
    DECAYS,
    assert_close,
    distance,
    generalized_delta_inputs,
    kda_inputs,
    output_state_gradients,
)

from statex.ops import backends, generalized_delta, generalized_delta_step, use_backend
from statex.ops.gated_delta import naive_gated_delta
from statex.ops.generalized_delta import chunk_generalized_delta, naive_generalized_delta, step_generalized_delta

ON_GPU = SimpleNamespace(dtype=torch.bfloat16, device=torch.device("cuda:0"))
LENGTHS = (1, 2, 63, 64, 65, 200)


def test_naive_is_rwkv7_s_recurrence():
    """S = S diag(w) - (S kk)(kk * rate)^T + v k^T with a state of values x keys, read after the update."""
    inputs = generalized_delta_inputs(6)
    output, last = naive_generalized_delta(**inputs, scale=1.0, output_final_state=True)
    r, k, v, log_decay, a, b, state = (x[0] for x in inputs.values())
    for head in range(3):
        S = state[head].T
        for t in range(6):
            kk, written = -a[t, head], b[t, head]
            S = S * log_decay[t, head].exp() - torch.outer(S @ kk, written) + torch.outer(v[t, head], k[t, head])
            torch.testing.assert_close(output[0, t, head], S @ r[t, head])
        torch.testing.assert_close(last[0, head], S.T)


def test_the_gated_delta_rule_is_a_case_of_it():
    """There what is replaced is what the decayed state has: a = -beta k * decay."""
    inputs = kda_inputs(70)
    beta = inputs.pop("beta")[..., None]
    wanted, wanted_state = naive_gated_delta(**inputs, beta=beta[..., 0], output_final_state=True)
    k, decay = inputs["k"], inputs["log_decay"].exp()
    got, state = chunk_generalized_delta(
        **inputs | {"k": beta * k, "a": -beta * k * decay, "b": k}, output_final_state=True
    )
    assert distance(got, wanted) < 1e-12
    assert distance(state, wanted_state) < 1e-12


@pytest.mark.parametrize("decay", DECAYS)
@pytest.mark.parametrize("num_tokens", LENGTHS)
def test_chunk_equals_naive(num_tokens, decay):
    inputs = generalized_delta_inputs(num_tokens, decay)
    wanted = output_state_gradients(naive_generalized_delta, inputs, torch.float64)
    assert_close(output_state_gradients(chunk_generalized_delta, inputs, torch.float64), wanted, 1e-10)
    assert_close(output_state_gradients(chunk_generalized_delta, inputs, torch.float32), wanted, 1e-5)


@pytest.mark.parametrize("dims", [(3, 1), (5, 3), (64, 16), (256, 64)], ids=str)
def test_chunk_at_every_key_dimension(dims):
    inputs = generalized_delta_inputs(80, "tokens", batch=1, heads=1, key_dim=dims[0], value_dim=dims[1])
    wanted = output_state_gradients(naive_generalized_delta, inputs, torch.float64, scale=1.0)
    assert_close(output_state_gradients(chunk_generalized_delta, inputs, torch.float64, scale=1.0), wanted, 1e-10)
    assert_close(output_state_gradients(chunk_generalized_delta, inputs, torch.float32, scale=1.0), wanted, 1e-5)


def test_chunk_in_bf16_loses_only_the_digits_of_bf16():
    inputs = {name: x.bfloat16().double() for name, x in generalized_delta_inputs(65).items()}
    wanted = output_state_gradients(naive_generalized_delta, inputs, torch.float64)
    got = output_state_gradients(chunk_generalized_delta, inputs, torch.bfloat16)
    assert got["output"].dtype == torch.bfloat16
    assert got["final_state"].dtype == torch.float32
    assert_close(got, wanted, 5e-3)


@pytest.mark.parametrize("recurrence", [naive_generalized_delta, chunk_generalized_delta])
def test_segments_equal_separate_sequences(recurrence):
    inputs = generalized_delta_inputs(70, batch=1)
    borders = [0, 3, 3, 40, 70]
    inputs["initial_state"] = torch.randn(4, *inputs["initial_state"].shape[1:], dtype=torch.float64)
    got, states = recurrence(**inputs, output_final_state=True, cu_seqlens=torch.tensor(borders))
    for s, (start, end) in enumerate(pairwise(borders)):
        part = {name: x[:, start:end] for name, x in inputs.items() if name != "initial_state"}
        state = inputs["initial_state"][s : s + 1]
        if start == end:
            assert torch.equal(states[s], state[0])
            continue
        wanted, last = naive_generalized_delta(**part, initial_state=state, output_final_state=True)
        assert distance(got[:, start:end], wanted) < 1e-12
        assert distance(states[s], last[0]) < 1e-12


def test_two_calls_continue_one():
    inputs = generalized_delta_inputs(101)
    state = inputs.pop("initial_state")
    wanted, wanted_state = chunk_generalized_delta(**inputs, initial_state=state, output_final_state=True)
    outputs = []
    for part in (slice(0, 37), slice(37, 101)):
        tokens = {name: x[:, part] for name, x in inputs.items()}
        output, state = chunk_generalized_delta(**tokens, initial_state=state, output_final_state=True)
        outputs.append(output)
    assert distance(torch.cat(outputs, dim=1), wanted) < 1e-12
    assert distance(state, wanted_state) < 1e-12


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_step_equals_naive(dtype):
    inputs = {name: x.to(dtype) for name, x in generalized_delta_inputs(20).items()}
    wanted, wanted_state = naive_generalized_delta(**inputs, output_final_state=True)
    state = inputs.pop("initial_state").to(wanted_state.dtype)
    outputs = [step_generalized_delta(*(x[:, t] for x in inputs.values()), state) for t in range(20)]
    assert outputs[0].dtype == dtype
    assert distance(torch.stack(outputs, dim=1), wanted) < {torch.float64: 1e-14, torch.float32: 1e-6}.get(dtype, 1e-3)
    assert distance(state, wanted_state) < (1e-14 if dtype == torch.float64 else 1e-6)


def test_the_public_functions():
    inputs = generalized_delta_inputs(30)
    assert torch.equal(generalized_delta(**inputs)[0], chunk_generalized_delta(**inputs)[0])
    *tokens, state = inputs.values()
    tokens, states = [x[:, 0] for x in tokens], (state.clone(), state.clone())
    got = generalized_delta_step(*tokens, states[0], scale=0.5)
    assert torch.equal(got, step_generalized_delta(*tokens, states[1], scale=0.5))
    assert torch.equal(*states)
    for name in ("k", "log_decay", "a", "b"):
        with pytest.raises(ValueError, match=rf"^{name} has shape \(2, 30, 3, 9\), expected \(2, 30, 3, 8\)"):
            generalized_delta(**inputs | {name: torch.zeros(2, 30, 3, 9)})
    assert backends.choose("generalized_delta", "auto", ON_GPU) is chunk_generalized_delta
    with use_backend("triton"), pytest.raises(ValueError, match="needs CUDA tensors"):
        generalized_delta(**inputs)


def test_compiled_code_takes_it_as_one_operator():
    inputs = generalized_delta_inputs(70, batch=1)

    def compiled(**given):
        return torch.compile(generalized_delta, backend="aot_eager", fullgraph=True)(**given)

    wanted = output_state_gradients(chunk_generalized_delta, inputs, torch.float32)
    assert_close(output_state_gradients(compiled, inputs, torch.float32), wanted, 1e-6)


def test_autocast_does_not_reach_the_arithmetic():
    inputs = {name: x.float() for name, x in generalized_delta_inputs(70).items()}
    wanted, _ = chunk_generalized_delta(**inputs)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        got, _ = chunk_generalized_delta(**inputs)
    assert torch.equal(got, wanted)
