"""The first Mamba's selective scan: the naive version against others' definitions, the chunked one and the step."""

from functools import partial
from importlib import import_module
from types import SimpleNamespace

import pytest
import torch
from recurrence_inputs import (
    DECAYS,
    assert_close,
    distance,
    log_decay,
    output_state_gradients,
    selective_scan_inputs,
)
from transformers.models.mamba.modeling_mamba import mamba_selective_scan

from statex.ops import backends, selective_scan, selective_scan_step, use_backend
from statex.ops.selective_scan import chunk_selective_scan, naive_selective_scan, step_selective_scan
from statex.ops.ssd import naive_ssd

ON_GPU = SimpleNamespace(dtype=torch.bfloat16, device=torch.device("cuda:0"))


@pytest.fixture(params=[1, 2**20], ids=["one-chunk", "many-chunks"])
def busy(request, monkeypatch):
    """With how many elements a device is busy: hence whether chunks run side by side."""
    monkeypatch.setitem(import_module(chunk_selective_scan.__module__).BUSY, "cpu", request.param)


def test_naive_is_ssd_where_all_decays_of_a_channel_are_alike():
    """Heads of one channel each, all of one group."""
    x, dt, A, B, C, D, state = selective_scan_inputs(9).values()
    one = A[:, :1]
    wanted, last = naive_ssd(
        x[..., None],
        dt,
        one[:, 0],
        B[:, :, None],
        C[:, :, None],
        D=D,
        initial_state=state[:, :, None],
        output_final_state=True,
    )
    got, got_last = naive_selective_scan(
        x, dt, one.expand_as(A), B, C, D=D, initial_state=state, output_final_state=True
    )
    torch.testing.assert_close(got, wanted[..., 0])
    torch.testing.assert_close(got_last, last[:, :, 0])


def test_naive_is_transformers_scan():
    x, dt, A, B, C, D, _ = (tensor.float() for tensor in selective_scan_inputs(30).values())
    wanted = mamba_selective_scan(x.mT, dt.mT, A, B.mT, C.mT, D=D, return_last_state=True)
    got, state = naive_selective_scan(x, dt, A, B, C, D=D, output_final_state=True)
    assert distance(got.mT, wanted[0]) < 1e-6
    assert distance(state, wanted[1]) < 1e-6


@pytest.mark.parametrize("decay", DECAYS)
@pytest.mark.parametrize("num_tokens", [1, 2, 63, 64, 65, 300])
def test_chunk_equals_naive(num_tokens, decay, busy):
    inputs = selective_scan_inputs(num_tokens, decay)
    wanted = output_state_gradients(naive_selective_scan, inputs, torch.float64)
    assert_close(output_state_gradients(chunk_selective_scan, inputs, torch.float64), wanted, 1e-10)
    assert_close(output_state_gradients(chunk_selective_scan, inputs, torch.float32), wanted, 1e-5)


@pytest.mark.parametrize("sizes", [(1, 1), (5, 3), (16, 64), (4, 256)], ids=str)
def test_chunk_at_every_size_with_decays_as_mamba_has_them(sizes, busy):
    channels, state_size = sizes
    inputs = selective_scan_inputs(150, batch=1, channels=channels, state_size=state_size)
    inputs["A"] = -torch.arange(1.0, state_size + 1, dtype=torch.float64).expand(channels, -1).contiguous()
    inputs["dt"] = -log_decay("typical", inputs["dt"].shape)
    wanted = output_state_gradients(naive_selective_scan, inputs, torch.float64)
    assert_close(output_state_gradients(chunk_selective_scan, inputs, torch.float64), wanted, 1e-10)
    assert_close(output_state_gradients(chunk_selective_scan, inputs, torch.float32), wanted, 1e-5)


@pytest.mark.parametrize("decay", DECAYS)
def test_chunk_in_bf16_loses_only_the_digits_of_bf16(decay):
    inputs = {name: x.bfloat16().double() for name, x in selective_scan_inputs(65, decay).items()}
    wanted = output_state_gradients(naive_selective_scan, inputs, torch.float64)
    got = output_state_gradients(chunk_selective_scan, inputs, torch.bfloat16)
    assert (got["output"].dtype, got["final_state"].dtype) == (torch.bfloat16, torch.float32)
    assert_close(got, wanted, 5e-3)


def test_gradcheck(busy):
    inputs = [x.requires_grad_() for x in selective_scan_inputs(5, batch=1, channels=2, state_size=3).values()]

    def both(x, dt, A, B, C, D, state):
        return chunk_selective_scan(x, dt, A, B, C, D=D, initial_state=state, output_final_state=True)

    assert torch.autograd.gradcheck(both, inputs)


@pytest.mark.parametrize("recurrence", [naive_selective_scan, chunk_selective_scan])
def test_state_and_skip_are_optional(recurrence):
    inputs = selective_scan_inputs(40)
    bare = {name: inputs[name] for name in ("x", "dt", "A", "B", "C")}
    got, state = recurrence(**bare)
    assert state is None
    zeros = {name: torch.zeros_like(inputs[name]) for name in ("D", "initial_state")}
    assert distance(got, recurrence(**bare, **zeros)[0]) < 1e-14


def test_two_calls_continue_one():
    inputs = selective_scan_inputs(101)
    fixed = {name: inputs.pop(name) for name in ("A", "D")}
    state = inputs.pop("initial_state")
    scan = partial(chunk_selective_scan, **fixed, output_final_state=True)
    wanted, wanted_state = scan(**inputs, initial_state=state)
    outputs = []
    for part in (slice(0, 37), slice(37, 101)):
        output, state = scan(**{name: x[:, part] for name, x in inputs.items()}, initial_state=state)
        outputs.append(output)
    assert distance(torch.cat(outputs, dim=1), wanted) < 1e-12
    assert distance(state, wanted_state) < 1e-12


def test_a_state_at_a_border_has_no_part_in_the_next_segment():
    inputs = selective_scan_inputs(30, batch=1)
    inputs["initial_state"] = torch.zeros(2, *inputs["initial_state"].shape[1:], dtype=torch.float64)
    borders = torch.tensor([0, 11, 30])
    wanted = selective_scan(**inputs, cu_seqlens=borders)[0]
    inputs["x"] = torch.cat([1e6 * inputs["x"][:, :11], inputs["x"][:, 11:]], dim=1)
    assert torch.equal(selective_scan(**inputs, cu_seqlens=borders)[0][:, 11:], wanted[:, 11:])


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("skip", [True, False])
def test_step_equals_naive(dtype, skip):
    inputs = {name: x.to(dtype) for name, x in selective_scan_inputs(20).items()}
    inputs["D"] = inputs["D"] if skip else None
    wanted, wanted_state = naive_selective_scan(**inputs, output_final_state=True)
    x, dt, A, B, C, D, state = inputs.values()
    state = state.to(wanted_state.dtype)
    outputs = [step_selective_scan(x[:, t], dt[:, t], A, B[:, t], C[:, t], state, D=D) for t in range(20)]
    assert outputs[0].dtype == dtype
    assert distance(torch.stack(outputs, dim=1), wanted) < {torch.float64: 1e-14, torch.float32: 1e-6}.get(dtype, 1e-3)
    assert distance(state, wanted_state) < (1e-14 if dtype == torch.float64 else 1e-6)


def test_the_public_functions():
    inputs = selective_scan_inputs(30)
    assert torch.equal(selective_scan(**inputs)[0], chunk_selective_scan(**inputs)[0])
    x, dt, A, B, C, D, state = inputs.values()
    token, states = (x[:, 0], dt[:, 0], A, B[:, 0], C[:, 0]), (state.clone(), state.clone())
    assert torch.equal(selective_scan_step(*token, states[0], D=D), step_selective_scan(*token, states[1], D=D))
    assert torch.equal(*states)
    assert backends.choose("selective_scan", "auto", ON_GPU) is chunk_selective_scan
    with use_backend("triton"), pytest.raises(ValueError, match="needs CUDA tensors"):
        selective_scan(**inputs)


@pytest.mark.parametrize(
    ("name", "expected"),
    [("dt", (2, 9, 6)), ("A", (6, 8)), ("B", (2, 9, 8)), ("C", (2, 9, 8)), ("D", (6,)), ("initial_state", (2, 6, 8))],
)
def test_a_wrong_shape_is_refused(name, expected):
    inputs = selective_scan_inputs(9)
    wrong = torch.zeros(7, *expected[1:])
    with pytest.raises(ValueError, match=f"^{name} has shape .*, expected ") as caught:
        selective_scan(**inputs | {name: wrong})
    assert str(caught.value) == f"{name} has shape {tuple(wrong.shape)}, expected {expected}"


def test_autocast_does_not_reach_the_arithmetic():
    inputs = {name: x.float() for name, x in selective_scan_inputs(70).items()}
    wanted, _ = chunk_selective_scan(**inputs)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(chunk_selective_scan(**inputs)[0], wanted)


def test_no_state_a_token_is_kept(busy):
    num_tokens, dim, sizes = 2048, 32, []
    inputs = selective_scan_inputs(num_tokens, batch=1, channels=dim, state_size=dim)

    def note(x):
        sizes.append(x.untyped_storage().nbytes() // x.element_size())
        return x

    with torch.autograd.graph.saved_tensors_hooks(note, lambda x: x):
        chunk_selective_scan(**{name: x.float().requires_grad_() for name, x in inputs.items()})
    assert max(sizes) <= 2 * num_tokens * dim
