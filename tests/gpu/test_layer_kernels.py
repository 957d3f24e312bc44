"""The kernels of the short convolution and the gated norm against PyTorch in fp64, on fresh random inputs."""

import secrets

import pytest
import torch

from layer_inputs import CONVOLUTIONS, NORMS, convolution_inputs, norm_inputs, output_and_gradients

pytest.importorskip("triton")

from statex import ops
from statex.ops import backends
from statex.ops.convolution import shifted_convolution, step_convolution
from statex.ops.gated_norm import plain_gated_rms_norm

pytestmark = pytest.mark.gpu

DTYPES = (torch.bfloat16, torch.float32)
TOLERANCE = {torch.bfloat16: 6e-3, torch.float32: 1e-5}
LARGE_CONVOLUTIONS = {"mamba2-1.3b": (1, 4099, 4352, 4), "gla-1.3b": (2, 1001, 4096, 4)}
LARGE_NORMS = {"mamba2-1.3b": (4099, 4096, 4096), "gla-1.3b": (8200, 512, 512), "stateX-gla-1.3b": (2050, 2048, 2048)}
EXTRAS = [(), ("bias",), ("bias", "context"), ("short-context",), ("bias", "documents")]
CONVOLUTION_CASES = [
    (shape, extra)
    for shape in (CONVOLUTIONS | LARGE_CONVOLUTIONS).values()
    for extra in (EXTRAS if shape == CONVOLUTIONS["usual"] else EXTRAS[2::2])
]
NORM_CASES = [
    (shape, has_gate, gate_first)
    for shape in (NORMS | LARGE_NORMS).values()
    for has_gate, gate_first in ((True, True), (True, False), (False, False))
    if has_gate or shape in (NORMS["groups"], LARGE_NORMS["stateX-gla-1.3b"])
]


@pytest.fixture(autouse=True)
def fresh_seed(record_property):
    seed = secrets.randbits(31)
    record_property("seed", seed)
    print(f"seed {seed}")
    torch.manual_seed(seed)


def assert_same(function, reference, inputs, **options):
    """Output and all gradients agree with fp64; and without gradients the output is the same."""
    dtype = inputs["x"].dtype
    wanted = output_and_gradients(reference, inputs, torch.float64, **options)
    found = output_and_gradients(function, inputs, **options)
    for name, expected in wanted.items():
        error = ((found[name].double() - expected).norm() / expected.norm().clamp_min(1e-30)).item()
        assert error < TOLERANCE[dtype], f"{name}: relative error {error:.1e}"
    with torch.no_grad():
        error = ((function(**inputs, **options).double() - wanted["output"]).norm() / wanted["output"].norm()).item()
    assert error < TOLERANCE[dtype]


def test_they_are_taken():
    x = torch.zeros(1, device="cuda")
    assert backends.choose("short_convolution", "auto", x) is not shifted_convolution
    assert backends.choose("short_convolution_step", "auto", x) is not step_convolution
    assert backends.choose("gated_rms_norm", "auto", x) is not plain_gated_rms_norm


@pytest.mark.parametrize(("shape", "extra"), CONVOLUTION_CASES, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_convolution(shape, extra, dtype):
    assert_same(ops.short_convolution, shifted_convolution, convolution_inputs(shape, extra, dtype, "cuda"))


@pytest.mark.parametrize("shape", [(1, 12, 4352, 4), (32, 12, 4352, 4), (2, 6, 130, 3), (1, 6, 24, 6)], ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_convolution_step(shape, dtype):
    B, T, D, W = shape
    inputs = convolution_inputs(shape, ("bias",), dtype, "cuda")
    wanted = ops.short_convolution(**{name: x.double() for name, x in inputs.items()})
    state = torch.zeros(B, D, W, dtype=dtype, device="cuda")
    x, weight, bias = inputs.values()
    found = torch.stack([ops.short_convolution_step(x[:, t], state, weight, bias) for t in range(T)], dim=1)
    assert ((found.double() - wanted).norm() / wanted.norm()).item() < TOLERANCE[dtype]
    assert torch.equal(state, x[:, -W:].mT)


def test_convolution_of_channels_first():
    """As transformers' Mamba2 continues from a cache: [B, D, T] in memory."""
    inputs = convolution_inputs((2, 37, 72, 4), ("bias",), torch.bfloat16, "cuda")
    assert_same(ops.short_convolution, shifted_convolution, inputs | {"x": inputs["x"].mT.contiguous().mT})


@pytest.mark.parametrize(("shape", "has_gate", "gate_first"), NORM_CASES, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_norm(shape, has_gate, gate_first, dtype):
    inputs = norm_inputs(shape, True, has_gate, dtype, "cuda")
    options = {"eps": 1e-5, "group_size": shape[2], "gate_first": gate_first}
    assert_same(ops.gated_rms_norm, plain_gated_rms_norm, inputs, **options)


def test_norm_without_a_weight():
    inputs = norm_inputs(LARGE_NORMS["gla-1.3b"], False, True, torch.bfloat16, "cuda")
    assert_same(ops.gated_rms_norm, plain_gated_rms_norm, inputs, eps=1e-5)
