"""The short convolution and the gated norm at the shapes of 1.3B and 45M models, PyTorch against the kernels.

16K tokens forward and backward against PyTorch; and as replays of a CUDA graph the kernels' forward and backward passes
of a training step's tokens, and one token. Shares are those of reading inputs and writing outputs once at the speed of
a copy. The results are compared with fp64 before they are timed.

Example: python benchmarks/layer_ops.py --out out
"""

import argparse
import functools
import json
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from statex import ops
from statex.benchmarking.ops import BYTES_PER_SECOND
from statex.utils import environment, timing

TOKENS, CHECKED_TOKENS, STEP_TOKENS = 16384, 1000, 65536
TOLERANCE = 1e-2  # relative, bf16 against fp64
BATCHES = (1, 32)  # of the single token
EPS = 1e-5


@dataclass(frozen=True)
class Case:
    """One op of one model's layer.

    Args:
        op: "convolution" or "norm".
        heads: that a norm treats alike; its rows are tokens times heads.
        channels: of one of them.
        width: of the projection that x (the convolution's) or the gate (the norm's) is a view of.
        rows: that the tokens of a training step are in.
        moved: tensors of the op's size that must be moved: forward, backward.
    """

    name: str
    op: str
    channels: int
    width: int
    heads: int = 1
    gate_first: bool = False
    rows: int = 1
    moved: tuple[int, int] = (2, 3)

    def inputs(self, tokens: int, rows: int = 1) -> dict[str, Tensor]:
        def normal(*shape: int) -> Tensor:
            return torch.randn(*shape, device="cuda", dtype=torch.bfloat16)

        if self.op == "convolution":
            x = normal(rows, tokens // rows, self.width)[..., -self.channels :]
            return {"x": x, "weight": normal(self.channels, 4), "bias": normal(self.channels)}
        gate = normal(tokens, self.width)[:, : self.heads * self.channels].view(tokens, self.heads, self.channels)
        return {"x": normal(tokens, self.heads, self.channels), "weight": normal(self.channels), "gate": gate}

    def run(self, backend: str, inputs: dict[str, Tensor]) -> Tensor:
        if self.op == "convolution":
            return ops.short_convolution(**inputs, backend=backend)
        return ops.gated_rms_norm(**inputs, eps=EPS, gate_first=self.gate_first, backend=backend)


CASES = (
    Case("mamba2 convolution, N 128", "convolution", 4352, 8512),
    Case("mamba2 convolution, N 512", "convolution", 5120, 9280),
    Case("mamba2 45M convolution", "convolution", 1152, 2192, rows=32),
    Case("gla convolution", "convolution", 4096, 4096),
    Case("mamba2 gated norm", "norm", 4096, 8512, gate_first=True, moved=(3, 5)),
    Case("mamba2 45M gated norm", "norm", 1024, 2192, gate_first=True, moved=(3, 5)),
    Case("gla gated norm, 1 head", "norm", 2048, 2048, moved=(3, 5)),
    Case("gla gated norm, 4 heads", "norm", 512, 2048, heads=4, moved=(3, 5)),
    Case("gla 45M gated norm", "norm", 128, 512, heads=4, moved=(3, 5)),
)


def results(case: Case, backend: str, inputs: dict[str, Tensor], dtype: torch.dtype | None = None) -> list[Tensor]:
    """Output and gradients."""
    leaves = {name: x.detach().to(dtype or x.dtype).requires_grad_() for name, x in inputs.items()}
    output = case.run(backend, leaves)
    generator = torch.Generator("cuda").manual_seed(0)
    gradient = torch.randn(output.shape, generator=generator, device="cuda", dtype=torch.bfloat16)
    output.backward(gradient.to(output.dtype))
    return [output.detach(), *(x.grad for x in leaves.values() if x.grad is not None)]


def worst_error(case: Case, backend: str) -> float:
    inputs = case.inputs(CHECKED_TOKENS)
    pairs = zip(results(case, backend, inputs), results(case, "torch", inputs, torch.float64), strict=True)
    return max(((found.double() - wanted).norm() / wanted.norm()).item() for found, wanted in pairs)


def with_backward(case: Case, backend: str, inputs: dict[str, Tensor]) -> Callable[[], object]:
    leaves = {name: x.detach().requires_grad_() for name, x in inputs.items()}
    gradient = torch.randn_like(case.run("torch", inputs))

    def run() -> None:
        case.run(backend, leaves).backward(gradient)
        for x in leaves.values():
            x.grad = None

    return run


def long_pass(case: Case) -> list[dict[str, Any]]:
    """Milliseconds of 16K tokens, PyTorch and ours alternating."""
    inputs, records = case.inputs(TOKENS), []
    units = 2 * TOKENS * case.heads * case.channels
    for backward in (False, True):
        if backward:
            runs = [with_backward(case, backend, inputs) for backend in ("torch", "triton")]
        else:
            runs = [functools.partial(case.run, backend, inputs) for backend in ("torch", "triton")]
        with torch.set_grad_enabled(backward):
            seconds = timing.time_functions(runs, "cuda", repetitions=10)
        floor = units * sum(case.moved[: 1 + backward]) / BYTES_PER_SECOND["H200"]
        records.append({"pass": "fwd+bwd" if backward else "fwd", "torch_ms": 1e3 * seconds[0], "ms": 1e3 * seconds[1]})
        records[-1] |= {"floor_ms": 1e3 * floor, "floor_share": floor / seconds[1]}
    return records


@torch.no_grad()
def step_passes(case: Case) -> list[dict[str, Any]]:
    """Milliseconds of the kernels on the tokens of a training step, weights in fp32, without launching."""
    inputs, operators = case.inputs(STEP_TOKENS, case.rows), torch.ops.statex
    x, weight, last = (inputs[name] for name in ("x", "weight", "bias" if case.op == "convolution" else "gate"))
    weight, gradient = weight.float(), torch.randn_like(x)
    runs: list[Callable[[], object]]
    if case.op == "convolution":
        saved = x, weight, last.float(), None
        runs = [
            functools.partial(operators.short_convolution.default, *saved),
            functools.partial(operators.short_convolution_backward.default, gradient, *saved, True),
        ]
    else:
        options = x.shape[-1], case.gate_first
        _, scales = operators.gated_rms_norm.default(x, weight, last, EPS, *options)
        runs = [
            functools.partial(operators.gated_rms_norm.default, x, weight, last, EPS, *options),
            functools.partial(operators.gated_rms_norm_backward.default, gradient, x, weight, last, scales, *options),
        ]
    records = []
    seconds = timing.time_replays([[run] * 5 for run in runs])  # of data that no cache holds
    for name, taken, tensors in zip(("step, fwd", "step, bwd"), seconds, case.moved, strict=True):
        moved = 2 * STEP_TOKENS * case.heads * case.channels * tensors
        floor = moved / BYTES_PER_SECOND["H200"]
        records.append({"pass": name, "torch_ms": None, "ms": 1e3 * taken, "gb_per_s": moved / taken / 1e9})
        records[-1] |= {"floor_ms": 1e3 * floor, "floor_share": floor / taken}
    return records


@torch.no_grad()
def one_token(case: Case, batch: int) -> dict[str, Any]:
    """Milliseconds of one token in each of `batch` rows, without launching."""

    def step(backend: str) -> Callable[[], object]:
        inputs = case.inputs(batch)
        if case.op == "norm":
            return functools.partial(case.run, backend, inputs)
        state = torch.zeros(batch, case.channels, 4, device="cuda", dtype=torch.bfloat16)
        inputs["x"] = inputs["x"][0]
        return functools.partial(ops.short_convolution_step, **inputs, state=state, backend=backend)

    seconds = timing.time_replays([[step(backend)] * 20 for backend in ("torch", "triton")])
    return {"pass": f"token, batch {batch}", "torch_ms": 1e3 * seconds[0], "ms": 1e3 * seconds[1], "floor_share": None}


def line(record: dict[str, Any]) -> str:
    share = f", {record['floor_share']:4.0%} of the floor" if record["floor_share"] is not None else ""
    if record["torch_ms"] is not None:
        beside = f"torch {record['torch_ms']:8.4f} ms, ratio {record['torch_ms'] / record['ms']:5.2f}"
    else:
        beside = f"{record['gb_per_s']:6.0f} GB/s, floor {record['floor_ms']:.3f} ms"
    start = f"{record['case']:26} {record['pass']:15} ours {record['ms']:8.4f} ms"
    return f"{start}, {beside}{share}, error {record['error']:.1e}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("."))
    arguments = parser.parse_args()
    begun, records = time.perf_counter(), []
    about = {
        "device": environment.device_name("cuda"),
        "commit": environment.source_commit(),
        "versions": environment.versions(),
    }
    for case in CASES:
        torch.manual_seed(0)
        try:
            error = worst_error(case, "triton")
            if not error < TOLERANCE:
                print(f"{case.name}: WRONG, error {error:.1e}", flush=True)
                continue
            found = [*step_passes(case), *long_pass(case), *(one_token(case, batch) for batch in BATCHES)]
        except Exception as problem:  # the others are still worth their time
            print(f"{case.name}: {type(problem).__name__}: {problem}"[:1000], flush=True)
            continue
        for record in found:
            records.append({"case": case.name} | record | {"error": error} | about)
            print(line(records[-1]), flush=True)
    arguments.out.mkdir(parents=True, exist_ok=True)
    (arguments.out / "layer_ops.json").write_text(json.dumps(records, indent=1) + "\n")
    print(f"{time.perf_counter() - begun:.0f} s")


if __name__ == "__main__":
    main()
