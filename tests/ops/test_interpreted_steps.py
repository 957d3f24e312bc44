"""The kernels of the recurrences' steps, interpreted on a CPU, against PyTorch in fp64."""

import pytest
import torch
from recurrence_inputs import distance

from statex.ops.gated_delta import step_gated_delta
from statex.ops.gla import step_gla
from statex.ops.ssd import step_ssd


@pytest.fixture(autouse=True)
def interpreter():
    if torch.cuda.is_available():
        pytest.skip("the kernels are compiled where there is a GPU: tests/gpu has the same cases")
    pytest.importorskip("triton")
    torch.manual_seed(0)


def assert_same(kernel, reference, inputs, state):
    """Output and state of three tokens; the inputs are views of a wider tensor."""
    states = state.double(), state.clone()
    for _ in range(3):
        wanted = reference(**{name: x.double() for name, x in inputs.items()}, state=states[0])
        assert distance(kernel(**inputs, state=states[1]), wanted) < 1e-6
    assert distance(states[1], states[0]) < 1e-6


@pytest.mark.parametrize("shape", [(2, 2, 100, 72), (1, 1, 256, 16), (3, 2, 133, 40)], ids=str)
def test_gla(shape, monkeypatch):
    from statex.ops.gla import triton_step
    from statex.ops.gla.triton_step import triton_gla_step

    B, H, K, V = shape
    if B == 3:  # the tiles of many programs: two of keys, the last not whole
        monkeypatch.setattr(triton_step, "FEW_PROGRAMS", 16)
    inputs = {"q": torch.randn(B, H, K), "k": torch.randn(B, H, K), "v": torch.randn(B, H, V)}
    assert_same(triton_gla_step, step_gla, inputs | {"log_decay": -torch.rand(B, H, K)}, torch.randn(B, H, K, V))


@pytest.mark.parametrize("shape", [(2, 4, 2, 40, 72), (1, 2, 1, 16, 512), (1, 2, 1, 5, 1030)], ids=str)
@pytest.mark.parametrize("options", [(), ("D",), ("D", "dt_bias")], ids=str)
def test_ssd(shape, options):
    from statex.ops.ssd.triton_step import triton_ssd_step

    B, H, G, P, N = shape
    x, keys, reads, dt = torch.randn(B, H * P + 2 * G * N + H + 8)[:, 8:].split([H * P, G * N, G * N, H], dim=1)
    inputs = {"x": x.unflatten(1, (H, P)), "B": keys.unflatten(1, (G, N)), "C": reads.unflatten(1, (G, N))}
    inputs |= {"dt": 8 * dt - 4 if "dt_bias" in options else dt.abs(), "A": -torch.rand(H)}
    inputs |= {name: torch.randn(H) for name in options}
    assert_same(triton_ssd_step, step_ssd, inputs, torch.randn(B, H, P, N))


@pytest.mark.parametrize("shape", [(2, 2, 100, 72), (1, 1, 1024, 16), (3, 2, 33, 5)], ids=str)
@pytest.mark.parametrize("kind", ["head", "channel"])
def test_gated_delta(shape, kind):
    from statex.ops.gated_delta.triton_step import triton_gated_delta_step

    B, H, K, V = shape
    q, k, v = torch.randn(B, H, 2 * K + V + 8)[..., 8:].split([K, K, V], dim=-1)
    inputs = {"q": q, "k": torch.nn.functional.normalize(k, dim=-1), "v": v, "beta": 2 * torch.rand(B, H)}
    inputs["log_decay"] = -torch.rand(B, H, K) if kind == "channel" else -torch.rand(B, H)
    assert_same(triton_gated_delta_step, step_gated_delta, inputs, torch.randn(B, H, K, V))


def test_gated_delta_on_a_state_that_lies_apart_and_is_rounded():
    from statex.ops.gated_delta.triton_step import triton_gated_delta_step

    tokens = [torch.randn(2, 3, d) for d in (8, 8, 5)] + [-torch.rand(2, 3), torch.rand(2, 3)]
    state = torch.randn(2, 3, 5, 8).half().mT
    wanted = state.float()
    step_gated_delta(*tokens, wanted)
    triton_gated_delta_step(*tokens, state)
    assert distance(state, wanted) < 1e-3
