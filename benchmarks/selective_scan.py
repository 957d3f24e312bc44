"""The selective scan in chunks against the loop that transformers has for it: seconds on one thread of a CPU.

    python benchmarks/selective_scan.py --tokens 2048 --channels 512 --state 16 64

Both get the same fp32 inputs, with the decays that a new Mamba has. The best of the repetitions is printed. The
backward pass of the loop takes time that grows with the square of the tokens: of each it makes a gradient of all.
"""

import argparse
import time
from collections.abc import Callable

import torch
from torch import Tensor
from transformers.models.mamba.modeling_mamba import mamba_selective_scan

from statex.ops import selective_scan
from statex.utils.environment import source_commit, versions


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, default=2048)
    parser.add_argument("--channels", type=int, default=512)
    parser.add_argument("--state", type=int, nargs="+", default=[16, 64])
    parser.add_argument("--repetitions", type=int, default=3)
    parser.add_argument("--peer-repetitions", type=int, default=1, help="of the loop; 0: statex alone")
    options = parser.parse_args()
    torch.set_num_threads(1)
    print(f"commit {source_commit()}; {versions()}")
    print("tokens  channels  state  whose         forward s  forward and backward s")
    for state_size in options.state:
        inputs = make_inputs(options.tokens, options.channels, state_size)
        for name, scan, repetitions in (
            ("statex", ours, options.repetitions),
            ("transformers", theirs, options.peer_repetitions),
        ):
            if repetitions:
                forward, both = best_times(scan, inputs, repetitions)
                sizes = f"{options.tokens:>6}  {options.channels:>8}  {state_size:>5}"
                print(f"{sizes}  {name:<12}  {forward:9.3f}  {both:22.3f}", flush=True)


def make_inputs(num_tokens: int, num_channels: int, state_size: int) -> list[Tensor]:
    """x, dt, A, B, C and D of one sequence."""
    torch.manual_seed(0)
    x, B, C = (torch.randn(1, num_tokens, size) for size in (num_channels, state_size, state_size))
    dt = 0.001 * 100 ** torch.rand(1, num_tokens, num_channels)
    A = -torch.arange(1.0, state_size + 1).expand(num_channels, -1).contiguous()
    return [each.requires_grad_() for each in (x, dt, A, B, C, torch.ones(num_channels))]


def ours(x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor) -> Tensor:
    return selective_scan(x, dt, A, B, C, D=D)[0]


def theirs(x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor) -> Tensor:
    return mamba_selective_scan(x.mT, dt.mT, A, B.mT, C.mT, D=D).mT


def best_times(scan: Callable[..., Tensor], inputs: list[Tensor], repetitions: int) -> tuple[float, float]:
    """Seconds of a forward pass alone, and of one with its backward pass."""
    times: tuple[list[float], list[float]] = [], []
    for _ in range(repetitions):
        start = time.perf_counter()
        with torch.no_grad():
            scan(*inputs)
        times[0].append(time.perf_counter() - start)
        start = time.perf_counter()
        torch.autograd.grad(scan(*inputs).square().sum(), inputs)
        times[1].append(time.perf_counter() - start)
    return min(times[0]), min(times[1])


if __name__ == "__main__":
    main()
