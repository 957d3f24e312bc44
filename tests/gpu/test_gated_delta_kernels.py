"""The gated delta rule on the GPU against the fp64 recurrence: output, states and every gradient, on fresh inputs."""

import secrets

import pytest
import torch
from torch.nn import functional as F

pytest.importorskip("triton")

from statex import ops
from statex.ops.gated_delta import chunk_gated_delta, naive_gated_delta, step_gated_delta

pytestmark = pytest.mark.gpu

TOLERANCE = {torch.bfloat16: 1e-2, torch.float32: 1e-4}
STRONG, WEAK = 20.0, 0.001
KINDS = ("head", "channel")


@pytest.fixture(autouse=True)
def fresh_seed(record_property):
    seed = secrets.randbits(31)
    record_property("seed", seed)
    print(f"seed {seed}")
    torch.manual_seed(seed)


def normal(*shape, dtype=torch.float32):
    return torch.randn(*shape, device="cuda", dtype=dtype)


def inputs_of(kind, shape, dtype, decay, segments=None, most=1.0):
    B, T, H, K, V = shape
    inputs = {name: F.normalize(normal(B, T, H, K), dim=-1).to(dtype) for name in ("q", "k")}
    decays = (B, T, H, K) if kind == "channel" else (B, T, H)
    inputs |= {"v": normal(B, T, H, V, dtype=dtype), "log_decay": -decay * torch.rand(decays, device="cuda")}
    inputs["beta"] = (most * torch.rand(B, T, H, device="cuda")).to(dtype)
    return inputs | {"initial_state": normal(segments or B, H, K, V)}


def assert_same(reference, inputs, cu_seqlens=None):
    """Output, final state and all gradients agree with fp64; the final state has a gradient too."""
    dtype, results, gradients = inputs["v"].dtype, [], None
    for run, cast in ((reference, torch.float64), (ops.gated_delta, None)):
        given = {name: x.detach().to(cast or x.dtype).clone().requires_grad_() for name, x in inputs.items()}
        output, state = run(**given, output_final_state=True, cu_seqlens=cu_seqlens)
        gradients = gradients or (normal(*output.shape, dtype=dtype), normal(*state.shape))
        torch.autograd.backward((output, state), [g.to(x.dtype) for g, x in zip(gradients, (output, state))])
        results.append({"output": output, "state": state} | {f"d {name}": x.grad for name, x in given.items()})
    for name, expected in results[0].items():
        error = ((results[1][name].double() - expected).norm() / expected.norm().clamp_min(1e-30)).item()
        assert error < TOLERANCE[dtype], f"{name}: relative error {error:.1e}"


SHAPES = [  # B, T, H, K, V
    (1, 1000, 4, 128, 128),
    (1, 513, 2, 512, 128),
    (1, 300, 1, 1024, 256),
    (2, 300, 6, 256, 64),
    (1, 320, 2, 512, 128),
    (1, 300, 2, 384, 96),
    (1, 300, 2, 256, 160),
    (1, 333, 3, 100, 72),
    (3, 1, 2, 64, 64),
    (1, 20, 2, 128, 128),
]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("decay", [WEAK, 1.0, STRONG])
def test_bf16(kind, shape, decay):
    assert_same(chunk_gated_delta, inputs_of(kind, shape, torch.bfloat16, decay))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("shape", SHAPES[:3], ids=str)
@pytest.mark.parametrize("decay", [WEAK, 1.0])
def test_fp32(kind, shape, decay):
    assert_same(chunk_gated_delta, inputs_of(kind, shape, torch.float32, decay, most=2.0))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("borders", [[0, 100, 100, 101, 357, 700], [0, 0, 256, 256, 768]], ids=str)
def test_segments(kind, dtype, borders):
    inputs = inputs_of(kind, (1, borders[-1], 2, 256, 128), dtype, 1.0, segments=len(borders) - 1)
    assert_same(chunk_gated_delta, inputs, torch.tensor(borders, device="cuda"))


@pytest.mark.parametrize("kind", KINDS)
def test_definition(kind):
    assert_same(naive_gated_delta, inputs_of(kind, (1, 150, 4, 64, 48), torch.float32, 1.0))


@pytest.mark.parametrize("kind", KINDS)
def test_one_forward_backward_compiles(kind):
    inputs = inputs_of(kind, (1, 200, 4, 128, 64), torch.bfloat16, 1.0)
    inputs = {name: x.requires_grad_() for name, x in inputs.items()}
    wanted, _ = ops.gated_delta(**inputs)
    found, _ = torch.compile(ops.gated_delta, fullgraph=True)(**inputs)
    assert torch.equal(found, wanted)
    gradient = torch.randn_like(wanted)
    expected = torch.autograd.grad(wanted, list(inputs.values()), gradient)
    for one, other in zip(torch.autograd.grad(found, list(inputs.values()), gradient), expected, strict=True):
        torch.testing.assert_close(one, other)


@pytest.mark.parametrize(("kind", "most"), [("head", 5.5), ("channel", 3.0)])
def test_what_is_kept_for_the_backward_pass(kind, most):
    """Of a decay a channel the output, as copies of groups of heads at most; of one a head also two squares of a chunk,
    what is written and the states: 1 + 1 + 1 + 2 times as much as the output."""
    inputs = inputs_of(kind, (1, 16384, 16, 128, 128), torch.bfloat16, 0.1)
    given = {name: x.requires_grad_() for name, x in inputs.items()}
    before = torch.cuda.memory_allocated()
    output, _ = ops.gated_delta(**given)
    kept = torch.cuda.memory_allocated() - before
    assert kept < most * output.numel() * output.element_size()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_steps(kind, dtype):
    *tokens, state = inputs_of(kind, (32, 1, 4, 512, 128), dtype, 1.0).values()
    tokens = [x[:, 0] for x in tokens]
    expected = state.double()
    output = step_gated_delta(*(x.double() for x in tokens), expected)
    found = ops.gated_delta_step(*tokens, state)
    assert ((state.double() - expected).norm() / expected.norm()).item() < 1e-5
    assert ((found.double() - output).norm() / output.norm()).item() < TOLERANCE[dtype]
