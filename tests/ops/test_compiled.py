"""What torch.compile makes of the ops, in one graph, forward and backward; and the operators that it takes whole."""

import pytest
import torch
from recurrence_inputs import (
    assert_close,
    delta_inputs,
    generalized_delta_inputs,
    gla_inputs,
    kda_inputs,
    output_state_gradients,
    selective_scan_inputs,
    ssd_inputs,
)

from layer_inputs import convolution_inputs, norm_inputs, output_and_gradients
from statex.ops import gated_delta, generalized_delta, gla, selective_scan, ssd

OPS = {"gla": (gla, gla_inputs), "ssd": (ssd, ssd_inputs)}
OPS |= {"gated_delta": (gated_delta, delta_inputs), "kda": (gated_delta, kda_inputs)}
OPS["generalized_delta"] = generalized_delta, generalized_delta_inputs
OPS["selective_scan"] = selective_scan, selective_scan_inputs
SMALL = {"gla": {"heads": 1, "key_dim": 16, "value_dim": 16}, "ssd": {"heads": 2, "head_dim": 16, "state_size": 16}}
SMALL |= dict.fromkeys(("gated_delta", "kda"), SMALL["gla"])
BORDERS = [0, 30, 30, 70]
SHAPES_ALONE = ("test_schema", "test_autograd_registration", "test_faketensor")
# not the values: what a kernel leaves for the backward pass may hold places that nobody writes or reads


@pytest.fixture(autouse=True)
def fresh_compiler():
    torch.manual_seed(0)
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


@pytest.fixture
def interpreter():
    if torch.cuda.is_available():
        pytest.skip("the kernels are compiled where there is a GPU: tests/gpu/test_compiled_on_gpu.py")
    pytest.importorskip("triton")


def compiled(function, **options):
    return torch.compile(function, fullgraph=True, backend="aot_eager", **options)


def packed(make_inputs, **sizes):
    """Inputs of one row of segments, one of them empty, and the options that say so."""
    inputs = make_inputs(BORDERS[-1], batch=1, **sizes)
    shape = inputs["initial_state"].shape
    inputs["initial_state"] = torch.randn(len(BORDERS) - 1, *shape[1:], dtype=torch.float64)
    return inputs, {"cu_seqlens": torch.tensor(BORDERS)}


@pytest.mark.parametrize("is_packed", [False, True], ids=["rows", "segments"])
@pytest.mark.parametrize("op", OPS)
def test_a_recurrence_and_its_gradients(op, is_packed):
    function, make_inputs = OPS[op]
    inputs, options = packed(make_inputs) if is_packed else (make_inputs(70), {})
    wanted = output_state_gradients(function, inputs, torch.float32, **options)
    found = output_state_gradients(compiled(function), inputs, torch.float32, **options)
    assert all(torch.equal(found[name], wanted[name]) for name in wanted)


@pytest.mark.parametrize("op", OPS)
def test_what_is_optional_may_be_left_out(op):
    function, make_inputs = OPS[op]
    inputs = {name: x.float().requires_grad_() for name, x in make_inputs(40).items()}
    given = {name: x for name, x in inputs.items() if name not in ("initial_state", "D")}
    output, state = compiled(function)(**given)
    assert state is None
    output.square().sum().backward()
    found = {name: x.grad for name, x in given.items()}
    wanted = torch.autograd.grad(function(**given)[0].square().sum(), list(given.values()))
    assert all(torch.equal(found[name], x) for name, x in zip(given, wanted, strict=True))
    with torch.no_grad():
        found, wanted = (each(**given, output_final_state=True)[1] for each in (compiled(function), function))
    assert torch.equal(found, wanted)


@pytest.mark.parametrize("op", OPS)
def test_one_graph_serves_every_number_of_tokens_and_segments(op):
    function, make_inputs = OPS[op]
    once = compiled(function)
    with torch._dynamo.config.patch(error_on_recompile=True):
        for borders in ([0, 40, 50, 90], [0, 33, 130, 130, 200]):
            inputs = {name: x.float().requires_grad_() for name, x in make_inputs(borders[-1], batch=1).items()}
            cu_seqlens = torch.tensor(borders)
            state = torch.randn(len(borders) - 1, *inputs.pop("initial_state").shape[1:], requires_grad=True)
            for x in (*(x for name, x in inputs.items() if name not in ("A", "D")),):
                torch._dynamo.mark_dynamic(x, 1)
            for x in (state, cu_seqlens):
                torch._dynamo.mark_dynamic(x, 0)
            options = {"initial_state": state, "cu_seqlens": cu_seqlens, "output_final_state": True}
            found, wanted = once(**inputs, **options), function(**inputs, **options)
            assert all(torch.equal(a, b) for a, b in zip(found, wanted, strict=True))
            sum(x.sum() for x in found).backward()


def test_autocast_does_not_reach_the_arithmetic():
    inputs = {name: x.float() for name, x in gla_inputs(40).items()}
    with torch.autocast("cpu", torch.bfloat16):
        found, _ = compiled(gla)(**inputs)
    assert torch.equal(found, gla(**inputs)[0])


def test_mistakes_are_reported_during_tracing():
    inputs = {name: x.float() for name, x in gla_inputs(20).items()}
    with pytest.raises(RuntimeError, match=r"ValueError: k has shape \(2, 20, 3, 9\), expected \(2, 20, 3, 8\)"):
        compiled(gla)(**inputs | {"k": torch.zeros(2, 20, 3, 9)})
    with pytest.raises(RuntimeError, match=r"ValueError: backend='triton' needs CUDA tensors"):
        compiled(gla)(**inputs, backend="triton")


@pytest.mark.parametrize("op", OPS)
def test_wrong_borders_are_reported_when_it_runs(op):
    function, make_inputs = OPS[op]
    inputs = {name: x.float() for name, x in make_inputs(20, batch=1).items() if name != "initial_state"}
    with pytest.raises(ValueError, match="expected borders rising from 0 to T = 20"):
        compiled(function)(**inputs, cu_seqlens=torch.tensor([0, 10]))


def in_order(inputs):
    """fp32 arguments of an operator that want gradients."""
    return tuple(x.float().requires_grad_() for x in inputs.values())


@pytest.mark.parametrize("is_packed", [False, True], ids=["rows", "segments"])
def test_the_operators_of_the_chunked_recurrences_are_sound(is_packed):
    for op, (_, make_inputs) in OPS.items():
        inputs, options = packed(make_inputs) if is_packed else (make_inputs(70), {})
        others = (True,) if op in ("ssd", "selective_scan") else (0.5, True)
        operator = getattr(torch.ops.statex, f"chunk_{op}".replace("kda", "gated_delta")).default
        torch.library.opcheck(operator, (*in_order(inputs), options.get("cu_seqlens"), *others))


@pytest.mark.parametrize("is_packed", [False, True], ids=["rows", "segments"])
@pytest.mark.parametrize("op", SMALL)
def test_kernels_of_a_recurrence(op, is_packed, interpreter, monkeypatch):
    from statex.ops.gated_delta import triton
    from statex.ops.gated_delta.triton import triton_gated_delta
    from statex.ops.gla.triton import triton_gla
    from statex.ops.ssd.triton import triton_ssd

    if op == "gated_delta":  # the fused kernels in fp32, too: the interpreter has no bf16
        monkeypatch.setattr(triton, "fits", lambda *_: True)
    function, make_inputs = {"gla": triton_gla, "ssd": triton_ssd}.get(op, triton_gated_delta), OPS[op][1]
    inputs, options = packed(make_inputs, **SMALL[op]) if is_packed else (make_inputs(65, batch=1, **SMALL[op]), {})
    wanted = output_state_gradients(function, inputs, torch.float32, **options)
    found = output_state_gradients(compiled(function, dynamic=True), inputs, torch.float32, **options)
    assert all(torch.equal(found[name], wanted[name]) for name in wanted)
    others = {"gla": (0.5, True, True), "ssd": (True,)}.get(op, (0.5, True))
    operator = getattr(torch.ops.statex, op.replace("kda", "walked_gated_delta")).default
    given = (*in_order(inputs), options.get("cu_seqlens"), *others)
    torch.library.opcheck(operator, given, test_utils=SHAPES_ALONE)


@pytest.mark.parametrize("extra", [("bias", "documents"), ("bias", "short-context")], ids=str)
def test_kernels_of_the_convolution(extra, interpreter):
    from statex.ops.triton_convolution import triton_short_convolution

    inputs = convolution_inputs((2, 9, 24, 4), extra)
    wanted = output_and_gradients(triton_short_convolution, inputs)
    assert_close(output_and_gradients(compiled(triton_short_convolution), inputs), wanted, 1e-6)
    given = [inputs[name].requires_grad_() for name in ("x", "weight", "bias")]
    torch.library.opcheck(
        torch.ops.statex.short_convolution.default, (*given, inputs.get("seq_idx")), test_utils=SHAPES_ALONE
    )


@pytest.mark.parametrize(("has_weight", "has_gate"), [(True, True), (False, True), (True, False)])
def test_kernels_of_the_norm(has_weight, has_gate, interpreter):
    from statex.ops.triton_gated_norm import triton_gated_rms_norm

    inputs, options = norm_inputs((7, 24, 8), has_weight, has_gate), {"eps": 1e-5, "group_size": 8}
    wanted = output_and_gradients(triton_gated_rms_norm, inputs, **options)
    assert_close(output_and_gradients(compiled(triton_gated_rms_norm), inputs, **options), wanted, 1e-6)
    given = [inputs[name].detach().requires_grad_() if name in inputs else None for name in ("x", "weight", "gate")]
    torch.library.opcheck(torch.ops.statex.gated_rms_norm.default, (*given, 1e-5, 8, False), test_utils=SHAPES_ALONE)


def test_there_is_room_for_the_chunks_of_any_borders(interpreter):
    from statex.ops.triton_layout import make_layout, most_chunks

    for borders in ([0, 1, 2, 3, 4], [0, 65, 130, 195, 260], [0, 0, 0, 0, 256], [0, 1, 66, 67, 500]):
        cu_seqlens, tokens = torch.tensor(borders), borders[-1]
        exact = make_layout(1, tokens, cu_seqlens, 64, torch.device("cpu")).num_chunks
        assert exact <= most_chunks(1, tokens, cu_seqlens, 64) <= exact + len(borders) - 1
    assert most_chunks(3, 65, None, 64) == make_layout(3, 65, None, 64, torch.device("cpu")).num_chunks


def test_without_gradients_the_compiler_fuses_the_layer_ops(monkeypatch):
    from statex.ops import backends

    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)
    monkeypatch.setattr(backends, "_choose_backend", lambda *_: "triton")
    monkeypatch.setattr(backends, "_triton_functions", dict.fromkeys(backends.TRITON, "kernel"))
    x = torch.zeros(1)
    with_gradients = {op for op in backends.TRITON if backends.choose(op, "auto", x) == "kernel"}
    with torch.no_grad():
        without = {op for op in backends.TRITON if backends.choose(op, "auto", x) == "kernel"}
    assert without == {"gated_delta", "gated_delta_step", "gla", "gla_step", "ssd", "ssd_step"}
    assert with_gradients == without | {"short_convolution", "gated_rms_norm"}
