"""The short convolution and the gated norm: PyTorch against their definitions, the interpreted kernels against it."""

import pytest
import torch
from recurrence_inputs import assert_close, distance
from torch.nn import functional as F

from layer_inputs import CONVOLUTIONS, NORMS, convolution_inputs, norm_inputs, output_and_gradients
from statex.ops import gated_rms_norm, short_convolution, short_convolution_step
from statex.ops.convolution import shifted_convolution, step_convolution
from statex.ops.gated_norm import plain_gated_rms_norm

EXTRAS = [(), ("bias",), ("bias", "context"), ("short-context",), ("bias", "documents"), ("context", "documents")]
CASES = [(name, extra) for name in CONVOLUTIONS for extra in (EXTRAS if name == "usual" else EXTRAS[2:5:2])]
WAYS = [(weight, gate, first) for weight in (True, False) for gate in (True, False) for first in (True, False)]


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


@pytest.fixture
def interpreter():
    if torch.cuda.is_available():
        pytest.skip("the kernels are compiled where there is a GPU: tests/gpu has the same cases")
    pytest.importorskip("triton")


def test_the_convolution_is_that_of_conv1d():
    inputs = convolution_inputs(CONVOLUTIONS["usual"], ("bias",))
    x, weight, bias = inputs.values()
    wanted = F.conv1d(x.mT, weight[:, None], bias, padding=weight.shape[1] - 1, groups=len(weight))[..., : x.shape[1]]
    assert distance(short_convolution(**inputs), F.silu(wanted).mT) < 1e-6


def test_the_norm_is_that_of_its_formula():
    x, weight, gate = norm_inputs((7, 24, 8), True, True, torch.float64).values()
    gated = (x * F.silu(gate)).view(7, 3, 8)
    wanted = (gated / (gated.square().mean(-1, keepdim=True) + 1e-3).sqrt()).view(7, 24) * weight
    assert distance(gated_rms_norm(x, weight, gate, eps=1e-3, group_size=8, gate_first=True), wanted) < 1e-12
    wanted = x / (x.square().mean(-1, keepdim=True) + 1e-3).sqrt() * weight * F.silu(gate)
    assert distance(gated_rms_norm(x, weight, gate, eps=1e-3), wanted) < 1e-12


def test_results_have_the_dtype_of_x():
    inputs = convolution_inputs(CONVOLUTIONS["usual"], ("bias",))
    assert short_convolution(**inputs | {"x": inputs["x"].bfloat16()}).dtype == torch.bfloat16
    inputs = norm_inputs(NORMS["one-group"], True, True)
    assert gated_rms_norm(**inputs | {"x": inputs["x"].bfloat16()}, eps=1e-5).dtype == torch.bfloat16


@pytest.mark.parametrize(("name", "extra"), CASES)
def test_the_kernels_of_the_convolution(name, extra, interpreter):
    from statex.ops.triton_convolution import triton_short_convolution

    inputs = convolution_inputs(CONVOLUTIONS[name], extra)
    wanted = output_and_gradients(shifted_convolution, inputs, torch.float64)
    if "documents" in extra:
        wanted["left_context"] = None  # a context belongs to no document
        wanted = {name: x for name, x in wanted.items() if x is not None}
    assert_close(output_and_gradients(triton_short_convolution, inputs), wanted, 1e-6)
    with torch.no_grad():
        assert distance(triton_short_convolution(**inputs), wanted["output"]) < 1e-6


def test_the_kernels_of_the_convolution_on_long_strips(interpreter, monkeypatch):
    from statex.ops import triton_convolution

    monkeypatch.setattr(triton_convolution, "ENOUGH", 0)
    inputs = convolution_inputs((1, triton_convolution.LONG_STRIP + 3, 24, 4), ("bias", "documents"))
    wanted = output_and_gradients(shifted_convolution, inputs, torch.float64)
    assert_close(output_and_gradients(triton_convolution.triton_short_convolution, inputs), wanted, 1e-6)


def steps(function, inputs):
    """The convolution token by token, and the inputs it keeps."""
    x, weight, *bias = inputs.values()
    state = x.new_zeros(x.shape[0], *weight.shape)
    outputs = [function(x[:, t], state, weight, *bias) for t in range(x.shape[1])]
    return torch.stack(outputs, dim=1), state


@pytest.mark.parametrize("extra", [(), ("bias",)])
def test_steps_of_the_convolution(extra):
    inputs = convolution_inputs((2, 9, 24, 4), extra)
    output, state = steps(short_convolution_step, inputs)
    assert distance(output, short_convolution(**inputs)) < 1e-6
    assert torch.equal(state, inputs["x"][:, -4:].mT)


@pytest.mark.parametrize("shape", [(2, 6, 130, 4), (1, 4, 24, 3), (1, 2, 16, 6)])
@pytest.mark.parametrize("extra", [(), ("bias",)])
def test_the_kernel_of_a_step(shape, extra, interpreter):
    from statex.ops.triton_convolution import triton_short_convolution_step

    inputs = convolution_inputs(shape, extra)
    (output, state), wanted = steps(triton_short_convolution_step, inputs), steps(step_convolution, inputs)
    assert distance(output, wanted[0]) < 1e-6
    assert torch.equal(state, wanted[1])


@pytest.mark.parametrize("name", NORMS)
@pytest.mark.parametrize(("has_weight", "has_gate", "gate_first"), WAYS)
def test_the_kernels_of_the_norm(name, has_weight, has_gate, gate_first, interpreter):
    from statex.ops.triton_gated_norm import triton_gated_rms_norm

    inputs = norm_inputs(NORMS[name], has_weight, has_gate)
    options = {"eps": 1e-5, "group_size": NORMS[name][2], "gate_first": gate_first}
    wanted = output_and_gradients(plain_gated_rms_norm, inputs, torch.float64, **options)
    assert_close(output_and_gradients(triton_gated_rms_norm, inputs, **options), wanted, 1e-6)
    with torch.no_grad():
        assert distance(triton_gated_rms_norm(**inputs, **options), wanted["output"]) < 1e-6


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"x": torch.zeros(2, 3)}, r"^x has shape \(2, 3\), expected \[B, T, D\]"),
        ({"weight": torch.zeros(7, 4)}, r"^weight has shape \(7, 4\), expected \(6, 4\)"),
        ({"bias": torch.zeros(7)}, r"^bias has shape \(7,\), expected \(6,\)"),
        ({"left_context": torch.zeros(2, 1, 5)}, r"^left_context has shape .*expected \(2, 1, 6\)"),
        ({"seq_idx": torch.zeros(2, 2)}, r"^seq_idx has shape .*expected \(2, 3\)"),
    ],
)
def test_the_convolution_names_the_argument_of_a_wrong_shape(change, message):
    with pytest.raises(ValueError, match=message):
        short_convolution(**{"x": torch.zeros(2, 3, 6), "weight": torch.zeros(6, 4)} | change)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"weight": torch.zeros(2)}, r"^weight has shape \(2,\), expected \(6,\)"),
        ({"gate": torch.zeros(2, 1)}, r"^gate has shape \(2, 1\), expected \(2, 6\)"),
        ({"group_size": 4}, r"^group_size is 4, expected a divisor of the 6 channels"),
    ],
)
def test_the_norm_names_the_argument_of_a_wrong_shape(change, message):
    with pytest.raises(ValueError, match=message):
        gated_rms_norm(**{"x": torch.zeros(2, 6), "eps": 1e-5} | change)


def test_parameters_may_lie_apart_in_memory(interpreter):
    from statex.ops import triton_convolution
    from statex.ops.triton_gated_norm import triton_gated_rms_norm

    x, gate = torch.randn(2, 2, 6, 8)
    weight, bias = torch.randn(4, 8).T, torch.randn(8, 2)[:, 0]
    for kernels, reference, vectors, options in (
        (triton_convolution.triton_short_convolution, shifted_convolution, {"weight": weight, "bias": bias}, {}),
        (triton_gated_rms_norm, plain_gated_rms_norm, {"weight": bias, "gate": gate}, {"eps": 1e-5}),
    ):
        wanted = output_and_gradients(reference, {"x": x} | vectors, torch.float64, **options)
        assert_close(output_and_gradients(kernels, {"x": x} | vectors, **options), wanted, 1e-6)
    step, wanted = (
        function(x[:, 0], torch.zeros(2, 8, 4), weight, bias)
        for function in (triton_convolution.triton_short_convolution_step, step_convolution)
    )
    assert distance(step, wanted) < 1e-6
