"""What `statex bench ops` measures: each case and sweep is declared here, with the least time it can take.

Shape letters: B batch, T tokens, H heads, G groups, K key dim, V value dim (gla, gated_delta); P head dim, N state
size (ssd).
"""

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor
from torch.nn import functional as F

from statex import ops
from statex.ops.gated_delta import chunk_gated_delta, naive_gated_delta, step_gated_delta
from statex.ops.gla import chunk_gla, naive_gla, step_gla
from statex.ops.ssd import chunk_ssd, naive_ssd, step_ssd


@dataclass(frozen=True)
class Case:
    """A recurrence at one shape.

    Args:
        op: "gla", "ssd" or "gated_delta", or one of these with "_step".
        heads, key_dim, value_dim: the state is [heads, key_dim, value_dim]; for ssd these are H, N and P.
        tokens: T; 1 for a step.
    """

    name: str
    op: str
    heads: int
    key_dim: int
    value_dim: int
    tokens: int = 65536
    batch: int = 1

    @property
    def state_size(self) -> int:
        return self.heads * self.key_dim * self.value_dim

    @property
    def is_step(self) -> bool:
        return self.op.endswith("_step")

    def flops(self, backward: bool) -> float:
        """Of the products with the state alone: two forward, five more backward; of the delta rule three and six."""
        products = (9 if backward else 3) if self.op.startswith("gated_delta") else (7 if backward else 2)
        return 2 * self.state_size * self.tokens * self.batch * products

    def moved_bytes(self, backward: bool) -> float:
        """Least traffic: inputs read and outputs written once (twice that and more with the gradients), states in
        fp32 read and written for a step."""
        if self.is_step:
            return 8 * self.state_size * self.batch
        names = make_inputs(replace(self, tokens=1, batch=1), torch.bfloat16, "meta")
        per_token = sum(x.numel() * x.element_size() for x in names.values() if x.ndim > 2)
        per_token += 2 * self.heads * self.value_dim
        return per_token * self.tokens * self.batch * (3 if backward else 1)

    def reduced(self, tokens: int, factor: int = 1) -> "Case":
        """The same case with fewer tokens and dimensions smaller by `factor`."""
        heads = max(1, self.heads // factor) if self.op.startswith("ssd") else self.heads
        key_dim, value_dim = max(8, self.key_dim // factor), max(8, self.value_dim // factor)
        return replace(self, heads=heads, key_dim=key_dim, value_dim=value_dim, tokens=1 if self.is_step else tokens)


def _by_name(*cases: Case) -> dict[str, Case]:
    return {case.name: case for case in cases}


CASES = _by_name(
    Case("gla-1x1024x2048", "gla", 1, 1024, 2048),
    Case("gla-4x1024x512", "gla", 4, 1024, 512),
    Case("gla-4x256x512", "gla", 4, 256, 512),
    Case("gla-2x512x1024", "gla", 2, 512, 1024),
    Case("gla-16x128x128", "gla", 16, 128, 128),
    Case("ssd-64x64-n512", "ssd", 64, 512, 64),
    Case("ssd-64x64-n128", "ssd", 64, 128, 64),
    Case("delta-32x128x128", "gated_delta", 32, 128, 128),
    Case("delta-32x512x128", "gated_delta", 32, 512, 128),
    Case("gla-step-b32", "gla_step", 1, 1024, 2048, tokens=1, batch=32),
    Case("gla-step-b1", "gla_step", 1, 1024, 2048, tokens=1),
    Case("ssd-step-b32", "ssd_step", 64, 512, 64, tokens=1, batch=32),
    Case("ssd-step-b1", "ssd_step", 64, 512, 64, tokens=1),
)

# Our kernels are compiled for each K and each V, so there are few of them; tokens compile nothing. The largest comes
# first: most of the peers' tuners keep what was fastest at the first size they saw.
SWEEPS = {
    "state": _by_name(
        *(Case(f"gla-1x{K}x{V}", "gla", 1, K, V) for K, V in ((1024, 2048), (1024, 512), (256, 512), (256, 256))),
        *(Case(f"ssd-64x64-n{N}", "ssd", 64, N, 64) for N in (1024, 512, 128, 64)),
    ),
    "tokens": _by_name(
        *(Case(f"gla-1x1024x2048-{T}k", "gla", 1, 1024, 2048, tokens=1024 * T) for T in (256, 64, 16, 4, 1)),
        *(Case(f"ssd-64x64-n512-{T}k", "ssd", 64, 512, 64, tokens=1024 * T) for T in (256, 64, 16, 4, 1)),
    ),
}

ROTATED_BYTES = 256 << 20  # of states between two uses of the same one: 5 times an H200's L2
STEPS: dict[str, Callable[..., object]] = {
    "gla_step": step_gla, "ssd_step": step_ssd, "gated_delta_step": step_gated_delta,
}  # fmt: skip
DECAYS = {"weak": 0.001, "usual": 0.1, "middle": 1.0, "strong": 20.0}  # largest decay of a token, in nats


def make_inputs(case: Case, dtype: torch.dtype, device: torch.device | str, decay: float = 0.1) -> dict[str, Tensor]:
    """Fresh random inputs by argument name; log decays are uniform between 0 and -decay."""
    B, T, H, K, V = case.batch, case.tokens, case.heads, case.key_dim, case.value_dim

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, device=device, dtype=dtype)

    time = () if case.is_step else (T,)
    if case.op.startswith("gla"):
        inputs = {"q": normal(B, *time, H, K), "k": normal(B, *time, H, K), "v": normal(B, *time, H, V)}
        inputs["log_decay"] = -decay * torch.rand(B, *time, H, K, device=device)
        state = (B, H, K, V)
    elif case.op.startswith("gated_delta"):
        inputs = {name: F.normalize(normal(B, *time, H, K).float(), dim=-1).to(dtype) for name in ("q", "k")}
        inputs |= {"v": normal(B, *time, H, V), "log_decay": -decay * torch.rand(B, *time, H, device=device)}
        inputs["beta"] = torch.rand(B, *time, H, device=device)
        state = (B, H, K, V)
    else:
        inputs = {"x": normal(B, *time, H, V), "dt": torch.rand(B, *time, H, device=device)}
        inputs["A"] = -decay * torch.rand(H, device=device)
        inputs |= {"B": normal(B, *time, 1, K), "C": F.normalize(normal(B, *time, 1, K), dim=-1)}
        inputs["D"] = torch.randn(H, device=device)
        state = (B, H, V, K)
    if case.is_step:
        inputs["state"] = torch.randn(*state, device=device)
    return inputs


def rotating_inputs(case: Case, dtype: torch.dtype, device: torch.device | str) -> list[dict[str, Tensor]]:
    """Inputs of a step whose states together are far larger than a cache; at least 4 of them."""
    count = max(4, ROTATED_BYTES // (4 * case.state_size * case.batch))
    return [make_inputs(case, dtype, device) for _ in range(count)]


def ours(case: Case) -> Callable[..., object]:
    """The public recurrence: the kernels on CUDA, the chunked PyTorch version elsewhere."""
    return getattr(ops, case.op)


def exact(case: Case) -> Callable[..., object]:
    """The recurrence to compare with in fp64; itself tested against the one-token-at-a-time definition."""
    return (STEPS | {"gla": chunk_gla, "ssd": chunk_ssd, "gated_delta": chunk_gated_delta})[case.op]


def plain(case: Case) -> Callable[..., object]:
    """The definition in plain PyTorch: the only peer where no other library runs."""
    return (STEPS | {"gla": naive_gla, "ssd": naive_ssd, "gated_delta": naive_gated_delta})[case.op]
