"""How far bf16 rounding alone takes the gradient of ssd's A: our kernels' roundings, everything else in fp64; no GPU.

The gradient of A is one sum a head, over all pairs of a reader and an earlier source, of the pair's part in the loss
times the time between the two. Rounded are, as in ops/ssd, for pairs of different chunks: x and the gradient of the
output decayed within their blocks, states and their gradients. Pairs of one chunk are exact.

Example: python benchmarks/rounding_of_A.py --draws 60
"""

import argparse
import statistics

import torch
from torch import Tensor
from torch.nn import functional as F

from statex.benchmarking.cases import DECAYS

BLOCK = 64


def rounded(x: Tensor) -> Tensor:
    return x.bfloat16().double()


def errors(seed: int, decay: float, T: int, H: int, P: int, N: int, chunk: int) -> tuple[float, float]:
    """Norm over heads of the error, over that of the gradient, and over that of the sum of its absolute terms.

    Inputs as in `statex bench ops`; T at most two chunks.
    """
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator)

    x, dt = rounded(normal(T, H, P)), torch.rand(T, H, generator=generator).double()
    A = -decay * torch.rand(H, generator=generator).double()
    B, C = rounded(normal(T, N)), rounded(F.normalize(normal(T, N), dim=-1))
    d_out = rounded(normal(T, H, P))
    token = torch.arange(T)
    block, earlier = token // BLOCK, token[:, None] > token[None, :]
    scores = C @ B.T
    gradient, error, size = torch.zeros(3, H, dtype=torch.float64)
    for h in range(H):
        sums, time, x_h, d_h = (dt[:, h] * A[h]).cumsum(0), dt[:, h].cumsum(0), x[:, h], d_out[:, h]
        apart = time[:, None] - time[None, :]
        pairs = scores * torch.exp((sums[:, None] - sums[None, :]).clamp(max=0)) * dt[:, h] * (d_h @ x_h.T)
        pairs = pairs.where(earlier, 0.0)
        gradient[h] = (pairs * apart).sum()
        begun, ended = pairs.sum(0), pairs.sum(1)
        around = (begun.cumsum(0) - begun) - (ended.cumsum(0) - ended)  # the gradient of each token's log decay
        size[h] = (dt[:, h] * around).abs().sum()
        starts = F.pad(sums, (1, 0))[block * BLOCK]
        ends = sums[((block + 1) * BLOCK).clamp(max=T) - 1]
        d_scaled = d_h * torch.exp(sums - starts)[:, None]
        x_scaled = x_h * (dt[:, h] * torch.exp(ends - sums))[:, None]
        if chunk < T:
            border = sums[chunk - 1]
            to_border, from_border = torch.exp(border - ends[:chunk])[:, None], torch.exp(starts[chunk:] - border)
            state = (x_scaled[:chunk] * to_border).T @ B[:chunk]
            d_state = (d_scaled[chunk:] * from_border[:, None]).T @ C[chunk:]
            kept = rounded((rounded(x_scaled)[:chunk] * to_border).T @ B[:chunk]) - state
            d_kept = rounded((rounded(d_scaled)[chunk:] * from_border[:, None]).T @ C[chunk:])
            read = ((d_h[chunk:] @ kept) * C[chunk:]).sum(1) * torch.exp(sums[chunk:] - border)
            written = rounded(x_scaled)[:chunk] @ d_kept - x_scaled[:chunk] @ d_state
            written = (written * B[:chunk]).sum(1) * to_border[:, 0]
            error[h] = (read * (time[chunk:] - time[chunk - 1])).sum()
            error[h] += (written * (time[chunk - 1] - time[:chunk])).sum()
    return (error.norm() / gradient.norm()).item(), (error.norm() / size.norm()).item()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--draws", type=int, default=60)
    parser.add_argument("--seed", type=int, default=1000, help="of the first draw")
    for name, value in (("tokens", 333), ("heads", 6), ("head-dim", 40), ("state-size", 128), ("chunk", 256)):
        parser.add_argument(f"--{name}", type=int, default=value)
    given = parser.parse_args()
    shape = (given.tokens, given.heads, given.head_dim, given.state_size, given.chunk)
    if given.tokens > 2 * given.chunk:
        parser.error(f"--tokens {given.tokens} are more than two chunks of {given.chunk}")
    print(f"T, H, P, N, chunk {shape}; seeds {given.seed} to {given.seed + given.draws - 1}; % of the gradient (terms)")
    for name, decay in DECAYS.items():
        draws = [errors(given.seed + i, decay, *shape) for i in range(given.draws)]
        of_sum, of_terms = ([100 * each for each in column] for column in zip(*draws, strict=True))
        print(
            f"{name:7} median {statistics.median(of_sum):.2f} ({statistics.median(of_terms):.3f}), largest "
            f"{max(of_sum):.2f} ({max(of_terms):.3f}), above 3 %: {sum(each > 3 for each in of_sum)}"
        )


if __name__ == "__main__":
    main()
