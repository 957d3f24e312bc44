"""The gated delta rule: the naive version against closed forms, the chunked one and the step against the naive one."""

import pytest
import torch
from recurrence_inputs import (
    DECAYS,
    assert_close,
    delta_inputs,
    distance,
    gla_inputs,
    kda_inputs,
    output_state_gradients,
)
from torch.nn import functional as F

from statex.ops.gated_delta import chunk_gated_delta, naive_gated_delta, step_gated_delta
from statex.ops.gated_delta.chunk import across_chunks, in_chunks, inverse_of_unit_lower
from statex.ops.gla import naive_gla

INPUTS = {"head": delta_inputs, "channel": kda_inputs}
LENGTHS = (1, 63, 64, 65, 200)
every_decay = pytest.mark.parametrize("make_inputs", INPUTS.values(), ids=INPUTS)


def test_naive_is_a_product_of_matrices_and_a_sum():
    """S_t = (I - beta_t k_t^T k_t) diag(a_t) S_{t-1} + beta_t k_t^T v_t, written with matrices."""
    q, k, v, log_decay, beta, state = (x[0] for x in kda_inputs(6).values())
    output, last = naive_gated_delta(**kda_inputs(6), output_final_state=True)
    for head in range(3):
        S = state[head]
        for t in range(6):
            key = k[t, head][:, None]
            forget = torch.eye(8, dtype=torch.float64) - beta[t, head] * key @ key.T
            S = forget @ torch.diag(log_decay[t, head].exp()) @ S + beta[t, head] * key @ v[t, head][None]
            torch.testing.assert_close(output[0, t, head], 8**-0.5 * q[t, head] @ S)
        torch.testing.assert_close(last[0, head], S)


def test_a_key_that_was_written_whole_is_read_back():
    """With beta = 1 and no decay the state has for each key what was written last, whatever it had before."""
    inputs = delta_inputs(20, "none")
    inputs["beta"] = torch.ones_like(inputs["beta"])
    inputs["k"] = F.normalize(inputs["k"], dim=-1)  # of length 1 in fp64
    output, _ = chunk_gated_delta(**inputs | {"q": inputs["k"]}, scale=1.0)
    torch.testing.assert_close(output, inputs["v"])


def test_without_overlap_of_keys_it_is_gla():
    """Keys that are orthogonal to one another and to the state's rows correct nothing."""
    inputs = gla_inputs(8, key_dim=16)
    inputs["k"] = torch.eye(8, 16, dtype=torch.float64)[None, :, None].expand_as(inputs["k"]).contiguous()
    inputs["initial_state"][:, :, :8] = 0
    wanted, wanted_state = naive_gla(**inputs, output_final_state=True)
    beta = torch.ones(inputs["q"].shape[:3], dtype=torch.float64)
    got, state = chunk_gated_delta(**inputs, beta=beta, output_final_state=True)
    torch.testing.assert_close(got, wanted)
    torch.testing.assert_close(state, wanted_state)


def test_channels_that_decay_alike_are_a_head_that_decays():
    inputs = delta_inputs(70, "tokens")
    channels = inputs | {"log_decay": inputs["log_decay"][..., None].expand_as(inputs["q"])}
    for dtype, bound in ((torch.float64, 1e-13), (torch.float32, 1e-5)):
        one, other = (chunk_gated_delta(**{n: x.to(dtype) for n, x in i.items()})[0] for i in (inputs, channels))
        assert distance(one, other) < bound


@pytest.mark.parametrize("decay", DECAYS)
@pytest.mark.parametrize("num_tokens", LENGTHS)
@every_decay
def test_chunk_equals_naive(make_inputs, num_tokens, decay):
    inputs = make_inputs(num_tokens, decay)
    wanted = output_state_gradients(naive_gated_delta, inputs, torch.float64)
    assert_close(output_state_gradients(chunk_gated_delta, inputs, torch.float64), wanted, 1e-10)
    assert_close(output_state_gradients(chunk_gated_delta, inputs, torch.float32), wanted, 1e-5)


@pytest.mark.parametrize("most", [0.0, 1e-3, 1.0, 2.0])
@pytest.mark.parametrize("alike", [0.0, 0.9, 1.0])
@every_decay
def test_chunk_at_every_beta_and_with_keys_that_are_alike(make_inputs, most, alike):
    """The system of a chunk is farthest from the identity where all keys are the same one and nothing decays.

    At beta = 2 each token then reflects what the one before it wrote: a condition that grows with the chunk's square.
    """
    inputs = make_inputs(130, "weak", batch=1)
    inputs["beta"] = torch.full_like(inputs["beta"], most)
    mixed = alike * inputs["k"][:, :1] + (1 - alike) * inputs["k"]
    inputs["k"] = F.normalize(mixed, dim=-1).float().double()
    wanted = output_state_gradients(naive_gated_delta, inputs, torch.float64)
    wanted = {name: x for name, x in wanted.items() if x.any()}  # nothing is written where beta is 0
    assert_close(output_state_gradients(chunk_gated_delta, inputs, torch.float64), wanted, 1e-10)
    assert_close(
        output_state_gradients(chunk_gated_delta, inputs, torch.float32), wanted, 5e-4 if most == 2.0 else 1e-5
    )


@pytest.mark.parametrize("dims", [(3, 1), (5, 3), (64, 16), (512, 64), (1024, 8)], ids=str)
@every_decay
def test_chunk_at_every_key_dimension(make_inputs, dims):
    inputs = make_inputs(80, "tokens", batch=1, heads=1, key_dim=dims[0], value_dim=dims[1])
    wanted = output_state_gradients(naive_gated_delta, inputs, torch.float64, scale=0.3)
    assert_close(output_state_gradients(chunk_gated_delta, inputs, torch.float64, scale=0.3), wanted, 1e-10)
    assert_close(output_state_gradients(chunk_gated_delta, inputs, torch.float32, scale=0.3), wanted, 1e-5)


@pytest.mark.parametrize("decay", DECAYS)
@every_decay
def test_chunk_in_bf16_loses_only_the_digits_of_bf16(make_inputs, decay):
    inputs = {name: x.bfloat16().double() for name, x in make_inputs(65, decay).items()}
    wanted = output_state_gradients(naive_gated_delta, inputs, torch.float64)
    got = output_state_gradients(chunk_gated_delta, inputs, torch.bfloat16)
    assert got["output"].dtype == torch.bfloat16
    assert got["final_state"].dtype == torch.float32
    assert_close(got, wanted, 5e-3)


@pytest.mark.parametrize("decay", ["weak", "tokens", "strong"])
@every_decay
def test_operands_in_bf16_and_sums_in_fp32(make_inputs, decay):
    """What the kernels multiply where inputs are bf16, with PyTorch's walk."""

    def walk(values, removed, keys, queries, *others):
        assert {x.dtype for x in (removed, keys, queries)} == {torch.bfloat16}
        return across_chunks(values, removed.float(), keys.float(), queries.float(), *others)

    def recurrence(output_final_state, initial_state, **tokens):
        options = {"initial_state": initial_state, "output_final_state": output_final_state}
        return in_chunks(walk, inverse_of_unit_lower, **tokens, **options, scale=0.3, operands=torch.bfloat16)

    inputs = {name: x.bfloat16().double() for name, x in make_inputs(130, decay, batch=1, key_dim=32).items()}
    wanted = output_state_gradients(naive_gated_delta, inputs, torch.float64, scale=0.3)
    assert_close(output_state_gradients(recurrence, inputs, torch.float32), wanted, 1e-2)


@every_decay
def test_the_state_is_optional(make_inputs):
    inputs = make_inputs(70)
    del inputs["initial_state"]
    wanted, no_state = naive_gated_delta(**inputs)
    got, state = chunk_gated_delta(**inputs)
    assert no_state is state is None
    assert distance(got, wanted) < 1e-10


@every_decay
def test_two_calls_continue_one(make_inputs):
    inputs = make_inputs(101)
    state = inputs.pop("initial_state")
    wanted, wanted_state = chunk_gated_delta(**inputs, initial_state=state, output_final_state=True)
    outputs = []
    for part in (slice(0, 37), slice(37, 101)):
        tokens = {name: x[:, part] for name, x in inputs.items()}
        output, state = chunk_gated_delta(**tokens, initial_state=state, output_final_state=True)
        outputs.append(output)
    assert distance(torch.cat(outputs, dim=1), wanted) < 1e-12
    assert distance(state, wanted_state) < 1e-12


@every_decay
def test_everything_is_forgotten_at_minus_infinity(make_inputs):
    inputs = {name: x.requires_grad_() for name, x in make_inputs(80).items()}
    forgetful = inputs["log_decay"].detach().clone()
    forgetful[:, 30] = -torch.inf
    output, state = chunk_gated_delta(**inputs | {"log_decay": forgetful}, output_final_state=True)
    after = {name: x[:, 30:] for name, x in inputs.items() if name != "initial_state"}
    fresh, fresh_state = naive_gated_delta(**after, output_final_state=True)
    assert distance(output[:, 30:], fresh) < 1e-12
    assert distance(state, fresh_state) < 1e-12
    (state.sum() + output.sum()).backward()
    assert all(x.grad.isfinite().all() for name, x in inputs.items() if name != "log_decay")


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@every_decay
def test_step_equals_naive(make_inputs, dtype):
    inputs = {name: x.to(dtype) for name, x in make_inputs(20).items()}
    wanted, wanted_state = naive_gated_delta(**inputs, output_final_state=True)
    state = inputs.pop("initial_state").to(wanted_state.dtype)
    outputs = [step_gated_delta(*(x[:, t] for x in inputs.values()), state) for t in range(20)]
    assert outputs[0].dtype == dtype
    assert distance(torch.stack(outputs, dim=1), wanted) < {torch.float64: 1e-14, torch.float32: 1e-6}.get(dtype, 1e-3)
    assert distance(state, wanted_state) < (1e-14 if dtype == torch.float64 else 1e-6)


def test_step_updates_a_state_of_another_dtype_in_place():
    *tokens, state = (x.bfloat16() for x in delta_inputs(1).values())
    exact = state.float()
    step_gated_delta(*(x[:, 0] for x in tokens), state)
    step_gated_delta(*(x[:, 0] for x in tokens), exact)
    assert torch.equal(state, exact.bfloat16())


@every_decay
def test_autocast_does_not_reach_the_arithmetic(make_inputs):
    inputs = {name: x.float() for name, x in make_inputs(70).items()}
    wanted, _ = chunk_gated_delta(**inputs)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        got, _ = chunk_gated_delta(**inputs)
    assert torch.equal(got, wanted)


@every_decay
def test_nothing_of_size_time_squared_or_of_a_state_a_token_is_kept(make_inputs):
    num_tokens, dim = 2048, 32
    inputs = make_inputs(num_tokens, batch=1, heads=1, key_dim=dim, value_dim=dim)
    sizes = []

    def note(x):
        sizes.append(x.untyped_storage().nbytes() // x.element_size())
        return x

    with torch.autograd.graph.saved_tensors_hooks(note, lambda x: x):
        chunk_gated_delta(**{name: x.float().requires_grad_() for name, x in inputs.items()})
    assert max(sizes) <= 2 * num_tokens * dim
