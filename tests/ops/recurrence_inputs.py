"""Inputs, gradients and distances that the tests of the recurrences share."""

import torch
from torch.nn import functional as F

from layer_inputs import unpacked_once

DECAYS = ("none", "weak", "typical", "moderate", "strong", "channels", "tokens")


def log_decay(kind: str, shape: tuple[int, ...]) -> torch.Tensor:
    """fp64 log decays: from almost no forgetting (-1e-4) to almost nothing kept (-20), alone and mixed."""
    extremes = torch.tensor([-1e-4, -20.0], dtype=torch.float64)
    constants = {"none": 0.0, "weak": -1e-4, "moderate": -1.0, "strong": -20.0}
    if kind in constants:
        return torch.full(shape, constants[kind], dtype=torch.float64)
    if kind == "typical":
        return F.logsigmoid(2 * torch.randn(shape, dtype=torch.float64)) / 16
    if kind == "channels":  # each channel or head has one of the two
        return extremes[torch.arange(shape[-1]) % 2].expand(shape).clone()
    return extremes[(torch.rand(shape) < 0.3).long()]  # each token


def gla_inputs(num_tokens: int, decay: str = "typical", batch: int = 2, heads: int = 3, key_dim: int = 8, value_dim=5):
    """q, k, v, log_decay and an initial state, exact in fp32 but held in fp64."""
    torch.manual_seed(0)
    shape = (batch, num_tokens, heads)
    q, k, v = (torch.randn(*shape, d) for d in (key_dim, key_dim, value_dim))
    inputs = {"q": q, "k": k, "v": v, "log_decay": log_decay(decay, (*shape, key_dim))}
    inputs["initial_state"] = torch.randn(batch, heads, key_dim, value_dim)
    return {name: x.float().double() for name, x in inputs.items()}


def delta_inputs(num_tokens, decay="typical", batch=2, heads=3, key_dim=8, value_dim=5, *, channels=False, most=1.0):
    """q, k, v, log_decay (one a head, or one a channel), beta from 0 to `most`, and an initial state."""
    torch.manual_seed(0)
    shape = (batch, num_tokens, heads)
    q, k = (F.normalize(torch.randn(*shape, key_dim), dim=-1) for _ in range(2))
    inputs = {"q": q, "k": k, "v": torch.randn(*shape, value_dim)}
    inputs["log_decay"] = log_decay(decay, (*shape, key_dim) if channels else shape)
    inputs |= {"beta": most * torch.rand(shape), "initial_state": torch.randn(batch, heads, key_dim, value_dim)}
    return {name: x.float().double() for name, x in inputs.items()}


def kda_inputs(num_tokens, decay="typical", batch=2, heads=3, key_dim=8, value_dim=5):
    """Those of the gated delta rule with a decay for each channel, and half of its eigenvalues negative."""
    return delta_inputs(num_tokens, decay, batch, heads, key_dim, value_dim, channels=True, most=2.0)


def generalized_delta_inputs(num_tokens, decay="typical", batch=2, heads=3, key_dim=8, value_dim=5):
    """q, k, v, log_decay, RWKV-7's a = -kk and b = kk * rate, and an initial state."""
    inputs = gla_inputs(num_tokens, decay, batch, heads, key_dim, value_dim)
    kk = F.normalize(torch.randn(*inputs["k"].shape, dtype=torch.float64), dim=-1)
    state = inputs.pop("initial_state")
    inputs |= {"a": -kk, "b": kk * torch.rand(kk.shape, dtype=torch.float64), "initial_state": state}
    return {name: x.float().double() for name, x in inputs.items()}


def ssd_inputs(num_tokens, decay="typical", batch=2, heads=4, groups=2, head_dim=6, state_size=8):
    """x, dt, A, B, C, D and an initial state, exact in fp32 but held in fp64."""
    torch.manual_seed(0)
    shape = (batch, num_tokens)
    dt = -log_decay(decay, (*shape, heads))  # times A, which is about -1
    inputs = {"x": torch.randn(*shape, heads, head_dim), "dt": dt, "A": -1 - 0.1 * torch.rand(heads)}
    inputs |= {name: torch.randn(*shape, groups, state_size) for name in ("B", "C")}
    inputs |= {"D": torch.randn(heads), "initial_state": torch.randn(batch, heads, head_dim, state_size)}
    return {name: x.float().double() for name, x in inputs.items()}


def selective_scan_inputs(num_tokens, decay="typical", batch=2, channels=6, state_size=8):
    """x, dt, A, B, C, D and an initial state, exact in fp32 but held in fp64."""
    torch.manual_seed(0)
    shape = (batch, num_tokens)
    dt = -log_decay(decay, (*shape, channels))  # times A, which is about -1
    inputs = {"x": torch.randn(*shape, channels), "dt": dt, "A": -1 - 0.1 * torch.rand(channels, state_size)}
    inputs |= {name: torch.randn(*shape, state_size) for name in ("B", "C")}
    inputs |= {"D": torch.randn(channels), "initial_state": torch.randn(batch, channels, state_size)}
    return {name: x.float().double() for name, x in inputs.items()}


def output_state_gradients(recurrence, inputs: dict, dtype: torch.dtype, **options) -> dict[str, torch.Tensor]:
    """Output, final state, and the gradient of a random projection of both in every input."""
    leaves = {name: x.to(dtype).requires_grad_() for name, x in inputs.items()}
    with unpacked_once():
        output, state = recurrence(**leaves, output_final_state=True, **options)
    weights = torch.Generator().manual_seed(1)
    projections = [torch.randn(x.shape, generator=weights, dtype=torch.float64) for x in (output, state)]
    loss = (output.double() * projections[0]).sum() + (state.double() * projections[1]).sum()
    gradients = torch.autograd.grad(loss, list(leaves.values()))
    results = {"output": output, "final_state": state} | dict(zip(leaves, gradients, strict=True))
    return {name: x.detach() for name, x in results.items()}


def distance(a: torch.Tensor, b: torch.Tensor) -> float:
    """||a - b|| / ||b||."""
    return ((a.double() - b.double()).norm() / b.double().norm().clamp_min(1e-300)).item()


def assert_close(got: dict, wanted: dict, bound: float) -> None:
    distances = {name: distance(got[name], wanted[name]) for name in wanted}
    wrong = {name: value for name, value in distances.items() if not value < bound}
    assert not wrong, f"above {bound}: {wrong}"
